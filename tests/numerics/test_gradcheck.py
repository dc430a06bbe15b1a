"""torch.autograd.gradcheck on generated fp64 code: derivatives against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import F64, HEADS, Captures, gathers, leaf, operand_mods, operands, verify
from test_row_functions import L2Normalised, SharpSoftmax
from torch import Tensor

import attnengine as ae

LENGTH, KEYS, DIM, VALUE_DIM = 4, 5, 3, 2


def everything() -> tuple[ae.AttentionSpec, Captures]:
    """Gathers of every kind and operand mods in one spec, softmax with a sink."""
    scores, captures = gathers(LENGTH, KEYS, F64, F64)
    mods, scalars = operand_mods(F64)
    logit = leaf(HEADS, seed=1, dtype=F64)
    spec = ae.AttentionSpec(
        score_mod=scores.score_mod,
        mask_mod=lambda b, h, q, k: (k <= q + 2) & (q != 2),
        row_func=ae.SoftmaxSink(logit),
        q_mod=mods.q_mod,
        k_mod=mods.k_mod,
        v_mod=mods.v_mod,
        scale=0.4,
    )
    return spec, {**captures, **scalars, "logit": logit}


def normalised() -> tuple[ae.AttentionSpec, Captures]:
    floor = leaf(HEADS, seed=2, dtype=F64)
    return ae.AttentionSpec(row_func=L2Normalised(floor)), {"floor": floor}


def capped() -> tuple[ae.AttentionSpec, Captures]:
    """A row function whose derivative needs passes, under a softcap and a mask."""
    cap = torch.tensor(2.0, dtype=F64, requires_grad=True)
    spec = ae.AttentionSpec(
        score_mod=lambda s, b, h, q, k: cap * torch.tanh(s / cap),
        mask_mod=lambda b, h, q, k: k <= q,
        row_func=SharpSoftmax(),
    )
    return spec, {"cap": cap}


CASES = [everything, normalised, capped]


@pytest.mark.parametrize("q_size", [1.0, 0.0], ids=["", "all scores equal"])
def test_output_alone(q_size: float) -> None:
    """Statistics whose gradients need passes, and get none: the maximum may then be anywhere."""
    spec, captures = capped()
    q, k, v = operands(F64, 1, HEADS, 2, LENGTH, KEYS, d=DIM, dv=VALUE_DIM)

    def run(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        return ae.attention(q, k, v, spec)

    inputs = [x.requires_grad_() for x in (q * q_size, k, v)]
    assert torch.autograd.gradcheck(run, (*inputs, *captures.values()))


@pytest.mark.parametrize("make", CASES)
def test_gradcheck(make: Any) -> None:
    """q, k, v and every captured tensor, through the output and all saved statistics."""
    spec, captures = make()
    inputs = operands(F64, 1, HEADS, 2, LENGTH, KEYS, d=DIM, dv=VALUE_DIM)

    def run(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        out, aux = ae.attention(q, k, v, spec, return_aux=True)
        return out, *(torch.where(x.isfinite(), x, 0.0) for x in aux.values())

    leaves = [x.requires_grad_() for x in inputs]
    # The captured tensors are read where they are: gradcheck changes them in place.
    assert torch.autograd.gradcheck(run, (*leaves, *captures.values()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize("B, L, S", [(2, LENGTH, KEYS), (1, LENGTH, 1)])
def test_gate(make: Any, B: int, L: int, S: int) -> None:
    """The same kernels against the reference, to 1e-12."""
    spec, captures = make()
    verify(spec, *operands(F64, B, HEADS, 2, L, S, d=DIM, dv=VALUE_DIM), captures)


@pytest.mark.parametrize("make", [normalised, capped])
def test_gate_of_many_tiles(make: Any) -> None:
    spec, captures = make()
    verify(spec, *operands(F64, 2, HEADS, 2, 130, 200, d=DIM, dv=VALUE_DIM), captures)
