"""Kernels made ahead of time: what may be asked for, folders, wheels, and no compiler.

Modules are those of other tests (attention causal and full, float32, D=40 x 24), so none is new.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_build import EXPORT, tiny

import attnengine as ae
from attnengine import (
    build,
    builtin,
    cache,
    cli,
    compiler,
    dispatch,
    elf,
    platform_tag,
    prebuild,
    prebuild_run,
    prebuilt,
    settings,
    staging,
)
from attnengine.prebuild import Request

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
D, DV = 40, 24


@pytest.fixture(autouse=True)
def as_new() -> None:
    prebuilt.forget()


# -- requests --------------------------------------------------------------------------------------


def test_request_takes_one_or_many() -> None:
    spec = ae.AttentionSpec()
    assert Request(spec, "bf16", 64).programs() == ((torch.bfloat16, 64, 64),)
    several = Request(spec, [torch.float32, "fp64"], (64, (192, 128)))
    assert several.programs() == (
        (torch.float32, 64, 64), (torch.float32, 192, 128),
        (torch.float64, 64, 64), (torch.float64, 192, 128),
    )  # fmt: skip
    every = Request(spec)
    assert {dtype for dtype, _, _ in every.programs()} == {*dispatch.SUPPORTED} - {torch.float64}
    assert {d for _, d, _ in every.programs()} == {64, 128}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda s: Request(s, "fp8"), "dtypes has 'fp8': expected 'fp32', 'fp64'"),
        (lambda s: Request(s, torch.int32), "dtypes has torch.int32"),
        (lambda s: Request(s, "bf16", 0), r"head_dims has 0: expected D, or \(D, Dv\)"),
        (lambda s: Request(s, "bf16", [(1, 2, 3)]), r"head_dims has \(1, 2, 3\)"),
        (lambda s: Request(s, "bf16", [True]), "head_dims has True"),
    ],
)
def test_request_that_no_kernel_serves(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(ae.AttentionSpec())


def test_request_needs_a_spec() -> None:
    with pytest.raises(TypeError, match="spec must be an attnengine.AttentionSpec, got function"):
        Request(lambda q, k, v: q)  # type: ignore[arg-type]


def test_builtin_variants_generate() -> None:
    """Every builtin variant has a forward and a backward unit, for a processor unlike this one."""
    requests = prebuild.read_requests("builtin")
    assert isinstance(requests, list) and len(requests) == len(builtin.BUILTIN)
    for request in requests:
        found = prebuild.kernels(request, torch.float32, D, DV, "portable")
        assert [k.label.split()[0] for k in found] == ["forward", "backward"], request.name
        assert {k.isa for k in found} == {"portable"}
        assert f"D{D}x{DV} portable {request.name}" in found[0].label
        assert len(prebuild.kernels(_forward(request), torch.float32, D, DV, "portable")) == 1


def _forward(request: Request) -> Request:
    return Request(request.spec, "fp32", D, backward=False)


def test_builtin_by_name() -> None:
    found = prebuild.read_requests("builtin:sink,causal")
    assert [r.name for r in found] == ["causal", "sink"]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="builtin:causl: expected names of full, causal, "):
        prebuild.read_requests("builtin:causl")


TOML = """
dtypes = ["bf16", "fp32"]
head_dims = [64, [192, 128]]

[[specs]]
variant = "sliding_window"
window = 1024
causal = false

[[specs]]
variant = "sink"
sink = { shape = [8], dtype = "fp32", requires_grad = true }
dtypes = "fp16"
head_dims = 128
backward = false
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_toml_file(tmp_path: Path) -> None:
    file = tmp_path / "kernels.toml"
    file.write_text(TOML)
    window, sink = prebuild.read_requests(str(file))  # type: ignore[misc]
    assert window.name == "sliding_window" and window.backward
    assert len(window.programs()) == 4
    live = window.spec.mask_mod(0, 0, torch.tensor(5), torch.tensor(1030))
    assert not live and window.spec.mask_mod(0, 0, torch.tensor(5), torch.tensor(1029))
    assert sink.programs() == ((torch.float16, 128, 128),) and not sink.backward
    captured = dispatch.captures_for(sink.spec).tensors
    assert [(tuple(t.shape), t.dtype, t.requires_grad) for t in captured] == [
        ((8,), torch.float32, True)
    ]


