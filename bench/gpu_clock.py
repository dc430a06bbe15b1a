"""Timing on a stream: events in a queue that the host keeps ahead of the device.

A kernel of some tens of microseconds is over before the host has launched the next; so every round
begins with a wait on the device while the host fills the queue. Contestants take turns in a
rotating order, so that drift of the clocks hits all alike. Between calls that must read memory, a
buffer larger than the last-level cache is overwritten, outside the timed interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .runner import Samples

SAMPLE_S = 1e-3  # of back-to-back calls, where nothing is flushed
MOST_CALLS = 32  # per sample: the launch queue holds about a thousand
FLUSHED_SAMPLES = 8  # of one call each, per round
COLD_CALLS, WARM_CALLS = 1, 2


class Stopwatch(Protocol):
    """A device's clock."""

    def mark(self) -> Any:
        """A point in the device's order of work."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; after finish()."""

    def hold(self, seconds: float) -> None:
        """Keep the device waiting while the host queues work."""

    def flush(self) -> None:
        """Queue the eviction of what the caches hold."""

    def finish(self) -> None:
        """Wait until all that is queued is done."""


class CudaStopwatch:
    """CUDA events on the current stream."""

    CYCLES = 2e9  # per second, about: only the length of a wait depends on it

    def __init__(self) -> None:
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * 2**20)
        self.buffer = torch.empty(max(4 * l2, 256 * 2**20), dtype=torch.int8, device="cuda")

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) * 1e-3

    def hold(self, seconds: float) -> None:
        if seconds > 0:
            torch.cuda._sleep(int(seconds * self.CYCLES))

    def flush(self) -> None:
        self.buffer.zero_()

    def finish(self) -> None:
        torch.cuda.synchronize()


class HostStopwatch:
    """For tensors on the CPU, where calls return when they are done."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def hold(self, seconds: float) -> None:
        pass

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        pass


def stopwatch(device: str) -> Stopwatch:
    """The clock of a device."""
    return CudaStopwatch() if device.startswith("cuda") else HostStopwatch()


def timed(watch: Stopwatch, run: Callable[[], object], calls: int) -> float:
    """Seconds per call of some back-to-back calls, waiting for them."""
    start = watch.mark()
    for _ in range(calls):
        run()
    end = watch.mark()
    watch.finish()
    return watch.seconds(start, end) / calls


def take_turns(
    contestants: dict[str, Callable[[], object]],
    watch: Stopwatch,
    budget_s: float,
    flush: bool = False,
    min_rounds: int = 5,
    max_rounds: int = 60,
) -> dict[str, Samples]:
    """Time each contestant in rounds until `budget_s` is spent, but at least `min_rounds`."""
    calls = {}
    for name, run in contestants.items():
        for _ in range(WARM_CALLS):
            run()
        watch.finish()
        once = max(timed(watch, run, COLD_CALLS), 1e-7)
        calls[name] = 1 if flush else max(1, min(MOST_CALLS, round(SAMPLE_S / once)))
    names = list(contestants)
    taken: dict[str, list[float]] = {name: [] for name in names}
    began, queueing = time.perf_counter(), 2e-3
    for turn in range(max_rounds):
        if turn >= min_rounds and time.perf_counter() - began > budget_s:
            break
        shift = turn % len(names)
        marks = []
        watch.hold(min(queueing * 1.25, 0.05))
        queued = time.perf_counter()
        for name in names[shift:] + names[:shift]:
            for _ in range(FLUSHED_SAMPLES if flush else 1):
                if flush:
                    watch.flush()
                start = watch.mark()
                for _ in range(calls[name]):
                    contestants[name]()
                marks.append((name, start, watch.mark()))
        queueing = time.perf_counter() - queued
        watch.finish()
        for name, start, end in marks:
            taken[name].append(watch.seconds(start, end) / calls[name])
    return {name: Samples(tuple(times)) for name, times in taken.items()}


def host_seconds(watch: Stopwatch, run: Callable[[], object], calls: int = 20) -> float:
    """Seconds that the host spends on a call, while the device is kept waiting."""
    watch.finish()
    watch.hold(5e-3)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    spent = time.perf_counter() - start
    watch.finish()
    return spent / calls
