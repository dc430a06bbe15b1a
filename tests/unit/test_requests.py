"""What may be asked of `attnengine prebuild`: specs, dtypes, head dims and targets."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

import attnengine as ae
from attnengine import builtin, dispatch, prebuild, prebuild_run, settings
from attnengine.key import Form
from attnengine.prebuild import Request

D, DV = 40, 24


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
    assert isinstance(requests, list)
    pairs = [r for r in requests if isinstance(r, Request)]
    assert len(pairs) == len(builtin.BUILTIN)
    for request in pairs:
        found = request.kernels(torch.float32, D, DV, "portable")
        assert [k.label.split()[0] for k in found] == ["forward", "backward"], request.name
        assert {k.isa for k in found} == {"portable"}
        assert f"D{D}x{DV} portable {request.name}" in found[0].label
        assert len(_forward(request).kernels(torch.float32, D, DV, "portable")) == 1


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


def test_targets_of_cuda_and_several() -> None:
    assert prebuild_run.target_isas("sm80") == prebuild_run.target_isas("sm_80") == ["sm_80"]
    several = prebuild_run.target_isas("cpu:avx2,sm80,cpu:avx2,sm_86")
    assert several == ["avx2", "sm_80", "sm_86"]
    with pytest.raises(ValueError, match="--target cpu,sm70: .*cpu:all, sm80, .*by commas"):
        prebuild_run.target_isas("cpu,sm70")


def test_cuda_starts_at_the_first_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine may know that the first spills registers; one that looks for it does not."""
    request = Request(ae.variants.causal(), "bf16", 64, name="causal")
    (first,) = request.kernels(torch.bfloat16, 64, 64, "sm_80")
    assert first.program is not None
    known = dispatch.program(
        request.spec, dispatch.captures_for(request.spec), torch.bfloat16, 64, 64, "sm_80"
    )
    later = dataclasses.replace(first.program.sources, forward="// another", candidate=2)
    monkeypatch.setattr(known, "sources", later)
    (again,) = request.kernels(torch.bfloat16, 64, 64, "sm_80")
    assert again.source == first.source and again.program is not None
    assert again.program.sources.candidate == 0 and known.sources is later


def test_cuda_makes_what_it_has(tmp_path: Path) -> None:
    """16-bit dtypes and head dims that have kernels; the others are left out, with one line."""
    log = (tmp_path / "log").open("w+")
    every = Request(ae.variants.causal(), name="causal", head_dims=(64, (320, 300)))
    found = prebuild_run._generated([every], ["sm_80"], Console(file=log))
    labels = ["forward bf16 D64x64 sm_80 causal", "forward fp16 D64x64 sm_80 causal"]
    assert sorted(kernel.label for kernel in found) == labels
    assert {kernel.isa for kernel in found} == {"sm_80"}
    log.seek(0)
    assert log.read() == (
        "CUDA kernels are bf16 or fp16 with head dims up to 576 (beyond 256 the values' a multiple "
        "of 32): 4 others are not made\n"
    )
    none = Request(ae.variants.causal(), "fp32", 64)
    with pytest.raises(ValueError, match="of 32\\): none of the requests is; see --dtypes and"):
        prebuild_run._generated([none], ["sm_80"], Console(file=log))


def test_forms_of_cuda_kernels() -> None:
    """Decode, prefill and MLA's latent where asked; on a CPU one kernel serves all calls."""
    spec, few = ae.variants.causal(), {"backward": False, "name": "causal"}
    every = Request(spec, "bf16", 64, forms=("dense", "decode", "prefill"), **few)
    found = every.kernels(torch.bfloat16, 64, 64, "sm_80")
    assert [k.label.partition("causal")[2] for k in found] == [
        "", " (decode16)", " (decode32)", " (decode64)", " (prefill)",
    ]  # fmt: skip
    assert len({k.source for k in found}) == 5
    rows = [k.program.form.decode_rows for k in found if k.program is not None]
    assert rows == [0, 16, 32, 64, 0]
    assert len(every.kernels(torch.bfloat16, 64, 64, "portable")) == 1
    latent = Request(spec, "bf16", [(576, 512)], forms="decode16", shared_kv=True, **few)
    (kernel,) = latent.kernels(torch.bfloat16, 576, 512, "sm_80")
    assert "kSharedKV = true" in kernel.source and "decode16, shared KV" in kernel.label


def test_a_form_is_what_its_calls_look_for() -> None:
    """A kernel that was made ahead of time is the one that a call asks for."""
    request = Request(ae.variants.causal(), "bf16", 64, forms="decode32")
    (kernel,) = request.kernels(torch.bfloat16, 64, 64, "sm_80")
    spec = ae.AttentionSpec(mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)
    captures = dispatch.captures_for(spec)
    called = dispatch.program(spec, captures, torch.bfloat16, 64, 64, "sm_80")
    assert called.in_form(Form.of_sequences(4 * 8)).sources.forward == kernel.source
    command = called.in_form(Form.of_sequences(4 * 8))._remedy("forward", kernel.source)
    assert "--specs builtin:causal --dtypes bf16 --head-dims 64 --forms decode32 " in command
    other = ae.AttentionSpec(mask_mod=lambda b, h, q, k: q >= 2 * k)
    made = dispatch.program(
        other, dispatch.captures_for(other), torch.bfloat16, 64, 64, "sm_80", Form(0, True, True)
    )
    said = made._remedy("forward", made.sources.forward)
    assert 'head_dims=64, forms="prefill", shared_kv=True)]' in said


@pytest.mark.parametrize(
    "given, message",
    [
        ({"forms": "decode8"}, "forms has 'decode8': expected 'dense', 'decode', 'prefill', 'deco"),
        ({"forms": ()}, "forms is empty"),
        ({"shared_kv": True}, "forms must not have 'dense'"),
    ],
)
def test_forms_that_there_are_not(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(ae.AttentionSpec(), **given)


def test_forms_of_files_and_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    file.write_text('[{"variant": "causal", "forms": ["decode", "prefill"], "shared_kv": true}]')
    (request,) = prebuild.read_requests(str(file))  # type: ignore[misc]
    assert len(request.kernel_forms()) == 4 and all(f.shared_kv for f in request.kernel_forms())
    options = prebuild_run.Options("builtin", "sm80", tmp_path, forms=["decode16"])
    (changed,) = prebuild_run._overruled([request], options)
    assert changed.kernel_forms() == (Form(16, True),)
    with pytest.raises(ValueError, match="--shared-kv belongs to --forms"):
        prebuild_run._overruled([request], dataclasses.replace(options, forms=(), shared_kv=True))
