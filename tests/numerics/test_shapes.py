"""A few specs over many shapes, head dims and strides: compiled once, run on anything."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from problems import BF16, DV, F16, F32, D, alibi, generator, operands, results, verify
from torch import Tensor

import attnengine as ae

BOTH = pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
ALL = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])

# One spec for the mask, group and length logic: dead first and last keys, per-head scores.
ALIBI, SLOPES = alibi()
PLAIN = ae.AttentionSpec()

lengths = st.sampled_from([0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 95, 97]) | (
    st.integers(0, 130)
)
key_lengths = lengths | st.sampled_from([127, 128, 129, 191, 255, 256, 257, 300])
groups = st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (1, 3)])
batches = st.sampled_from([1, 1, 2, 3, 0])


@ALL
@given(batch=batches, group=groups, L=lengths, S=key_lengths, shared=st.booleans())
@example(batch=1, group=(1, 4), L=1, S=300, shared=False)
@example(batch=2, group=(2, 2), L=0, S=5, shared=False)
@example(batch=2, group=(2, 2), L=5, S=0, shared=True)
@example(batch=0, group=(2, 2), L=5, S=5, shared=False)
def test_lengths_heads_and_batch(
    dtype: torch.dtype, batch: int, group: tuple[int, int], L: int, S: int, shared: bool
) -> None:
    """Causal ALiBi. shared: keys and values of batch 1 for every batch."""
    hkv, per = group
    kv_batch = 1 if shared else batch
    q, k, v = operands(dtype, batch, hkv * per, hkv, L, S, kv_batch=kv_batch, seed=L * 1000 + S)
    verify(ALIBI, q, k, v, SLOPES)


@BOTH
@given(group=st.integers(1, 8), hkv=st.integers(1, 3), L=st.integers(1, 40), S=st.integers(1, 200))
def test_any_group_size(dtype: torch.dtype, group: int, hkv: int, L: int, S: int) -> None:
    q, k, v = operands(dtype, 1, group * hkv, hkv, L, S, seed=group + 10 * S)
    verify(PLAIN, q, k, v)


# -- strides ---------------------------------------------------------------------------------------


def laid_out(x: Tensor, how: str) -> Tensor:
    """The values of x in another layout."""
    if how == "heads inside":  # [B, L, H, D], as models make them
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "last stride not 1":
        return x.mT.contiguous().mT
    if how == "sliced":  # odd offset and row pitch: nothing is aligned
        wide = x.new_full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 5), float("nan"))
        wide[:, :, 2:-1, 3:-2] = x
        return wide[:, :, 2:-1, 3:-2]
    if how == "every second":
        wide = x.new_full((*x.shape[:3], 2 * x.shape[3]), float("nan"))
        wide[..., ::2] = x
        return wide[..., ::2]
    if how == "batch innermost":
        return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if how == "packed with others":  # q, k, v in one tensor
        wide = x.new_full((x.shape[0], x.shape[2], x.shape[1], 3, x.shape[3]), float("nan"))
        wide[:, :, :, 1] = x.transpose(1, 2)
        return wide[:, :, :, 1].transpose(1, 2)
    return x


LAYOUTS = ["plain", "heads inside", "last stride not 1", "sliced", "every second"]
LAYOUTS += ["batch innermost", "packed with others"]
layouts = st.sampled_from(LAYOUTS)


@ALL
@given(q_layout=layouts, k_layout=layouts, v_layout=layouts, grad_layout=layouts)
def test_layouts(
    dtype: torch.dtype, q_layout: str, k_layout: str, v_layout: str, grad_layout: str
) -> None:
    """The same bits as contiguous operands give, in forward and backward."""
    inputs = operands(dtype, B=2, L=37, S=131)
    grad = torch.randn((2, 4, 37, DV), generator=generator(9)).to(dtype)

    def run(tensors: list[Tensor], g: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_() for x in tensors]
        out = ae.attention(*leaves, ALIBI)
        return out, *torch.autograd.grad(out, leaves, g)

    got = run(
        [laid_out(x, how) for x, how in zip(inputs, (q_layout, k_layout, v_layout), strict=True)],
        laid_out(grad, grad_layout),
    )
    for x, y in zip(got, run([x.clone() for x in inputs], grad), strict=True):
        assert torch.equal(x, y)


@BOTH
def test_expanded_operands(dtype: torch.dtype) -> None:
    """Strides of 0: one key and value head, one batch, one query for all."""
    q, k, v = operands(dtype, B=1, H=1, Hkv=1, L=33, S=140)
    many = [x.expand(3, 4, -1, -1) for x in (q, k, v)]
    verify(PLAIN, *many)
    same = ae.attention(*many, PLAIN)
    assert torch.equal(same, same[:1, :1].expand_as(same))
    row = q[:, :, :1].expand(1, 1, 33, -1)
    verify(PLAIN, row, k, v)


def test_output_follows_the_layout_of_q() -> None:
    q, k, v = operands(F32, B=2)
    for how in ("plain", "heads inside"):
        out = ae.attention(laid_out(q, how), k, v, PLAIN)
        want = laid_out(torch.empty(out.shape), how)
        assert out.stride() == want.stride()


def test_gradient_of_shared_keys_is_the_sum_over_the_batch() -> None:
    q, k, v = operands(F32, B=5, kv_batch=1)
    got = results(PLAIN, q, k, v)
    wide = results(PLAIN, q, k.expand(5, -1, -1, -1), v.expand(5, -1, -1, -1))
    for name in ("dk", "dv"):
        want = wide[name].sum(0, keepdim=True)
        torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-5)


# -- head dims -------------------------------------------------------------------------------------

PAIRS = [
    (F32, 59, 1), (BF16, 128, 128), (F32, 128, 128), (BF16, 576, 512),
    (BF16, 1, 128),
]  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 4, 2, 70, 131), (1, 8, 1, 1, 260), (1, 1, 1, 2, 1)], ids=str)
@pytest.mark.parametrize("dtype, d, dv", PAIRS)
def test_head_dims(dtype: torch.dtype, d: int, dv: int, shape: tuple[int, ...]) -> None:
    verify(PLAIN, *operands(dtype, *shape, d=d, dv=dv, seed=d))


@pytest.mark.parametrize("dtype, d, dv", [p for p in PAIRS if p[1] == 576])
def test_rows_of_large_head_dims_in_any_layout(dtype: torch.dtype, d: int, dv: int) -> None:
    q, k, v = operands(dtype, 1, 4, 1, 9, 70, d=d, dv=dv)
    verify(
        PLAIN, laid_out(q, "last stride not 1"), laid_out(k, "every second"), laid_out(v, "sliced")
    )


# -- split work ------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("S", [1, 129, 1000, 5003])
@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (4, 4)], ids=str)
def test_decode(dtype: torch.dtype, heads: tuple[int, int], S: int) -> None:
    """One query: the keys are cut between workers and merged."""
    verify(PLAIN, *operands(dtype, 1, *heads, 1, S, d=D, dv=DV, seed=S))


@BOTH
@pytest.mark.parametrize("L, S", [(2, 2000), (17, 1500), (300, 8)])
def test_long_and_thin(dtype: torch.dtype, L: int, S: int) -> None:
    verify(PLAIN, *operands(dtype, 1, 2, 1, L, S))
