"""Kernels made ahead of time: the command, folders, wheels, and machines without a compiler.

Modules are those of other tests (attention causal and full, float32, D=40 x 24), so none is new.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from bare_machine import DV, Bare, D, command_in, lines_in, same
from build_work import needs_compiler, tiny
from rich.console import Console

import attnengine as ae
from attnengine import cache, cli, dispatch, prebuild, prebuild_run, prebuilt, program, staging


@pytest.fixture(autouse=True)
def as_new() -> None:
    prebuilt.forget()


@needs_compiler
@pytest.mark.compiles
def test_no_compiler_runs_what_is_prebuilt_and_says_how_to_make_the_rest(
    bare: Bare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder serves forward and backward; the commands in the errors make what is missing."""
    out = bare.root / "ready kernels"
    dims = ["--dtypes", "fp32", "--head-dims", f"{D}x{DV}"]
    assert cli.main(["prebuild", "--specs", "builtin:causal", *dims, "--out", str(out)]) == 0
    assert "2 kernels, 2 new" in capsys.readouterr().out
    assert {p.name for p in out.rglob("*") if p.is_file()} == {
        "prebuilt.json", "kernel.so", "kernel.cpp", "manifest.json",
    }  # fmt: skip
    for file in out.rglob("*"):
        if file.is_file():
            assert str(cache.settings.cache_dir()).encode() not in file.read_bytes(), file
    aot = {"ATTNENGINE_AOT_PATH": str(out)}
    found = bare.run("causal", "full", "user", **aot)
    assert same(found["causal"], bare.here("causal", monkeypatch))

    isa = dispatch.default_isa()
    command, name = command_in(found["full"])
    assert name == "builtin:full"
    assert command[:2] == ["attnengine", "prebuild"] and f"cpu:{isa}" in command
    assert cli.main([*command[1:-1], str(out)]) == 0

    command, name = command_in(found["user"])
    assert name == "kernels.py"
    file = bare.root / name
    file.write_text("\n".join(["from user_variant import spec", *lines_in(found["user"])]))
    monkeypatch.chdir(bare.root)
    assert cli.main([*command[1:-1], str(out)]) == 0
    assert "2 kernels, 2 new" in capsys.readouterr().out

    found = bare.run("causal", "full", "user", **aot)
    for name in ("causal", "full", "user"):
        assert same(found[name], bare.here(name, monkeypatch)), name


@needs_compiler
@pytest.mark.compiles
def test_wheel_of_kernels_is_found_when_installed(
    bare: Bare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dims = ["--dtypes", "fp32", "--head-dims", f"{D}x{DV}", "--forward-only"]
    command = ["prebuild", "--specs", "builtin:causal", *dims, "--target", "cpu"]
    assert cli.main([*command, "--out", str(bare.root / "dist"), "--wheel"]) == 0
    (wheel,) = (bare.root / "dist").iterdir()
    own = f"attnengine_kernels_cpu-{ae.__version__}+{staging.build_id()[:12]}"
    assert wheel.name.startswith(f"{own}-py3-none-manylinux_2_17_") and str(wheel) in (
        capsys.readouterr().out
    )
    first = wheel.read_bytes()
    assert cli.main([*command, "--out", str(bare.root / "dist" / "my-kernels.whl")]) == 0
    assert len(list((bare.root / "dist").glob("my-*"))) == 1
    site = bare.root / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, str(site), str(wheel)], check=True, capture_output=True)
    with zipfile.ZipFile(wheel) as archive:
        info = next(n for n in archive.namelist() if n.endswith("METADATA"))
        assert f"Requires-Dist: attnengine=={ae.__version__}\n" in archive.read(info).decode()
    found = bare.run("causal", PYTHONPATH=str(site))
    assert "backward fp32" in found["causal"] or "backward f32" in found["causal"]
    program = (
        "import torch, attnengine as ae\n"
        f"q, k, v = (torch.randn(1, 2, 5, d) for d in ({D}, {D}, {DV}))\n"
        "out = ae.attention(q, k, v, ae.variants.causal())\n"
        "assert (out - ae.reference(q, k, v, ae.variants.causal())).abs().max() < 1e-5\n"
    )
    environment = {"PATH": "/nowhere", "PYTHONPATH": str(site), "HOME": str(bare.root)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert first == wheel.read_bytes()


@needs_compiler
@pytest.mark.compiles
def test_function_form(
    bare: Bare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A function is run, and requests that it returns are compiled beside what it used."""
    file = bare.root / "function.py"
    file.write_text(
        "import torch, attnengine as ae\nfrom attnengine.prebuild import Request\n"
        f"def run():\n    q, k, v = (torch.randn(1, 2, 5, d) for d in ({D}, {D}, {DV}))\n"
        "    ae.attention(q, k, v, ae.variants.causal())\n"
        f"    return [Request(ae.AttentionSpec(), 'fp32', [({D}, {DV})], backward=False)]\n"
    )
    monkeypatch.setattr(program, "_programs", {})  # a new process, in which nothing is loaded
    out = bare.root / "out"
    assert cli.main(["prebuild", "--specs", f"{file}:run", "--out", str(out)]) == 0
    assert "2 kernels, 2 new" in capsys.readouterr().out
    labels = [json.loads(p.read_text())["label"] for p in out.rglob("manifest.json")]
    assert all(label.startswith("forward") for label in labels) and len(labels) == 2
    every = ["prebuild", "--specs", f"{file}:run", "--target", "cpu:all", "--out", str(out)]
    assert cli.main(every) == 1
    assert "is a function, which is run to see what it uses" in capsys.readouterr().err


@needs_compiler
@pytest.mark.compiles
def test_a_kernel_that_fails_does_not_stop_the_others(alone: Path) -> None:
    wanted = [
        prebuild.Kernel(tiny(), "portable", "good"),
        prebuild.Kernel("#error on purpose\n", "portable", "bad"),
    ]
    console = Console(file=(alone / "log").open("w"))
    made, failed = prebuild_run._compiled(wanted, 1, console)
    assert [unit.label for unit, _ in made] == ["good"]
    assert list(failed) == ["bad"] and "on purpose" in failed["bad"]
    assert "2 kernels, 0 of them compiled already" in (alone / "log").read_text()
    with pytest.raises(ValueError, match="--jobs 0: expected at least 1"):
        prebuild_run._compiled(wanted, 0, console)


def test_prebuild_without_a_compiler(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    words = ["--specs", "builtin:full", "--dtypes", "fp32", "--head-dims", f"{D}x{DV}"]
    assert cli.main(["prebuild", *words, "--out", str(alone / "out")]) == 1
    assert "no C++ compiler" in capsys.readouterr().err
    assert not (alone / "out").exists()


@pytest.mark.parametrize(
    "words",
    [[], ["--specs", "builtin"], ["--specs", "builtin", "--out", "x", "--head-dims", "64x64x64"]],
)
def test_bad_usage(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["prebuild", *words])
    assert caught.value.code == 2
