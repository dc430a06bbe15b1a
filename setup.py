"""Builds the operator library, the host module and the wheel. Project metadata: pyproject.toml."""

from __future__ import annotations

import pathlib
import shutil

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = pathlib.Path(__file__).parent
OPS_LIBRARY = "libattnengine_ops"
FLAGS = [
    "-std=c++20",
    "-O2",
    "-g0",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
]
# The stable ABI of torch 2.10: one binary for every later torch, CPU or CUDA.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


class BuildLibraries(BuildExtension):
    """Names the operator library without Python's ABI tag: it contains no Python API."""

    def get_ext_filename(self, fullname: str) -> str:
        filename = pathlib.PurePath(super().get_ext_filename(fullname))
        if fullname.rpartition(".")[2] == OPS_LIBRARY:
            filename = filename.with_name(OPS_LIBRARY + ".so")
        return str(filename)


class BuildWithTemplates(build_py):
    """Installs the kernel templates as attnengine/templates; a checkout uses them in place."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = pathlib.Path(self.build_lib, "attnengine", "templates")
            shutil.rmtree(target, ignore_errors=True)
            for header in sorted((ROOT / "templates").rglob("*.h")):
                copy = target / header.relative_to(ROOT / "templates")
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(header, copy)


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
            ["csrc/ops.cpp", "csrc/registry.cpp", "csrc/host_api.cpp"],
            include_dirs=list(INCLUDE),
            depends=DEPENDS,
            extra_compile_args={"cxx": [*FLAGS, TORCH_TARGET]},
            extra_link_args=["-ldl"],
            py_limited_api=True,
        ),
        Extension(
            "attnengine._host",
            ["csrc/host.cpp"],
            include_dirs=[*INCLUDE, pybind11.get_include()],
            depends=DEPENDS,
            extra_compile_args={"cxx": FLAGS},
            extra_link_args=["-ldl"],
            language="c++",
        ),
    ],
    package_data={"attnengine": ["*.pyi"]},
    cmdclass={"build_ext": BuildLibraries, "build_py": BuildWithTemplates},
    zip_safe=False,
)
