"""Modules that cannot run on this processor, read instead of executed; the platform of a wheel."""

from __future__ import annotations

import ctypes.util
from pathlib import Path

import pytest
from build_work import EXPORT, needs_compiler, tiny

import attnengine as ae
from attnengine import build, compiler, elf, platform_tag, settings, staging

TRAP = tiny().replace("  static const", "  __builtin_trap();\n  static const")


@pytest.fixture
def old_machine(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine with a processor that runs nothing we compile for."""
    monkeypatch.setattr(staging, "runs_here", lambda isa: False)


@needs_compiler
@pytest.mark.compiles
def test_module_for_another_processor_is_checked_unexecuted(old_machine: None) -> None:
    assert build.module(TRAP, "avx512_bf16", "trap").exists()


@needs_compiler
@pytest.mark.compiles
def test_module_for_this_processor_is_executed(alone: Path) -> None:
    with pytest.raises(ae.BuildError, match="does not load"):
        build.module(TRAP, "portable", "trap")


@needs_compiler
@pytest.mark.compiles
@pytest.mark.parametrize(
    "source, message",
    [
        ("int nothing;", "undefined symbols: ae_info, ae_workspace_bytes, ae_launch"),
        (f"{tiny()}void missing(); {EXPORT}void x() {{ missing(); }}", "symbols: .*missing"),
        (
            f"{tiny()}{EXPORT}void aoti_torch_grad_mode_set_enabled(bool);\n"
            f"{EXPORT}void x() {{ aoti_torch_grad_mode_set_enabled(true); }}",
            "undefined symbols: aoti_torch_grad_mode_set_enabled|depends on torch's libraries",
        ),
    ],
    ids=["symbols", "undefined", "torch"],
)
def test_module_for_another_processor_that_cannot_be_used(
    old_machine: None, source: str, message: str
) -> None:
    with pytest.raises(ae.BuildError, match=message):
        build.module(source, "avx2", "bad")


@needs_compiler
@pytest.mark.compiles
def test_weak_and_library_symbols_are_bound(old_machine: None) -> None:
    source = (
        f"#include <cmath>\n#include <cstdio>\n{tiny()}"
        "__attribute__((weak)) void perhaps();\n"
        f'{EXPORT}void x(double y) {{ if (perhaps) std::printf("%f", std::lgamma(y)); }}\n'
    )
    assert build.module(source, "portable", "x").exists()


def test_what_is_no_module(tmp_path: Path) -> None:
    library = Path(ctypes.util.__file__)
    for data in (b"", library.read_bytes(), b"\x7fELF\x02\x01" + bytes(80)):
        (tmp_path / "kernel.so").write_bytes(data)
        with pytest.raises(compiler.CompileFailed, match="does not load"):
            compiler.inspect(tmp_path / "kernel.so", ("ae_info",))
    whole = (Path(build.__file__).parent / "libattnengine_ops.so").read_bytes()
    found = elf.read_shared_object(whole)
    assert {"libtorch_cpu.so", "libc.so.6"} <= set(found.needed)
    for length in range(0, len(whole), len(whole) // 23):
        with pytest.raises(ValueError, match="ELF|not found"):
            elf.read_shared_object(whole[:length])


def test_runs_here() -> None:
    assert staging.runs_here("portable")
    assert [isa for isa in settings.ISAS if staging.runs_here(isa)][-1] == staging_isa()


def staging_isa() -> str:
    from attnengine import library

    return library.cpu_isa()


@pytest.mark.parametrize(
    "versions, minor",
    [
        (b"\0GLIBC_2.2.5\0GLIBC_2.14\0", 17),
        (b"\0GLIBC_2.34\0GLIBCXX_3.4.21\0", 34),
        (b"\0GLIBC_2.29\0GLIBCXX_3.4.29\0", 34),
        (b"\0GLIBC_2.29\0GLIBCXX_3.4.30\0", 35),
        (b"text GLIBC_2.99 in a string", 17),
    ],
)
def test_platform_of_a_binary(tmp_path: Path, versions: bytes, minor: int) -> None:
    if not platform_tag.platform.libc_ver()[0]:
        pytest.skip("no glibc")
    (tmp_path / "x.so").write_bytes(b"\x7fELF" + versions)
    tag = platform_tag.platform_tag([tmp_path / "x.so"])
    assert tag.startswith(f"manylinux_2_{minor}_")
