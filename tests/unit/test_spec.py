"""AttentionSpec's argument checks, and the checks of row functions."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnengine import spec as spec_module
from attnengine.errors import RowFunctionError
from attnengine.rows import Identity, ReLU, Retention, Sigmoid, Softmax, SoftmaxSink
from attnengine.spec import AttentionSpec, OnlineFunc, check_row_function

# -- arguments -------------------------------------------------------------------------------------


def test_default_is_plain_softmax() -> None:
    spec = AttentionSpec()
    assert isinstance(spec.row_func, Softmax)
    assert (spec.score_mod, spec.mask_mod, spec.scale) == (None, None, None)
    assert hash(spec) == hash(AttentionSpec())
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.scale = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("score_mod", lambda s, b, h, q, k: s, lambda b, h, q, k: q >= k),
        ("mask_mod", lambda b, h, q, k: q >= k, lambda s, b, h, q, k: s),
        ("q_mod", lambda x: x, lambda x, y: x),
        ("k_mod", torch.tanh, lambda: 0),
        ("v_mod", lambda x, y=1: x, lambda *, x: x),
    ],
)
def test_callables_are_told_by_arity(name: str, good: Any, bad: Any) -> None:
    assert getattr(AttentionSpec(**{name: good}), name) is good
    with pytest.raises(TypeError, match=rf"{name} takes \d positional arguments, {name}\("):
        AttentionSpec(**{name: bad})
    with pytest.raises(TypeError, match=f"{name}=3: expected a callable"):
        AttentionSpec(**{name: 3})


def test_partial_counts_what_is_left() -> None:
    def window(size: int, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q - k < size

    AttentionSpec(mask_mod=functools.partial(window, 4))
    with pytest.raises(TypeError, match="mask_mod takes 4"):
        AttentionSpec(mask_mod=functools.partial(window, 4, 5))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scale_must_be_finite(scale: float) -> None:
    with pytest.raises(ValueError, match="scale="):
        AttentionSpec(scale=scale)


@pytest.mark.parametrize("scale", ["1", True, torch.tensor(1.0)])
def test_scale_must_be_a_number(scale: Any) -> None:
    with pytest.raises(TypeError, match="scale="):
        AttentionSpec(scale=scale)


def test_row_func_must_be_an_instance() -> None:
    with pytest.raises(TypeError, match=r"pass an instance: Softmax\(\.\.\.\)"):
        AttentionSpec(row_func=Softmax)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected an OnlineFunc instance"):
        AttentionSpec(row_func=torch.softmax)  # type: ignore[arg-type]


def test_arguments_of_built_in_row_functions() -> None:
    with pytest.raises(TypeError, match="sink="):
        SoftmaxSink(0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sink has shape \(2, 2\)"):
        SoftmaxSink(torch.zeros(2, 2))
    for bias in (math.nan, True, torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="bias"):
            Sigmoid(bias)


# -- row functions ---------------------------------------------------------------------------------

SINK = torch.tensor([0.3, -1.0], requires_grad=True)


@pytest.mark.parametrize(
    "func",
    [
        Softmax(),
        Softmax(max_scores=True),
        SoftmaxSink(SINK),
        SoftmaxSink(SINK, max_scores=True),
        SoftmaxSink(torch.full((1,), -math.inf)),
        Sigmoid(-2.0),
        Sigmoid(SINK),
        Sigmoid(torch.tensor(1.0, requires_grad=True)),
        ReLU(),
        Identity(),
        Retention(),
    ],
    ids=lambda f: type(f).__name__,
)
def test_built_in_row_functions_obey_the_rules(func: OnlineFunc) -> None:
    AttentionSpec(row_func=func)
    assert type(func).merge is not OnlineFunc.merge


class Tiled(Softmax):
    def update(self, scores: Tensor, state: dict) -> tuple:
        p, new, alpha = super().update(scores, state)
        return p, {**new, "r": new["r"] + 1e-6}, alpha


class ForgetsFactor(Softmax):
    def update(self, scores: Tensor, state: dict) -> tuple:
        p, new, _ = super().update(scores, state)
        return p, new, 1.0


class NotLinear(Softmax):
    def finalize(self, out: Tensor, state: dict) -> tuple:
        return torch.tanh(out), super().finalize(out, state)[1]


class Affine(Softmax):
    def finalize(self, out: Tensor, state: dict) -> tuple:
        out, saved = super().finalize(out, state)
        return out + 1e-3, saved


class MixesColumns(Softmax):
    def finalize(self, out: Tensor, state: dict) -> tuple:
        out, saved = super().finalize(out, state)
        return out.flip(0), saved


class StatisticOfOut(Identity):
    def finalize(self, out: Tensor, state: dict) -> tuple:
        return out, {"size": out.norm()}


class WrongWeights(Softmax):
    def weights(self, scores: Tensor, saved: dict) -> Tensor:
        return torch.exp(scores - saved["lse"]) * 1.01


class WrongGradient(Softmax):
    def weights(self, scores: Tensor, saved: dict) -> Tensor:
        return torch.exp(scores - saved["lse"].detach())


class WrongMerge(Softmax):
    def merge(self, a: dict, b: dict) -> tuple:
        new, fa, fb = super().merge(a, b)
        return {**new, "r": a["r"] + b["r"]}, fa, fb


class DropsState(Softmax):
    def update(self, scores: Tensor, state: dict) -> tuple:
        p, new, alpha = super().update(scores, state)
        return p, {"m": new["m"]}, alpha


class VectorState(Softmax):
    def update(self, scores: Tensor, state: dict) -> tuple:
        p, new, alpha = super().update(scores, state)
        return p, {**new, "r": p}, alpha


class ScalarWeights(Softmax):
    def update(self, scores: Tensor, state: dict) -> tuple:
        p, new, alpha = super().update(scores, state)
        return p.sum(), new, alpha


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Tiled, "do not depend on the tiling: tiles of .* keys against one tile of 13: 0"),
        (ForgetsFactor, "do not depend on the tiling"),
        (NotLinear, "finalize is linear in out"),
        (Affine, "finalize is linear in out"),
        (MixesColumns, "finalize is linear in out"),
        (StatisticOfOut, "saved statistics do not depend on out"),
        (WrongWeights, r"weights\(saved\) equals the online result: .*: 0.* against 0"),
        (WrongGradient, r"weights\(saved\) has the gradient of the online result"),
        (WrongMerge, "merge equals one pass over both parts"),
        (DropsState, r"keeps the state's names: update gave \['m'\]"),
        (VectorState, r"row scalars are 0-d: 'r' of update has shape \(13,\)"),
        (ScalarWeights, r"13 scores gave weights \(\)"),
    ],
)
def test_broken_row_functions_are_named(broken: type, message: str) -> None:
    with pytest.raises(RowFunctionError, match=rf"row function {broken.__name__}: .*{message}"):
        AttentionSpec(row_func=broken())


def test_missing_method_is_named() -> None:
    class Half(OnlineFunc):
        pass

    with pytest.raises(NotImplementedError, match=r"Half must define update\(scores, state\)"):
        AttentionSpec(row_func=Half())


def test_checks_run_once_per_class_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    class Watched(Softmax):
        def __init__(self, size: Any) -> None:
            super().__init__()
            self.size = size

    run = spec_module._RowCheck.run
    monkeypatch.setattr(spec_module._RowCheck, "run", lambda c: (runs.append(1), run(c))[1])
    for size, count in [(1, 1), (1, 1), (2, 2), (torch.ones(2), 3), (torch.zeros(2), 3), ([], 4)]:
        check_row_function(Watched(size))
        assert len(runs) == count
    check_row_function(Watched([]))  # nothing to remember it by
    assert len(runs) == 5


def test_checks_leave_the_random_state_alone_and_work_in_inference_mode() -> None:
    class Fresh(Softmax):
        pass

    before = torch.get_rng_state()
    with torch.inference_mode():
        AttentionSpec(row_func=Fresh())

        class Sink(SoftmaxSink):
            pass

        AttentionSpec(row_func=Sink(torch.zeros(2)))
    assert torch.equal(before, torch.get_rng_state())


def test_nan_in_a_captured_tensor_is_data() -> None:
    class Sink(SoftmaxSink):
        pass

    AttentionSpec(row_func=Sink(torch.full((2,), math.nan)))
