"""Row functions written by a user: only the forward is given, the gradient is derived."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import BF16, F32, HEADS, Captures, leaf, operands, verify
from torch import Tensor

import attnengine as ae
from attnengine import dispatch, gate
from attnengine.spec import State


class SharpSoftmax(ae.OnlineFunc):
    """Softmax whose maximum is not detached, with a phantom key of score 0: the derivative of its
    statistics goes through amax and sum, which costs passes over the keys. No merge."""

    state = {"m": 0.0, "r": 1.0}

    def update(self, scores: Tensor, state: State) -> tuple[Tensor, State, Any]:
        m = torch.maximum(state["m"], scores.amax())
        alpha = torch.exp(state["m"] - m)
        p = torch.exp(scores - m)
        return p, {"m": m, "r": state["r"] * alpha + p.sum()}, alpha

    def finalize(self, out: Tensor, state: State) -> tuple[Tensor, State]:
        return out / state["r"], {"m": state["m"], "r": state["r"]}

    def weights(self, scores: Tensor, saved: State) -> Tensor:
        return torch.exp(scores - saved["m"]) / saved["r"]


class L2Normalised(ae.OnlineFunc):
    """s / sqrt(floor[h] + sum s^2) with a learnable floor: the initial state has a gradient."""

    def __init__(self, floor: Tensor) -> None:
        self.floor = floor

    def init(self, b: Tensor, h: Tensor, q_idx: Tensor) -> State:
        return {"r": torch.exp(self.floor[h]) + 0.01 * q_idx}

    def update(self, scores: Tensor, state: State) -> tuple[Tensor, State, Any]:
        return scores, {"r": state["r"] + scores.square().sum()}, 1.0

    def finalize(self, out: Tensor, state: State) -> tuple[Tensor, State]:
        norm = torch.sqrt(state["r"])
        return out / norm, {"norm": norm}

    def weights(self, scores: Tensor, saved: State) -> Tensor:
        return scores / saved["norm"]


class Tempered(ae.OnlineFunc):
    """Softmax of scores times a learnable temperature per head, which is part of the state. With
    merge, so that its work can be split. Saves lse and the mean score, both differentiable."""

    def __init__(self, beta: Tensor) -> None:
        self.beta = beta

    def init(self, b: Tensor, h: Tensor, q_idx: Tensor) -> State:
        return {"m": -torch.inf, "r": 0.0, "t": 0.0, "beta": self.beta[h]}

    def update(self, scores: Tensor, state: State) -> tuple[Tensor, State, Any]:
        x = scores * state["beta"]
        m = torch.maximum(state["m"], x.amax().detach())
        alpha, p = torch.exp(state["m"] - m), torch.exp(x - m)
        r, t = state["r"] * alpha + p.sum(), state["t"] * alpha + (p * scores).sum()
        return p, {"m": m, "r": r, "t": t, "beta": state["beta"]}, alpha

    def finalize(self, out: Tensor, state: State) -> tuple[Tensor, State]:
        saved = {"lse": state["m"] + torch.log(state["r"]), "mean": state["t"] / state["r"]}
        return out / state["r"], {**saved, "beta": state["beta"]}

    def weights(self, scores: Tensor, saved: State) -> Tensor:
        return torch.exp(scores * saved["beta"] - saved["lse"])

    def merge(self, a: State, b: State) -> tuple[State, Any, Any]:
        m = torch.maximum(a["m"], b["m"])
        fa, fb = torch.exp(a["m"] - m), torch.exp(b["m"] - m)
        r, t = a["r"] * fa + b["r"] * fb, a["t"] * fa + b["t"] * fb
        return {"m": m, "r": r, "t": t, "beta": a["beta"]}, fa, fb


def sharp() -> tuple[ae.OnlineFunc, Captures]:
    return SharpSoftmax(), {}


def l2() -> tuple[ae.OnlineFunc, Captures]:
    floor = leaf(HEADS, seed=1)
    return L2Normalised(floor), {"floor": floor}


def tempered() -> tuple[ae.OnlineFunc, Captures]:
    beta = (torch.rand(HEADS, generator=torch.Generator().manual_seed(2)) + 0.5).requires_grad_()
    return Tempered(beta), {"beta": beta}


OFFSET = torch.tensor(0)  # of the queries: where a decoded token stands


def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Row 0 is dead; later rows meet more and more keys, after a dead start."""
    at = q + OFFSET
    return (k < 2 * at) & (k >= at // 2)


CASES = [(sharp, F32), (l2, F32), (l2, BF16), (tempered, F32)]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 60, 150), (1, 33, 257), (3, 5, 2)], ids=str)
@pytest.mark.parametrize("make, dtype", CASES)
def test_row_function(make: Callable, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    B, L, S = shape
    row, captures = make()
    spec = ae.AttentionSpec(row_func=row, mask_mod=mask)
    q, k, v = operands(dtype, B=B, L=L, S=S, seed=5)
    reports = verify(spec, q, k, v, captures)
    checked = {r.name for r in reports}
    assert checked >= {"out", "dq", "dk", "dv", *[f"d{n}" for n in captures]}
    handle = ae.compile(spec, q, k, v)
    assert set(handle.program.sources.stats) <= checked


def test_extra_passes_are_made_and_explained() -> None:
    """What cannot be simplified away costs passes over the keys, and explain says so."""
    q, k, v = operands(F32)
    passes = {}
    for make in (sharp, l2, tempered):
        row, _ = make()
        handle = ae.compile(ae.AttentionSpec(row_func=row, mask_mod=mask), q, k, v, backward=True)
        passes[make.__name__] = handle.program.sources.passes
        assert "pass" in handle.explain()
    assert passes["sharp"] >= 1
    assert ae.compile(ae.variants.causal(), q, k, v, backward=True).program.sources.passes == 0


class DetachedSoftmax(SharpSoftmax):
    """As users write it: the maximum is detached, its statistic and the sum are saved."""

    state = {"m": float("-inf"), "r": 0.0}

    def update(self, scores: Tensor, state: State) -> tuple[Tensor, State, Any]:
        m = torch.maximum(state["m"], scores.amax().detach())
        alpha = torch.exp(state["m"] - m)
        p = torch.exp(scores - m)
        return p, {"m": m, "r": state["r"] * alpha + p.sum()}, alpha


class ClampedSoftmax(DetachedSoftmax):
    """Scores beyond 20 have no gradient, which random ones of size 1 would not show."""

    def update(self, scores: Tensor, state: State) -> tuple[Tensor, State, Any]:
        return super().update(scores.clamp(max=20.0), state)

    def weights(self, scores: Tensor, saved: State) -> Tensor:
        return super().weights(scores.clamp(max=20.0), saved)


def test_statistics_without_a_gradient_cost_no_pass() -> None:
    """What a softmax that saves its maximum and sum has in common with one that saves lse: together
    they give rowsum(dO * O) times the weights. Only gradients of their own need the passes."""
    q, k, v = operands(F32)
    sharp_spec = ae.AttentionSpec(row_func=SharpSoftmax(), mask_mod=mask)
    pipeline = ae.compile(sharp_spec, q, k, v, backward=False).pipeline
    assert pipeline.derived is not None and len(pipeline.derived.passes) == 2
    assert pipeline.quiet is not None and len(pipeline.quiet.passes) == 0
    text = ae.compile(sharp_spec, q, k, v, backward=False).explain()
    assert "extra passes over the keys: 2" in text
    assert "extra passes when no statistic has a gradient: 0" in text
    detached = ae.AttentionSpec(row_func=DetachedSoftmax())
    for spec in (detached, ae.AttentionSpec()):
        stages = dispatch.pipeline(spec, dispatch.captures_for(spec), F32, 40, 24, "avx2")
        assert stages.derived is not None and stages.derived.passes == ()
        assert stages.quiet is None


def test_a_clamp_is_not_taken_for_a_softmax() -> None:
    spec = ae.AttentionSpec(row_func=ClampedSoftmax())
    stages = dispatch.pipeline(spec, dispatch.captures_for(spec), F32, 40, 24, "avx2")
    assert stages.derived is not None
    assert not any("rowsum(dO o O) w" in note for note in stages.derived.notes)
    assert "clamp" in str(stages.sources.backward) or "minimum" in str(stages.sources.backward)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 60, 150), (1, 33, 257), (3, 5, 9)], ids=str)
