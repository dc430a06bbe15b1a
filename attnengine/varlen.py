"""Attention over packed sequences of any lengths: flash-attn's variable-length call, with spec=."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import api, exported, ops_sequences
from .backward import TRANSFORMS
from .flash_args import COLD, NO_WINDOW, flash_spec
from .handle import (
    Handle,
    _forward_ad,
    _has_tangent,
    _is_compiling,
    _is_dynamo_compiling,
    _is_exporting,
    _refusal,
    autocast_operands,
)
from .ops_sequences_backward import NO_CACHE_GRADIENT, Ranges, apply
from .spec import AttentionSpec

_forward = ops_sequences.forward_sequences
_INDEX = (torch.int32, torch.int64)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    return_lse: bool = False,
    spec: AttentionSpec | None = None,
) -> Any:
    """Fused attention of sequences that are packed one after the other, with gradients.

    Sequence b has rows ``cu_seqlens_q[b]:cu_seqlens_q[b + 1]`` of q and keys
    ``cu_seqlens_k[b]:cu_seqlens_k[b + 1]`` of k and v; it meets no other sequence. Any length may
    be 0. Names, order and meanings are those of flash-attn's ``flash_attn_varlen_func``.

    Args:
        q: [total_q, Hq, D]; float32, bfloat16, float16 or float64, any strides.
        k: [total_k, Hkv, D]; Hq must be a multiple of Hkv. With ``block_table``
            [pages, page_size, Hkv, D].
        v: [total_k, Hkv, Dv]; with ``block_table`` [pages, page_size, Hkv, Dv].
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32 (int64 is converted) on q's device: running sums
            of the lengths, from 0. They may end before total_q and total_k: rows of no sequence
            give 0 and get no gradient.
        max_seqlen_q, max_seqlen_k: bounds of the lengths. None: the largest length on the CPU;
            total_q and total_k in a compiled graph and on a GPU, which is slower than the lengths.
        softmax_scale: factor of the scores, None for 1/sqrt(D).
        causal, window_size, softcap, alibi_slopes: as in flash-attn. Rows are aligned with the
            ends of the keys: row i of Lq rows with Lk keys has position i + Lk - Lq.
        block_table: [B, pages per sequence] int32: the keys are in pages, and ``cu_seqlens_k`` has
            their numbers; forward only.
        return_lse: also return the log of the sum of exp(score) of each row, natural, float32
            (float64 for float64 operands), -inf for a row without keys; differentiable.
        spec: an AttentionSpec in place of softmax_scale, causal, window_size, softcap and
            alibi_slopes. Its functions see the number of the sequence as ``b`` and indices of their
            own sequence: ``q_idx`` and ``kv_idx`` both start at 0.

    Returns:
        out [total_q, Hq, Dv] in q's dtype, or (out, lse [Hq, total_q]). Differences to flash-attn:
        no dropout; lse of a row without keys is -inf; always deterministic.

    Raises:
        TypeError, ValueError: an argument does not fit; names it, its value and the limit. On a GPU
            the values of the tables are looked at with ATTNENGINE_SYNC_DEBUG=1 only.
        NotImplementedError: a gradient on CUDA or with ``block_table``.
        TraceError, KernelUnavailable, BuildError: as :func:`attnengine.attention`.
    """
    aligned = spec is None
    meaning = flash_spec(spec, causal, window_size, softcap, alibi_slopes, softmax_scale)
    q, k, v = autocast_operands(q, k, v)
    _check_packed(q, k, v, block_table)
    starts_q = _lengths("cu_seqlens_q", cu_seqlens_q, q)
    starts_k = _lengths("cu_seqlens_k", cu_seqlens_k, q)
    if starts_q.shape[0] != starts_k.shape[0]:
        raise ValueError(
            f"cu_seqlens_q describes {starts_q.shape[0] - 1} sequences and cu_seqlens_k "
            f"{starts_k.shape[0] - 1}; both must have B + 1 elements"
        )
    rows = _longest("max_seqlen_q", max_seqlen_q, starts_q, q.shape[0])
    total_k = k.shape[0] if block_table is None else k.shape[1] * _columns(block_table)
    keys = _longest("max_seqlen_k", max_seqlen_k, starts_k, total_k)
    q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)
    handle = _handle(q, k, v, meaning)
    if return_lse and "lse" not in handle.program.sources.stats:
        raise ValueError(
            f"return_lse=True: {type(meaning.row_func).__name__} saves "
            f"{list(handle.program.sources.stats)} and no lse; use return_lse=False"
        )
    if block_table is None:
        ranges = Ranges(
            starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], rows, keys, aligned
        )
        out, stats = _run(handle, q, k, v, ranges, return_lse)
    else:
        lengths = starts_k[1:] - starts_k[:-1]
        tables = starts_q[:-1], starts_q[1:], None, lengths, None, block_table
        out, stats = _run_paged(handle, q, k, v, (*tables, rows, keys, 0, aligned), return_lse)
    out = out[0].transpose(0, 1)
    if not return_lse:
        return out
    return out, stats[handle.program.sources.stats.index("lse"), 0]


# -- arguments -----------------------------------------------------------------------------------


def _check_packed(q: Any, k: Any, v: Any, block_table: Any) -> None:
    want = "[total, H, D]" if block_table is None else "[pages, page_size, H, D]"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        paged = block_table is not None and name != "q"
        if x.dim() != (4 if paged else 3):
            layout = want if paged else "[total, H, D]"
            hint = "" if paged else "; attnengine.attention takes padded [B, H, L, D]"
            raise ValueError(f"{name} must be {layout}, got shape {tuple(x.shape)}{hint}")
    if block_table is None:
        return
    if not isinstance(block_table, Tensor) or block_table.dim() != 2:
        shape = tuple(block_table.shape) if isinstance(block_table, Tensor) else block_table
        raise ValueError(f"block_table must be int32 [B, pages per sequence], got {shape}")


def _columns(block_table: Tensor) -> int:
    return block_table.shape[1]


def _lengths(name: str, x: Any, q: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be an int32 tensor [B + 1], got {type(x).__name__}")
    if x.dtype not in _INDEX:
        raise TypeError(f"{name} has dtype {x.dtype}, expected torch.int32; cast it with .int()")
    if x.dim() != 1 or x.shape[0] == 0:
        raise ValueError(
            f"{name} must have shape [B + 1], got {tuple(x.shape)}; it holds the running sum of "
            "the lengths, from 0"
        )
    if x.device != q.device:
        raise ValueError(
            f"{name} is on {x.device} but q is on {q.device}; move it there with .to()"
        )
    if x.dtype != torch.int32:
        x = x.clamp(-1, 2**31 - 1).to(torch.int32)  # what does not fit stays out of range
    return x.contiguous()


def _longest(name: str, given: Any, starts: Tensor, total: int) -> int | torch.SymInt:
    """The bound of the lengths that the operator gets; it checks the lengths against it."""
    if given is not None:
        if isinstance(given, Tensor):  # as some callers of flash-attn pass it
            given = int(given)
        if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int or None, got {type(given).__name__}")
        if not _is_compiling() and given < 0:
            raise ValueError(f"{name}={given} must not be negative")
        return given
    if _is_compiling() or starts.device.type != "cpu":
        return total
    if starts.shape[0] == 1:
        return 0
    longest = int((starts[1:] - starts[:-1]).max())
    return max(0, min(longest, total))  # the operator says which value is beyond the total


def _heads_first(x: Tensor) -> Tensor:
    """[total, H, D] as [1, H, total, D]; pages [pages, page_size, H, D] as [pages, H, ..]."""
    return x.transpose(0, 1).unsqueeze(0) if x.dim() == 3 else x.transpose(1, 2)


# -- what runs -----------------------------------------------------------------------------------


def _handle(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Handle:
    if not _is_compiling():
        return api._handle(q, k, v, spec)
    if _is_exporting() and not _is_dynamo_compiling():
        return api._exported(q, k, v, spec)
    for handle in spec.__dict__.get("_handles", {}).values():
        if (
            handle.program.element == q.dtype
            and handle.head_dim == q.shape[3]
            and handle.value_dim == v.shape[3]
            and handle.program.is_cuda == q.is_cuda
        ):
            return handle
    raise RuntimeError(COLD)


def _run(
    handle: Handle, q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, want_stats: bool
) -> tuple[Tensor, Tensor]:
    if handle.q_factor != 1.0:
        q = q * handle.q_factor
    tables, (rows, keys, aligned) = ranges[:4], ranges[4:]
    if _is_compiling():
        key, tensors = _traced(handle)
        return torch.ops.attnengine.attention_sequences(
            q, k, v, tensors, key, handle.scale, *tables, None, None, rows, keys, 0, aligned
        )
    _refuse_tangents(q, k, v, *handle.tensors)
    try:
        if _wants_grad(handle, q, k, v):
            if not handle.ready:
                handle.program.backward()
                handle.ready = True
            return apply(q, k, v, handle.program, handle.scale, ranges, handle.tensors)
        return _forward(
            q, k, v, handle.tensors, handle.sequences_id(q, k, v, rows), handle.scale, want_stats,
            *tables, None, None, rows, keys, 0, aligned,
        )  # fmt: skip
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise _refusal(error, q, k, v) from None


def _run_paged(
    handle: Handle, q: Tensor, k: Tensor, v: Tensor, tables: tuple, want_stats: bool
) -> tuple[Tensor, Tensor]:
    if _wants_grad(handle, q, k, v):
        raise NotImplementedError(NO_CACHE_GRADIENT)
    if handle.q_factor != 1.0:
        q = q * handle.q_factor
    if _is_compiling():
        key, tensors = _traced(handle)
        return torch.ops.attnengine.attention_sequences(
            q, k, v, tensors, key, handle.scale, *tables
        )
    _refuse_tangents(q, k, v, *handle.tensors)
    try:
        kernel = handle.sequences_id(q, k, v, tables[6])
        return _forward(q, k, v, handle.tensors, kernel, handle.scale, want_stats, *tables)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise _refusal(error, q, k, v) from None


def _traced(handle: Handle) -> tuple[str, list[Tensor]]:
    """The operator's key and captured tensors in a graph (see Handle.run)."""
    if not _is_exporting():
        return handle.key, handle.tensors
    if _is_dynamo_compiling():  # Dynamo finds a module's parameters by itself
        return handle.portable, handle.tensors
    return handle.portable, exported.module_tensors(handle.tensors)


def _wants_grad(handle: Handle, q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or handle.capture_grads
    )


def _refuse_tangents(*tensors: Tensor) -> None:
    if _forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        raise NotImplementedError(TRANSFORMS)


__all__ = ["attention_varlen"]
