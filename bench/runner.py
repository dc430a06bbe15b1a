"""Interleaved timing: every contestant runs once a round, so the machine's drift hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Samples:
    """Seconds per call, one entry per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range as a share of the median."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / 2 / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def calls_per_sample(run: Callable[[], object], sample_s: float) -> int:
    """How many back-to-back calls make one sample of at least `sample_s` seconds."""
    count = 1
    while True:
        start = time.perf_counter()
        for _ in range(count):
            run()
        elapsed = time.perf_counter() - start
        if elapsed >= sample_s or count >= 1 << 20:
            return count
        count = min(1 << 20, max(count * 2, int(count * sample_s / max(elapsed, 1e-9)) + 1))


def interleave(
    contestants: dict[str, Callable[[], object]],
    budget_s: float,
    min_rounds: int = 7,
    max_rounds: int = 200,
    sample_s: float = 2e-3,
) -> dict[str, Samples]:
    """Time each contestant in rounds until `budget_s` is spent, but at least `min_rounds`. The
    order rotates by one each round; the collector is off while the clock runs."""
    counts = {}
    for name, run in contestants.items():
        run()  # first touch: allocator, thread pool, page faults
        counts[name] = calls_per_sample(run, sample_s)
    names = list(contestants)
    taken: dict[str, list[float]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        for turn in range(max_rounds):
            if turn >= min_rounds and time.perf_counter() - began > budget_s:
                break
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                run, count = contestants[name], counts[name]
                start = time.perf_counter()
                for _ in range(count):
                    run()
                taken[name].append((time.perf_counter() - start) / count)
    finally:
        if enabled:
            gc.enable()
    return {name: Samples(tuple(times)) for name, times in taken.items()}
