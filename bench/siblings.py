"""Groups windows, rows and bias: our kernels against each other, timed in the same rounds.

What a mask, a row function or a learnable bias costs beside the plain kernel of the same shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from . import agreement, baselines
from .cases import BATCH, DTYPES, HEADS, LENGTH, QUICK_LENGTH, make_operands, matmul_flops
from .rows import Row, per_work_row
from .runner import Samples, interleave
from .session import Session
from .variants import Variant, causal, full, learned_bias, row_functions, t5, window

DIM = 64
WINDOWS = (128, 256, 512, 1024)
# "Proportional to its tiles": the time per visited tile pair may exceed that of full causal by the
# rows' fixed cost (packing q, the row state, the output), which few tiles have to carry.
WINDOW_BAR = 1.25
ROW_FUNCTION_BAR = 1.10
BIAS_BAR = 1.4
HALF_AND_SINGLE = (torch.bfloat16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Contest:
    """Variants of one shape; the first is the one that the others are held against."""

    name: str
    variants: dict[str, Variant]
    dtype: torch.dtype
    length: int
    heads: int
    backward: bool = False

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of [B, H, L, D]."""
        return make_operands((BATCH, self.heads, self.length, DIM), self.dtype)


@dataclasses.dataclass(frozen=True)
class Result:
    """Times and checked distances by variant, and visited (query, key) pairs of one head."""

    times: dict[str, Samples]
    distances: dict[str, float]
    visited: dict[str, float]


def run(contest: Contest, session: Session) -> Result:
    """Check every variant against its reference (with gradients where they are timed), the ones
    with parameters also for equal bits in two runs; then time all."""
    operands = contest.operands()
    steps: dict[str, baselines.Step] = {}
    distances: dict[str, float] = {}
    visited: dict[str, float] = {}
    for name, variant in contest.variants.items():
        what = f"{contest.name}/{name}"
        handle = baselines.ours(variant, operands, contest.backward)
        parameters = [p for _, p in variant.trainable]
        steps[name] = baselines.step(handle, operands, contest.backward, parameters)
        out = steps[name]()[0]
        distances[name] = agreement.check_output(what, out, variant, operands)
        if contest.backward:
            agreement.check_gradients(what, handle, variant, operands)
        if parameters:
            agreement.check_repeats(what, steps[name])
        heads = (contest.heads, contest.heads)
        table = handle.tiles(contest.length, contest.length, B=BATCH, heads=heads)
        tiles = table.counts()
        visited[name] = float((tiles["partial"] + tiles["full"]) * table.block_m * table.block_n)
    times = interleave(steps, session.budget_s * 2, session.min_rounds)
    return Result(times, distances, visited)


def row_of(contest: Contest, result: Result, session: Session, name: str, bar: float | None) -> Row:
    """The variant against the first of the contest: how many times its time."""
    base = next(iter(contest.variants))
    mine, other = result.times[name], result.times[base].median
    flops = matmul_flops(contest.variants[name], BATCH * contest.heads, DIM, contest.backward)
    rate = flops / mine.median
    return Row(
        name=f"{contest.name}/{name}",
        unit="ms",
        ours=mine.median * 1e3,
        spread=mine.spread,
        peer=f"our {base}",
        peer_value=other * 1e3,
        ratio=mine.median / other,
        bar=bar,
        at_least=False,
        gflops=rate / 1e9,
        share_of_peak=rate / session.peak_flops(contest.dtype),
        distance=result.distances[name],
    )


def measure_windows(contest: Contest, session: Session) -> list[Row]:
    """Per window: time per visited tile pair (with the bar) and per live pair, against causal."""
    result = run(contest, session)
    base = contest.variants["causal"]
    base_ms = result.times["causal"].median * 1e3
    rows = []
    for name, variant in contest.variants.items():
        if name == "causal":
            continue
        row = row_of(contest, result, session, name, None)
        rows.append(
            per_work_row(
                row, "visited pair", result.visited[name], base_ms, result.visited["causal"],
                WINDOW_BAR,
            )
        )  # fmt: skip
        rows.append(per_work_row(row, "live pair", variant.live, base_ms, base.live, None))
    return rows


def measure_costs(contest: Contest, session: Session, bar: float | None) -> list[Row]:
    """Every variant but the first, as a multiple of the first's time."""
    result = run(contest, session)
    names = list(contest.variants)
    return [row_of(contest, result, session, name, bar) for name in names[1:]]


def windows(dtype: torch.dtype, length: int, heads: int) -> Contest:
    """Full causal, then windows of growing size."""
    variants = {"causal": causal(length, heads)}
    for size in WINDOWS:
        if size < length:
            variants[f"w{size}"] = window(length, heads, size)
    return Contest(f"windows/{DTYPES[dtype]}/d{DIM}", variants, dtype, length, heads)


def rows(dtype: torch.dtype, length: int, heads: int, backward: bool) -> Contest:
    """Row functions, the built-in softmax first."""
    name = f"rows/{DTYPES[dtype]}/d{DIM}/{'forward+backward' if backward else 'forward'}"
    return Contest(name, row_functions(length), dtype, length, heads, backward)


def biases(dtype: torch.dtype, length: int, heads: int) -> Contest:
    """The plain kernel, a bias of every pair, and T5's; parameters are kept in fp32, and for 16-bit
    operands in their dtype as well."""
    variants = {"plain": full(length, heads)}
    for kept in dict.fromkeys((torch.float32, dtype)):
        variants[f"bias-{DTYPES[kept]}"] = learned_bias(length, heads, kept)
        variants[f"t5-{DTYPES[kept]}"] = t5(length, heads, kept)
    return Contest(f"bias/{DTYPES[dtype]}/d{DIM}", variants, dtype, length, heads, True)


def measure(session: Session) -> None:
    """The three groups."""
    length, heads = (QUICK_LENGTH, 2) if session.quick else (LENGTH, HEADS)
    for dtype in HALF_AND_SINGLE:
        _attempt(session, windows(dtype, length, heads), measure_windows)
    for backward, bar in ((False, ROW_FUNCTION_BAR), (True, None)):
        for dtype in HALF_AND_SINGLE:
            contest = rows(dtype, length, heads, backward)
            _attempt(session, contest, lambda c, s, bar=bar: measure_costs(c, s, bar))
    for dtype in HALF_AND_SINGLE:
        if session.wanted(f"bias/{DTYPES[dtype]}"):  # 128 MiB of parameters, not made in vain
            contest = biases(dtype, length, heads)
            _attempt(session, contest, lambda c, s: measure_costs(c, s, BIAS_BAR))


def _attempt(
    session: Session, contest: Contest, measure: Callable[[Contest, Session], list[Row]]
) -> None:
    session.attempt(contest.name, lambda: measure(contest, session))
