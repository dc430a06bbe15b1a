"""One timed case: every contestant is checked, then all take turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import gpu_agreement, gpu_peers
from .gpu_cases import Case, by_name
from .gpu_clock import host_seconds, stopwatch, take_turns
from .gpu_machine import clocks


def measure(
    name: str,
    compiled: bool = False,
    budget_s: float = 0.5,
    skip: Sequence[str] = (),
    device: str = "cuda",
) -> dict[str, Any]:
    """Rows of a case by contestant: `status` ("ok", or why there is no time), `ms`, `spread`,
    `distance`, and `host_us`, which the host spends on a call. `compiled`: ours against the peers
    that need compiling, instead of the others. `fatal`: the process is of no use any more;
    contestants without `ms` were not timed."""
    return measure_case(by_name(name), compiled, budget_s, skip, device)


def measure_case(
    case: Case, compiled: bool, budget_s: float, skip: Sequence[str], device: str
) -> dict[str, Any]:
    """As measure()."""
    operands = case.operands(device)
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, gpu_peers.Run] = {}
    first = None
    with torch.no_grad():
        for contestant in [*gpu_peers.contestants(case, compiled), gpu_peers.OURS]:
            if contestant in skip:
                continue
            try:
                run = gpu_peers.make(contestant, case, operands)
                out = run()
                off = gpu_agreement.distance(case, operands, out, first)
            except Exception as error:
                rows[contestant] = {"status": describe(error)}
                if is_fatal(error):
                    return {"case": case.name, "rows": rows, "fatal": True}
                continue
            first = out if first is None else first
            runs[contestant] = run
            rows[contestant] = {"status": "ok", "distance": off}
        del first
        if runs:
            watch = stopwatch(device)
            times = take_turns(runs, watch, budget_s * len(runs), flush=flushed(case))
            for contestant, samples in times.items():
                rows[contestant] |= {
                    "ms": samples.median * 1e3,
                    "spread": samples.spread,
                    "rounds": len(samples.seconds),
                    "host_us": host_seconds(watch, runs[contestant]) * 1e6,
                }
    return {
        "case": case.name, "rows": rows, "flushed": flushed(case),
        "clocks": clocks(),
    }  # fmt: skip


def flushed(case: Case) -> bool:
    """Whether the caches are emptied before every call: what a decode reads comes from memory."""
    return case.decode


def describe(error: BaseException) -> str:
    """A table cell: the kind of error and its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def is_fatal(error: BaseException) -> bool:
    """Whether the device's context is lost, so that nothing can be timed in this process."""
    if "out of memory" in str(error):
        return False
    if "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
        return True
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
