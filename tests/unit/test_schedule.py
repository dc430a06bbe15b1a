"""The segment schedule and the choice of its policy; the model of a GPU that the docs quote.

tests/cpp/schedule_test.cpp has the same properties, more of them on fewer cases.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from attnengine import schedule
from attnengine.schedule import POLICIES, PolicyCosts
from bench import schedule as model

Numbers = npt.NDArray[np.int64]


def random_cases(count: int, seed: int) -> Iterator[tuple[Numbers, int, int]]:
    """(prefix, workers, splits): lengths that are zero, equal, small, skewed, near int64's end."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        outputs = 1 if random.integers(8) == 0 else int(random.integers(1, 60))
        tiles = [
            lambda n: np.zeros(n, np.int64),
            lambda n: np.full(n, random.integers(1, 500)),
            lambda n: random.integers(0, 4, n),
            lambda n: 1 << random.integers(0, 12, n),
            lambda n: random.integers(0, 500, n),
            lambda n: (1 << 62) // n - random.integers(0, 1000, n),
        ][random.integers(6)](outputs)
        if random.integers(2):
            tiles = np.where(random.integers(0, 4, outputs) == 0, 0, tiles)
        prefix = np.concatenate([np.zeros(1, np.int64), np.cumsum(tiles)])
        workers = int(random.integers(1, random.choice([4, 40, 400])))
        yield prefix, workers, int(random.integers(1, 20))


