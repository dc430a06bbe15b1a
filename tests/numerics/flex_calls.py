"""Operands, masks and the dense formula of the tests of flex_attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

D, BLOCK = 8, 32
SLOPES = torch.tensor([0.5, -0.25, 0.125, 1.0])


def operands(
    B: int = 2,
    Hq: int = 4,
    Hkv: int = 4,
    L: int = 70,
    S: int = 70,
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
    seed: int = 0,
    Bkv: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, Hq, L, D, generator=g).to(dtype)
    k = torch.randn(Bkv or B, Hkv, S, D, generator=g).to(dtype)
    v = torch.randn(Bkv or B, Hkv, S, D, generator=g).to(dtype)
    return tuple(x.requires_grad_(grad) for x in (q, k, v))  # type: ignore[return-value]


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + SLOPES[h] * (kv_idx - q_idx)


def masked(mask: Callable, L: int = 70, S: int = 70, **kwargs: Any) -> Any:
    sizes = {"B": None, "H": None, "BLOCK_SIZE": BLOCK} | kwargs
    return flex.create_block_mask(mask, Q_LEN=L, KV_LEN=S, device="cpu", **sizes)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, live: Tensor, score_mod: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of live pairs [B|1, H|1, L, S]; rows without any give 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.expand(q.shape[0], *x.shape[1:]).repeat_interleave(group, 1) for x in (k, v))
    s = q.double() @ k.double().mT / math.sqrt(q.shape[3])
    if score_mod is not None:
        b, h, i, j = torch.meshgrid(*[torch.arange(n) for n in s.shape], indexing="ij")
        s = score_mod(s, b, h, i, j)
    s = s.masked_fill(~live, -math.inf)
    lse = s.logsumexp(-1)
    w = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return w @ v.double(), lse


def from_lists(mask: Any, B: int = 1, H: int = 1) -> Tensor:
    """Live pairs as compiled kernels see them: full blocks, and partial ones under mask_mod."""
    L, S = mask.seq_lengths
    live = torch.zeros(B, H, L, S, dtype=torch.bool)
    inner = flex.create_mask(mask.mask_mod, B, H, L, S, device="cpu")
    qb, kb = mask.BLOCK_SIZE
    lists = [(mask.kv_num_blocks, mask.kv_indices, inner)]
    if mask.full_kv_num_blocks is not None:
        everything = torch.ones_like(inner)
        lists.append((mask.full_kv_num_blocks, mask.full_kv_indices, everything))
    for counts, indices, allowed in lists:
        counts, indices = (x.expand(B, H, *x.shape[2:]) for x in (counts, indices))
        for b, h, r in torch.cartesian_prod(*[torch.arange(n) for n in counts.shape]).tolist():
            for c in indices[b, h, r, : int(counts[b, h, r])].tolist():
                block = (b, h, slice(r * qb, (r + 1) * qb), slice(c * kb, (c + 1) * kb))
                live[block] |= allowed[block]
    return live


def near(got: Tensor, want: Tensor, tol: float = 2e-5) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=tol, atol=tol)


IDS = torch.arange(2 * 70).view(2, 70) // 23
PER_BATCH_AND_HEAD = flex.or_masks(
    flex.and_masks(lambda b, h, q, k: IDS[b, q] == IDS[b, k], causal),
    lambda b, h, q, k: q - k == h,
)
