"""Masks without the L x S: tile classes are right, and tables of huge masks are small and quick."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

import attnengine as ae
from attnengine.blockmask import as_mask_mod
from attnengine.masks import EMPTY, FULL, PARTIAL, TileTable

pytestmark = pytest.mark.compiles
D = 8
HUGE = 128 * 1024
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def handle(mask: Mask) -> ae.Handle:
    x = torch.zeros(1, 1, 1, D)
    return ae.compile(ae.AttentionSpec(mask_mod=mask), x, x, x)


def dense(mask: Mask, L: int, S: int, b: int = 0, h: int = 0) -> np.ndarray:
    i, j = torch.arange(L)[:, None], torch.arange(S)[None, :]
    live = mask(torch.tensor(b), torch.tensor(h), i, j)
    return live.expand(L, S).numpy()


def check(table: TileTable, live: np.ndarray, exact: bool = True) -> None:
    """Empty tiles have no live pair, full ones no dead pair; ``exact``: partial ones have both."""
    classes = table.dense()
    assert classes.shape == (table.rows, table.columns)
    for r in range(table.rows):
        rows = live[r * table.block_m : (r + 1) * table.block_m]
        for c in range(table.columns):
            tile = rows[:, c * table.block_n : (c + 1) * table.block_n]
            kind = classes[r, c]
            where = (r, c, tile.mean())
            if kind == EMPTY:
                assert not tile.any(), where
            elif kind == FULL:
                assert tile.all(), where
            elif exact:
                assert tile.any(), where
                inside = tile.shape == (table.block_m, table.block_n)
                assert not (inside and tile.all()), where


def well_formed(table: TileTable) -> None:
    """Runs in order, not touching another of the same class, inside the table."""
    runs = table.runs
    assert runs.dtype == np.int32 and runs.shape[1] == 4
    assert set(np.unique(runs[:, 3])) <= {PARTIAL, FULL}
    assert bool((runs[:, 1] < runs[:, 2]).all()) and runs[:, 2].max(initial=0) <= table.columns
    assert runs[:, 0].max(initial=-1) < table.rows and runs.min(initial=0) >= 0
    for a, b in zip(runs, runs[1:], strict=False):
        assert a[0] <= b[0]
        if a[0] == b[0]:
            assert a[2] <= b[1]
            assert a[2] < b[1] or a[3] != b[3]


CUTS = torch.tensor([0, 300, 301, 700, 1000])
DOCUMENT = torch.bucketize(torch.arange(1100), CUTS[1:], right=True)
BY_BATCH = torch.stack([DOCUMENT, DOCUMENT.flip(0)])
LENGTHS = torch.tensor([1000, 77])
OFFSET = torch.tensor(100)
BLOCKS = torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) < 0.4

MASKS: dict[str, tuple[Mask, bool]] = {
    "causal": (lambda b, h, q, k: q >= k, True),
    "window": (lambda b, h, q, k: (q >= k) & (q - k <= 200), True),
    "two-sided window": (lambda b, h, q, k: (q - k).abs() <= 150, True),
    "prefix": (lambda b, h, q, k: (k < 333) | (q >= k), True),
    "offset from a tensor": (lambda b, h, q, k: q + OFFSET >= k, True),
    "per head": (lambda b, h, q, k: q - k >= h * 25, True),
    "documents": (lambda b, h, q, k: DOCUMENT[q] == DOCUMENT[k], True),
    "causal documents": (lambda b, h, q, k: (DOCUMENT[q] == DOCUMENT[k]) & (q >= k), True),
    "documents by batch": (lambda b, h, q, k: BY_BATCH[b, q] == BY_BATCH[b, k], True),
    "lengths by batch": (lambda b, h, q, k: k < LENGTHS[b], True),
    "blocks": (lambda b, h, q, k: BLOCKS[q // 128, k // 128], True),
    "neither": (lambda b, h, q, k: ~((q >= k) | (k > 900)), False),
    "exclusive or": (lambda b, h, q, k: (q >= k) ^ (k < 500), True),
    "dilated": (lambda b, h, q, k: ((q - k) % 3 == 0) & (q >= k), False),
    "hash": (lambda b, h, q, k: ((q * 31 + k * 17) % 7) < 3, False),
    "product": (lambda b, h, q, k: (q - 500) * (k - 500) > 0, False),
    "true division": (lambda b, h, q, k: q / 2 >= k, True),
    "all": (lambda b, h, q, k: k >= 0, True),
    "none": (lambda b, h, q, k: k < 0, True),
}


def packed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Head i has mask i: one kernel for all of them."""
    live = h < 0
    for i, (mask, _) in enumerate(MASKS.values()):
        live = live | ((h == i) & mask(b, h, q, k))
    return live


@pytest.mark.parametrize("name", MASKS)
def test_classes_against_the_dense_mask(name: str) -> None:
    mask, exact = MASKS[name]
    attn, h, heads = handle(packed), list(MASKS).index(name), len(MASKS)
    for L, S in ((1100, 1100), (130, 900)):
        for b in (0, 1):
            table = attn.tiles(L, S, B=2, heads=(heads, heads), b=b, h=h)
            well_formed(table)
            check(table, dense(mask, L, S, b, h), exact)
            counts = table.counts()
            assert sum(counts.values()) == table.rows * table.columns


