"""Which tiles of a mask are empty, partial or full, as runs per row of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from . import library

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True)
class TileTable:
    """Runs of tiles: int32 [runs, 4] of (row of tiles, first KV tile, end, class).

    Classes are PARTIAL (the mask is evaluated per key) and FULL (it is not); tiles in no run are
    empty and never visited. ``block_m`` x ``block_n`` pairs make a tile.
    """

    runs: np.ndarray
    rows: int
    columns: int
    block_m: int
    block_n: int

    @property
    def nbytes(self) -> int:
        return int(self.runs.nbytes)

    def counts(self) -> dict[str, int]:
        """Tiles by class."""
        length = self.runs[:, 2] - self.runs[:, 1]
        partial = int(length[self.runs[:, 3] == PARTIAL].sum())
        full = int(length[self.runs[:, 3] == FULL].sum())
        empty = self.rows * self.columns - partial - full
        return {"empty": empty, "partial": partial, "full": full}

    def dense(self) -> np.ndarray:
        """uint8 [rows, columns] of classes: for small tables."""
        out = np.zeros((self.rows, self.columns), dtype=np.uint8)
        for row, first, end, kind in self.runs:
            out[row, first:end] = kind
        return out


def tile_table(
    kernel: int,
    captures: Sequence[torch.Tensor],
    block_m: int,
    block_n: int,
    pack_group: bool,
    sizes: tuple[int, int, int, int, int],
    b: int,
    h: int,
) -> TileTable:
    """All runs of one batch element and head block; ``sizes`` is (B, Hq, Hkv, L, S)."""
    _, heads, kv_heads, length, keys = sizes
    group = heads // kv_heads if pack_group and kv_heads else 1
    rows = -(-length * group // block_m)
    runs = library.classify(kernel, sizes, captures, b=b, h=h)
    return TileTable(runs, rows, -(-keys // block_n), block_m, block_n)
