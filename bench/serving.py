"""Decode over KV caches as a server holds them: batches, ragged lengths, pages, MLA's latent.

`ae.attention_with_kvcache` against a plain read of large buffers and SDPA on the same tensors (one
call per sequence where lengths differ). Small caches take turns, so that every call reads DRAM.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import attnengine as ae

from . import agreement, baselines, peaks
from .rows import Row, share_row
from .runner import Samples, interleave
from .session import Session
from .variants import Variant

READ_BAR, SDPA_BAR = 0.80, 10.0
RAGGED_BAR = 1.10  # time per byte beside equal lengths
PAGED_BAR = 0.93  # dense time by paged time
PEAK_BAR = 0.60  # MLA, of the bf16 dot peak
TURN_BYTES = 168 << 20  # what copies that take turns hold together: five times a large L3
MOST_BYTES = 5 << 30  # of all caches of one contest
PAGES = (16, 64, 256)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Cache:
    """Lengths of the sequences of a batch, and the heads. `latent`: V is the first `value_dim`
    elements of K, as in MLA."""

    name: str
    lengths: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    value_dim: int = 128
    latent: bool = False

    @property
    def token_bytes(self) -> int:
        """Of K and V of one position; a latent is read once."""
        width = self.dim if self.latent else self.dim + self.value_dim
        return self.kv_heads * width * DTYPE.itemsize

    @property
    def bytes(self) -> int:
        """K and V of all sequences, each read once."""
        return sum(self.lengths) * self.token_bytes

    @property
    def flops(self) -> float:
        """Two products."""
        return 2.0 * self.heads * sum(self.lengths) * (self.dim + self.value_dim)

    @property
    def copies(self) -> int:
        """Caches that take turns."""
        return max(1, math.ceil(TURN_BYTES / self.bytes))


@dataclass(frozen=True)
class Held:
    """One filled cache. k, v [B, S, Hkv, D] or, with a table, [pages, page, Hkv, D]."""

    q: Tensor  # [B, 1, Hq, D]
    k: Tensor
    v: Tensor
    lengths: Tensor  # int32 [B]
    table: Tensor | None = None  # int32 [B, columns]


def fill(cache: Cache, seed: int = 0) -> Held:
    """A dense cache; memory beyond a sequence's length is not touched."""
    random = torch.Generator().manual_seed(seed)
    batch, most = len(cache.lengths), max(cache.lengths)
    k = torch.empty(batch, most, cache.kv_heads, cache.dim, dtype=DTYPE)
    if cache.latent:
        v = k[..., : cache.value_dim]
    else:
        v = torch.empty(batch, most, cache.kv_heads, cache.value_dim, dtype=DTYPE)
    for b, length in enumerate(cache.lengths):
        for x in (k,) if cache.latent else (k, v):
            for at in range(0, length, 4096):
                rows = x[b, at : min(at + 4096, length)]
                rows.copy_(torch.randn(rows.shape, generator=random))
    q = torch.randn(batch, 1, cache.heads, cache.dim, generator=random).to(DTYPE)
    return Held(q, k, v, torch.tensor(cache.lengths, dtype=torch.int32))


