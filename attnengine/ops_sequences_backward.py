"""Gradients of attention over packed sequences, for both doors (see :mod:`attnengine.ops`).

``attnengine::attention_sequences_backward`` is what compilers trace; :func:`apply` serves eager
calls. Sequences in a cache have no gradient: their keys were written in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from . import ops, ops_sequences
from .backward import TRANSFORMS
from .dispatch import Program

_forward = ops_sequences.forward_sequences
_backward = torch.ops.attnengine.backward_sequences.default._op

NO_CACHE_GRADIENT = (
    "attnengine: attention over a cache (block_table, cache_batch_idx, appended tokens) has no "
    "gradient; call it under torch.no_grad(), or use attnengine.attention_varlen on packed keys "
    "and values"
)


class Ranges(NamedTuple):
    """Where packed sequences lie: int32 [B] tables, bounds of their rows and keys, and whether the
    last row has the index of the last key (else the first row has index 0)."""

    q_start: Tensor
    q_end: Tensor
    key_start: Tensor
    key_end: Tensor
    max_rows: int | torch.SymInt
    max_keys: int | torch.SymInt
    align_end: bool


# ------------------------------------------------------------------------- the traceable operator

_library = torch.library.Library("attnengine", "FRAGMENT")
_library.define(
    "attention_sequences_backward(Tensor q, Tensor k, Tensor v, Tensor[] captures, Tensor out, "
    "Tensor stats, Tensor dout, Tensor? dstats, str key, float scale, Tensor? q_start, "
    "Tensor? q_end, Tensor? key_start, Tensor? key_end, SymInt max_rows, SymInt max_keys, "
    "SymInt key_more, bool align_end) -> (Tensor dq, Tensor dk, Tensor dv, Tensor[] dcaptures)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _attention_sequences_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    out: Tensor,
    stats: Tensor,
    dout: Tensor,
    dstats: Tensor | None,
    key: str,
    scale: float,
    *tables: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    kernel = ops.resolve(key, "backward")
    try:
        return _backward(q, k, v, captures, out, stats, dout, dstats, kernel, scale, *tables)
    except ValueError as error:
        raise ops.translate(error) from None


for _device in ("CPU", "CUDA"):
    _library.impl("attention_sequences_backward", _attention_sequences_backward, _device)


@torch.library.register_fake("attnengine::attention_sequences_backward", lib=_library)
def _attention_sequences_backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    out: Tensor,
    stats: Tensor,
    dout: Tensor,
    dstats: Tensor | None,
    key: str,
    *more: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    return ops._fake_gradients(q, k, v, captures, ops._grad_mask(key))


@torch.library.register_fake("attnengine::backward_sequences")
def _backward_sequences_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    out: Tensor,
    stats: Tensor,
    dout: Tensor,
    dstats: Tensor | None,
    kernel: int,
    *more: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    ops._check(kernel, q, k, v, captures)
    return ops._fake_gradients(q, k, v, captures, ops.library.kernel_info(kernel).grad_mask)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, captures, key, scale, *tables, kv_row, pages, max_rows, max_keys, more, end = inputs
    if kv_row is not None or pages is not None or more:
        raise NotImplementedError(NO_CACHE_GRADIENT)
    ops.check_frozen(key, captures)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *tables, *captures)
    ctx.key, ctx.scale, ctx.bounds = key, scale, (max_rows, max_keys, more, end)


def _differentiate(ctx: Any, dout: Tensor | None, dstats: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, stats, *rest = ctx.saved_tensors
    tables, captures = rest[:4], rest[4:]
    if dout is None:
        dout = torch.zeros_like(out)
    if dstats is not None:
        _, user_stats = ops._saved_stats(ctx.key)
        dstats = dstats[:user_stats] if user_stats > 0 else None
    dq, dk, dv, produced = torch.ops.attnengine.attention_sequences_backward.default(
        q, k, v, captures, out, stats, dout, dstats, ctx.key, ctx.scale, *tables, *ctx.bounds
    )
    remaining, mask = iter(produced), ops._grad_mask(ctx.key)
    grads = [next(remaining) if mask >> i & 1 else None for i, _ in enumerate(captures)]
    return dq, dk, dv, grads, *(None,) * 12


torch.library.register_autograd(
    "attnengine::attention_sequences", _differentiate, setup_context=_save, lib=_library
)
torch.library.register_autograd(
    "attnengine::attention_sequences_backward", ops._no_double_backward, lib=_library
)


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
    raise NotImplementedError(
        "attnengine: vmap over attention of packed sequences is not implemented; pack the mapped "
        "dimension too, and extend cu_seqlens"
    )


for _name in ("backward_sequences", "attention_sequences_backward"):
    torch.library.register_vmap(f"attnengine::{_name}", _no_vmap, lib=_library)


# ------------------------------------------------------------------------------------ eager calls


class SequencesAttention(torch.autograd.Function):
    """(out, statistics) of one program; gradients of q, k, v and of its captured tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        program: Program,
        scale: float,
        ranges: Ranges,
        *captures: Tensor,
    ) -> tuple[Tensor, Tensor]:
        tables, (max_rows, max_keys, align_end) = ranges[:4], ranges[4:]
        bounds = max_rows, max_keys, 0, align_end
        out, stats = _forward(
            q, k, v, captures, program.forward_id, scale, True, *tables, None, None, *bounds
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, stats, *tables, *captures)
        ctx.program, ctx.scale, ctx.bounds = program, scale, bounds
        return out, stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError(ops.DOUBLE_BACKWARD)
        dout, dstats = grads
        q, k, v, out, stats, *rest = ctx.saved_tensors
        tables, captures, program = rest[:4], rest[4:], ctx.program
        if dout is None:
            dout = torch.zeros_like(out)
        user = len(program.sources.stats)
        if dstats is not None:
            dstats = dstats[:user] if user else None
        try:
            dq, dk, dv, produced = _backward(
                q, k, v, captures, out, stats, dout, dstats, program.backward(), ctx.scale,
                *tables, *ctx.bounds,
            )  # fmt: skip
        except ValueError as error:
            raise ops.translate(error) from None
        extra: list[Tensor | None] = [None] * len(captures)
        for number, grad in zip(program.sources.grads, produced, strict=True):
            extra[number] = grad
        return dq, dk, dv, None, None, None, *extra


def apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    program: Program,
    scale: float,
    ranges: Ranges,
    captures: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """(out, statistics) with autograd; the program's forward is loaded."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(TRANSFORMS)
    return SequencesAttention.apply(q, k, v, program, scale, ranges, *captures)
