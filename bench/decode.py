"""Group decode: one query against a long cache, held against the machine's streaming read.

K and V (33.5 MB) are hardly larger than a last-level cache, so several copies take turns: what a
call reads has left the caches since its last turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from . import agreement, baselines, peaks
from .rows import Row, share_row
from .runner import Samples, interleave
from .session import Session
from .variants import Variant

READ_BAR = 0.60
COPIES = 5  # 168 MB in turn


@dataclass(frozen=True)
class Decode:
    """One query per sequence; `keys` are all live."""

    heads: int = 32
    kv_heads: int = 8
    keys: int = 8192
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """Of its rows."""
        return f"decode/bf16/d{self.dim}/s{self.keys}/q{self.heads}kv{self.kv_heads}"

    @property
    def bytes(self) -> int:
        """K and V, each read once."""
        return 2 * self.kv_heads * self.keys * self.dim * self.dtype.itemsize

    @property
    def flops(self) -> float:
        """Two products."""
        return 4.0 * self.heads * self.keys * self.dim

    def operands(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """q [1, Hq, 1, D] and COPIES caches of k, v [1, Hkv, S, D]."""
        generator = torch.Generator().manual_seed(0)
        cache = (1, self.kv_heads, self.keys, self.dim)
        shapes = ((1, self.heads, 1, self.dim), cache, cache)
        q, k, v = (torch.randn(x, generator=generator).to(self.dtype) for x in shapes)
        return [(q, k.clone(), v.clone()) for _ in range(COPIES)]


def rotate(attend: baselines.Attend, copies: Sequence[tuple[Tensor, ...]]) -> baselines.Step:
    """A forward step that takes the next copy at every call."""
    turn = itertools.cycle(copies)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attend(*next(turn)),)

    return forward


def prepare(case: Decode) -> tuple[dict[str, baselines.Step], float]:
    """The contestants, checked; and ours' distance from the reference."""
    copies = case.operands()
    variant = Variant("full", float(case.keys))
    handle = baselines.ours(variant, copies[0], False)
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    steps = {
        "attnengine": rotate(handle, copies),
        "sdpa": rotate(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), copies
        ),
        "flex": rotate(lambda q, k, v: compiled(q, k, v, enable_gqa=True), copies),
    }
    mine = steps["attnengine"]()
    # The group shares its keys: the first query head belongs to the first key head.
    distance = agreement.check_output(case.name, mine[0], variant, copies[0])
    peers = {name: run for name, run in steps.items() if name != "attnengine"}
    agreement.check_peers(case.name, mine, peers, case.dtype)
    return steps, distance


def measure_case(case: Decode, session: Session) -> list[Row]:
    """Ours, the peers and a plain read of large buffers, in the same rounds."""
    steps, distance = prepare(case)
    library = peaks.library()
    read = library.read_once(session.threads)
    contestants = {**steps, "read": lambda: library.read_once(session.threads)}
    times = interleave(contestants, session.budget_s * 2, session.min_rounds)
    library.release_buffers()
    # Threads of a pool that is still spinning slow a plain read; the better of two measurements.
    rate = max(read / times["read"].median, session.peaks[-1].read_bytes)
    return case_rows(case, times, distance, rate)


def case_rows(case: Decode, times: dict[str, Samples], distance: float, rate: float) -> list[Row]:
    """Against each peer, then the share of the streaming-read rate, which has the bar."""
    ours = times["attnengine"]
    rows = []
    for peer in times:
        if peer in ("attnengine", "read"):
            continue
        rows.append(
            Row(
                name=case.name,
                unit="ms",
                ours=ours.median * 1e3,
                spread=ours.spread,
                peer=peer,
                peer_value=times[peer].median * 1e3,
                ratio=times[peer].median / ours.median,
                gflops=case.flops / ours.median / 1e9,
                share_of_peak=case.bytes / ours.median / rate,
                distance=distance,
                intensity=case.flops / case.bytes,
            )
        )
    rows.append(share_row(rows[0], READ_BAR, f"read of {rate / 1e9:.1f} GB/s"))
    return rows


def measure(session: Session) -> None:
    """The one case of the group."""
    case = Decode(keys=1024) if session.quick else Decode()
    session.attempt(case.name, lambda: measure_case(case, session))
