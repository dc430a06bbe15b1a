"""Kernels of linear attention and of token statistics made ahead of time: requests, the builtin
variants, and a machine without a compiler. Modules are those of other tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_machine import DV, Bare, D, command_in, lines_in, same
from build_work import needs_compiler
from rich.console import Console
from test_cuda_build import needs_nvcc

import attnengine as ae
from attnengine import build, cli, dispatch, prebuild, prebuild_run, prebuilt, statistics_ops
from attnengine.arch import CUDA
from attnengine.linear import builtin
from attnengine.linear import dispatch as linear_dispatch
from attnengine.linear.arguments import check_arguments
from attnengine.linear.stages import request_of
from attnengine.prebuild import LinearKernels, StatisticsKernels

Spec = ae.LinearAttentionSpec


@pytest.fixture(autouse=True)
def as_new() -> None:
    prebuilt.forget()


def requests(text: str) -> list[Any]:
    found = prebuild.read_requests(text)
    assert isinstance(found, list)
    return found


# -- requests --------------------------------------------------------------------------------------


def test_dtypes_of_what_stands_beside_q() -> None:
    """A decay is in the accumulator's type and a beta in q's, unless they are named."""
    both = LinearKernels(Spec(), ("bf16", "fp64"), (64, (128, 32)), decay="channel", delta=True)
    r = both.request(torch.bfloat16, 64, 64)
    assert (r.element, r.decay_kind) == ("bf16", "channel")
    assert (r.decay_dtype, r.beta_dtype) == ("f32", "bf16")
    r = both.request(torch.float64, 128, 32)
    assert (r.d, r.dv, r.decay_dtype, r.beta_dtype) == (128, 32, "f64", "f64")
    named = LinearKernels(Spec(normalizer="sum"), decay="scalar", decay_dtype="bf16")
    r = named.request(torch.float32, 64, 64)
    assert (r.decay_dtype, r.beta_dtype, r.normalizer) == ("bf16", None, True)
    assert len(named.programs()) == 6 and {dtype for dtype, _, _ in named.programs()} == {
        *dispatch.SUPPORTED
    } - {torch.float64}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"dtypes": "fp8"}, "dtypes has 'fp8': expected 'fp32', 'fp64'"),
        ({"decay": "head"}, "decay='head': expected one of 'none', 'scalar', 'channel'"),
        ({"decay": "scalar", "decay_dtype": "int8"}, "decay_dtype has 'int8': expected 'fp32'"),
        ({"decay_dtype": "fp32"}, "decay_dtype='fp32' of calls without it"),
        ({"decay": "scalar", "beta_dtype": "fp32"}, "beta_dtype='fp32' of calls without it"),
    ],
)
def test_requests_that_no_kernel_serves(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearKernels(Spec(), **given)


def test_a_request_needs_a_spec() -> None:
    with pytest.raises(TypeError, match="spec must be an attnengine.LinearAttentionSpec or a func"):
        LinearKernels(ae.AttentionSpec())  # type: ignore[arg-type]
    wrong = LinearKernels(lambda dtype, d, dv: ae.AttentionSpec())  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="returned AttentionSpec, expected an attnengine.Linear"):
        wrong.kernels(torch.float32, 8, 8, "portable")
    beyond = LinearKernels(Spec())
    with pytest.raises(ValueError, match="1024"):
        beyond.kernels(torch.float32, 2048, 8, "portable")


def test_captured_tensors_say_what_they_broadcast_to() -> None:
    """Sizes are read off the tensors, of q's heads and of v's; the kernel is that of any sizes."""
    gate, scales = torch.ones(6, 33, 1, requires_grad=True), torch.ones(3, 1, 1)
    spec = Spec(q_mod=lambda x: x * scales, out_mod=lambda x: x * gate)
    wanted = LinearKernels(spec, decay="scalar")
    forward, backward = wanted.kernels(torch.float32, D, DV, "portable")
    q, k, v = torch.ones(2, 2, 9, D), torch.ones(2, 2, 9, D), torch.ones(2, 4, 9, DV)
    decay = torch.zeros(2, 4, 9)
    gate, scales = torch.ones(4, 9, 1, requires_grad=True), torch.ones(2, 1, 1)
    called = program(
        {"q": q, "k": k, "v": v, "decay": decay,
         "spec": Spec(q_mod=lambda x: x * scales, out_mod=lambda x: x * gate)}, "portable"
    )  # fmt: skip
    assert (forward.source, backward.source) == (called.sources.forward, called.sources.backward)
    explicit = LinearKernels(spec, decay="scalar", sizes=(2, 3, 6, 33), backward=False)
    (alone,) = explicit.kernels(torch.float32, D, DV, "portable")
    assert alone.source == forward.source and alone.label.startswith("linear forward f32 D40x24")


def program(call: dict[str, Any], isa: str) -> linear_dispatch.LinearProgram:
    """What a call looks for."""
    spec = call.get("spec") or Spec()
    a = check_arguments(**call)
    request = request_of(a, call["q"], spec.normalizer == "sum")
    captures = linear_dispatch.captures_for(spec)
    return linear_dispatch.program(spec, captures, request, (a.B, a.Hk, a.H, a.L), isa)


# -- builtin ---------------------------------------------------------------------------------------


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape).to(dtype).requires_grad_()


def calls(dtype: torch.dtype) -> dict[str, Callable[[], dict[str, Any]]]:
    """Each builtin variant as a model with learned inputs calls it: other sizes, grouped heads."""
    B, G, H, L, V = 1, 2, 6, 17, ae.linear_variants
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v, z = (leaf(B, h, L, d, dtype=dtype) for h, d in ((G, D), (G, D), (H, DV), (H, DV)))
    g, gk = -leaf(B, H, L, dtype=wide), -leaf(B, H, L, D, dtype=wide)
    beta, A, skip = leaf(B, H, L, dtype=dtype), -leaf(H), leaf(H, dtype=wide)
    return {
        "simple_gla": lambda: V.simple_gla(q, k, v, g),
        "retention": lambda: V.retention(q, k, v),
        "gla": lambda: V.gla(q, k, v, gk),
        "mamba2": lambda: V.mamba2(v, -g, A, k, q),
        "mamba2 with D": lambda: V.mamba2(v, -g, A, k, q, skip),
        "mamba2 with D and z": lambda: V.mamba2(v, -g, A, k, q, skip, z),
        "elu_linear": lambda: V.elu_linear(q, k, v),
        "delta_net": lambda: V.delta_net(q, k, v, beta),
        "gated_delta_net": lambda: V.gated_delta_net(q, k, v, g, beta),
        "kda": lambda: V.kda(q, k, v, gk, beta),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_builtin_kernels_are_those_that_calls_look_for(dtype: torch.dtype) -> None:
    """On every target, with the gradient on CPUs; the name of a call is its request's."""
    made = requests("builtin:linear")
    want = calls(dtype)
    assert [r.name.removeprefix("linear.") for r in made] == [n.partition(" ")[0] for n in want]
    for request, (name, call) in zip(made, want.items(), strict=True):
        for isa in ("avx512_bf16", "portable", "sm_80"):
            if request.refused(isa, dtype, D, DV):
                assert isa == "sm_80" and dtype == torch.float32
                continue
            found = [k.source for k in request.kernels(dtype, D, DV, isa)]
            sources = program(call(), isa).sources
            assert found == [s for s in (sources.forward, sources.backward) if s], (name, isa)
            assert len(found) == (1 if isa == "sm_80" else 2)


