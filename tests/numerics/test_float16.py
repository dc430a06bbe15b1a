"""float16 operands: what the tests that run in every dtype do not cover. Products are of fp32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import F16, HEADS, alibi, generator, leaf, operands, results, verify
from torch import Tensor

import attnengine as ae
from attnengine import gate

LENGTH, KEYS = 70, 300
D_ROWS = 64  # whole vectors: few queries read keys and values where they lie


def test_captured_bias_and_dead_rows() -> None:
    """Learnable float16 captures: a bias of every pair, and a 0-d gain whose product with it is
    rounded to float16 as torch does; whole rows and keys without a live pair."""
    bias, gain = leaf(HEADS, LENGTH, KEYS, seed=1, dtype=F16), leaf(seed=2, dtype=F16)
    alive = torch.rand(LENGTH, KEYS, generator=generator(3)) < 0.9
    dead_rows, dead_keys = [0, 5, 69], [0, 64, 129, 299]
    alive[dead_rows] = False
    alive[:, dead_keys] = False

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (score + bias[h, q, k] * gain).half()

    spec = ae.AttentionSpec(score_mod=score_mod, mask_mod=lambda b, h, q, k: alive[q, k])
    captures = {"bias": bias, "gain": gain}
    q, k, v = operands(F16, B=2, L=LENGTH, S=KEYS)
    k[:, :, dead_keys], v[:, :, dead_keys] = float("nan"), float("inf")
    verify(spec, q, k, v, captures)
    got = results(spec, q, k, v, captures)
    for name, dead in (("out", dead_rows), ("dq", dead_rows), ("dk", dead_keys), ("dv", dead_keys)):
        assert (got[name][..., dead, :] == 0).all(), name
    assert got["dbias"].dtype == got["dgain"].dtype == F16
    assert all(x.isfinite().all() for n, x in got.items() if n != "lse")


def test_scores_and_gradients_beyond_the_largest_number() -> None:
    """Dot products of 2e5 are as exact as small ones: they are never stored in 16 bits. Where dK
    leaves the range it is infinite."""
    made, captures = alibi()
    q, k, v = operands(F16, L=LENGTH, S=KEYS)
    for scale, q_size, k_size in ((2e-4, 300.0, 30.0), (1.0, 1e4, 1e-4)):
        spec = replace(made, scale=scale)
        x = q * q_size, k * k_size, v
        assert all(t.isfinite().all() for t in x)
        verify(spec, *x, captures)
    assert results(spec, *x)["dk"].isinf().any()


RELU = ae.AttentionSpec(row_func=ae.ReLU())


def relu_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ae.attention(q, k, v, RELU)


def test_output_beyond_the_largest_number() -> None:
    """Infinite in the same places as the reference; the weights are not normalised."""
    q, k, v = operands(F16, L=LENGTH, S=KEYS, d=D_ROWS, dv=D_ROWS)
    v = v * 1e4
    assert v.isfinite().all()
    gate.compare(relu_of, RELU, q, k, v, grads=False)
    out = relu_of(q, k, v)
    assert 100 < out.isinf().sum() < out.numel() - 100


@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("L, S", [(1, 1), (1, 260), (3, 2000)])
def test_rows_read_where_they_lie(L: int, S: int, heads: tuple[int, int]) -> None:
    q, k, v = operands(F16, 2, *heads, L, S, d=D_ROWS, dv=D_ROWS, seed=S)
    gate.compare(relu_of, RELU, q, k, v, grads=False)
    wide = torch.cat([k, v], -1)  # [.., 2 D]: rows with a pitch of their own
    same = relu_of(q, wide[..., :D_ROWS], wide[..., D_ROWS:])
    assert torch.equal(same, relu_of(q, k, v))


def test_subnormal_values() -> None:
    """Below 2**-14 numbers have fewer bits, but none is flushed to zero."""
    spec, captures = alibi()
    q, k, v = operands(F16, L=LENGTH, S=KEYS)
    v = v * 2e-6
    assert ((v != 0) & (v.abs() < 2.0**-14)).float().mean() > 0.9
    verify(spec, q, k, v, captures)
    assert (ae.attention(q, k, v, spec) != 0).float().mean() > 0.5


def test_autocast_to_float16() -> None:
    """As scaled_dot_product_attention: operands are cast, gradients come back in their dtype."""
    spec, _ = alibi()
    wide = [x.float().requires_grad_() for x in operands(F16)]
    with torch.autocast("cpu", dtype=F16):
        out = ae.attention(*wide, spec)
        sdpa = torch.nn.functional.scaled_dot_product_attention(*wide, enable_gqa=True)
    assert out.dtype == sdpa.dtype == F16
    assert torch.equal(out, ae.attention(*operands(F16), spec))
    grads = torch.autograd.grad(out.float().sum(), wide)
    assert all(g.dtype == torch.float32 for g in grads)
