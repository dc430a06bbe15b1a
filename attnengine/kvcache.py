"""Attention over a KV cache: decode and chunked prefill, dense or paged."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from . import api, dispatch, exported, ops, ops_sequences
from .flash_args import COLD, NO_WINDOW, flash_spec
from .handle import Handle, autocast_operands
from .rotary import rotate
from .spec import AttentionSpec

_is_compiling = torch.compiler.is_compiling
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_exporting = torch.compiler.is_exporting
_grad_enabled = torch.is_grad_enabled
_autocast = torch._C._is_any_autocast_enabled
_forward = ops_sequences.forward_sequences
_append = ops_sequences.append_kv
_increment_version = torch.autograd.graph.increment_version
_int32 = torch.int32

PAGE_MULTIPLE = 16  # tokens


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    num_splits: int = 0,
    return_lse: bool = False,
    spec: AttentionSpec | None = None,
) -> Any:
    """Attention of a few new rows per sequence over its cache, as ``flash_attn_with_kvcache``.

    With ``k`` and ``v`` they are first written into the cache, in place, at the positions
    ``cache_seqlens[b], cache_seqlens[b] + 1, ...``; attention then sees them too. The caller adds
    their number to its lengths. No gradients.

    Positions are absolute: the last of q's rows has the position of the sequence's last key, so
    causal and window_size are aligned to the bottom right, and a mask of a ``spec`` means the same
    with a cache as without: mods see b = number of the sequence, kv_idx = position of the key and
    q_idx = position of the row (both counted from the first key where there is left padding).

    Args:
        q: [B, Lq, Hq, D]; dtypes and head dims as :func:`attnengine.attention`.
        k_cache: [rows, S, Hkv, D], row b for sequence b (rows = 1: shared by all), or with
            block_table [pages, page_size, Hkv, D]; page_size a multiple of 16 tokens.
        v_cache: the same with Dv. It may be a view of k_cache (MLA: ``k_cache[..., :512]``).
        k, v: [B, Lnew, Hkv, D] and [.., Dv], appended; need cache_seqlens.
        cache_seqlens: int or int32 [B]: positions that are filled, before the append. None: all.
        cache_batch_idx: int32 [B], the row of the cache of each sequence; rows that are appended to
            must differ.
        cache_leftpad: int32 [B], position of the first key; 0 <= cache_leftpad <= cache_seqlens.
        block_table: int32 [B, columns], the page of each page_size positions. Entries beyond the
            length are not read. Pages may be shared (a common prefix), but not where tokens are
            appended.
        softmax_scale: factor of q.k; None is 1/sqrt(D).
        causal: rows meet keys up to their position. No sequence may have fewer keys than q rows.
        window_size: (left, right), keys beside its own position that a row meets; -1: all.
        softcap: scores become softcap * tanh(score / softcap), before ALiBi; 0: no.
        alibi_slopes: [Hq] or [B, Hq] floating: score - slope * distance.
        rotary_cos, rotary_sin: [positions, R/2] floating, R <= D: rotates q and k (which must be
            given) at their positions, cache_seqlens + row; without causal, window and spec, all of
            q's rows at cache_seqlens. The cache holds rotated keys.
        rotary_interleaved: pairs are elements 0 and 1, 2 and 3, ...; False: 0 and R/2, ...
            (GPT-NeoX).
        num_splits: accepted, not used: the plan chooses how keys are split among workers.
        return_lse: also return the logsumexp of the scores.
        spec: what attention means, instead of the flash-attn arguments from softmax_scale to
            alibi_slopes; k_mod and v_mod apply to what the cache holds.

    Returns:
        out [B, Lq, Hq, Dv], or (out, lse [B, Hq, Lq] float32). Rows without a key give 0 and -inf.

    Differences from flash-attn: pages of 16 tokens and more (flash-attn: 256); fp32 and fp64 too;
    v_cache may have a head dim of its own; block_table and cache_leftpad go together; sequences
    must not append to one place; causal with more rows than keys is refused, not 0; rotary_cos
    may be shorter than the cache on the CPU.

    Raises:
        TypeError, ValueError: an argument does not fit; names it, its value and the limit. On the
            CPU nothing has been written then. Values in a GPU's memory are not looked at, except
            under ATTNENGINE_SYNC_DEBUG=1.
        NotImplementedError: something requires grad; call it under torch.no_grad().
        TraceError, KernelUnavailable, BuildError: as :func:`attnengine.attention`.
    """
    meaning = flash_spec(spec, causal, window_size, softcap, alibi_slopes, softmax_scale)
    if _autocast():
        q, k, v = autocast_operands(q, k, v)
    tracing = _is_compiling()
    handle = (_traced_handle if tracing else _handle)(q, k_cache, v_cache, meaning)
    if _grad_enabled():
        _refuse_gradients(handle, (q, k_cache, v_cache, k, v))
    statistic = _lse_of(handle) if return_lse else -1
    lengths = None if cache_seqlens is None else _lengths(cache_seqlens, q)
    start = None if cache_leftpad is None else _table("cache_leftpad", cache_leftpad, 1)
    row = None if cache_batch_idx is None else _table("cache_batch_idx", cache_batch_idx, 1)
    pages = None if block_table is None else _table("block_table", block_table, 2)
    least = q.shape[1] if spec is None and (causal or window_size[1] == 0) else 0
    caches = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    capacity, more = k_cache.shape[1], 0
    if pages is not None:
        capacity = capacity * pages.shape[1]
    if k is not None or v is not None or rotary_cos is not None or rotary_sin is not None:
        k, v = _new_keys(q, k_cache, v_cache, k, v, lengths, handle)
        if rotary_cos is not None or rotary_sin is not None:
            each = spec is not None or causal or tuple(window_size) != NO_WINDOW
            table = rotary_cos, rotary_sin, lengths, capacity, rotary_interleaved
            q, k = rotate(q, k, *table, each)
        more = k.shape[1]
        if not tracing:  # a kernel that cannot be built must not fail after the write
            handle.sequences_id(q.transpose(1, 2), *caches, q.shape[1])
        _write(k_cache, v_cache, k, v, lengths, row, pages, start, least)
    if handle.q_factor != 1.0:
        q = q * handle.q_factor
    operands = q.transpose(1, 2), *caches
    tables = (None, None, start, lengths, row, pages, q.shape[1], capacity, more, True)
    if tracing:
        out, stats = _traced(handle, operands, tables)
    else:
        try:
            kernel = handle.sequences_id(*operands, q.shape[1])
            out, stats = _forward(
                *operands, handle.tensors, kernel, handle.scale, return_lse, *tables, least
            )
        except (ValueError, TypeError, RuntimeError) as error:
            _check_operands(q, k_cache, v_cache, block_table is not None)
            raise _translated(error) from None
    out = out.transpose(1, 2)
    return (out, stats[statistic]) if return_lse else out


# -- the kernel ------------------------------------------------------------------------------------


def _handle(q: Any, k_cache: Any, v_cache: Any, spec: AttentionSpec) -> Handle:
    """The handle of a spec: the one of the last call where it fits, without a look at anything
    else."""
    handle = spec.__dict__.get("_handle")
    try:
        if (
            handle is not None
            and k_cache.dim() == q.dim() == 4
            and handle.program.element is q.dtype
            and handle.head_dim == q.shape[3]
            and handle.value_dim == v_cache.shape[3]
            and handle.program.is_cuda is q.is_cuda
            and not (handle.tensors and handle.stale())
        ):
            return handle
    except (AttributeError, IndexError):
        pass  # no tensors, or of another rank: the checks say which
    _check_operands(q, k_cache, v_cache, False)
    return api._handle(q, k_cache, v_cache, spec, backward=False)


def _traced_handle(q: Any, k_cache: Any, v_cache: Any, spec: AttentionSpec) -> Handle:
    """The handle for torch.compile, which must have been made, and for torch.export."""
    if _is_exporting() and not _is_dynamo_compiling():
        _check_operands(q, k_cache, v_cache, False)
        return api._exported(q, k_cache, v_cache, spec)
    for handle in spec.__dict__.get("_handles", {}).values():
        if (
            handle.program.element == q.dtype
            and handle.head_dim == q.shape[3]
            and handle.value_dim == v_cache.shape[3]
            and handle.program.is_cuda == q.is_cuda
        ):
            return handle
    raise RuntimeError(COLD)


def _traced(handle: Handle, operands: tuple, tables: tuple) -> tuple[Tensor, Tensor]:
    key, tensors = handle.key, handle.tensors
    if _is_exporting():
        key = handle.portable
        if not _is_dynamo_compiling():  # Dynamo finds a module's parameters by itself
            tensors = exported.module_tensors(tensors)
    return torch.ops.attnengine.attention_sequences(*operands, tensors, key, handle.scale, *tables)


def _lse_of(handle: Handle) -> int:
    """Which saved statistic is the lse."""
    names = handle.program.sources.stats
    if "lse" in names:
        return names.index("lse")
    row_func = type(handle.spec.row_func).__name__
    raise ValueError(
        f"return_lse=True: the row function {row_func} saves {list(names)} and no 'lse'; return "
        "lse from its finalize, or leave return_lse=False"
    )


def _refuse_gradients(handle: Handle, operands: tuple) -> None:
    names = ("q", "k_cache", "v_cache", "k", "v")
    wanting = [n for n, x in zip(names, operands, strict=True) if x is not None and x.requires_grad]
    if wanting or handle.capture_grads:
        raise NotImplementedError(
            f"{wanting[0] if wanting else 'a captured tensor'} requires grad, and "
            "attention_with_kvcache has no gradients; call it under torch.no_grad() or detach it "
            "(attnengine.attention and attnengine.attention_varlen have gradients)"
        )


# -- arguments -------------------------------------------------------------------------------------


def _lengths(given: Any, q: Tensor) -> Tensor:
    if isinstance(given, Tensor):
        return _table("cache_seqlens", given, 1)
    if isinstance(given, bool) or not isinstance(given, (int, Integral, torch.SymInt)):
        raise TypeError(f"cache_seqlens={given!r}: expected an integer or an int32 tensor [B]")
    return torch.full((q.shape[0],), given, dtype=_int32, device=q.device)  # type: ignore[arg-type]


def _table(name: str, x: Any, rank: int) -> Tensor:
    """A table as the operators take it: int32, contiguous in its last dimension."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}={x!r}: expected an int32 tensor")
    if x.dim() != rank:
        form = "[B]" if rank == 1 else "[B, columns]"
        raise ValueError(f"{name} must be {rank}-D {form}, got shape {tuple(x.shape)}")
    if x.dtype is not _int32:
        if x.dtype is not torch.int64:
            raise TypeError(f"{name} has dtype {x.dtype}; expected torch.int32 (or int64)")
        x = x.clamp(-1, 2**31 - 1).to(_int32)  # what does not fit stays out of range
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_operands(q: Any, k_cache: Any, v_cache: Any, paged: bool) -> None:
    """What must hold of q and the cache by themselves."""
    named = (("q", q), ("k_cache", k_cache), ("v_cache", v_cache))
    for name, x in named:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            layout = "[B, Lq, Hq, D]" if x is q else "[rows or pages, S or page_size, Hkv, D]"
            raise ValueError(f"{name} must be 4-D {layout}, got shape {tuple(x.shape)}")
    if not q.device == k_cache.device == v_cache.device:
        raise ValueError(
            f"q, k_cache and v_cache must be on one device, got {q.device}, {k_cache.device}, "
            f"{v_cache.device}; move them with .to()"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype or q.dtype not in dispatch.SUPPORTED:
        raise TypeError(
            f"q, k_cache and v_cache must share one dtype, got {q.dtype}, {k_cache.dtype}, "
            f"{v_cache.dtype}; supported are torch.float32, torch.float64, torch.bfloat16 and "
            "torch.float16: cast with .to()"
        )
    if q.shape[3] != k_cache.shape[3]:
        raise ValueError(
            f"k_cache has head_dim {k_cache.shape[3]} and q has {q.shape[3]} (q {tuple(q.shape)}, "
            f"k_cache {tuple(k_cache.shape)}); the last dimensions must agree"
        )
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} must agree in all "
            "but the last size"
        )
    if k_cache.shape[2] == 0 or q.shape[2] % k_cache.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads, which is not a multiple of the {k_cache.shape[2]} of the "
            "cache; grouped-query attention needs Hq % Hkv == 0"
        )
    if paged and (k_cache.shape[1] == 0 or k_cache.shape[1] % PAGE_MULTIPLE):
        raise ValueError(
            f"page_size={k_cache.shape[1]} (k_cache {tuple(k_cache.shape)}): a page must hold a "
            f"multiple of {PAGE_MULTIPLE} tokens"
        )