def test_builtin_names() -> None:
    every, linear = requests("builtin"), requests("builtin:linear")
    assert len(linear) == len(builtin.BUILTIN)
    assert {r.name for r in linear} == {f"linear.{n}" for n in builtin.names()} - {
        "linear.gated_retention"  # simple_gla by another name
    }
    statistics = every[-1]
    assert isinstance(statistics, StatisticsKernels) and statistics.name == "token_statistics"
    assert [r.name for r in every[-1 - len(linear) : -1]] == [r.name for r in linear]
    assert all(d == 64 or d == 128 for r in linear for _, d, _ in r.programs())
    with pytest.raises(
        ValueError, match="builtin:gla: expected names of full, .*linear.gla, .*tok"
    ):
        prebuild.read_requests("builtin:gla")


def test_statistics_kernels() -> None:
    wanted = StatisticsKernels("bf16", (64, (64, 32)))
    found = wanted.kernels(torch.bfloat16, 64, 64, "avx2")
    labels = ["statistics forward bf16 D64 avx2", "statistics backward bf16 D64 avx2"]
    assert [k.label for k in found] == labels
    assert "one head dim" in wanted.refused("avx2", torch.bfloat16, 64, 32)
    assert "one head dim, 1 to 1024" in wanted.refused("avx2", torch.bfloat16, 2048, 2048)
    assert not wanted.refused("avx2", torch.bfloat16, 64, 64)
    assert len(StatisticsKernels(backward=False).kernels(torch.float32, 64, 64, "avx2")) == 1


