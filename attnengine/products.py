"""The two matrix products of attention for the dense reference: exact about dead pairs, and with
the roundings of a kernel that feeds a matrix unit, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def live_matmul(a: Tensor, b: Tensor, live: Tensor) -> Tensor:
    """a [.., M, N] @ b [.., N, D] over live pairs only. a is 0 elsewhere, but 0 * NaN is not."""
    finite = b.isfinite().all(-1)
    if finite.all():
        return a @ b
    bad = (~finite).flatten(0, -2).any(0).nonzero()[:, 0]
    out = a @ b.index_fill(-2, bad, 0.0)
    parts = a[..., bad, None] * b[..., None, bad, :]
    return out + torch.where(live[..., bad, None], parts, 0.0).sum(-2)


def rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype).to(x.dtype)


class Scores(torch.autograd.Function):
    """q k^T; the gradient, rounded to the MMA dtype, flows through live pairs only."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, live: Tensor, mma: torch.dtype | None) -> Tensor:
        ctx.save_for_backward(q, k, live)
        ctx.mma = mma
        return q @ k.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        q, k, live = ctx.saved_tensors
        ds = rounded(torch.where(live, grads[0], 0.0), ctx.mma)
        return live_matmul(ds, k, live), live_matmul(ds.mT, q, live.mT), None, None


class Aggregate(torch.autograd.Function):
    """w v with the weights rounded to the MMA dtype, forward and in dV."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, v: Tensor, live: Tensor, mma: torch.dtype | None) -> Tensor:
        w = rounded(w, mma)
        ctx.save_for_backward(w, v, live)
        return live_matmul(w, v, live)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        w, v, live = ctx.saved_tensors
        return (
            torch.where(live, grads[0] @ v.mT, 0.0),
            live_matmul(w.mT, grads[0], live.mT),
            None,
            None,
        )


class Round(torch.autograd.Function):
    """Rounds the value; ``both``: its gradient as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype | None, both: bool) -> Tensor:
        ctx.dtype = dtype if both else None
        return rounded(x, dtype).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return rounded(grads[0], ctx.dtype), None, None