def test_only_the_output_has_a_gradient(shape: tuple[int, int, int]) -> None:
    B, L, S = shape
    spec = ae.AttentionSpec(row_func=SharpSoftmax(), mask_mod=mask)
    q, k, v = operands(F32, B=B, L=L, S=S, seed=8)
    reports = gate.compare(lambda q, k, v: ae.attention(q, k, v, spec), spec, q, k, v)
    assert {r.name for r in reports} >= {"out", "dq", "dk", "dv"}


@pytest.mark.parametrize("make, dtype", CASES)
def test_one_query_and_many_keys(make: Callable, dtype: torch.dtype) -> None:
    """Split work where the row function has merge, one long walk where it has none."""
    row, captures = make()
    spec = ae.AttentionSpec(row_func=row, mask_mod=mask)
    OFFSET.fill_(1400)
    try:
        verify(spec, *operands(dtype, L=1, S=3000, seed=6), captures)
    finally:
        OFFSET.zero_()


def test_statistics_alone_have_gradients() -> None:
    """Only a statistic is used, not the output."""
    row, captures = tempered()
    spec = ae.AttentionSpec(row_func=row, mask_mod=mask)
    grads = []
    for run in (ae.attention, ae.reference):
        q, k, v = (x.requires_grad_() for x in operands(F32, seed=7))
        _, aux = run(q, k, v, spec, return_aux=True)
        loss = torch.where(aux["mean"].isfinite(), aux["mean"], 0.0).square().sum()
        grads.append(torch.autograd.grad(loss, [q, k, captures["beta"]]))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