def test_what_a_target_does_not_have_is_left_out(tmp_path: Path) -> None:
    log = (tmp_path / "log").open("w+")
    options = prebuild_run.Options("builtin", "sm80", tmp_path, dtypes=["bf16"], head_dims=[64])
    asked = prebuild_run._overruled(requests("builtin:linear.gla,token_statistics"), options)
    (kernel,) = prebuild_run._generated(asked, ["sm_80"], Console(file=log))
    assert kernel.label == "linear forward bf16 D64x64 channel decay f32 sm_80 linear.gla"
    log.seek(0)
    assert log.read() == "token statistics attention has kernels for CPUs: 1 others are not made\n"
    with pytest.raises(ValueError, match="CPUs: none of the requests is; see --dtypes"):
        prebuild_run._generated(asked[1:], ["sm_80"], Console(file=log))
    wide = [LinearKernels(Spec(), "bf16", 320), LinearKernels(Spec(), "fp32", 64)]
    with pytest.raises(
        ValueError, match="linear attention are bf16 or fp16 with head dims up to 2"
    ):
        prebuild_run._generated(wide, ["sm_80"], Console(file=log))


def test_files_and_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    table = {
        "dtypes": ["bf16"], "forms": "decode", "decay_dtype": "bf16",
        "specs": [
            {"variant": "linear.gated_delta_net", "head_dims": [[128, 256]], "beta_dtype": "fp32"},
            {"variant": "linear.mamba2", "D": True, "backward": False},
            {"variant": "token_statistics", "head_dims": 64},
            {"variant": "causal"},
        ],
    }  # fmt: skip
    file.write_text(json.dumps(table))
    gated, mamba, statistics, causal = requests(str(file))
    r = gated.request(*gated.programs()[0])
    assert (r.d, r.dv, r.decay_dtype, r.beta_dtype) == (128, 256, "bf16", "f32")
    assert mamba.spec(torch.float32, 8, 8).out_mod is not None and not mamba.backward
    assert statistics.programs() == ((torch.bfloat16, 64, 64),) and len(causal.kernel_forms()) == 3
    words = {"decay_dtype": "fp16", "beta_dtype": "fp64", "dtypes": ["fp32"], "forms": ["prefill"]}
    options = prebuild_run.Options("", "cpu", tmp_path, **words)
    gated, mamba, statistics, causal = prebuild_run._overruled(requests(str(file)), options)
    assert (gated.decay_dtype, gated.beta_dtype, mamba.beta_dtype) == ("fp16", "fp64", None)  # type: ignore[attr-defined]
    assert all(r.programs()[0][0] == torch.float32 for r in (gated, mamba, statistics, causal))
    assert [f.label for f in causal.kernel_forms()] == ["prefill"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"variant": "linear.glu"}]', r"variant='linear.glu': expected one of linear.retention"),
        ('[{"variant": "linear.gla", "D": true}]', "linear.gla has no setting D = True: expected"),
        ('[{"variant": "linear.mamba2", "D": 3}]', "D = 3: expected D = true, z = true"),
        ('[{"variant": "linear.gla", "forms": "dense"}]', "linear.gla has no setting forms"),
        ('[{"variant": "token_statistics", "window": 3}]', "no setting 'window': expected none"),
        ('[{"variant": "linear.gla", "beta_dtype": "fp32"}]', "beta_dtype='fp32' of calls without"),
    ],
)  # fmt: skip
def test_wrong_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "kernels.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        prebuild.read_requests(str(file))


