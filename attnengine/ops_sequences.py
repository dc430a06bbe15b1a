"""The operators on sequences as torch sees them: attention over packed sequences and over caches.

``attnengine::forward_sequences`` and ``attnengine::append_kv`` are C++ (csrc/ops_sequences.cpp).
``attnengine::attention_sequences`` takes a string key, as ``attnengine::attention`` does
(:mod:`attnengine.ops`), so that ``torch.compile`` and ``torch.export`` can trace it.

Tables (int32, on q's device, contiguous; any may be None):

====================  ============================================================================
q_start, q_end        [n]: rows of sequence b in q [1, Hq, total, D]; None: q [n, Hq, L, D]
key_start, key_end    [n]: its keys' positions; with ``key_more``, key_end + key_more is their end
kv_row                [n]: its batch row in k and v; None: row b, or row 0 where it is the only one
pages                 [n, columns]: its pages; k and v are then [pages, Hkv, page_size, D]
====================  ============================================================================

``max_rows`` and ``max_keys`` bound the lengths; of the C++ operators, ``least_keys`` refuses
sequences with fewer keys (causal=True: q's rows). The user's functions see b = number of the
sequence and kv_idx from 0; q_idx of a sequence's first row is 0, or with ``align_end`` that of its
last row is the index of its last key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnengine import dispatch, library, ops

forward_sequences = torch.ops.attnengine.forward_sequences.default._op
append_kv = torch.ops.attnengine.append_kv.default._op

_TABLES = (
    "Tensor? q_start, Tensor? q_end, Tensor? key_start, Tensor? key_end, Tensor? kv_row, "
    "Tensor? pages, SymInt max_rows, SymInt max_keys, SymInt key_more, bool align_end"
)
_library = torch.library.Library("attnengine", "FRAGMENT")
_library.define(
    "attention_sequences(Tensor q, Tensor k, Tensor v, Tensor[] captures, str key, float scale, "
    f"{_TABLES}) -> (Tensor out, Tensor stats)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


# ---------------------------------------------------------------------------------------- forward


@torch.library.register_fake("attnengine::forward_sequences", lib=_library)
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    kernel: int,
    scale: float,
    stats: bool,
    *tables: Any,
) -> tuple[Tensor, Tensor | None]:
    info = library.kernel_info(kernel)
    _check(q, k, v, tables)
    if (q.dtype, q.shape[3], v.shape[3]) != (info.dtype, info.D, info.Dv):
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype} and v {tuple(v.shape)}: this kernel was compiled for "
            f"{info.dtype} and head dims {info.D} and {info.Dv}"
        )
    out, saved = ops._fake_results(q, v, info.stats)
    return out, saved if stats else None


def _check(q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Any]) -> None:
    """What must hold of shapes, dtypes and devices; they may be symbolic, and values are not seen.

    The operators themselves say more, so a failure here is rare: arguments have passed a face.
    """
    q_start, q_end, key_start, key_end, kv_row, pages, *_ = tables
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(
            f"q, k and v must be 4-D [B, H, L, D], got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must share dtype and device, got {q.dtype} {q.device}, "
            f"{k.dtype} {k.device}, {v.dtype} {v.device}; convert them with .to()"
        )
    if q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}: q and k need one "
            "head_dim, k and v the same batch, heads and length"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"q has {q.shape[1]} heads, which is not a multiple of the {k.shape[1]} of k and v"
        )
    for name, x, rank in (
        ("q_start", q_start, 1), ("q_end", q_end, 1), ("key_start", key_start, 1),
        ("key_end", key_end, 1), ("kv_row", kv_row, 1), ("pages", pages, 2),
    ):  # fmt: skip
        if x is None:
            continue
        if x.dim() != rank or x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}; expected int32 of rank "
                f"{rank} on {q.device}"
            )


# ------------------------------------------------------------------------------------- the append


def _append_on_device(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor | None,
    kv_row: Tensor | None,
    pages: Tensor | None,
    key_start: Tensor | None = None,
    least_keys: int = 0,
) -> None:
    """append_kv on CUDA tensors, by torch's own kernels: nothing waits for the device."""
    if cache_seqlens is None:
        raise ValueError("appending k and v needs cache_seqlens: the lengths before the append")
    steps = torch.arange(k.shape[1], dtype=torch.int32, device=k.device)
    positions = cache_seqlens[:, None] + steps
    if pages is not None:
        size = k_cache.shape[1]
        rows = pages.gather(1, (positions // size).long())
        positions = positions % size
    elif kv_row is not None:
        rows = kv_row[:, None]
    else:
        rows = torch.arange(k.shape[0], dtype=torch.int32, device=k.device)[:, None]
    where = (rows.long(), positions.long())
    k_cache.index_put_(where, k)
    v_cache.index_put_(where, v)


@torch.library.register_fake("attnengine::append_kv", lib=_library)
def _append_fake(*arguments: Any, **more: Any) -> None:
    return None


_library.impl("append_kv", _append_on_device, "CUDA")


# ------------------------------------------------------------------------- the traceable operator


def _attention_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    key: str,
    scale: float,
    *tables: Any,
) -> tuple[Tensor, Tensor]:
    rows = tables[6] * (q.shape[1] // max(k.shape[1], 1))
    shared = " shared" if dispatch.shares_keys(k, v) else ""
    kernel = ops.resolve(key, f"{dispatch.SEQUENCES}{rows}{shared}")
    try:
        return forward_sequences(q, k, v, captures, kernel, scale, True, *tables)
    except ValueError as error:
        raise ops.translate(error) from None


for _device in ("CPU", "CUDA"):
    _library.impl("attention_sequences", _attention_sequences, _device)


@torch.library.register_fake("attnengine::attention_sequences", lib=_library)
def _attention_sequences_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    key: str,
    scale: float,
    *tables: Any,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, tables)
    if q.device.type == "cuda" and not ops._on_cuda(key):  # one for the CPU must not pass
        raise ValueError(
            f"q is on {q.device} but the kernel of this graph was compiled for the CPU; "
            "compile one for CUDA tensors, or use CPU tensors (.cpu())"
        )
    return ops._fake_results(q, v, ops._saved_stats(key)[0])


for _name in ("forward_sequences", "append_kv", "attention_sequences"):
    torch.library.register_vmap(f"attnengine::{_name}", ops._no_vmap, lib=_library)
