"""The autograd of eager calls: a thin Function around the bare operators."""

from __future__ import annotations

from typing import Any

import torch

from . import ops
from .dispatch import Program


class Attention(torch.autograd.Function):
    """(out, statistics) of one program; gradients of q, k, v and of its captured tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        program: Program,
        scale: float,
        *captures: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, stats = ops.forward(q, k, v, captures, program.forward_id, scale, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, stats, *captures)
        ctx.program, ctx.scale = program, scale
        return out, stats

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError(ops.DOUBLE_BACKWARD)
        dout, dstats = grads
        q, k, v, out, stats, *captures = ctx.saved_tensors
        program = ctx.program
        if dout is None:
            dout = torch.zeros_like(out)
        user = len(program.sources.stats)
        if dstats is not None:
            dstats = dstats[:user] if user else None
        try:
            dq, dk, dv, produced = ops.backward(
                q, k, v, captures, out, stats, dout, dstats, program.backward(), ctx.scale
            )
        except ValueError as error:
            raise ops.translate(error) from None
        extra: list[torch.Tensor | None] = [None] * len(captures)
        for number, grad in zip(program.sources.grads, produced, strict=True):
            extra[number] = grad
        return dq, dk, dv, None, None, *extra


TRANSFORMS = (
    "attnengine: transforms of torch.func (vmap, grad, jvp, ...) and forward-mode gradients of "
    "attention are not implemented; take gradients with torch.autograd, and fold the dimension of "
    "a vmap into the batch dimension of q, k and v (reshape to [N*B, H, L, D])"
)

# Function.apply without its Python half, which only functorch needs: 2 of the call's 12 us.
_direct = super(torch.autograd.Function, Attention).apply
_functorch = torch._C._are_functorch_transforms_active


def apply(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    program: Program,
    scale: float,
    captures: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, statistics) with autograd; the program's forward is loaded."""
    if _functorch():
        raise NotImplementedError(TRANSFORMS)
    return _direct(q, k, v, program, scale, *captures)
