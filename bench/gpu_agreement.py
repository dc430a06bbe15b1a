"""Nothing is timed before its output is right: a dense fp64 reference, independent of attnengine.

Two checks. Three bands of rows of the first and of the last head are compared with the reference;
and every element with that of the first contestant of the case that passed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gpu_caches import CacheCase
from .gpu_cases import Case, TimedCase, meaning

# Relative L2. Two right 16-bit kernels differ by the rounding of weights and outputs: 2^-9 relative
# each for bf16, 2^-12 for fp16, and of scores where a dense peer stores them.
AGREEMENT = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
BAND = 128  # rows


def difference(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 distance; infinite when anything is not finite."""
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    expected = expected.double()
    distance = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    return float(distance)


def bands(length: int) -> list[slice]:
    """The first, middle and last rows."""
    starts = sorted({0, max(0, length // 2 - BAND // 2), max(0, length - BAND)})
    return [slice(s, min(length, s + BAND)) for s in starts]


def expected_rows(
    case: TimedCase, q: Tensor, k: Tensor, v: Tensor, b: int, h: int, rows: slice
) -> Tensor:
    """Output rows [rows, Dv] of one head, in fp64."""
    said, device = meaning(case, q.device), q.device
    kv = h // (case.Hq // case.Hkv)
    q_idx = torch.arange(case.L, device=device)[rows, None]
    kv_idx = torch.arange(case.S, device=device)[None]
    at = (torch.tensor(b, device=device), torch.tensor(h, device=device), q_idx, kv_idx)
    s = q[b, h, rows].double() @ k[b, kv].double().mT * case.scale
    if said.score_mod is not None:
        s = said.score_mod(s, *at)
    live = torch.ones_like(s, dtype=torch.bool)
    if said.mask_mod is not None:
        live = said.mask_mod(*at).expand_as(s)
    if case.variant == "relu":
        w = torch.relu(s)
    elif case.variant == "sigmoid":
        assert said.bias is not None
        w = torch.sigmoid(s + said.bias)
    elif case.variant == "retention":
        s = s.masked_fill(~live, 0.0)
        w = s / s.abs().sum(-1, keepdim=True).clamp(min=1.0)
    else:
        w = torch.softmax(s.masked_fill(~live, float("-inf")), dim=-1)
    return w.masked_fill(~live, 0.0) @ v[b, kv].double()


def distance(
    case: Case,
    operands: Any,
    out: Tensor,
    first: Tensor | None = None,
) -> float:
    """How far an output is off; the larger of both checks.

    Raises AssertionError, which says where, when that is beyond rounding.
    """
    shape = (case.B, case.Hq, case.L, case.Dv)
    if tuple(out.shape) != shape or out.dtype != case.dtype:
        raise AssertionError(f"output is {tuple(out.shape)} {out.dtype}, expected {shape}")
    limit, worst = AGREEMENT[case.dtype], 0.0
    for b, h in dict.fromkeys([(0, 0), (case.B - 1, case.Hq - 1)]):
        for rows in bands(case.L):
            if isinstance(case, CacheCase):
                want = case.expected(operands, b, h)
            else:
                want = expected_rows(case, *operands, b, h, rows)
            off = difference(out[b, h, rows], want)
            if not off <= limit:
                where = f"rows {rows.start}:{rows.stop} of batch {b}, head {h}"
                raise AssertionError(f"{where} differ by {off:.3g} (limit {limit:.0e})")
            worst = max(worst, off)
    if first is not None:
        off = difference(out, first)
        if not off <= limit:
            raise AssertionError(
                f"the output differs from another contestant's by {off:.3g} (limit {limit:.0e})"
            )
        worst = max(worst, off)
    return worst
