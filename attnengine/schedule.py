"""How the tiles of keys of a call are shared among workers, and why that way.

Kernels and launchers decide this in C++ (``templates/common/schedule.h``, ``policy.h``); here the
same code is asked, for people and for tests. docs/scheduling.md explains the policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from .library import DTYPE_CODES, host, kernel_info
from .plan import Plan

POLICIES = ("tiles", "split", "stream-K")  # of SchedulePolicy, in its order
MOST_SPLITS = 128
CROWDED = 32  # outputs per worker: kCrowded of policy.h

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PolicyCosts:
    """What a schedule is priced with, in any one unit of time."""

    tile: float  #: of a tile of keys, at the rate that one of `slots` busy workers gets
    segment: float = 0.0  #: of a segment beside its tiles
    part: float = 0.0  #: of a partial result: half to write it, half to merge it
    combine: float = 0.0  #: of having a combine step: its launch

    @classmethod
    def of_memory(
        cls,
        tile_bytes: float,
        part_bytes: float,
        *,
        bandwidth: float,
        slots: int,
        segment: float,
        combine: float,
    ) -> PolicyCosts:
        """Seconds, where memory binds: ``slots`` workers share ``bandwidth`` bytes/s evenly. A
        part is written once and read once. segment, combine: seconds."""
        rate = bandwidth / slots
        return cls(tile_bytes / rate, segment, 2 * part_bytes / rate, combine)


@dataclass(frozen=True)
class PolicyChoice:
    """The policy of a launch and the predicted makespan of each, in the unit of the costs."""

    policy: str  #: of POLICIES
    splits: int  #: parts of an output under "split", else 1
    workers: int
    cost: tuple[float, float, float]  #: of each of POLICIES at its best; infinite: not legal


@dataclass(frozen=True)
class Schedule:
    """A line of tiles cut for workers. Printed, it says what was chosen and why."""

    prefix: tuple[int, ...]  #: where each output starts on the line of tiles; [outputs + 1]
    slots: int  #: workers that run at a time
    can_merge: bool
    costs: PolicyCosts
    choice: PolicyChoice
    of: str = ""  #: what an output and a tile are, where a kernel said it

    @property
    def outputs(self) -> int:
        return len(self.prefix) - 1

    @property
    def ideal(self) -> float:
        """The tiles alone, spread over all slots without a remainder."""
        return self.prefix[-1] * self.costs.tile / self.slots

    @property
    def segments(self) -> Numbers:
        """[segments, 5]: worker, output, begin, end (tiles of the output), and the slot of the
        partial result or -1."""
        return segments(self.choice.policy, self.prefix, self.choice.workers, self.choice.splits)

    @property
    def parts(self) -> Numbers:
        """[outputs, 5]: first slot, second, step, count, and whether a worker finishes it."""
        return parts(self.choice.policy, self.prefix, self.choice.workers, self.choice.splits)

    def __str__(self) -> str:
        tiles = np.diff(self.prefix) if self.outputs else np.zeros(1, np.int64)
        head = (
            f"{self.outputs} outputs of {tiles.min()} to {tiles.max()} tiles, "
            f"{self.prefix[-1]} in all, {self.slots} workers at a time"
        )
        if self.of:
            head = f"{self.of}\n{head}"
        if not self.can_merge:
            return f"{head}\n  tiles: the row function has no merge, so outputs stay whole"
        if not self.ideal:
            return f"{head}\n  tiles: nothing to share"
        lines = [head]
        for name, cost in zip(POLICIES, self.choice.cost, strict=True):
            taken = name == self.choice.policy
            mark, detail = ("->", self._detail()) if taken else ("  ", "")
            said = "not legal" if np.isinf(cost) else f"{cost / self.ideal:.2f}x of ideal"
            lines.append(f"  {mark} {name}: {said}{detail}")
        return "\n".join(lines)

    def _detail(self) -> str:
        count = self.parts[:, 3]
        merged = f"{int((count > 0).sum())} outputs merged from up to {int(count.max())} parts"
        return {
            "tiles": f", {self.choice.workers} workers, one per output",
            "split": f", {self.choice.splits} parts per output, {merged}",
            "stream-K": f", {self.choice.workers} workers, {merged}",
        }[self.choice.policy]


def segments(policy: str, prefix: npt.ArrayLike, workers: int, splits: int = 1) -> Numbers:
    """Schedule.segments of any policy, workers and splits."""
    return host.schedule_segments(POLICIES.index(policy), prefix, workers, splits)


def parts(policy: str, prefix: npt.ArrayLike, workers: int, splits: int = 1) -> Numbers:
    """Schedule.parts of any policy, workers and splits."""
    return host.schedule_parts(POLICIES.index(policy), prefix, workers, splits)


def slot_count(policy: str, outputs: int, workers: int, splits: int = 1) -> int:
    """Partial results that a launch needs room for, whatever the lengths."""
    return host.schedule_slots(POLICIES.index(policy), outputs, workers, splits)


def cost(
    policy: str,
    prefix: npt.ArrayLike,
    slots: int,
    costs: PolicyCosts,
    *,
    workers: int | None = None,
    splits: int = 1,
) -> float:
    """Predicted makespan, in the unit of ``costs``. workers: of stream-K; default: ``slots``."""
    index = POLICIES.index(policy)
    return host.policy_cost(index, prefix, workers or slots, splits, slots, astuple(costs))


def split_candidates(prefix: npt.ArrayLike, slots: int) -> list[int]:
    """What the choice looks at: all that fit one wave of slots, what fills two to four, what cuts
    the longest output into a worker's share, its half and its quarter, and powers of two."""
    tiles = np.diff(np.asarray(prefix, np.int64))
    live, total, longest = int((tiles > 0).sum()), int(tiles.sum()), int(tiles.max(initial=0))
    found = {1 << i for i in range(1, 8)}
    if live:
        found |= {*range(2, slots // live + 1), *(wave * slots // live for wave in range(2, 5))}
        found |= {longest * slots * finer // total + 1 for finer in (1, 2, 4)}
    return sorted(s for s in found if 2 <= s <= min(MOST_SPLITS, longest))


def choose(
    prefix: npt.ArrayLike, slots: int, costs: PolicyCosts, can_merge: bool = True
) -> PolicyChoice:
    """The choice of the launchers, with every cost counted to its end (they stop where a policy
    cannot win any more)."""
    policy, splits, workers, quick = host.choose_policy(prefix, slots, can_merge, astuple(costs))
    if not can_merge:
        return PolicyChoice(POLICIES[policy], splits, workers, tuple(quick))
    split = min(
        (cost("split", prefix, slots, costs, splits=s) for s in split_candidates(prefix, slots)),
        default=float("inf"),
    )
    # Stream-K with fewer workers where that is better has been counted exactly.
    stream = quick[2] if np.isfinite(quick[2]) else cost("stream-K", prefix, slots, costs)
    whole = cost("tiles", prefix, slots, costs)
    return PolicyChoice(POLICIES[policy], splits, workers, (whole, split, stream))


def choose_bounded(
    outputs: int,
    most_tiles: int,
    slots: int,
    costs: PolicyCosts,
    can_merge: bool = True,
    count: float = 0.0,
    crowded: int = CROWDED,
) -> PolicyChoice:
    """The choice where the host does not know the lengths: ``outputs`` of at most ``most_tiles``.

    Its costs compare the policies on lengths of half of that, of which one has all. ``count``: of
    counting the tiles of all outputs on the device, which stream-K needs; from ``crowded`` outputs
    per worker on, none is split."""
    policy, splits, workers, quick = host.choose_policy_bounded(
        outputs, most_tiles, slots, can_merge, astuple(costs), count, crowded
    )
    return PolicyChoice(POLICIES[policy], splits, workers, tuple(quick))


def device_costs(tile_cycles: int, slot_bytes: int) -> tuple[PolicyCosts, float]:
    """What the launcher of CUDA kernels prices with, and ``count`` of :func:`choose_bounded`:
    cycles of an SM, for a plan's ``tile_cycles`` and ``slot_bytes``. Estimates."""
    costs, count = host.device_costs(tile_cycles, slot_bytes)
    return PolicyCosts(*costs), count


@dataclass(frozen=True)
class DeviceSchedule:
    """How a CUDA launch shares the work of a call on a cache. It knows bounds alone, for lengths
    lie on the device: ``choice`` follows from them, in cycles. Printed, it says what was chosen,
    why, and what that makes of the lengths that were given, without a mask."""

    target: str
    multiprocessors: int
    blocks: int  #: thread blocks of an SM at a time
    rows: int  #: of an output, at most
    tile_keys: int
    most_tiles: int  #: of an output
    made: Schedule  #: of the given lengths, by the choice
    count: float

    @property
    def choice(self) -> PolicyChoice:
        return self.made.choice

    def __str__(self) -> str:
        made, choice = self.made, self.made.choice
        lines = [
            f"an output: {self.rows} rows of a head of K and V; a tile: {self.tile_keys} keys",
            f"{made.outputs} outputs of at most {self.most_tiles} tiles, {made.slots} workers at a "
            f"time: {self.blocks} thread blocks on each of {self.multiprocessors} SMs",
        ]
        if not made.can_merge:
            return "\n".join(
                [*lines, "  tiles: the row function has no merge, so outputs stay whole"]
            )
        lines.append("predicted from these bounds, by estimated costs:")
        for name, cycles in zip(POLICIES, choice.cost, strict=True):
            mark = "->" if name == choice.policy else "  "
            said = "not considered" if np.isinf(cycles) else f"{cycles:.0f} cycles"
            lines.append(f"  {mark} {name}: {said}{made._detail() if mark == '->' else ''}")
        if made.ideal:
            args = made.prefix, made.slots, made.costs
            cycles = cost(choice.policy, *args, workers=choice.workers, splits=choice.splits)
            cycles += self.count if choice.policy == "stream-K" else 0.0
            known = choose(*args)
            best = known.cost[POLICIES.index(known.policy)]
            lines.append(
                f"these lengths: {cycles:.0f} cycles, {cycles / made.ideal:.2f}x of the tiles "
                f"spread evenly; {known.policy} would take {best:.0f} if the host knew them"
            )
        return "\n".join(lines)


def device_schedule(
    plan: Plan,
    lengths: Sequence[int],
    heads: tuple[int, int],
    rows: int,
    capacity: int,
    multiprocessors: int,
) -> DeviceSchedule:
    """What a launch of a CUDA kernel for caches does with ``rows`` queries of each sequence, on
    caches of ``capacity`` keys that hold ``lengths``. Raises ValueError for a length beyond it."""
    hq, hkv = heads
    packed = hq // hkv if plan.pack_group else 1
    slots = plan.blocks * multiprocessors
    costs, count = device_costs(plan.tile_cycles, plan.slot_bytes)
    sizes = {"rows_per_tile": plan.block_m, "block_n": plan.block_n, "slots": slots}
    given = schedule(
        lengths,
        heads=hq // packed,
        rows=rows * packed,
        costs=costs,
        can_merge=plan.split_kv,
        **sizes,
    )
    if max(lengths, default=0) > capacity:
        raise ValueError(f"lengths has {max(lengths)}: the cache holds {capacity} keys")
    most = -(-capacity // plan.block_n)
    choice = choose_bounded(
        given.outputs, most, slots, costs, plan.split_kv, count, plan.crowded or CROWDED
    )
    return DeviceSchedule(
        plan.target, multiprocessors, plan.blocks, min(plan.block_m, rows * packed), plan.block_n,
        most, replace(given, choice=choice), count,
    )  # fmt: skip


def schedule(
    lengths: Sequence[int],
    *,
    heads: int,
    rows_per_tile: int,
    block_n: int,
    slots: int,
    costs: PolicyCosts,
    can_merge: bool = True,
    rows: int = 1,
) -> Schedule:
    """The schedule of a call without a mask.

    Args:
        lengths: keys of each sequence.
        heads: heads of K and V; each has outputs of its own.
        rows_per_tile: query rows of an output, those of a group of query heads packed.
        block_n: keys of a tile.
        slots: workers that run at a time.
        costs: of a tile, a segment, a part and the combine step.
        can_merge: whether the row function has a merge; without one, outputs stay whole.
        rows: query rows of one sequence and head of K, all of its group.

    Raises:
        ValueError: a negative length, or a size that is not positive.
    """
    sizes = {"heads": heads, "rows_per_tile": rows_per_tile, "block_n": block_n, "slots": slots,
             "rows": rows}  # fmt: skip
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value}: at least 1")
    keys = np.asarray(lengths, np.int64).reshape(-1)
    if (keys < 0).any():
        at = int(np.argmax(keys < 0))
        raise ValueError(f"lengths[{at}]={keys[at]}: a sequence has 0 keys or more")
    outputs_each = heads * -(-rows // rows_per_tile)
    tiles = np.repeat(-(-keys // block_n), outputs_each)
    prefix = np.concatenate([np.zeros(1, np.int64), np.cumsum(tiles)])
    choice = choose(prefix, slots, costs, can_merge)
    return Schedule(tuple(prefix.tolist()), slots, can_merge, costs, choice)


def kernel_schedule(
    kernel: int,
    captures: Sequence[torch.Tensor],
    lengths: Sequence[int],
    heads: tuple[int, int],
    rows: int,
    layout: str,
    can_merge: bool,
) -> Schedule:
    """What a CPU kernel does with ``rows`` queries on caches of these lengths (Handle.schedule)."""
    if layout not in ("BSHD", "BHSD"):
        raise ValueError(f"layout={layout!r}: 'BSHD' or 'BHSD'")
    info, (hq, hkv), most = kernel_info(kernel), heads, max(lengths, default=0)
    strides = [
        (most * hkv * d, d, hkv * d, 1) if layout == "BSHD" else (most * hkv * d, most * d, d, 1)
        for d in (info.D, info.Dv)
    ]
    tensors = [(0, tuple(t.shape), t.stride(), DTYPE_CODES[t.dtype]) for t in captures]
    sizes = (len(lengths), hq, hkv, rows, most)
    cut = host.describe_cut(kernel, sizes, tensors, *strides, list(lengths))
    costs, slots, prefix = PolicyCosts(*cut["costs"]), cut["workers"], tuple(cut["prefix"])
    outputs = len(prefix) - 1
    if cut["may_split"] or not can_merge:
        choice = choose(prefix, slots, costs, can_merge)
    else:  # so many that the longest is a small part of the whole
        choice = PolicyChoice("tiles", 1, outputs, (cost("tiles", prefix, slots, costs),) * 3)
    each = "head" if cut["kv_heads"] == 1 else f"{cut['kv_heads']} heads"
    of = f"an output: {cut['rows']} rows of {each} of K and V; a tile: {cut['tile_keys']} keys"
    return Schedule(prefix, slots, can_merge, costs, choice, of)