def _new_keys(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any, v: Any, lengths: Any, handle: Handle
) -> tuple[Tensor, Tensor]:
    """k and v, checked: nothing but the tables' values can be wrong when they are written."""
    if k is None or v is None:
        missing = "k and v" if k is None and v is None else "k" if k is None else "v"
        raise ValueError(f"{missing} must be given: k and v come together, and rotary needs them")
    if lengths is None:
        raise ValueError("k and v need cache_seqlens: the positions that are filled before them")
    if not _fit(q, k_cache, v_cache, k, v):
        _check_operands(q, k_cache, v_cache, False)
        _check_new(q, k_cache, v_cache, k, v)
    for i, t in enumerate(handle.tensors):
        if t.device != q.device:
            raise ValueError(
                f"captures[{i}] is on {t.device} but q is on {q.device}; move it there with .to()"
            )
    return k, v


def _fit(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any, v: Any) -> bool:
    """Whether the operands of an append fit each other; other checks say what does not."""
    if not (isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    if not q.dim() == k_cache.dim() == v_cache.dim() == k.dim() == v.dim() == 4:
        return False
    b, _, hq, d = q.shape
    _, _, h, dk = k_cache.shape
    return (
        k_cache.shape[:3] == v_cache.shape[:3]
        and d == dk
        and h != 0
        and hq % h == 0
        and k.shape[:3] == v.shape[:3]
        and (b, h, d) == (k.shape[0], k.shape[2], k.shape[3])
        and v.shape[3] == v_cache.shape[3]
        and q.dtype == k_cache.dtype == v_cache.dtype == k.dtype == v.dtype
        and q.device == k_cache.device == v_cache.device == k.device == v.device
    )


def _check_new(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any, v: Any) -> None:
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.shape[0] != q.shape[0] or x.shape[2:] != cache.shape[2:]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; with q {tuple(q.shape)} and {name}_cache "
                f"{tuple(cache.shape)} it must be [{q.shape[0]}, Lnew, {cache.shape[2]}, "
                f"{cache.shape[3]}]"
            )
        if x.dtype != cache.dtype or x.device != cache.device:
            raise TypeError(
                f"{name} is {x.dtype} on {x.device}, and the cache is {cache.dtype} on "
                f"{cache.device}; convert it with .to()"
            )
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"k has {k.shape[1]} new tokens and v {v.shape[1]}; they must be equal")


def _write(k_cache: Tensor, v_cache: Tensor, *arguments: Any) -> None:
    if _is_compiling():
        torch.ops.attnengine.append_kv(k_cache, v_cache, *arguments)
        return
    try:
        _append(k_cache, v_cache, *arguments)
        _increment_version((k_cache, v_cache))  # a saved cache must not pass for the old one
    except (ValueError, RuntimeError) as error:
        raise _translated(error) from None


def _translated(error: Exception) -> Exception:
    return ops.translate(error) if isinstance(error, ValueError) else error
