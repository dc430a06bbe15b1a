"""Captured tensors: every kind of gather, every stored dtype, and their gradients."""

from __future__ import annotations

import pytest
import torch
from problems import BF16, F32, HEADS, alibi, gathers, leaf, operand_mods, operands, verify

import attnengine as ae

LENGTH, KEYS = 70, 150


@pytest.mark.parametrize("dtype", [F32], ids=["f32"])
def test_any_number_of_gathers_of_one_tensor(dtype: torch.dtype) -> None:
    """And of one that is stored in 16 bits: its gradient is summed in fp32, rounded once."""
    spec, captures = gathers(LENGTH, KEYS, stored=BF16)
    verify(spec, *operands(dtype, B=2, L=LENGTH, S=KEYS), captures)


@pytest.mark.parametrize("dtype", [BF16], ids=["bf16"])
def test_operand_mods_share_captured_scalars(dtype: torch.dtype) -> None:
    spec, captures = operand_mods()
    verify(spec, *operands(dtype, B=2, L=LENGTH, S=KEYS), captures)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "reversed storage order"])
def test_strides_of_captured_tensors(layout: str) -> None:
    """Gradients have the tensor's own meaning, whatever its strides; an expanded tensor's are
    summed by torch, outside."""
    wide = leaf(2 * LENGTH, 2 * KEYS, seed=1)
    make = {
        "transposed": lambda: leaf(KEYS, LENGTH, seed=1).detach().mT,
        "sliced": lambda: wide.detach()[1::2, 3 : 3 + KEYS],
        "expanded": lambda: wide.detach()[0, :KEYS].expand(LENGTH, KEYS),
        "reversed storage order": lambda: wide.detach()[:LENGTH, ::2],
    }
    bias = make[layout]().requires_grad_()
    spec = ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s + bias[q, k])
    verify(spec, *operands(F32, L=LENGTH, S=KEYS), {"bias": bias})


def test_captured_tensor_that_is_not_a_leaf() -> None:
    """The usual case: a parameter goes through a layer before it is captured."""
    weight = leaf(HEADS, 3, seed=2)
    grads = []
    for attend in (ae.attention, ae.reference):
        slopes = torch.sigmoid(weight.sum(1)) + 0.0 * weight[0, 0]
        out = attend(*operands(F32), ae.variants.alibi(slopes))
        grads.append(torch.autograd.grad(out.square().sum(), weight)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_values_are_read_at_every_call() -> None:
    """An optimizer steps in place; the same handle sees the new values."""
    spec, captures = alibi()
    q, k, v = operands(F32)
    handle = ae.compile(spec, q, k, v)
    before = handle(q, k, v).clone()
    with torch.no_grad():
        captures["slopes"].mul_(3.0)
    after = handle(q, k, v)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, ae.reference(q, k, v, spec), rtol=1e-4, atol=1e-5)


def test_same_code_other_tensors() -> None:
    """A fresh lambda over other tensors of the same kind is bound to those."""
    q, k, v = operands(F32)
    for seed in range(3):
        spec, captures = alibi(seed)
        verify(spec, q, k, v, captures)


def test_some_captured_tensors_without_gradient() -> None:
    """q, k and v need no gradient at all; only one of the tensors of one spec does."""
    spec, captures = gathers(LENGTH, KEYS, stored=BF16)
    q, k, v = operands(F32, L=LENGTH, S=KEYS)
    got = torch.autograd.grad(ae.attention(q, k, v, spec).sum(), captures["bend"])
    want = torch.autograd.grad(ae.reference(q, k, v, spec).sum(), captures["bend"])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
