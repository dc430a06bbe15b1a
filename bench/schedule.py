"""`python -m bench schedule`: cutting decode work among the 132 SMs of an H200, as a model.

No GPU is involved: lists of tiles are cut by the code that kernels and launchers run, and the
makespan is counted here once more, worker by worker. First in tiles alone (how evenly the work is
cut), then with what a segment, a partial result and the combine step cost.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markdown import Markdown

from attnengine import schedule
from attnengine.schedule import PolicyCosts

from .record import RESULTS
from .tables import markdown_table

SMS = 132
TILE = 128  # keys
DIM = 128  # of K and of V; 16-bit elements
BANDWIDTH = 0.9 * 4.8e12  # bytes/s: what copies reach of an H200's memory
PROLOGUE = 1e-6  # s of a segment: Q, the first K and V, the end of O
COMBINE = 3e-6  # s: the launch of a small kernel
COUNT = 3e-6  # s: the same, before stream-K where the device alone knows the lengths
HEADS = ((32, 8), (28, 4), (64, 8), (32, 32))  # of queries, of keys
BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = tuple(1 << p for p in range(13, 19))  # 8k to 256k keys
KINDS = ("equal", "uniform", "doubling")
COUNTED = PolicyCosts(1.0)  # tiles alone
EVEN_BAR = 0.97  # of stream-K on ragged lengths
BEHIND_BAR = 0.03  # of the automatic choice
# Tiles per SM from which the bar holds whatever the lengths: q of q - 1 + a fraction.
ENOUGH = math.ceil(1 / (1 - EVEN_BAR))

Prefix = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cell:
    """One batch of decode: a group of query heads is packed, so an output is a head of keys."""

    heads: int
    kv_heads: int
    batch: int
    kind: str
    context: int  # the longest possible

    @property
    def name(self) -> str:
        return f"{self.heads}/{self.kv_heads} B{self.batch} {self.kind} {self.context // 1024}k"

    @property
    def lengths(self) -> Prefix:
        """Keys of each sequence, in no order of size. The same for every number of heads."""
        random = np.random.default_rng((self.batch, self.context))
        if self.kind == "equal":
            return np.full(self.batch, self.context)
        if self.kind == "uniform":
            return random.integers(self.context // 10, self.context, self.batch, endpoint=True)
        # 1k to 128k; a small batch has the longest of them.
        return random.permutation(self.context >> (np.arange(self.batch) % 8))

    @property
    def prefix(self) -> Prefix:
        tiles = np.repeat(-(-self.lengths // TILE), self.kv_heads)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(tiles)])

    @property
    def costs(self) -> PolicyCosts:
        """Seconds. A part is the group's rows of fp32 sums and two numbers each."""
        return PolicyCosts.of_memory(
            2 * TILE * DIM * 2,
            self.heads // self.kv_heads * (DIM + 2) * 4,
            bandwidth=BANDWIDTH,
            slots=SMS,
            segment=PROLOGUE,
            combine=COMBINE,
        )


def cells() -> Iterator[Cell]:
    """The whole grid: heads, batches, contexts of equal and uniform lengths, and the doubling."""
    for heads, kv_heads in HEADS:
        for batch in BATCHES:
            for kind in ("equal", "uniform"):
                for context in CONTEXTS:
                    yield Cell(heads, kv_heads, batch, kind, context)
            yield Cell(heads, kv_heads, batch, "doubling", 1 << 17)


def flash_splits(outputs: int, most_tiles: int, sms: int = SMS) -> int:
    """The number of splits of FlashAttention-3 for one row tile per head (its
    ``hopper/heuristics.h``): one where the outputs nearly fill the SMs or are short, else the
    smallest whose last wave is nearly as full as the best's."""
    if outputs >= 0.8 * sms or most_tiles <= 4:
        return 1
    tried = range(1, min(128, sms, most_tiles) + 1)
    waves = [outputs * s / sms for s in tried]
    full = [w / math.ceil(w) for w in waves]
    return next(s for s, part in zip(tried, full, strict=True) if part >= 0.85 * max(full))


def makespan(
    policy: str, prefix: Prefix, workers: int, splits: int, slots: int, costs: PolicyCosts
) -> float:
    """When the last worker and the merge are done, by following the schedule."""
    segments = schedule.segments(policy, prefix, workers, splits)
    if not len(segments):
        return 0.0
    worker, _, begin, end, slot = segments.T
    written = slot >= 0
    each = (end - begin) * costs.tile + costs.segment + written * (costs.part / 2)
    loads = np.bincount(worker, weights=each)
    free = [0.0] * slots
    for load in loads:
        if load > 0:
            heapq.heapreplace(free, free[0] + load)
    if policy == "tiles":
        return max(free)
    count = schedule.parts(policy, prefix, workers, splits)[:, 3]
    merge = max(float(count.max()), float(count.sum()) / slots) * costs.part / 2
    return max(free) + merge + costs.combine