def test_json_file(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    file.write_text('[{"variant": "softcap", "cap": 30.0, "dtypes": ["fp32"], "head_dims": [16]}]')
    (request,) = prebuild.read_requests(str(file))  # type: ignore[misc]
    assert request.programs() == ((torch.float32, 16, 16),)
    score = request.spec.score_mod(torch.tensor(1e9), 0, 0, 0, 0)
    assert score.item() == 30.0


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "kernels.json: "),
        ("{}", "expected an array `specs`"),
        ('{"specs": [], "dtype": "bf16"}', "expected an array `specs`"),
        ("[]", "has no requests"),
        ("[{}]", r"specs\[0\] has no `variant`"),
        ('[{"variant": "causla"}]', r"specs\[0\]: variant='causla': expected one of full, causal"),
        ('[{"variant": "__init__"}]', "variant='__init__'"),
        ('[{"variant": "causal", "window": 3}]', "causal has no setting 'window': expected none"),
        ('[{"variant": "softcap"}]', "softcap needs the setting 'cap'"),
        ('[{"variant": "softcap", "cap": -1}]', "cap=-1"),
        ('[{"variant": "sink", "sink": {"shape": [0]}}]', "expected a tensor as shape"),
        ('[{"variant": "sink", "sink": {"dtype": "fp32"}}]', "expected a tensor as shape"),
        ('[{"variant": "sink", "sink": {"shape": [8], "dtype": "x"}}]', "dtype = one of bf16, "),
        ('[{"variant": "causal", "dtypes": "fp7"}]', "dtypes has 'fp7'"),
    ],
)
def test_wrong_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "kernels.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        prebuild.read_requests(str(file))


def test_python_file(tmp_path: Path) -> None:
    (tmp_path / "mine_for_prebuild.py").write_text(
        "import attnengine as ae\nspec = ae.AttentionSpec()\n"
    )
    file = tmp_path / "kernels.py"
    file.write_text(
        "from attnengine.prebuild import Request\nfrom mine_for_prebuild import spec\n"
        "SPECS = (r for r in [Request(spec, 'fp32', 8), spec])\none = spec\nnumber = 3\n"
    )
    first, second = prebuild.read_requests(str(file))  # type: ignore[misc]
    assert len(first.programs()) == 1 and len(second.programs()) > 1
    assert len(prebuild.read_requests(f"{file}:one")) == 1  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kernels.py:number is a int, not a function and not an"):
        prebuild.read_requests(f"{file}:number")


@pytest.mark.parametrize("target", ["gpu", "cpu:avx1024", "cpu:", "", "cuda:sm_90a"])
def test_targets(target: str) -> None:
    if target == "cpu:":
        assert prebuild_run.target_isas(target) == [dispatch.default_isa()]
        return
    with pytest.raises(ValueError, match="expected cpu .* or cpu:portable, cpu:avx2, .*cpu:all"):
        prebuild_run.target_isas(target)


def test_targets_of_this_and_of_every_machine() -> None:
    assert prebuild_run.target_isas("cpu") == [dispatch.default_isa()]
    assert prebuild_run.target_isas("cpu:all") == list(settings.ISAS)


# -- where prebuilt modules are looked for ---------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache of its own, and nothing remembered from before."""
    for name in list(os.environ):
        if name.startswith("ATTNENGINE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ATTNENGINE_CACHE_DIR", str(tmp_path / "cache"))
    build.forget()
    yield tmp_path
    build.forget()


def packed(folder: Path, site: Path, name: str) -> Path:
    """A folder of modules under the namespace of kernel wheels in `site`, as pip would put it."""
    place = site / prebuilt.NAMESPACE / name
    shutil.copytree(folder, place)
    return place


def exported(out: Path, number: int = 7) -> Path:
    with build.collecting() as used:
        build.module(tiny(number), "portable", "x")
    build.export(used, out)
    build.forget()
    return out