def paged(held: Held, page: int, seed: int = 0) -> Held:
    """The same keys in pages that lie in random order."""
    random = torch.Generator().manual_seed(seed)
    counts = [-(-n // page) for n in held.lengths.tolist()]
    order = torch.randperm(sum(counts), generator=random).to(torch.int32)
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    latent = held.v.data_ptr() == held.k.data_ptr()
    shape = (sum(counts), page)
    k = torch.empty(*shape, *held.k.shape[2:], dtype=DTYPE)
    v = (
        k[..., : held.v.shape[-1]]
        if latent
        else torch.empty(*shape, *held.v.shape[2:], dtype=DTYPE)
    )
    begin = 0
    for b, count in enumerate(counts):
        table[b, :count] = order[begin : begin + count]
        begin += count
        for i, to in enumerate(table[b, :count].tolist()):
            live = slice(i * page, min((i + 1) * page, int(held.lengths[b])))
            rows = live.stop - live.start
            k[to, :rows] = held.k[b, live]
            if not latent:
                v[to, :rows] = held.v[b, live]
    return Held(held.q, k, v, held.lengths, table)


def ours(held: Held) -> Tensor:
    """[B, 1, Hq, Dv]."""
    return ae.attention_with_kvcache(
        held.q, held.k, held.v, cache_seqlens=held.lengths, block_table=held.table
    )


def sdpa(held: Held) -> Tensor:
    """torch on the live part of a dense cache: at once where lengths are equal, else a call per
    sequence. One head of keys: the query heads are rows, so that nothing is repeated."""
    lengths = held.lengths.tolist()
    equal = len(set(lengths)) == 1
    step = len(lengths) if equal else 1
    out = []
    for b in range(0, len(lengths), step):
        q = held.q[b : b + step].transpose(1, 2)
        k, v = (x[b : b + step, : lengths[b]].transpose(1, 2) for x in (held.k, held.v))
        rows = held.k.shape[2] == 1
        if rows:
            q = q.transpose(1, 2)
        found = F.scaled_dot_product_attention(q, k, v, enable_gqa=not rows)
        out.append(found if rows else found.transpose(1, 2))
    return torch.cat(out)


def turns(attend: Callable[[Held], Tensor], copies: Sequence[Held]) -> baselines.Step:
    """A step that takes the next cache at every call."""
    turn = itertools.cycle(copies)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attend(next(turn)),)

    return forward


def check(cache: Cache, held: Held) -> float:
    """Distance of one head of the first sequence from the fp64 reference; every element of a dense
    cache against SDPA."""
    with torch.no_grad():
        out, length = ours(held), cache.lengths[0]
        q, k, v = (x[:1].transpose(1, 2)[:, :1] for x in (held.q, held.k, held.v))
        keys = (k[:, :, :length], v[:, :, :length])
        variant = Variant("full", float(length))
        distance = agreement.check_output(cache.name, out[:1].transpose(1, 2), variant, (q, *keys))
        agreement.check_peers(cache.name, [out], {"sdpa": lambda: (sdpa(held),)}, DTYPE)
    return distance


def contest(
    session: Session, contestants: dict[str, baselines.Step]
) -> tuple[dict[str, Samples], float]:
    """Times in the same rounds as a plain read of large buffers, and the rate of that: what the
    memory gives changes from minute to minute on a shared machine."""
    read = peaks.QuietRead(session.threads)
    times = interleave({**contestants, "read": read}, session.budget_s * 2, session.min_rounds)
    peaks.library().release_buffers()
    return times, read.rate


def row(cache: Cache, times: Samples, rate: float, distance: float | None = None) -> Row:
    """Ours, with its share of the read rate."""
    return Row(
        name=cache.name,
        unit="ms",
        ours=times.median * 1e3,
        spread=times.spread,
        gflops=cache.flops / times.median / 1e9,
        share_of_peak=cache.bytes / times.median / rate,
        distance=distance,
    )


def against(mine: Row, peer: str, times: Samples, bar: float | None) -> Row:
    """How many times as fast as a peer."""
    value = times.median * 1e3
    return replace(mine, peer=peer, peer_value=value, ratio=value / mine.ours, bar=bar)


def read_row(mine: Row, rate: float, bar: float | None) -> Row:
    return share_row(mine, bar, f"read of {rate / 1e9:.1f} GB/s")


def measure_cache(cache: Cache, session: Session) -> list[Row]:
    """A dense cache against the streaming read and SDPA."""
    copies = [fill(cache, seed) for seed in range(cache.copies)]
    distance = check(cache, copies[0])
    times, rate = contest(session, {"ours": turns(ours, copies), "sdpa": turns(sdpa, copies)})
    mine = row(cache, times["ours"], rate, distance)
    return [against(mine, "sdpa", times["sdpa"], SDPA_BAR), read_row(mine, rate, READ_BAR)]


def measure_ragged(cache: Cache, session: Session) -> list[Row]:
    """The same, and beside a batch of as many keys in equal sequences."""
    mean = sum(cache.lengths) // len(cache.lengths)
    level = replace(cache, name=cache.name + "/equal", lengths=(mean,) * len(cache.lengths))
    ragged = [fill(cache, seed) for seed in range(cache.copies)]
    equal = [fill(level, seed) for seed in range(cache.copies)]
    distance = check(cache, ragged[0])
    check(level, equal[0])
    times, rate = contest(
        session,
        {"ours": turns(ours, ragged), "equal": turns(ours, equal), "sdpa": turns(sdpa, ragged)},
    )
    mine = row(cache, times["ours"], rate, distance)
    return [
        against(mine, "sdpa", times["sdpa"], SDPA_BAR),
        read_row(mine, rate, READ_BAR),
        ragged_row(mine, cache, times["equal"], level),
    ]


def ragged_row(mine: Row, cache: Cache, times: Samples, level: Cache) -> Row:
    """Time per byte relative to equal lengths; 1 is the same."""
    ratio = (mine.ours / cache.bytes) / (times.median * 1e3 / level.bytes)
    return replace(
        mine, peer="equal, per byte", peer_value=None, ratio=ratio, bar=RAGGED_BAR, at_least=False
    )


def bare_read(held: Held, threads: int) -> baselines.Step:
    """Reads the pages of a cache in the order of its table, and does nothing with them: what the
    memory gives for blocks of this size."""
    assert held.table is not None
    page = held.k.shape[1]
    live = [row[: -(-n // page)] for row, n in zip(held.table, held.lengths.tolist(), strict=True)]
    order = torch.cat(live)
    size = held.k[0].numel() * held.k.element_size()

    def forward() -> tuple[Tensor, ...]:
        k, v = held.k.data_ptr(), held.v.data_ptr()
        peaks.library().read_blocks(threads, k, v, size, order.data_ptr(), len(order))
        return ()

    return forward


def measure_pages(cache: Cache, session: Session) -> list[Row]:
    """Pages in random order against the same keys in one piece, and against a loop that only reads
    them."""
    dense = [fill(cache, seed) for seed in range(cache.copies)]
    distance = check(cache, dense[0])
    held = {page: [paged(one, page, i) for i, one in enumerate(dense)] for page in PAGES}
    with torch.no_grad():
        expected = ours(dense[0])
        for page, copies in held.items():
            name = f"{cache.name}/page{page}"
            agreement.require(name, agreement.difference(ours(copies[0]), expected), DTYPE)
    steps = {f"page{page}": turns(ours, copies) for page, copies in held.items()}
    if not cache.latent:  # whose V is read with K
        steps |= {f"bare{p}": bare_read(copies[0], session.threads) for p, copies in held.items()}
    times, rate = contest(session, {"dense": turns(ours, dense), **steps})
    rows = []
    for page in PAGES:
        mine = row(cache, times[f"page{page}"], rate, distance)
        mine = replace(mine, name=f"{cache.name}/page{page}")
        if f"bare{page}" in times:
            rows.append(against(mine, "bare read of the pages", times[f"bare{page}"], None))
        rows += [
            against(mine, "dense", times["dense"], PAGED_BAR),
            read_row(mine, rate, READ_BAR if not cache.latent else None),
        ]
    return rows


def measure_latent(cache: Cache, session: Session) -> list[Row]:
    """MLA: many heads on one latent, so that products bind, not reading."""
    copies = [fill(cache, seed) for seed in range(cache.copies)]
    distance = check(cache, copies[0])
    times, rate = contest(session, {"ours": turns(ours, copies), "sdpa": turns(sdpa, copies)})
    mine = row(cache, times["ours"], rate, distance)
    peak = session.peak_flops(DTYPE)
    share = replace(mine, share_of_peak=cache.flops / times["ours"].median / peak)
    name = f"bf16 dot peak of {peak / 1e9:.0f} GFLOP/s"
    return [against(mine, "sdpa", times["sdpa"], None), share_row(share, PEAK_BAR, name)]


def size(keys: int) -> str:
    return f"{keys // 1024}k" if keys % 1024 == 0 else str(keys)


def latent(name: str, batch: int, keys: int) -> Cache:
    """DeepSeek-V2 and V3: 128 heads on a latent of 512 and 64 rotary elements."""
    full = f"serving/bf16/mla/b{batch}/s{size(keys)}{name}"
    return Cache(full, (keys,) * batch, 128, 1, 576, 512, latent=True)


def caches(quick: bool) -> list[tuple[Cache, Callable[[Cache, Session], list[Row]]]]:
    """Every contest, those that fit the memory."""
    start = "serving/bf16/q32kv8"
    lengths, batches = ((1024,), (1, 2)) if quick else ((4096, 16384, 65536, 131072), (1, 4, 16))
    found = [
        (Cache(f"{start}/b{b}/s{size(s)}", (s,) * b), measure_cache)
        for s in lengths
        for b in batches
    ]
    doubling = tuple((64 if quick else 1024) << i for i in (5, 0, 7, 2, 4, 1, 6, 3))
    ragged = Cache(f"{start}/b8/ragged", doubling)
    pages = Cache(f"{start}/b4/s{size(lengths[min(1, len(lengths) - 1)])}", (lengths[-1],) * 4)
    if not quick:
        pages = replace(pages, lengths=(16384,) * 4)
    found += [(ragged, measure_ragged), (ragged, measure_pages), (pages, measure_pages)]
    for batch, keys in ((1, 512),) if quick else ((1, 4096), (1, 16384), (4, 16384)):
        found.append((latent("", batch, keys), measure_latent))
    found.append((latent("", 1, 512 if quick else 16384), measure_pages))
    # Paging holds a cache once more per size of page, ragged lengths twice.
    holds = {measure_pages: 1 + len(PAGES), measure_ragged: 2}
    return [
        (cache, how)
        for cache, how in found
        if cache.bytes * cache.copies * holds.get(how, 1) <= MOST_BYTES
    ]


def measure(session: Session) -> None:
    """Every contest that is asked for."""
    for cache, how in caches(session.quick):
        session.attempt(cache.name, lambda cache=cache, how=how: how(cache, session))
