"""The tools that CUDA units are compiled with: found, or missing with the remedy; their texts."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest
from test_cuda_build import FOUND, fake_cutlass, get, needs_nvcc, script, unit

from attnengine import build, cutlass, nvcc, ptx, settings, staging
from attnengine.errors import BuildError, KernelUnavailable


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As on a machine where a package is not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else real(name, *rest),
    )


def test_no_nvcc(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(nvcc, "_USUAL", alone / "usr" / "local" / "cuda")
    hide(monkeypatch, "nvidia")
    with pytest.raises(KernelUnavailable) as caught:
        get(unit(), "my kernel")
    text = str(caught.value)
    for part in (
        "kernel 'my kernel' (sm_80, digest ", "no CUDA compiler: CUDA_HOME and CUDA_PATH are",
        str(alone / "usr"), "pip install 'attnengine[cuda13]'", "CUDA toolkit 12.4 or newer",
        "attnengine prebuild --specs FILE --target sm80 --out DIR",
    ):  # fmt: skip
        assert part in text
    monkeypatch.setenv("CUDA_PATH", str(alone))
    with pytest.raises(KernelUnavailable, match=f"CUDA_PATH='{alone}' has no bin/nvcc; pip"):
        get(unit())


@pytest.mark.parametrize(
    "answer, message",
    [
        (
            "echo release 11.8, V11.8.1",
            r"nvcc 11\.8 in .* is too old: .* need 12\.4 or newer \(C",
        ),
        ("echo release 12.4, V12.4.1", "has nvcc but no bin/ptxas: the toolkit is incomplete"),
        ("exit 1", "nvcc --version does not run in "),
    ],
)
def test_nvcc_that_cannot_be_used(
    alone: Path, monkeypatch: pytest.MonkeyPatch, answer: str, message: str
) -> None:
    script(alone / "cuda" / "bin" / "nvcc", answer)
    monkeypatch.setenv("CUDA_HOME", str(alone / "cuda"))
    with pytest.raises(KernelUnavailable, match=message + ".*pip install 'attnengine"):
        get(unit())


@needs_nvcc
def test_old_nvcc_on_the_path_is_passed_over(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(FOUND, str)
    old = script(alone / "old" / "bin" / "nvcc", "echo release 11.8, V11.8.1")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{old.parent}:/usr/bin:/bin")
    monkeypatch.setattr(nvcc, "_USUAL", FOUND.home)
    found = nvcc.find_device_compiler()
    assert not isinstance(found, str) and "old" not in str(found.home)


@needs_nvcc
def test_no_host_compiler(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNENGINE_CXX", "/nowhere/g++")
    with pytest.raises(KernelUnavailable, match="nvcc needs a C.. compiler: no C.. compiler: "):
        get(unit())


@needs_nvcc
def test_no_cutlass(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNENGINE_CUTLASS", str(alone))
    text = rf"CUTLASS headers missing: ATTNENGINE_CUTLASS='{alone}' has no include/cutlass/vers"
    with pytest.raises(KernelUnavailable, match=rf"{text}.*pip install 'attnengine\[cuda\]'"):
        get(unit())
    monkeypatch.delenv("ATTNENGINE_CUTLASS")
    hide(monkeypatch, "cutlass_library")
    with pytest.raises(KernelUnavailable, match="CUTLASS headers missing: .* not installed; pip"):
        get(unit())


def test_cutlass_folder_or_its_include(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake_cutlass(alone / "cutlass", 3, 5)
    for place in (root, root / "include"):
        monkeypatch.setenv("ATTNENGINE_CUTLASS", str(place))
        found = cutlass.find_cutlass()
        assert isinstance(found, cutlass.Cutlass)
        assert (found.include, found.version) == (root / "include", "3.5.1")
    fake_cutlass(root, 3, 4)
    found = cutlass.find_cutlass()
    assert isinstance(found, str) and "CUTLASS 3.4.1 in " in found
    assert "is too old: the kernels need 3.5 or newer; pip install" in found
    (root / "include" / "cutlass" / "version.h").write_text("")
    assert "CUTLASS unknown in " in str(cutlass.find_cutlass())


def test_remedy_names_the_target() -> None:
    for target in ("sm_80", "sm_86"):  # the second is planned for, the same architecture compiled
        text = build.remedy("builtin:causal", target)
        assert f"--specs builtin:causal --target {target.replace('_', '')} --out DIR" in text
        assert "CUDA toolkit 12.4 or newer" in text
    assert "--target cpu:avx2" in build.remedy("FILE", "avx2")


@pytest.mark.parametrize("target", ["sm_70", "sm_75", "sm_80; touch x", "sm_90a"])
def test_unsupported_target(alone: Path, target: str) -> None:
    with pytest.raises(BuildError, match="expected one of sm_80 .* or use CPU tensors") as found:
        build.device_module(unit(), target, "x")
    assert str(found.value).startswith(f"{target}: no CUDA kernels are compiled for")


# -- PTX and the report of ptxas as text -----------------------------------------------------------


def test_report_of_ptxas() -> None:
    log = (
        "ptxas info    : 11 bytes gmem\n"
        "ptxas info    : Compiling entry function 'ae_forward' for 'sm_80'\n"
        "ptxas info    : Function properties for ae_forward\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 56 registers, used 1 barriers, 4096 bytes smem, 380 bytes cmem\n"
        "ptxas info    : Compiling entry function 'ae_tables' for 'sm_80'\n"
        "ptxas info    : Function properties for ae_tables\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 12 registers, 352 bytes cmem[0]\n"
        "ptxas info    : Function properties for helper\n"
        "    0 bytes stack frame, 2 bytes spill stores, 2 bytes spill loads\n"
    )
    found = ptx.resources(log, ["ae_forward", "ae_tables"])
    assert found["ae_forward"] == ptx.Resources(56, 20, 8, 4096)
    assert found["ae_tables"] == ptx.Resources(12, 4, 0, 0)
    with pytest.raises(ptx.CompileFailed, match="reports nothing of ae_other"):
        ptx.resources(log, ["ae_other"])


def test_portable_names(tmp_path: Path) -> None:
    hidden = "_ZN39_INTERNAL_5c3bf668_9_kernel_cu_3da0d2416helperEf"
    numbers = [*hidden.encode(), 0]
    rows = [numbers[i : i + 40] for i in range(0, len(numbers), 40)]
    strings = "".join(f".b8 {','.join(map(str, row))}\n" for row in rows)
    text = (
        f'\t.file\t1 "{tmp_path}/kernel.cu", 17, 23\n\t.file 2 "{tmp_path}/templates/a.h"\n'
        '\t.file\t3 "/opt/cuda/bin/../targets/x/include/b.hpp"\n\t.file\t4 "/usr/include/c.h"\n'
        f"call {hidden};\n\t.section\t.debug_str\n\t{{\n$L__info_string0:\n{strings}\n\t}}\n"
    )
    found = ptx.portable(text, tmp_path, Path("/opt/cuda"))
    for name in ("kernel.cu", "templates/a.h", "cuda/b.hpp", "host/c.h"):
        assert f'"{name}"\n' in found
    plain = hidden.replace("5c3bf668", "00000000")
    assert f"call {plain};" in found and "53,99,51,98" not in found
    assert ",".join(map(str, [*plain.encode(), 0][:40])) in found
    assert ptx.portable(found, tmp_path, Path("/opt/cuda")).count("host/") == 4


def test_targets() -> None:
    assert staging.flags("sm_80")[-1] == "-arch=compute_80"
    assert not set(settings.DEVICE_TARGETS) & set(settings.ISAS)


@needs_nvcc
def test_ptxas_speaks_as_it_did(tmp_path: Path) -> None:
    """The report is read by its words; a toolkit that changed them is noticed here."""
    assert not isinstance(FOUND, str)
    (tmp_path / "a.ptx").write_text(
        ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry a() {\n ret;\n}\n"
    )
    command = [FOUND.ptxas.command, "-arch=sm_80", "-v", "a.ptx", "-o", "a.cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ptx.resources(done.stdout + done.stderr, ["a"])["a"].spill_bytes == 0