@needs_compiler
@pytest.mark.compiles
def test_folders_come_before_wheels_and_wheels_before_the_cache(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(alone / "aot")
    wheels = [packed(folder, alone / "site", name) for name in ("b_kernels", "a_kernels")]
    (alone / "site" / prebuilt.NAMESPACE / "not_marked").mkdir()
    monkeypatch.syspath_prepend(str(alone / "site"))
    monkeypatch.setenv("ATTNENGINE_AOT_PATH", str(folder))
    assert prebuilt.folders(staging.build_id()) == [folder, wheels[1], wheels[0]]
    assert prebuilt.NAMESPACE not in sys.modules
    for place in (folder, wheels[1], wheels[0], alone / "cache"):
        build.forget()
        path = build.module(tiny(), "portable", "x")
        assert place in path.parents
        shutil.rmtree(place)


@needs_compiler
@pytest.mark.compiles
def test_kernels_of_another_build_are_one_warning(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(alone / "aot")
    mark = folder / prebuilt.MARK
    known = json.loads(mark.read_text())
    assert known == {"build": staging.build_id(), "attnengine": ae.__version__}
    monkeypatch.setenv("ATTNENGINE_AOT_PATH", str(folder))
    for text in (json.dumps({**known, "build": "0" * 64}), "{", "[]"):
        mark.write_text(text)
        build.forget()
        with pytest.warns(RuntimeWarning, match=f"{folder} are not used: they are of build"):
            path = build.module(tiny(), "portable", "x")
        assert alone / "cache" in path.parents
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert alone / "cache" in build.module(tiny(8), "portable", "x").parents
    with build.collecting() as used:
        build.module(tiny(), "portable", "x")
    with pytest.raises(ae.CacheError, match="kernels of another build .* choose another folder"):
        build.export(used, folder)


def test_build_id_covers_what_every_module_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = staging.build_id()
    copy = tmp_path / "templates"
    shutil.copytree(staging.templates_dir(), copy)
    monkeypatch.setattr(staging, "templates_dir", lambda: copy)
    assert staging.build_id() == first
    with (copy / "common" / "abi.h").open("a") as file:
        file.write("// changed\n")
    assert staging.build_id() != first


# -- instruction sets that cannot run here ---------------------------------------------------------

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


# -- the command -----------------------------------------------------------------------------------

USER = """
import torch
import attnengine as ae

slope = torch.tensor([0.1, -0.2, 0.3, 0.4], requires_grad=True)
spec = ae.AttentionSpec(
    score_mod=lambda s, b, h, q, k: s + slope[h] * (q - k),
    mask_mod=lambda b, h, q, k: q + 2 >= k,
)
"""

CALL = """
import sys
sys.path.insert(0, {here!r})
import torch, attnengine as ae
from user_variant import spec as user, slope

def call(spec, d, dv, extra=()):
    g = torch.Generator().manual_seed(1)
    sizes = ((2, 4, 33, d), (2, 2, 47, d), (2, 2, 47, dv))
    q, k, v = (torch.randn(s, generator=g).requires_grad_() for s in sizes)
    out = ae.attention(q, k, v, spec)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v, *extra))]

CALLS = {{
    "causal": lambda: call(ae.variants.causal(), {D}, {DV}),
    "full": lambda: call(ae.AttentionSpec(), {D}, {DV}),
    "user": lambda: call(user, 8, 8, (slope,)),
}}
results = {{}}
for name in sys.argv[2:]:
    try:
        results[name] = CALLS[name]()
    except ae.KernelUnavailable as error:
        results[name] = str(error)
from attnengine import compiler
results["compiler"] = compiler.find_compiler()
torch.save(results, sys.argv[1])
"""


class Bare:
    """A machine without a compiler: new processes with an empty cache and a bare environment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "user_variant.py").write_text(USER)
        (root / "call.py").write_text(CALL.format(here=str(root), D=D, DV=DV))

    def run(self, *names: str, **variables: str) -> dict:
        shutil.rmtree(self.root / "cache", ignore_errors=True)
        keep = {n: os.environ[n] for n in ("HOME", "LD_LIBRARY_PATH") if n in os.environ}
        out = self.root / "results.pt"
        done = subprocess.run(
            [sys.executable, str(self.root / "call.py"), str(out), *names],
            env={
                "PATH": "/nowhere",
                "ATTNENGINE_CACHE_DIR": str(self.root / "cache"),
                **keep,
                **variables,
            },
            cwd=self.root,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert not list((self.root / "cache").rglob("kernel.so"))
        found = torch.load(out)
        assert "no C++ compiler" in found.pop("compiler")
        return {**found, "stderr": done.stderr}

    def here(self, name: str, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
        """The same call in this process, with its cache and compiler."""
        namespace: dict = {}
        monkeypatch.syspath_prepend(str(self.root))
        monkeypatch.setattr(sys, "argv", ["call.py", str(self.root / "here.pt")])
        exec((self.root / "call.py").read_text(), namespace)
        return namespace["CALLS"][name]()


@pytest.fixture
def bare(tmp_path: Path) -> Bare:
    return Bare(tmp_path)


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return len(got) == len(want) and all(map(torch.equal, got, want))


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
    lines = found["user"].splitlines()
    snippet = [line.strip() for line in lines[lines.index(next(filter(is_import, lines))) :]]
    file = bare.root / name
    file.write_text("\n".join(["from user_variant import spec", *snippet]))
    monkeypatch.chdir(bare.root)
    assert cli.main([*command[1:-1], str(out)]) == 0
    assert "2 kernels, 2 new" in capsys.readouterr().out

    found = bare.run("causal", "full", "user", **aot)
    for name in ("causal", "full", "user"):
        assert same(found[name], bare.here(name, monkeypatch)), name


def is_import(line: str) -> bool:
    return "from attnengine.prebuild import Request" in line


def command_in(text: str) -> tuple[list[str], str]:
    """The words of the prebuild command in an error, and what its --specs says."""
    (line,) = (line for line in text.splitlines() if "attnengine prebuild" in line)
    words = shlex.split(line)
    assert words[-2:] == ["--out", "DIR"]
    return words, words[words.index("--specs") + 1]


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
    monkeypatch.setattr(dispatch, "_programs", {})  # a new process, in which nothing is loaded
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


# -- the platform of a wheel -----------------------------------------------------------------------


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