def check(policy: str, prefix: Numbers, workers: int, splits: int) -> None:
    """Every property of one schedule."""
    outputs, tiles, total = len(prefix) - 1, np.diff(prefix), int(prefix[-1])
    worker, output, begin, end, slot = schedule.segments(policy, prefix, workers, splits).T
    first, second, step, count, whole = schedule.parts(policy, prefix, workers, splits).T

    # Every tile once: in the order of workers, segments are the line.
    at = prefix[output] + begin
    assert (at[1:] == (prefix[output] + end)[:-1]).all()
    assert (at[:1] == 0).all() and (end - begin).sum() == total
    assert (end <= tiles[output]).all() and ((end > begin) | (tiles[output] == 0)).all()

    # An output's workers follow each other, and it is finished by one or has that many parts.
    same = output[1:] == output[:-1]
    assert (worker[1:][same] == worker[:-1][same] + 1).all()
    pieces = np.bincount(output, minlength=outputs)
    assert ((slot == -1) == (whole[output] == 1)).all()
    assert (pieces[whole == 1] == 1).all()
    assert (count == np.where(whole == 1, 0, pieces)).all()

    # Slots are one segment's each, within the room for them, and parts() lists them in order.
    used = slot[slot >= 0]
    assert (np.diff(np.sort(used)) > 0).all()
    assert (used < schedule.slot_count(policy, outputs, workers, splits)).all()
    place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    first, second, step = (np.repeat(x, count) for x in (first, second, step))
    assert (np.where(place == 0, first, second + (place - 1) * step) == used).all()

    if policy == "tiles":
        assert (worker == np.arange(outputs)).all()
    if policy == "split":
        assert (pieces == np.minimum(tiles, splits)).all()
        size = (end - begin)[np.argsort(output, kind="stable")]
        starts = np.cumsum(pieces) - pieces
        shared = pieces > 0
        spread = (
            np.maximum.reduceat(size, starts[shared]) - np.minimum.reduceat(size, starts[shared])
            if shared.any()
            else np.zeros(1)
        )
        assert (spread <= 1).all()
    if policy == "stream-K" and total:
        live = min(workers, total)
        load = np.zeros(live, np.int64)
        np.add.at(load, worker, end - begin)
        assert load.max() - load.min() <= 1
        q = -(-total // live)
        q -= total % live != 0
        if q >= 1:
            assert (pieces <= 1 + -(-(np.maximum(tiles, 1) - 1) // q)).all()


def test_schedules_of_random_lengths() -> None:
    """Exact cover, balance, consecutive peers, unique slots, parts in order, bounded pieces."""
    for i, (prefix, workers, splits) in enumerate(random_cases(10_000, seed=0)):
        check("stream-K", prefix, workers, splits)
        if i % 4 == 0:
            check("split", prefix, workers, splits)
            check("tiles", prefix, workers, splits)


def test_small_schedules_exhaustively() -> None:
    """All lists of three lengths up to four, all numbers of workers and splits that differ."""
    for tiles in itertools.product(range(5), repeat=3):
        prefix = np.concatenate([[0], np.cumsum(tiles)])
        for n in range(1, 14):
            check("stream-K", prefix, n, 1)
        for splits in range(1, 6):
            check("split", prefix, 1, splits)
        check("tiles", prefix, 1, 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_parts_merge_to_the_whole(policy: str) -> None:
    """Softmax over keys in pieces, merged in the order of parts(), is softmax; also of outputs
    without keys."""
    random = np.random.default_rng(1)
    block, dim = 3, 4
    for prefix, workers, splits in random_cases(60, seed=2):
        if prefix[-1] > 2000:
            continue
        outputs = len(prefix) - 1
        score = [random.normal(0, 4, n * block) for n in np.diff(prefix)]
        value = [random.normal(size=(n * block, dim)) for n in np.diff(prefix)]
        out = np.full((outputs, dim), np.nan)
        slots: dict[int, tuple[float, float, Numbers]] = {}
        for _, o, begin, end, slot in schedule.segments(policy, prefix, workers, splits):
            keys = slice(begin * block, end * block)
            m = score[o][keys].max(initial=-np.inf)
            weight = np.exp(score[o][keys] - m)
            state = (m, weight.sum(), weight @ value[o][keys])
            if slot >= 0:
                slots[int(slot)] = state
            else:
                out[o] = state[2] / state[1] if end > begin else 0.0
        for o, row in enumerate(schedule.parts(policy, prefix, workers, splits)):
            first, second, step, count, whole = (int(x) for x in row)
            if whole:
                continue
            m, r, acc = -np.inf, 0.0, np.zeros(dim)
            for i in range(count):
                ms, rs, accs = slots.pop(first if i == 0 else second + (i - 1) * step)
                top = max(m, ms)
                old, new = np.exp(m - top), np.exp(ms - top)
                m, r, acc = top, old * r + new * rs, old * acc + new * accs
            out[o] = acc / r if count else 0.0
        assert not slots
        for o in range(outputs):
            weight = np.exp(score[o] - score[o].max(initial=-np.inf))
            expected = weight @ value[o] / weight.sum() if len(weight) else np.zeros(dim)
            np.testing.assert_allclose(out[o], expected, rtol=1e-12, atol=1e-12)


def test_choice_is_what_its_schedule_costs() -> None:
    """The prediction is the makespan of the schedule, and no simple way is far better."""
    random = np.random.default_rng(3)
    for prefix, slots, splits in random_cases(400, seed=4):
        if not 0 < prefix[-1] < 1 << 30 or slots == 1:
            continue
        costs = PolicyCosts(1.0, *random.choice([0.0, 0.25, 1.0], 3).tolist())
        found = schedule.choose(prefix, slots, costs)
        spent = model.makespan(found.policy, prefix, found.workers, found.splits, slots, costs)
        priced = schedule.cost(
            found.policy, prefix, slots, costs, workers=found.workers, splits=found.splits
        )
        assert priced == pytest.approx(spent, rel=1e-9)
        outputs = len(prefix) - 1
        for policy, workers, parts in (
            ("tiles", outputs, 1),
            ("stream-K", slots, 1),
            ("split", outputs * (splits + 1), splits + 1),
        ):
            other = model.makespan(policy, prefix, workers, parts, slots, costs)
            assert schedule.cost(
                policy, prefix, slots, costs, workers=workers, splits=parts
            ) == pytest.approx(other, rel=1e-9)
            if policy != "split":
                assert spent * 0.99 <= other * (1 + 1e-9), (prefix, slots, costs, found)
        whole = schedule.choose(prefix, slots, costs, can_merge=False)
        assert whole.policy == "tiles" and np.isinf(whole.cost[1:]).all()


def test_ties_go_to_the_simpler_policy() -> None:
    even = np.arange(0, 132 * 64 + 1, 64)
    assert schedule.choose(even, 132, PolicyCosts(1.0)).policy == "tiles"
    eighths = np.arange(0, 8 * 64 + 1, 64)
    found = schedule.choose(eighths, 64, PolicyCosts(1.0))
    assert (found.policy, found.splits) == ("split", 8)
    assert found.cost == (64.0, 8.0, 8.0)


def test_lengths_unknown_to_the_host() -> None:
    costs = PolicyCosts(2.0, 1.0, 0.1, 3.0)
    few = schedule.choose_bounded(64, 1024, 132, costs)
    assert (few.policy, few.workers) == ("stream-K", 132)
    assert schedule.choose_bounded(64, 1024, 132, costs, can_merge=False).policy == "tiles"
    assert schedule.choose_bounded(32 * 132, 1024, 132, costs).policy == "tiles"
    assert schedule.choose_bounded(64, 2, 132, costs).policy == "tiles"
    assert schedule.choose_bounded(0, 2, 132, costs).policy == "tiles"


@pytest.mark.parametrize(
    "batch, keys, policy",
    [
        (1, 1 << 17, "stream-K"), (8, 1 << 17, "stream-K"), (132, 1 << 15, "stream-K"),
        (1, 4096, "split"), (2, 4096, "split"), (1, 128, "tiles"), (600, 4096, "tiles"),
    ],
)  # fmt: skip
def test_a_gpu_of_132_sms_takes_each_policy(batch: int, keys: int, policy: str) -> None:
    """8 heads of keys, lengths unknown: counting tiles takes a launch, which short lengths do not
    pay for; where nothing is gained, outputs stay whole."""
    costs, count = schedule.device_costs(tile_cycles=600, slot_bytes=4 * 16 * (128 + 3))
    tiles = -(-keys // 32)
    choice = schedule.choose_bounded(8 * batch, tiles, 132, costs, count=count)
    assert choice.policy == policy
    assert choice.cost[schedule.POLICIES.index(policy)] <= min(choice.cost) * 1.02
    if policy == "split":
        assert choice.workers == 8 * batch * choice.splits <= 132
        free = schedule.choose_bounded(8 * batch, tiles, 132, costs)
        assert free.cost[2] == pytest.approx(choice.cost[2] - count)
    many = schedule.choose_bounded(8 * batch, tiles, 132, costs, count=count, crowded=1)
    assert many.policy == ("tiles" if 8 * batch >= 132 else policy)


def test_schedule_says_what_and_why() -> None:
    costs = PolicyCosts(2.0, 1.0, 0.1, 3.0)
    lengths = [1024 << i for i in range(8)]
    made = schedule.schedule(
        lengths, heads=8, rows_per_tile=64, block_n=128, slots=132, costs=costs
    )
    assert made.choice.policy == "stream-K" and made.outputs == 64 and made.prefix[-1] == 16320
    assert str(made).splitlines() == [
        "64 outputs of 8 to 1024 tiles, 16320 in all, 132 workers at a time",
        "     tiles: 8.29x of ideal",
        "     split: 1.08x of ideal",
        "  -> stream-K: 1.07x of ideal, 132 workers, 39 outputs merged from up to 10 parts",
    ]
    assert len(made.segments) == 194 and len(made.parts) == 64
    same = {"heads": 8, "rows_per_tile": 64, "block_n": 128, "slots": 132, "costs": costs}
    assert "no merge" in str(schedule.schedule(lengths, can_merge=False, **same))
    assert "nothing to share" in str(schedule.schedule([0, 0], **same))
    assert schedule.schedule([300], rows=65, **same).outputs == 16
    assert dataclasses.replace(made) == made


def test_refusals() -> None:
    same = {"heads": 8, "rows_per_tile": 64, "block_n": 128, "slots": 4, "costs": PolicyCosts(1.0)}
    with pytest.raises(ValueError, match=r"lengths\[1\]=-1"):
        schedule.schedule([1, -1], **same)
    with pytest.raises(ValueError, match="slots=0"):
        schedule.schedule([1], **{**same, "slots": 0})
    with pytest.raises(ValueError, match=r"prefix\[2\]=1"):
        schedule.segments("tiles", [0, 2, 1], 1)
    with pytest.raises(ValueError, match="prefix: "):
        schedule.choose([1, 2], 4, PolicyCosts(1.0))
    with pytest.raises(ValueError, match="costs: "):
        schedule.choose([0, 2], 4, PolicyCosts(-1.0))
    with pytest.raises(ValueError, match="splits=0"):
        schedule.parts("split", [0, 2], 1, 0)


# The recorded table of bench/results.


@pytest.fixture(scope="module")
def table() -> model.Table:
    return model.load()


def test_flash_heuristic() -> None:
    assert model.flash_splits(8, 512) == 15
    assert model.flash_splits(32, 256) == 4
    assert model.flash_splits(64, 1024) == 2
    assert model.flash_splits(110, 1024) == 1  # the SMs are nearly full
    assert model.flash_splits(8, 4) == 1  # short


@pytest.mark.parametrize("cell, one_tile, flash, stream_k", model.KNOWN, ids=str)
def test_known_efficiencies(
    cell: model.Cell, one_tile: float, flash: float, stream_k: float
) -> None:
    found = model.measure_cell(cell, model.COUNTED)
    assert 1 / found.one_tile == pytest.approx(one_tile, abs=0.006)
    assert 1 / found.flash == pytest.approx(flash, abs=0.006)
    assert 1 / found.stream_k == pytest.approx(stream_k, abs=0.006)


def test_recorded_table_is_what_the_code_computes(table: model.Table) -> None:
    """Every eleventh cell of those that are counted fast; names and order of all."""
    grid = list(model.cells())
    for found in (table.counted, table.priced):
        assert [f.name for f in found] == [c.name for c in grid]
    for i in [i for i in range(0, len(grid), 11) if grid[i].batch <= 8]:
        assert model.measure_cell(grid[i], model.COUNTED) == table.counted[i]
        assert model.measure_cell(grid[i], grid[i].costs) == table.priced[i]
    assert (model.RESULTS / "schedule.md").read_text() == model.report(table)


def test_stream_k_cuts_evenly(table: model.Table) -> None:
    """0.97 on every ragged cell with enough tiles; in the others as even as whole tiles can be."""
    for found in table.counted:
        q = found.tiles_per_sm  # rounded to 0.01
        assert 1 / found.stream_k >= model.EVEN_BAR or q < model.ENOUGH, found
        assert found.stream_k <= found.best * 1.001, found
    assert all(f.tiles_per_sm < model.ENOUGH for f in table.uneven)


def test_the_choice_is_never_far_behind(table: model.Table) -> None:
    assert max(f.behind for f in (*table.counted, *table.priced)) <= model.BEHIND_BAR


def test_docs_quote_the_table(table: model.Table) -> None:
    page = (model.RESULTS.parents[1] / "docs" / "scheduling.md").read_text()
    for found in (table.counted, table.priced):
        assert "\n".join(model.summary(found)) in page
    assert f"{len(table.uneven)} of the 168 ragged batches" in page
    assert f"{len(table.counted)} decode batches" in page