def best_split(prefix: Prefix, costs: PolicyCosts) -> int:
    """Of all numbers of splits up to FlashAttention's limit, the cheapest."""
    longest = int(np.diff(prefix).max())
    tried = range(1, min(schedule.MOST_SPLITS, longest) + 1)
    return min(tried, key=lambda s: schedule.cost("split", prefix, SMS, costs, splits=s))


@dataclass(frozen=True)
class Found:
    """One cell: the makespan of each way, in units of the tiles spread without a remainder."""

    name: str
    tiles_per_sm: float
    one_tile: float
    flash: float
    flash_splits: int
    split: float
    splits: int
    stream_k: float
    auto: float
    choice: str
    blind: float  # lengths not known on the host
    blind_choice: str

    @property
    def best(self) -> float:
        return min(self.one_tile, self.flash, self.split, self.stream_k)

    @property
    def behind(self) -> float:
        """How much longer the automatic choice takes than the best way."""
        return self.auto / self.best - 1


def measure_cell(cell: Cell, costs: PolicyCosts) -> Found:
    """Every way of one cell."""
    prefix = cell.prefix
    outputs, most_tiles = len(prefix) - 1, -(-cell.context // TILE)
    ideal = float(prefix[-1]) * costs.tile / SMS

    def relative(policy: str, workers: int, splits: int) -> float:
        return round(float(makespan(policy, prefix, workers, splits, SMS, costs)) / ideal, 4)

    def split(splits: int) -> float:
        if splits == 1:
            return relative("tiles", outputs, 1)
        return relative("split", outputs * splits, splits)

    flash = flash_splits(outputs, int(np.diff(prefix).max()))
    splits = best_split(prefix, costs)
    auto = schedule.choose(prefix, SMS, costs)
    counting = COUNT if costs.combine else 0.0
    blind = schedule.choose_bounded(outputs, most_tiles, SMS, costs, count=counting)
    launched = counting / ideal if blind.policy == "stream-K" else 0.0
    return Found(
        name=cell.name,
        tiles_per_sm=round(float(prefix[-1]) / SMS, 2),
        one_tile=relative("tiles", outputs, 1),
        flash=split(flash),
        flash_splits=flash,
        split=split(splits),
        splits=splits,
        stream_k=relative("stream-K", SMS, 1),
        auto=relative(auto.policy, auto.workers, auto.splits),
        choice=auto.policy + (f" {auto.splits}" if auto.policy == "split" else ""),
        blind=round(relative(blind.policy, blind.workers, blind.splits) + launched, 4),
        blind_choice=blind.policy + (f" {blind.splits}" if blind.policy == "split" else ""),
    )


# Rows that seed_systems.md computed on its own: efficiency of a worker per output, of
# FlashAttention-3's split, of stream-K.
KNOWN = (
    (Cell(32, 8, 1, "equal", 1 << 16), 0.06, 0.89, 0.97),
    (Cell(32, 8, 4, "equal", 1 << 15), 0.24, 0.97, 0.99),
    (Cell(32, 8, 8, "doubling", 1 << 17), 0.12, 0.24, 0.997),
)


@dataclass(frozen=True)
class Table:
    """What the model says of the whole grid."""

    counted: tuple[Found, ...]  # tiles alone
    priced: tuple[Found, ...]  # with every cost

    @property
    def uneven(self) -> list[Found]:
        """Ragged cells where stream-K is below the bar."""
        ragged = (f for f in self.counted if "equal" not in f.name)
        return [f for f in ragged if 1 / f.stream_k < EVEN_BAR]

    @property
    def losing(self) -> list[Found]:
        """Cells where another way than the automatic choice is faster."""
        return sorted((f for f in self.priced if f.behind > 0), key=lambda f: -f.behind)


def measure() -> Table:
    """The grid; about a minute."""
    grid = list(cells())
    return Table(
        tuple(measure_cell(c, COUNTED) for c in grid),
        tuple(measure_cell(c, c.costs) for c in grid),
    )


def as_json(table: Table) -> str:
    """One line per cell."""
    parts = [
        f'"{part}": [\n' + ",\n".join(json.dumps(asdict(f)) for f in getattr(table, part)) + "\n]"
        for part in ("counted", "priced")
    ]
    return "{" + ",\n".join(parts) + "}\n"


def load(path: Path = RESULTS / "schedule.json") -> Table:
    """The recorded table."""
    data = json.loads(path.read_text())
    return Table(
        tuple(Found(**f) for f in data["counted"]), tuple(Found(**f) for f in data["priced"])
    )


def summary(found: tuple[Found, ...]) -> list[str]:
    """Efficiency of each way by kind of lengths: the lowest and the median."""
    lines = []
    for kind in KINDS:
        of_kind = [f for f in found if f" {kind} " in f.name]
        ways = ("one_tile", "flash", "split", "stream_k", "auto", "blind")
        values = [np.array([1 / getattr(f, way) for f in of_kind]) for way in ways]
        texts = [f"{v.min():.2f} / {np.median(v):.2f}" for v in values]
        lines.append((f"{kind} ({len(of_kind)})", *texts))
    ways = ("tile per SM", "split as FA3", "best split", "stream-K", "auto", "lengths unknown")
    return markdown_table(("lengths (cells)", *ways), lines)


def crowded() -> list[str]:
    """Makespan of a worker per output by stream-K's, by outputs per SM: the lowest and the highest
    of three batches around that number."""
    lines = []
    for kind, context in (("equal", 1 << 15), ("uniform", 1 << 15), ("doubling", 1 << 17)):
        cells = []
        for per_sm in (1, 2, 4, 8, 16, 32):
            ratios = []
            for batch in (per_sm * SMS // 8 + more for more in (-3, 0, 3)):
                cell = Cell(32, 8, batch, kind, context)
                whole = schedule.cost("tiles", cell.prefix, SMS, cell.costs)
                ratios.append(whole / schedule.cost("stream-K", cell.prefix, SMS, cell.costs))
            cells.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
        lines.append((f"{kind} {context // 1024}k", *cells))
    return markdown_table(("lengths", *(f"{n} per SM" for n in (1, 2, 4, 8, 16, 32))), lines)


def detail(found: list[Found]) -> list[str]:
    """Each way's efficiency, cell by cell."""
    lines = [
        (
            f.name,
            f"{f.tiles_per_sm:.1f}",
            f"{1 / f.one_tile:.3f}",
            f"{1 / f.flash:.3f} ({f.flash_splits})",
            f"{1 / f.split:.3f} ({f.splits})",
            f"{1 / f.stream_k:.3f}",
            f"{1 / f.auto:.3f}",
            f.choice,
        )
        for f in found
    ]
    ways = ("tile per SM", "split as FA3", "best split", "stream-K", "auto", "its choice")
    return markdown_table(("case", "tiles / SM", *ways), lines)


def report(table: Table) -> str:
    """The Markdown page."""
    known = [cell.name for cell, *_ in KNOWN]
    doubling = [f for f in table.priced if "doubling" in f.name]
    worst = max((f.behind for f in table.priced), default=0.0)
    blind = sorted(table.priced, key=lambda f: -(f.blind / f.best))
    short = sorted(table.uneven, key=lambda f: f.stream_k, reverse=True)
    return "\n".join(
        [
            "# Cutting decode work among 132 SMs: a model",
            "",
            f"`python -m bench schedule`; no GPU ran. {len(table.counted)} cells: heads 32/8, "
            "28/4, 64/8, 32/32, batches of 1 to 32, 8k to 256k keys, D 128, tiles of 128 keys, a "
            "group packed. Efficiency: the tiles' time spread over 132 SMs, by the makespan. In "
            "brackets: splits.",
            "",
            "## In tiles alone",
            "",
            "Lowest and median efficiency:",
            "",
            *summary(table.counted),
            "",
            "Cases computed elsewhere (0.06, 0.89, 0.97; 0.24, 0.97, 0.99; 0.12, 0.24, 0.997):",
            "",
            *detail([f for f in table.counted if f.name in known]),
            "",
            f"{len(short)} of {sum('equal' not in f.name for f in table.counted)} ragged cells are "
            f"below {EVEN_BAR} with stream-K. All have fewer than {ENOUGH} tiles per SM: an SM has "
            "q tiles or q - 1, and no cut into whole tiles does better.",
            "",
            *detail(short),
            "",
            "## With costs",
            "",
            f"A tile at {BANDWIDTH / 1e12:.2f} TB/s, {PROLOGUE * 1e6:.0f} us per segment, parts "
            f"written and read at that rate, {COMBINE * 1e6:.0f} us for the combine step.",
            "",
            *summary(table.priced),
            "",
            "1k to 128k keys in one batch:",
            "",
            *detail(doubling),
            "",
            f"The automatic choice is at most {worst:.1%} behind the best way. Cells where it is "
            f"behind: {len(table.losing)}; the furthest:",
            "",
            *detail(table.losing[:20]),
            "",
            "Where lengths are not known on the host, the choice is furthest behind in:",
            "",
            *markdown_table(
                ("case", "behind the best", "its choice", "choice with lengths"),
                [
                    (f.name, f"{f.blind / f.best - 1:.0%}", f.blind_choice, f.choice)
                    for f in blind[:8]
                ],
            ),
            "",
            "Time of a worker per output by that of stream-K, for so many outputs per SM:",
            "",
            *crowded(),
            "",
        ]
    )


def write(folder: Path, table: Table) -> list[Path]:
    """schedule.json and schedule.md."""
    paths = [folder / "schedule.json", folder / "schedule.md"]
    for path, text in zip(paths, (as_json(table), report(table)), strict=True):
        path.write_text(text)
    return paths


def run(folder: Path, console: Console) -> list[Path]:
    """The target: the page on the terminal, and both files."""
    with console.status("counting"):
        table = measure()
    console.print(Markdown(report(table)))
    return write(folder, table)
