"""What the doctor says of machines that lack something; facts are of this machine, or made so."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import attnengine
from attnengine import (
    build,
    cache_entry,
    cli,
    doctor,
    library,
    machine,
    nvcc,
    prebuilt,
    settings,
)  # fmt: skip
from attnengine.cache import Store

PACKAGE = Path(attnengine.__file__).parent
COMPILER = shutil.which("c++")
NVCC = nvcc.find_device_compiler()


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        if name.startswith(("ATTNENGINE_", "CUDA_")) or name == "CXX":
            monkeypatch.delenv(name)
    monkeypatch.setenv("ATTNENGINE_CACHE_DIR", str(tmp_path / "cache"))
    build.forget()
    yield
    build.forget()


def fill(root: Path, count: int = 2) -> list[Path]:
    store = Store(root)
    store.prepare()
    made = []
    for number in range(count):
        with store.stage() as stage:
            entry = stage / "entry"
            entry.mkdir(mode=0o700)
            cache_entry.write_file(entry / "kernel.so", b"x" * 3000)
            digest = cache_entry.sha256(str(number).encode())
            facts = {"isa": "avx2", "abi": 1, "cflags": [], "content": digest}
            made.append(store.publish(entry, digest, f"kernel {number}", facts))
    return made


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def said(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    assert cli.main(["doctor", *arguments]) == status
    return capsys.readouterr().out


@pytest.mark.compiles
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_machine_that_has_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fill(tmp_path / "cache")
    out = said(capsys, 0)
    names = ("attnengine", "python", "torch", "operators", "processor", "compiler", "cache",
             "prebuilt", "gpu", "cuda", "cutlass")  # fmt: skip
    for name in names:
        assert f"\n{name} " in f"\n{out}"
    assert f"instruction set {library.cpu_isa()}: " in out
    assert "it made a module, which was loaded again" in out and "-fPIC" in out
    assert "2 modules, " in out and " of 2.0 GiB" in out
    assert "\nattention can run here: any spec can be compiled here" in out
    if not isinstance(NVCC, str):
        assert "nvcc and ptxas made a module for sm_80" in out
    assert "!" not in out
    assert not any((tmp_path / "cache" / "1").glob("[0-9a-f][0-9a-f]/*/cmd.json"))  # no trace


def test_json_has_every_fact(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNENGINE_DISABLE_JIT", "1")
    report = json.loads(said(capsys, 1, "--json"))
    assert report["can_run"] is False and report["compiler"]["disabled"] is True
    assert report["operators"]["isa"] == library.cpu_isa()
    assert report["processor"]["usable"] == len(os.sched_getaffinity(0))
    assert report["cache"]["modules"] == 0 and report["prebuilt"] == []
    assert set(report["cuda"]) == {"toolkits", "cutlass", "driver", "gpus", "works", "problem"}


@pytest.mark.parametrize("value", ["/nowhere/g++", "empty"])
def test_no_compiler(
    value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if value == "empty":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("ATTNENGINE_CXX", value)
    out = said(capsys, 1)
    assert "compiler   MISSING: no C++ compiler" in out and "install g++ 11 or newer" in out
    assert "attention CANNOT run here: nothing can be compiled here and no kernel is ready" in out
    ready = tmp_path / "aot"
    fill(ready)
    monkeypatch.setenv("ATTNENGINE_AOT_PATH", str(ready))
    out = said(capsys, 0)
    assert f"prebuilt   {ready} (ATTNENGINE_AOT_PATH): 2 modules for avx2" in out
    assert "only the 2 prebuilt and 0 cached kernels run" in out


@pytest.mark.parametrize(
    "text, message",
    [
        ("echo 'kernel.cpp:1:1: error: no such header' >&2; exit 1", "no such header"),
        ("exit 0", "it made no module"),
    ],
)
def test_compiler_that_does_not_work(
    text: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    broken = script(
        tmp_path / "bin" / "broken-c++", f'case "$*" in -v) echo gcc 99;; *) {text};; esac'
    )
    monkeypatch.setenv("ATTNENGINE_CXX", str(broken))
    out = said(capsys, 1)
    assert f"compiler   {broken}: gcc 99" in out
    (line,) = [x for x in out.splitlines() if "! DOES NOT WORK: " in x]
    assert message in line and "set ATTNENGINE_CXX to another" in line


def test_nothing_may_be_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ATTNENGINE_DISABLE_JIT", "1")
    out = said(capsys, 1)
    assert "ATTNENGINE_DISABLE_JIT is set: nothing is compiled until it is unset" in out
    if COMPILER is not None:  # cached kernels are named after their compiler
        fill(tmp_path / "cache")
        assert "only the 0 prebuilt and 2 cached kernels run" in said(capsys, 0)


def test_unwritable_cache(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNENGINE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("ATTNENGINE_CXX", "/nowhere/g++")
    out = said(capsys, 1)
    assert "cache      UNUSABLE, a temporary folder is used instead: " in out
    assert "set ATTNENGINE_CACHE_DIR to a folder of yours that can be written" in out
    if COMPILER is not None:  # slower, but it runs
        monkeypatch.delenv("ATTNENGINE_CXX")
        assert "attention can run here" in said(capsys, 0)


def test_broken_entries(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernels = fill(tmp_path / "cache", 3)
    data = bytearray(kernels[1].read_bytes())
    data[7] ^= 1
    kernels[1].chmod(0o600)
    kernels[1].write_bytes(data)
    facts = machine.cache_facts()
    assert (facts.modules, len(facts.broken), facts.writable) == (2, 1, True)
    monkeypatch.setenv("ATTNENGINE_DISABLE_JIT", "1")
    monkeypatch.setenv("ATTNENGINE_AOT_PATH", str(tmp_path / "cache"))
    out = said(capsys, 0)
    assert "broken: " in out and "differs from the hash in its manifest" in out
    assert "1 entries are broken: attnengine cache verify --repair removes them" in out
    assert "1 modules are altered: run attnengine prebuild again" in out


def test_prebuilt_of_another_build_or_empty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other, empty = tmp_path / "other", tmp_path / "empty"
    fill(other)
    prebuilt.mark(other, "0" * 64, "0.0.1")
    monkeypatch.setenv("ATTNENGINE_AOT_PATH", os.pathsep.join(map(str, (other, empty))))
    first, second = machine.prebuilt_facts()
    assert first.modules == 0 and "another build" in str(first.problem)
    assert second.modules == 0 and "attnengine prebuild --specs builtin" in str(second.problem)


@pytest.mark.parametrize(
    "value, words",
    [
        ("portable", "ATTNENGINE_ISA=portable is used instead: no AVX2"),
        ("sse", "! ATTNENGINE_ISA='sse': expected one of"),
    ],
)
def test_isa_override(
    value: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNENGINE_ISA", value)
    monkeypatch.setenv("ATTNENGINE_DISABLE_JIT", "1")
    assert words in said(capsys, 1)


def test_isa_beyond_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNENGINE_ISA", settings.ISAS[-1])
    for isa in settings.ISAS:
        problem = machine.processor_facts(isa).problem
        assert (problem is None) == (isa == settings.ISAS[-1]), isa
    assert "is beyond this processor (avx512): unset it" in str(
        machine.processor_facts("avx512").problem
    )


def test_every_instruction_set_is_explained() -> None:
    assert set(doctor._MEANING) == set(settings.ISAS)
    assert "no bf16 dot products" in doctor._MEANING["avx2"]


# -- torch and the operator library ----------------------------------------------------------------


@pytest.mark.parametrize(
    "version, problem",
    [("2.13.0+cpu", None), ("2.11.1", None), ("2.10.0", "pip install -U torch"),
     ("1.13", "torch 2.11 or newer"), (None, "pip install 'torch>=2.11'")],
)  # fmt: skip
def test_torch(version: str | None, problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "installed_version", lambda name: version)
    facts = machine.torch_facts()
    assert facts.version == version
    assert facts.problem is None if problem is None else problem in str(facts.problem)


def copied(tmp_path: Path, library: bytes | None) -> subprocess.CompletedProcess[str]:
    """The doctor of an installation without its operator library, or with a damaged one."""
    root = tmp_path / "installed"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, root / "attnengine", ignore=ignored)
    shutil.copytree(PACKAGE.parent / "templates", root / "templates", dirs_exist_ok=True)
    if library is not None:
        (root / "attnengine" / "libattnengine_ops.so").write_bytes(library)
    program = (
        "import attnengine, attnengine.cli\n"
        "try:\n    attnengine.attention\nexcept ImportError as error:\n    print('use:', error)\n"
        "print('status', attnengine.cli.main(['doctor']))"
    )
    return subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(root), "ATTNENGINE_DISABLE_JIT": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(
    "data, words",
    [(None, "is missing: the operator library is not built"), (b"\x7fELF cut", "build it again")],
    ids=["missing", "damaged"],
)
def test_no_operator_library(data: bytes | None, words: str, tmp_path: Path) -> None:
    """The doctor runs where `import attnengine` finds nothing to run with, and says so."""
    done = copied(tmp_path, data)
    assert done.returncode == 0, done.stderr
    assert "operators  MISSING" in done.stdout and words in done.stdout
    assert "attention CANNOT run here: torch or the operator library is missing" in done.stdout
    assert "status 1" in done.stdout
    assert "use: attnengine.attention: " in done.stdout and "`attnengine doctor`" in done.stdout


def test_unknown_names_are_no_import_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        attnengine.nothing  # type: ignore[attr-defined]  # noqa: B018


# -- CUDA ------------------------------------------------------------------------------------------

NVCC = """case "$*" in
  *--dryrun*) echo "#$ TOP={top}" >&2;;
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.1";;
esac"""


def toolkit(home: Path, version: str) -> Path:
    script(home / "bin" / "nvcc", NVCC.format(top=home, version=version))
    return home


def test_toolkits_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An explicit one, then PATH's, whose nvcc may be a wrapper, then pip's beside this Python."""
    asked = toolkit(tmp_path / "asked", "12.9")
    pip = toolkit(tmp_path / "site" / "nvidia" / "cu13", "13.0")
    real = toolkit(tmp_path / "real", "12.4")
    wrapper = script(tmp_path / "bin" / "nvcc", f'exec {real}/bin/nvcc "$@"')
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in [n for n in sys.modules if n == "nvidia" or n.startswith("nvidia.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(asked))
    found = [t for t in machine.cuda_facts().toolkits if t.home.startswith(str(tmp_path))]
    assert [(t.home, t.found, t.version) for t in found] == [
        (str(asked), "CUDA_HOME", "12.9"),
        (str(real), "PATH", "12.4"),
        (str(pip), "pip packages", "13.0"),
    ]


def test_cuda_home_without_a_toolkit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    facts = machine.cuda_facts()
    assert not facts.works and f"CUDA_PATH='{tmp_path}' has no bin/nvcc" in str(facts.problem)
    monkeypatch.setenv("CUDA_PATH", str(toolkit(tmp_path / "old", "11.8")))
    out = said(capsys, 0 if COMPILER else 1)
    assert f"cuda       11.8 in {tmp_path}/old (from CUDA_PATH)" in out
    assert "! nvcc 11.8 in " in out and "CUDA kernels cannot be compiled: nvcc 11.8 in " in out


def test_no_cutlass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("ATTNENGINE_CUTLASS", str(tmp_path))
    monkeypatch.setenv("ATTNENGINE_DISABLE_JIT", "1")
    out = said(capsys, 1)
    assert "cutlass    no headers: CUDA kernels include them. pip install 'attnengine[cuda]'" in out


def test_gpus_by_capability() -> None:
    new, old = machine.Gpu("A", "9.0"), machine.Gpu("B", "7.5")
    assert doctor._gpu_line(new) == "A, compute capability 9.0"
    assert "B, compute capability 7.5: too old for CUDA kernels" in doctor._gpu_line(old)


DRIVER = """
#include <string.h>
int cuDriverGetVersion(int* v) { *v = 13010; return 0; }
int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int* n) { *n = 2; return 0; }
int cuDeviceGet(int* d, int at) { *d = at; return 0; }
int cuDeviceGetName(char* name, int n, int d) { strncpy(name, d ? "B" : "A", n); return 0; }
int cuDeviceGetAttribute(int* v, int which, int d) { *v = which == 75 ? 9 - d : 0; return 0; }
"""


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_gpus_through_the_driver(tmp_path: Path) -> None:
    """A library with the driver's own functions; a child process finds it by the driver's name."""
    (tmp_path / "driver.c").write_text(DRIVER)
    made = tmp_path / "libcuda.so.1"
    subprocess.run([str(COMPILER), "-x", "c", "-shared", "-fPIC", "driver.c", "-o", str(made)],
                   cwd=tmp_path, check=True)  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "from attnengine.machine import _gpus; print(_gpus())"],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == (
        "('13.1', (Gpu(name='A', capability='9.0'), Gpu(name='B', capability='8.0')))"
    )


def test_size() -> None:
    texts = [doctor.size(n) for n in (0, 1023, 1024, 3 << 20, 5 << 30, 2048 << 30)]
    assert texts == ["0 B", "1023 B", "1.0 KiB", "3.0 MiB", "5.0 GiB", "2048.0 GiB"]