def test_a_linear_spec_is_a_request(tmp_path: Path) -> None:
    file = tmp_path / "linear_specs.py"
    file.write_text(
        "import attnengine as ae\nfrom attnengine.prebuild import LinearKernels\n"
        "SPECS = [ae.LinearAttentionSpec(), LinearKernels(ae.LinearAttentionSpec(), 'bf16', 64)]\n"
    )
    plain, named = requests(str(file))
    assert isinstance(plain, LinearKernels) and plain.decay == "none" and plain.name == "spec 0"
    assert named.programs() == ((torch.bfloat16, 64, 64),) and named.name == "spec 1"


# -- what is missing -------------------------------------------------------------------------------


def remedy(made: linear_dispatch.LinearProgram, kind: str = "forward") -> str:
    return made._remedy(kind, getattr(made.sources, kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_errors_name_the_variant_of_a_call(dtype: torch.dtype) -> None:
    """Its command makes the kernel that is missing, whatever the dtypes of decay and beta."""
    for name, call in calls(dtype).items():
        given = call()
        for of_decay in (None, torch.float16):
            if of_decay is not None and "decay" in given:
                given = {**given, "decay": given["decay"].to(of_decay)}
            made = program(given, "avx2")
            for kind in ("forward", "backward"):
                command, specs = command_in(remedy(made, kind))
                own = "simple_gla" if name == "retention" else name.partition(" ")[0]
                assert specs == f"builtin:linear.{own}", name
                sources = {k.source for k in asked_for(command)}
                assert getattr(made.sources, kind) in sources, (name, of_decay, kind)


def asked_for(command: list[str]) -> list[prebuild.Kernel]:
    """The modules that a prebuild command would make."""
    given = vars(cli._parser().parse_args(command[1:]))
    fields = prebuild_run.Options.__dataclass_fields__
    options = prebuild_run.Options(**{name: given[name] for name in fields})
    asked = prebuild_run._overruled(requests(options.specs), options)
    isas = prebuild_run.target_isas(options.target)
    return prebuild_run._generated(asked, isas, Console(quiet=True))


def test_errors_give_the_lines_for_a_spec_of_ones_own(tmp_path: Path) -> None:
    x = calls(torch.bfloat16)["gated_delta_net"]()
    decay, beta = x["decay"].bfloat16(), x["beta"].half()
    spec = Spec(v_mod=lambda v: v * 3.5, normalizer="sum")
    made = program({**x, "spec": spec, "decay": decay, "beta": beta}, "sm_80")
    text = remedy(made)
    assert command_in(text)[0][-4:-2] == ["--target", "sm80"]
    lines = lines_in(text)
    assert lines[1] == (
        'SPECS = [LinearKernels(spec, dtypes="bf16", head_dims=[(40, 24)], decay="scalar", '
        'delta=True, decay_dtype="bf16", beta_dtype="fp16")]'
    )
    namespace: dict[str, Any] = {"spec": spec}
    exec("\n".join(lines), namespace)
    (wanted,) = namespace["SPECS"]
    (kernel,) = wanted.kernels(torch.bfloat16, D, DV, "sm_80")
    assert kernel.source == made.sources.forward
    plain = program({n: x[n] for n in "qkv"}, "portable")
    assert lines_in(remedy(plain))[1].endswith('dtypes="bf16", head_dims=[(40, 24)])]')


def test_errors_of_exported_programs_name_a_function() -> None:
    """The tensors of the file's own program are not a spec's, so running it is a way too."""
    made = program(calls(torch.float32)["gla"](), dispatch.default_isa())
    read = linear_dispatch.program_of(made.portable)
    assert "--specs builtin:linear.gla " in remedy(read)
    assert "for an exported program, --specs kernels.py:run" in remedy(read)
    assert "exported" not in remedy(made)


def test_statistics_without_a_compiler(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_ops, "_kernels", {})
    monkeypatch.setenv("ATTNENGINE_DISABLE_JIT", "1")
    with pytest.raises(ae.KernelUnavailable, match="DISABLE_JIT is set") as caught:
        ae.token_statistics_attention(torch.ones(1, 2, 3, D), torch.ones(2))
    command, specs = command_in(str(caught.value))
    assert specs == "builtin:token_statistics"
    isa = dispatch.default_isa()
    labels = [f"statistics forward f32 D{D} {isa}", f"statistics backward f32 D{D} {isa}"]
    assert [k.label for k in asked_for(command)] == labels


# -- a machine without a compiler ------------------------------------------------------------------


@needs_compiler
@pytest.mark.compiles
def test_no_compiler_runs_what_the_errors_say_to_make(
    bare: Bare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forward and gradients of a plain recurrence, of a spec of one's own, and of statistics."""
    out, names = bare.root / "kernels", ("recurrence", "gated", "statistics")
    missing = bare.run(*names)
    commands = {name: command_in(missing[name]) for name in names}
    assert {name: specs for name, (_, specs) in commands.items()} == {
        "recurrence": "builtin:linear.simple_gla", "gated": "kernels.py",
        "statistics": "builtin:token_statistics",
    }  # fmt: skip
    lines = "\n".join(["from user_variant import gated as spec", *lines_in(missing["gated"])])
    (bare.root / "kernels.py").write_text(lines)
    monkeypatch.chdir(bare.root)
    for name in names:
        assert cli.main([*commands[name][0][1:-1], str(out)]) == 0
        assert "2 kernels, 2 new" in capsys.readouterr().out
    found = bare.run(*names, ATTNENGINE_AOT_PATH=str(out))
    for name in names:
        assert same(found[name], bare.here(name, monkeypatch)), name


@needs_nvcc
@pytest.mark.compiles
def test_cuda_kernels_need_no_nvcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made without a GPU; a call finds them, and the error of another has its command."""
    words = ["--specs", "builtin:linear.simple_gla", "--dtypes", "bf16", "--head-dims", f"{D}x{DV}"]
    out = tmp_path / "kernels"
    assert cli.main(["prebuild", *words, "--target", "sm80", "--out", str(out)]) == 0
    assert "1 kernels, 1 new in " in capsys.readouterr().out
    (kernel,) = out.rglob("kernel.cubin")
    monkeypatch.setenv("ATTNENGINE_AOT_PATH", str(out))
    monkeypatch.setenv("ATTNENGINE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    build.forget()
    made = program(calls(torch.bfloat16)["retention"](), "sm_80")
    found = build.device_module(made.sources.forward, CUDA["sm_80"].code, "")
    assert found.folder == kernel.parent
    other = program(calls(torch.float16)["retention"](), "sm_80")
    with pytest.raises(ae.KernelUnavailable, match="'/nowhere' has no bin/nvcc") as caught:
        other.forward()
    command, specs = command_in(str(caught.value))
    assert specs == "builtin:linear.simple_gla" and "fp16" in command and "sm80" in command
    build.forget()
