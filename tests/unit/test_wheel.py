"""The wheel that people install: built from a copy of the checkout, examined, and used elsewhere.

Nothing is fetched: the build uses the torch that runs the tests, and so does the virtual
environment that the wheel is installed in. The kernels are those of test_torch_integration.py.
"""

from __future__ import annotations

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import torch

import attnengine as ae
from attnengine.cache_lock import hold
from attnengine.elf import read_shared_object

ROOT = Path(__file__).parents[2]
PARTS = ("attnengine", "csrc", "templates", "setup.py", "pyproject.toml", "README.md", "LICENSE")

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment, with pip kept off every index."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("PIP_", "PYTHONPATH"))}
    return {**kept, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkout/, in which an older build has left things behind, and its dist/."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # one for all workers
    place = root / "wheel_under_test"
    with hold(root / "wheel_under_test.lock", "the wheel under test", 300.0):
        if not (place / "dist").exists():
            shutil.rmtree(place, ignore_errors=True)
            copy_of_checkout(place / "checkout")
            build_wheel(place / "checkout", place / "new")
            (place / "new").rename(place / "dist")
    return place


def copy_of_checkout(checkout: Path) -> None:
    """What a build needs, with the traces of an older build."""
    checkout.mkdir(parents=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, checkout / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, checkout / part)
    version = f"{sys.version_info[0]}{sys.version_info[1]}"
    left = f"build/lib.{sysconfig.get_platform()}-cpython-{version}/attnengine"
    (checkout / left / "templates").mkdir(parents=True)
    (checkout / left / "gone.py").write_text("")
    (checkout / left / "templates" / "gone.h").write_text("")


def build_wheel(checkout: Path, out: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*pip, "-w", str(out), "."], cwd=checkout, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(built: Path) -> Path:
    return built / "checkout"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (made,) = (built / "dist").iterdir()
    return made


@pytest.fixture(scope="module")
def files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(files: dict[str, bytes]) -> Message:
    return email.message_from_bytes(files[f"attnengine-{ae.__version__}.dist-info/METADATA"])


def test_tag_says_what_it_runs_on(wheel: Path) -> None:
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    found = re.fullmatch(
        rf"attnengine-{re.escape(ae.__version__)}-{python}-{python}-(\w+)\.whl", wheel.name
    )
    assert found is not None, wheel.name
    libc, version = os.confstr("CS_GNU_LIBC_VERSION").split()  # type: ignore[union-attr]
    platform = re.fullmatch(rf"manylinux_2_(\d+)_{os.uname().machine}", found[1])
    assert libc == "glibc" and platform is not None, wheel.name
    assert 17 <= int(platform[1]) <= int(version.split(".")[1])


def test_contents(files: dict[str, bytes], checkout: Path) -> None:
    """Each source of the package and each template once, two libraries, and nothing else."""
    package = [p for p in (checkout / "attnengine").rglob("*") if p.suffix in (".py", ".pyi")]
    expected = {p.relative_to(checkout).as_posix(): p.read_bytes() for p in package}
    for path in (checkout / "templates").rglob("*.*h"):
        assert path.suffix in (".h", ".cuh")
        expected[f"attnengine/{path.relative_to(checkout).as_posix()}"] = path.read_bytes()
    expected["attnengine/py.typed"] = b""
    templates = ("templates/cpu/forward.h", "templates/sm80/forward.cuh")
    for name in ("demo/__main__.py", "_host.pyi", *templates):
        assert f"attnengine/{name}" in expected
    info = f"attnengine-{ae.__version__}.dist-info"
    rest = {n: d for n, d in files.items() if n not in expected and not n.startswith(info)}
    assert {name: files.get(name) for name in expected} == expected
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert sorted(rest) == [f"attnengine/_host{suffix}", "attnengine/libattnengine_ops.so"]
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"attnengine = attnengine.cli:main" in files[f"{info}/entry_points.txt"]


def test_no_paths_of_this_machine(files: dict[str, bytes], checkout: Path) -> None:
    places = [checkout, ROOT, Path(torch.__file__).parent, Path(sys.prefix), Path.home()]
    for name, data in files.items():
        for place in places:
            assert f"{place}/".encode() not in data, f"{name} names {place}"


def test_metadata_names_what_is_imported(files: dict[str, bytes], metadata: Message) -> None:
    needed = {
        re.split(r"[^\w-]", text)[0]
        for text in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in text
    }
    assert "torch>=2.11" in metadata.get_all("Requires-Dist", [])
    assert {"cuda", "cuda13"} <= set(metadata.get_all("Provides-Extra", []))
    assert metadata["Version"] == ae.__version__
    assert metadata["License-Expression"] == "BSD-3-Clause"
    imported = set()
    for name, data in files.items():
        if name.endswith(".py"):
            for node in ast.walk(ast.parse(data)):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    imported.add(node.module.split(".")[0])
    imported -= {*sys.stdlib_module_names, "attnengine"}
    # torch.utils.cpp_extension, which compiles the kernels, imports setuptools.
    assert imported | {"setuptools"} == needed


def test_operator_library_is_bound_to_no_torch_and_no_python(files: dict[str, bytes]) -> None:
    """Of torch it uses the C functions of the stable ABI only, and of Python nothing."""
    library = read_shared_object(files["attnengine/libattnengine_ops.so"])
    outside = [name for name in library.unbound if not name.startswith("__")]
    foreign = [name for name in outside if not re.match(r"(aoti_)?torch_", name)]
    assert outside and not foreign
    assert not any(name.startswith("libpython") for name in library.needed)
    host = next(data for name, data in files.items() if name.startswith("attnengine/_host."))
    assert not any("torch" in name or "c10" in name for name in read_shared_object(host).needed)


PROGRAM = """
import sys, torch
import attnengine as ae
from attnengine import library, staging

assert ae.__file__.startswith(sys.prefix) and str(library.OPS_LIBRARY).startswith(sys.prefix)
assert str(staging.templates_dir()).startswith(sys.prefix)
g = torch.Generator().manual_seed(3)
bias = torch.tensor([0.1, -0.2, 0.3, 0.4], requires_grad=True)
spec = ae.AttentionSpec(
    score_mod=lambda s, b, h, q, k: s + bias[h] * (q - k),
    mask_mod=lambda b, h, q, k: q + 2 >= k,
)
sizes = ((2, 4, 33, 8), (2, 2, 47, 8), (2, 2, 47, 8))
q, k, v = (torch.randn(s, generator=g).requires_grad_() for s in sizes)
inputs = (q, k, v, bias)
for got, want in zip(
    torch.autograd.grad(ae.attention(q, k, v, spec).square().sum(), inputs),
    torch.autograd.grad(ae.reference(q, k, v, spec).square().sum(), inputs),
):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
print("gradients agree")
"""


def test_installed_wheel_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """In a virtual environment that has this torch, through the shared cache of kernels."""
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    subprocess.run([*pip, str(wheel)], env=environment(), check=True, capture_output=True)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "torch_of_the_tests.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    variables = {"VIRTUAL_ENV": str(place), "PYTHONSAFEPATH": "1"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*words: str) -> str:
        done = subprocess.run(
            words, cwd=elsewhere, env=environment(**variables), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run(str(python), "-c", PROGRAM) == "gradients agree\n"
    assert "modules" in run(str(place / "bin" / "attnengine"), "cache", "ls")
    assert list(elsewhere.iterdir()) == []
