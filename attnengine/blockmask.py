"""torch's BlockMask as a mask function over a captured table of block classes.

Compiled kernels obey the block lists: a pair is live in a full block, or in a partial block where
mask_mod holds. The table has one byte per block, so a list that is a strict subset of the mask is
obeyed too, and interval analysis reads it like any captured tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

_NO_MASK_BLOCK = 1 << 30  # torch's block size of "no mask": lengths are not checked
_tables: weakref.WeakKeyDictionary[Any, tuple] = weakref.WeakKeyDictionary()


def as_mask_mod(mask: Any, q: torch.Tensor, k: torch.Tensor) -> Callable | None:
    """A mask_mod with the meaning of BlockMask ``mask`` for q [B, H, L, D] and k [B, Hkv, S, D].

    Raises TypeError for another object, ValueError for lengths, batch or heads that do not fit.
    """
    for name in ("kv_num_blocks", "kv_indices", "mask_mod", "BLOCK_SIZE", "seq_lengths"):
        if not hasattr(mask, name):
            raise TypeError(
                f"block_mask must be a torch BlockMask, got {type(mask).__name__} without {name}"
            )
    q_block, kv_block = mask.BLOCK_SIZE
    lengths = tuple(int(x) for x in mask.seq_lengths)
    if q_block >= _NO_MASK_BLOCK and kv_block >= _NO_MASK_BLOCK:
        return None
    if lengths != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"block_mask was made for lengths (Q, KV) = {lengths}, query and key have "
            f"({q.shape[2]}, {k.shape[2]}); make it again with create_block_mask, or crop it with "
            "block_mask._adjust"
        )
    batch, heads = mask.kv_num_blocks.shape[:2]
    for name, have, want in (("batch", batch, q.shape[0]), ("heads", heads, q.shape[1])):
        if have not in (1, want):
            raise ValueError(f"block_mask has {name} {have}, expected 1 or {want} as in query")
    table = _classes(mask)
    return _mask_function(table, mask.mask_mod, q_block, kv_block, batch > 1, heads > 1)


def _mask_function(
    table: torch.Tensor,
    mask_mod: Callable,
    q_block: int,
    kv_block: int,
    by_batch: bool,
    by_head: bool,
) -> Callable:
    def block_mask(
        b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        at = (b if by_batch else 0, h if by_head else 0, q_idx // q_block, kv_idx // kv_block)
        kind = table[at]
        # Not "kind == 1": over tiles with full and partial blocks, "kind > 0" is known to be true.
        return (kind == 2) | ((kind > 0) & mask_mod(b, h, q_idx, kv_idx))

    return block_mask


def _classes(mask: Any) -> torch.Tensor:
    """uint8 [B|1, H|1, Q blocks, KV blocks]: 0 empty, 1 partial (mask_mod applies), 2 full."""
    lists = [mask.kv_num_blocks, mask.kv_indices]
    full = (getattr(mask, "full_kv_num_blocks", None), getattr(mask, "full_kv_indices", None))
    if full[0] is not None:
        lists += full
    versions = tuple((id(t), t._version) for t in lists)
    known = _tables.get(mask)
    if known is not None and known[0] == versions:
        return known[1]
    (_, kv_block), (_, keys) = mask.BLOCK_SIZE, mask.seq_lengths
    rows = mask.kv_num_blocks.shape[2]
    columns = max(-(-int(keys) // kv_block), mask.kv_indices.shape[3])
    table = torch.zeros((*mask.kv_num_blocks.shape[:2], rows, columns + 1), dtype=torch.uint8)
    for count, index, kind in ((*lists[:2], 1), *([(*lists[2:], 2)] if len(lists) > 2 else [])):
        width = index.shape[3]
        listed = torch.arange(width) < count.unsqueeze(-1)
        # Entries past the count are undefined: they go to a spare column that is cut off.
        at = torch.where(listed, index.long(), columns).clamp(0, columns)
        table.scatter_(3, at, kind)
        table[..., columns] = 0
    table = table[..., :columns].contiguous()
    _tables[mask] = (versions, table)
    return table
