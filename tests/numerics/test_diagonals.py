"""Values and gradients that the kernels keep per diagonal (kv_idx - q_idx) of the score matrix."""

from __future__ import annotations

import pytest
import torch
from problems import F32, leaf, operands, verify
from torch import Tensor

import attnengine as ae

BATCH, HEADS, BUCKETS = 2, 4, 12


def relative() -> tuple[ae.AttentionSpec, dict[str, Tensor]]:
    """Bias and slope by bucket of the distance, per batch and head; the slope multiplies the score,
    so that its gradient does not depend on the diagonal alone. Causal."""
    bias, slope = leaf(BATCH, HEADS, BUCKETS, seed=1), leaf(BUCKETS, HEADS, seed=2)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = (q - k).abs()
        far = 6 + (distance.float() / 6 + 1e-6).log2().to(torch.int64)
        bucket = torch.where(distance < 6, distance, far.clamp(0, BUCKETS - 1))
        return score * (1.0 + 0.1 * slope[bucket, h]) + bias[b, h, bucket]

    spec = ae.AttentionSpec(score_mod=score_mod, mask_mod=lambda b, h, q, k: q + 40 >= k)
    return spec, {"bias": bias, "slope": slope}


@pytest.mark.parametrize(
    ("dtype", "L", "S", "kv_heads"),
    [
        (F32, 130, 130, 4),
        (F32, 37, 300, 2),
        (F32, 300, 37, 1),
        (F32, 1, 517, 2),
        (F32, 1, 1, 4),
    ],
)
def test_bias_and_slope_by_bucket(dtype: torch.dtype, L: int, S: int, kv_heads: int) -> None:
    spec, captures = relative()
    q, k, v = operands(dtype, B=BATCH, Hkv=kv_heads, L=L, S=S)
    verify(spec, q, k, v, captures)


def test_index_out_of_bounds_only_where_nothing_is_live() -> None:
    """A table with an entry for every live distance serves; a shorter one raises. 97 > a vector."""
    q, k, v = operands(F32, B=1, H=HEADS, Hkv=HEADS, L=97, S=97)

    def spec(entries: int) -> tuple[ae.AttentionSpec, Tensor]:
        table = leaf(entries, HEADS, seed=3).detach()

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            distance = torch.where(q >= k, q - k, q - k + 1000)  # beyond the table when masked
            return score + table[distance * 3 // 3, h].tanh()

        return ae.AttentionSpec(score_mod=score_mod, mask_mod=ae.variants.causal_mask), table

    enough, table = spec(97)
    verify(enough, q, k, v, {"table": table}, grads=False)
    short, table = spec(96)
    with pytest.raises(IndexError, match="out of range"), torch.no_grad():
        ae.attention(q, k, v, short)


def test_same_bits_at_any_thread_count() -> None:
    spec, captures = relative()
    q, k, v = (x.requires_grad_() for x in operands(F32, B=BATCH, H=HEADS, L=300, S=300))
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = ae.attention(q, k, v, spec)
            seen.append([out, *torch.autograd.grad(out.sum(), [q, k, v, *captures.values()])])
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(x, y) for x, y in zip(seen[0], other, strict=True))