def test_grouped_heads_share_a_table_when_the_mask_ignores_them() -> None:
    mask, _ = MASKS["window"]
    attn = handle(mask)
    assert attn.plan.pack_group
    table = attn.tiles(300, 500, heads=(8, 2))
    assert table.rows == -(-300 * 4 // table.block_m)
    live = np.repeat(dense(mask, 300, 500), 4, axis=0)
    check(table, live)


def test_lengths_of_zero_and_one() -> None:
    attn = handle(MASKS["causal"][0])
    for L, S in ((0, 5), (5, 0), (1, 1), (1, 1000)):
        table = attn.tiles(L, S)
        well_formed(table)
        check(table, dense(MASKS["causal"][0], L, S), exact=False)
    assert attn.tiles(1, 1000).counts()["empty"] == attn.tiles(1, 1000).columns - 1


def long_documents() -> Tensor:
    sizes = torch.randint(50, 3000, (400,), generator=torch.Generator().manual_seed(1))
    return torch.repeat_interleave(torch.arange(400), sizes)[:HUGE].int()


HUGE_DOCUMENT = long_documents()


def causal_then_prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) | ((h == 1) & (k < 333))


HUGE_MASKS: dict[str, tuple[Mask, int, float]] = {
    # mask, head, live pairs / all pairs
    "causal": (causal_then_prefix, 0, 0.5),
    "prefix": (causal_then_prefix, 1, 0.5),
    "window": (MASKS["window"][0], 0, 201 / HUGE),
    "causal documents": (
        lambda b, h, q, k: (HUGE_DOCUMENT[q] == HUGE_DOCUMENT[k]) & (q >= k),
        0,
        float((torch.bincount(HUGE_DOCUMENT.long()).double() ** 2).sum() / 2 / HUGE**2),
    ),
}


@pytest.mark.parametrize("name", HUGE_MASKS)
def test_huge_masks_are_small_and_quick(name: str) -> None:
    """128k x 128k: 17 billion pairs, a dense mask of 16 GiB. A bound with room for a busy machine;
    what it takes on a quiet one is in the benchmarks."""
    assert len(HUGE_DOCUMENT) == HUGE
    mask, h, share = HUGE_MASKS[name]
    attn = handle(mask)
    attn.tiles(HUGE, HUGE, heads=(2, 2), h=h)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        table = attn.tiles(HUGE, HUGE, heads=(2, 2), h=h)
        times.append(time.perf_counter() - start)
    well_formed(table)
    assert table.nbytes <= 300 * 1024
    assert min(times) < 0.2
    counts, tile = table.counts(), table.block_m * table.block_n
    live = share * HUGE * HUGE
    assert counts["full"] * tile <= live * 1.001
    assert (counts["full"] + counts["partial"]) * tile >= live * 0.999
    assert counts["partial"] <= 8 * (table.rows + table.columns) + len(CUTS) * table.rows


def test_huge_mask_is_walked_not_made() -> None:
    """A whole call at 64k keys with a window: what a dense mask would make impossible here."""
    n = 64 * 1024
    mask = MASKS["window"][0]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, D, generator=g) for _ in range(3))
    out = ae.attention(q, k, v, ae.AttentionSpec(mask_mod=mask))
    for at in (0, 5, 1000, n - 1):
        keys = slice(max(0, at - 200), at + 1)
        w = torch.softmax(q[0, 0, at] @ k[0, 0, keys].T / D**0.5, 0)
        torch.testing.assert_close(out[0, 0, at], w @ v[0, 0, keys], rtol=1e-4, atol=1e-5)


# -- BlockMask -------------------------------------------------------------------------------------


def block_masks() -> dict[str, flex.BlockMask]:
    causal = MASKS["causal"][0]

    def made(mask: Mask, **more: object) -> flex.BlockMask:
        sizes = {"B": None, "H": None, "BLOCK_SIZE": 128} | more
        return flex.create_block_mask(mask, Q_LEN=1100, KV_LEN=900, device="cpu", **sizes)

    subset = made(causal)
    subset.kv_num_blocks.clamp_(max=0)  # full blocks stay, diagonal ones are dropped
    return {
        "causal": made(causal),
        "one list": made(causal, separate_full_blocks=False),
        "oblong, by batch": made(MASKS["documents by batch"][0], B=2, BLOCK_SIZE=(64, 256)),
        "strict subset": subset,
    }


@pytest.mark.parametrize("name", list(block_masks()))
def test_classes_of_a_block_mask(name: str) -> None:
    block_mask = block_masks()[name]
    q, k = torch.zeros(2, 1, 1100, D), torch.zeros(2, 1, 900, D)
    mod = as_mask_mod(block_mask, q, k)
    assert mod is not None
    attn = handle(mod)
    for b in (0, 1):
        table = attn.tiles(1100, 900, B=2, b=b)
        well_formed(table)
        check(table, dense(mod, 1100, 900, b), exact=name != "oblong, by batch")
        listed = dense(mod, 1100, 900, b)
        wanted = dense(block_mask.mask_mod, 1100, 900, b)
        assert (listed <= wanted).all() and ((listed < wanted).any() == (name == "strict subset"))


def test_table_of_a_block_mask_is_made_once() -> None:
    mask = block_masks()["causal"]
    q, k = torch.zeros(1, 1, 1100, D), torch.zeros(1, 1, 900, D)

    def table(m: object) -> Tensor:
        mod = as_mask_mod(m, q, k)
        assert mod is not None and mod.__closure__ is not None
        cells = [c.cell_contents for c in mod.__closure__]
        return next(c for c in cells if isinstance(c, Tensor))

    first = table(mask)
    assert table(mask) is first
    mask.kv_num_blocks.zero_()
    assert table(mask) is not first
    assert table(block_masks()["causal"]) is not first
