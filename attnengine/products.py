"""The two matrix products of attention for the dense reference: exact about dead pairs, and with
the roundings of a kernel that feeds a matrix unit, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
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
    """x rounded to a narrower dtype, kept in its own."""
    return x if dtype is None else x.to(dtype).to(x.dtype)


@dataclass(frozen=True)
class Precision:
    """Where an evaluation rounds.

    ``acc`` computes; ``mma`` holds the operands of the second product (None: acc); ``store`` holds
    the output; ``dense`` rounds the scores as well; ``upcast`` reads captured fp32 tensors as acc.
    ``unit`` > 0 adds a random relative error of up to that size to every weight, score gradient and
    output row, and with ``loud`` to every term of a dot product: what a correct kernel may do.
    """

    acc: torch.dtype
    mma: torch.dtype | None = None
    store: torch.dtype | None = None
    dense: bool = False
    upcast: bool = False
    unit: float = 0.0
    loud: bool = False
    random: torch.Generator | None = None

    def error(self, size: Tensor) -> Tensor:
        """Random errors, uniform within ``unit`` times the given sizes."""
        r = torch.rand(size.shape, generator=self.random, dtype=size.dtype).to(size.device)
        return torch.nan_to_num((2.0 * r - 1.0) * self.unit * size, 0.0, 0.0, 0.0)

    def fed(self, x: Tensor) -> Tensor:
        """x as the matrix unit is fed it."""
        return x + self.error(x) if self.unit else rounded(x, self.mma)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b."""
        return a @ b + self.error(a.abs() @ b.abs()) if self.loud else a @ b


class Scores(torch.autograd.Function):
    """q k^T; the gradient flows through live pairs only, as the matrix unit is fed it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, live: Tensor, precision: Precision) -> Tensor:
        ctx.save_for_backward(q, k, live)
        ctx.precision = precision
        return precision.product(q, k.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        q, k, live = ctx.saved_tensors
        ds = ctx.precision.fed(torch.where(live, grads[0], 0.0))
        return live_matmul(ds, k, live), live_matmul(ds.mT, q, live.mT), None, None


class Aggregate(torch.autograd.Function):
    """w v with the weights as the matrix unit is fed them, forward and in dV."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, v: Tensor, live: Tensor, precision: Precision) -> Tensor:
        w = precision.fed(w)
        ctx.save_for_backward(w, v, live)
        ctx.precision = precision
        return live_matmul(w, v, live)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        w, v, live = ctx.saved_tensors
        dw = torch.where(live, ctx.precision.product(grads[0], v.mT), 0.0)
        return dw, live_matmul(w.mT, grads[0], live.mT), None, None


class Round(torch.autograd.Function):
    """Rounds a value; ``both``: its gradient as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, precision: Precision, both: bool) -> Tensor:
        ctx.precision = precision if both else None
        return precision.fed(x).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return grads[0] if ctx.precision is None else ctx.precision.fed(grads[0]), None, None
