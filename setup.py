"""Builds the operator library, the host module and the wheel. Project metadata: pyproject.toml."""

from __future__ import annotations

import importlib.util
import pathlib
import shutil

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

ROOT = pathlib.Path(__file__).resolve().parent
OPS_LIBRARY = "libattnengine_ops"
FLAGS = [
    "-std=c++20",
    "-O2",
    "-g0",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    # Texts of checks name the file they are in: as in the repository, not as on this machine.
    f"-ffile-prefix-map={ROOT}/=",
    *(f"-ffile-prefix-map={folder}/=" for folder in include_paths()),
]
# The stable ABI of torch 2.11: one binary for every later torch, CPU or CUDA.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"


class BuildLibraries(BuildExtension):
    """Names the operator library without Python's ABI tag: it contains no Python API."""

    def get_ext_filename(self, fullname: str) -> str:
        filename = pathlib.PurePath(super().get_ext_filename(fullname))
        if fullname.rpartition(".")[2] == OPS_LIBRARY:
            filename = filename.with_name(OPS_LIBRARY + ".so")
        return str(filename)


class BuildPackage(build_py):
    """Installs the kernel templates as attnengine/templates (a checkout uses them in place), into a
    folder where no earlier build has left a module that is gone since."""

    def run(self) -> None:
        package = pathlib.Path(self.build_lib, "attnengine")
        if not self.editable_mode:
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            templates = ROOT / "templates"
            for header in sorted([*templates.rglob("*.h"), *templates.rglob("*.cuh")]):
                copy = package / header.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(header, copy)


class TaggedWheel(bdist_wheel):
    """Tags the wheel for this Python (pybind11's module has its ABI; the operator library does not)
    and for the oldest Linux that can load what was compiled."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        compiled = list(pathlib.Path(self.bdist_dir).rglob("*.so"))
        if compiled and platform.startswith("linux_"):  # an editable install has none in its wheel
            platform = platform_tag(compiled)
        return python, abi, platform


def _platform_tag_function():
    """The package cannot be imported before it is built; this file of it can."""
    place = ROOT / "attnengine" / "platform_tag.py"
    spec = importlib.util.spec_from_file_location("platform_tag", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.platform_tag


platform_tag = _platform_tag_function()


def headers(*folders: str) -> list[str]:
    """Headers of the folders, so that a changed one rebuilds what includes it."""
    return [str(p.relative_to(ROOT)) for f in folders for p in sorted((ROOT / f).glob("*.h"))]


DEPENDS = headers("csrc", "templates/common")
INCLUDE = [str(ROOT / "templates"), str(ROOT / "csrc")]

setup(
    packages=find_packages(include=["attnengine", "attnengine.*"]),
    ext_modules=[
        CppExtension(
            f"attnengine.{OPS_LIBRARY}",
            [
                "csrc/ops.cpp",
                "csrc/ops_sequences.cpp",
                "csrc/backward_sequences.cpp",
                "csrc/ops_linear.cpp",
                "csrc/ops_statistics.cpp",
                "csrc/merge_state.cpp",
                "csrc/registry.cpp",
                "csrc/host_api.cpp",
                "csrc/driver_table.cpp",
                "csrc/cuda_module.cpp",
                "csrc/cuda_launch.cpp",
                "csrc/cuda_linear.cpp",
            ],
            include_dirs=list(INCLUDE),
            depends=DEPENDS,
            extra_compile_args={"cxx": [*FLAGS, TORCH_TARGET]},
            # Ahead of torch's libraries, some of which export unversioned copies of its symbols:
            # the operator library would then ask every later torch for them.
            libraries=["stdc++"],
            extra_link_args=["-ldl"],
            py_limited_api=True,
        ),
        Extension(
            "attnengine._host",
            ["csrc/host.cpp", "csrc/schedule_binding.cpp"],
            include_dirs=[*INCLUDE, pybind11.get_include()],
            depends=DEPENDS,
            extra_compile_args={"cxx": FLAGS},
            extra_link_args=["-ldl"],
            language="c++",
        ),
    ],
    package_data={"attnengine": ["py.typed", "*.pyi"]},
    cmdclass={
        "bdist_wheel": TaggedWheel,
        "build_ext": BuildLibraries,
        "build_py": BuildPackage,
    },
    zip_safe=False,
)
