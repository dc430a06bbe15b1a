"""What the best kernel of a dtype computes: linear attention by chunks, rounded where it must."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..products import Precision, Round
from ..reference import Mods
from .arguments import check_arguments
from .chunked import by_chunks
from .reference import first_state, hooked, modified, over_sequences
from .spec import LinearAttentionSpec


def ideal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: LinearAttentionSpec | None = None,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """``ae.linear_attention`` as the best kernel with a matrix unit of q's dtype computes it.

    Hooks, decays, sums and states in fp32 (fp64 for fp64); what a matrix product is fed, forward
    and backward, rounded to q's dtype; the output rounded. Arguments as of ``ae.linear_attention``.
    """
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    precision = Precision(acc, mma=None if q.dtype == acc else q.dtype)
    out, state = evaluate(
        q, k, v, spec, precision,
        decay=decay, beta=beta, initial_state=initial_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return (out.to(q.dtype), state) if output_final_state else out.to(q.dtype)


def evaluate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: LinearAttentionSpec | None,
    precision: Precision,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output and the final states in ``precision.acc``, by chunks."""
    spec = LinearAttentionSpec() if spec is None else spec
    found = check_arguments(
        q, k, v, spec, decay=decay, beta=beta, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    acc, mods = precision.acc, Mods(precision.acc if precision.upcast else None)
    given = modified(q, k, v, spec, found, mods, acc)
    if precision.loud and given.decay is not None:
        given = given._replace(decay=_misjudged(given.decay, precision))
    state = first_state(found, spec, acc, q.device)
    form = functools.partial(by_chunks, arithmetic=Ideal(precision))
    out, state = over_sequences(form, given, state, found, spec)
    out = hooked("out_mod", spec.out_mod, out, mods, acc)
    out = out + precision.error(out.detach()) if precision.unit else out
    return out, state


def _misjudged(g: Tensor, precision: Precision) -> Tensor:
    """Log-decays whose exp is wrong by roundings, part of which repeat: a head's equal numbers are
    rounded alike."""
    always = torch.ones_like(g[:1, :, :1])
    return g + precision.error(always) + precision.error(torch.ones_like(g))


@dataclass(frozen=True)
class Ideal:
    """The arithmetic of :func:`attnengine.linear.chunked.chunk_step` with a matrix unit."""

    precision: Precision
    scales_rows: ClassVar[bool] = False  # the operands: what a kernel for either kind of decay does

    def fed(self, x: Tensor) -> Tensor:
        return Round.apply(x, self.precision, False)

    def factor(self, x: Tensor) -> Tensor:
        return x

    def product(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return Product.apply(a, b, scale, self.precision)

    def sums(self, a: Tensor, b: Tensor) -> Tensor:
        return self.precision.product(a, b)

    def solve(self, a: Tensor, b: Tensor) -> Tensor:
        return Solve.apply(a, b, self.precision)


class Product(torch.autograd.Function):
    """scale a @ b of operands as the matrix unit is fed them; it is fed the gradient as well."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: float, precision: Precision) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.scale, ctx.precision = scale, precision
        return precision.product(a, b) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        (a, b), product = ctx.saved_tensors, ctx.precision.product
        g = ctx.precision.fed(grads[0])
        da, db = product(g, b.mT) * ctx.scale, product(a.mT, g) * ctx.scale
        return da.sum_to_size(a.shape), db.sum_to_size(b.shape), None, None


class Solve(torch.autograd.Function):
    """(I + a)^-1 b for a strictly lower triangular a, with the matrix unit in a's gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, precision: Precision) -> Tensor:
        x = torch.linalg.solve_triangular(a, b, upper=False, unitriangular=True)
        ctx.save_for_backward(a, x)
        ctx.precision = precision
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        (a, x), precision = ctx.saved_tensors, ctx.precision
        y = torch.linalg.solve_triangular(a.mT, grads[0], upper=True, unitriangular=True)
        da = -precision.product(precision.fed(y), precision.fed(x).mT).tril(-1)
        return da, y, None
