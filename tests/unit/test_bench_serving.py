"""The serving benchmark without its clock and without kernels: caches, pages, peers, verdicts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import attnengine as ae
from bench import agreement, serving
from bench.runner import Samples
from bench.serving import Cache

SMALL = Cache("serving/bf16/small", (40, 7, 64), 4, 2, 16, 24)
LATENT = Cache("serving/bf16/latent", (40, 7), 6, 1, 24, 16, latent=True)


def steady(seconds: float) -> Samples:
    return Samples((seconds,) * 5)


def dense(held: serving.Held, b: int) -> tuple[torch.Tensor, ...]:
    """q, k, v of one sequence, [1, H, L, D] in fp64."""
    n = int(held.lengths[b])
    parts = held.q[b : b + 1], held.k[b : b + 1, :n], held.v[b : b + 1, :n]
    return tuple(x.transpose(1, 2).double() for x in parts)


@pytest.mark.parametrize("cache", [SMALL, LATENT], ids=lambda c: c.name)
def test_peer_is_attention_over_the_live_keys(cache: Cache) -> None:
    held = serving.fill(cache)
    out = serving.sdpa(held)
    assert out.shape == (len(cache.lengths), 1, cache.heads, cache.value_dim)
    for b in range(len(cache.lengths)):
        golden = ae.reference(*dense(held, b), ae.AttentionSpec(), dtype=torch.float64)
        assert agreement.difference(out[b : b + 1].transpose(1, 2), golden) < 1e-2
    equal = serving.fill(replace(cache, lengths=(33, 33)))
    at_once = serving.sdpa(equal)
    for b in range(2):
        golden = ae.reference(*dense(equal, b), ae.AttentionSpec(), dtype=torch.float64)
        assert agreement.difference(at_once[b : b + 1].transpose(1, 2), golden) < 1e-2


@pytest.mark.parametrize("cache", [SMALL, LATENT], ids=lambda c: c.name)
def test_pages_hold_the_same_keys(cache: Cache) -> None:
    held = serving.fill(cache)
    pages = serving.paged(held, 16)
    assert pages.table is not None
    used = [-(-n // 16) for n in cache.lengths]
    entries = torch.cat([pages.table[b, :n] for b, n in enumerate(used)])
    assert sorted(entries.tolist()) == list(range(sum(used)))
    assert (pages.v.data_ptr() == pages.k.data_ptr()) == cache.latent
    for b, n in enumerate(cache.lengths):
        for whole, cut in ((held.k, pages.k), (held.v, pages.v)):
            rows = cut[pages.table[b, : used[b]].long()].flatten(0, 1)[:n]
            assert torch.equal(rows, whole[b, :n])


def test_bytes_and_flops() -> None:
    one = Cache("x", (1024,))
    assert one.bytes == 1024 * 4096 and one.flops == 4 * 32 * 128 * 1024
    assert one.copies == serving.TURN_BYTES // one.bytes
    mla = serving.latent("", 1, 1024)
    assert mla.bytes == 1024 * 576 * 2 and mla.flops == 2 * 128 * 1024 * 1088
    assert serving.fill(replace(LATENT, lengths=(3,))).v.shape == (1, 3, 1, 16)


def test_the_suite_is_the_one_that_is_documented() -> None:
    found = serving.caches(quick=False)
    names = [cache.name.removeprefix("serving/bf16/") for cache, _ in found]
    assert names == [
        *(f"q32kv8/b{b}/s{s}" for s in ("4k", "16k", "64k") for b in (1, 4, 16)),
        "q32kv8/b1/s128k", "q32kv8/b4/s128k",
        "q32kv8/b8/ragged", "q32kv8/b8/ragged", "q32kv8/b4/s16k",
        "mla/b1/s4k", "mla/b1/s16k", "mla/b4/s16k", "mla/b1/s16k",
    ]  # fmt: skip
    ragged = next(cache for cache, how in found if how is serving.measure_ragged)
    assert sorted(ragged.lengths) == [1024 << i for i in range(8)]
    assert ragged.lengths != tuple(sorted(ragged.lengths))
    assert len(serving.caches(quick=True)) == 7


def test_rows_and_bars() -> None:
    cache = Cache("serving/bf16/x", (1000, 3000))
    mine = serving.row(cache, steady(cache.bytes / 20e9), 25e9)
    assert serving.read_row(mine, 25e9, serving.READ_BAR).verdict == "pass"
    assert serving.read_row(mine, 25e9, 0.81).verdict == "miss"
    faster = serving.against(mine, "sdpa", steady(mine.ours / 1e3 * 9), serving.SDPA_BAR)
    assert faster.ratio == pytest.approx(9) and faster.verdict == "miss"
    level = replace(cache, lengths=(1000, 1000))
    row = serving.ragged_row(mine, cache, steady(level.bytes / 22e9), level)
    assert row.ratio == pytest.approx(1.1) and math.isclose(row.bar or 0, 1.1)
    slow = serving.ragged_row(mine, cache, steady(level.bytes / 23e9), level)
    assert slow.verdict == "miss"


def test_turns_go_round() -> None:
    copies = [serving.fill(replace(SMALL, lengths=(n, n))) for n in (1, 2, 3)]
    step = serving.turns(lambda held: held.lengths, copies)
    assert [int(step()[0][0]) for _ in range(5)] == [1, 2, 3, 1, 2]
