"""The numerics suite on the device: one kernel, all its shapes, through the gate.

The cases are those of the simulator's suite (tests/cuda_cases.py). Every call is made twice into
memory that held NaN: results that differ between two runs of one kernel are a race.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .gpu_caches import CacheCase
from .gpu_cases import by_name
from .gpu_timing import is_fatal

TESTS = Path(__file__).resolve().parents[1] / "tests"
LONGEST_TEXT = 3000  # characters of an error


def suite(which: str) -> list[str]:
    """Ids of the kernels of "cover" or "full"; none of "none"."""
    return [] if which == "none" else [c.id for c in getattr(_cases(), which.upper())]


def _cases() -> Any:
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    import cuda_cases

    return cuda_cases


def build_timed(name: str, device: str = "cuda") -> dict[str, Any]:
    """Compile the kernel of a timed case, on a tiny problem: kernels fit any size."""
    import dataclasses

    import attnengine as ae

    from . import gpu_peers

    case = by_name(name)
    if isinstance(case, CacheCase):
        began = time.monotonic()
        few = dataclasses.replace(case, lengths=(64,))
        gpu_peers.make(gpu_peers.OURS, few, few.operands(device))()
        return {"build_s": time.monotonic() - began}
    length = 1 if case.decode else 64
    small = dataclasses.replace(case, B=1, L=length, S=64)
    began = time.monotonic()
    operands = small.operands(device)
    ae.compile(gpu_peers.spec(small, device), *operands, backward=False)
    return {"build_s": time.monotonic() - began}


def check(name: str, seeds: tuple[int, ...] = (0, 1), device: str = "cuda") -> dict[str, Any]:
    """Compile a kernel and judge it on every shape.

    Returns seconds of building and checking, calls judged, the worst share of a limit that was
    used up, and ``failures``: what broke, by shape. Raises what compiling raises.
    """
    import attnengine as ae

    case = _cases().by_id(name)
    shapes = case.shapes()
    began = time.monotonic()
    first = case.problem(shapes[0], device=device)
    handle = ae.compile(first.spec, first.q, first.k, first.v, backward=False)
    built = time.monotonic()
    plan = getattr(handle, "plan", None)
    stages = getattr(plan, "stages", None) or 2
    if plan is not None:  # the shapes that wrap this kernel's ring, whatever its tiles
        shapes = case.shapes(block_m=plan.block_m, block_n=plan.block_n, stages=stages)
    failures, calls, used = [], 0, 0.0
    for seed in seeds:
        for shape in shapes:
            calls += 1
            try:
                used = max(used, judged(case, shape, seed, device))
            except Exception as error:  # of the gate, or of a launch
                if is_fatal(error):
                    raise
                failures.append(f"{shape} seed {seed}: {error}"[:LONGEST_TEXT])
    return {
        "build_s": built - began,
        "check_s": time.monotonic() - built,
        "calls": calls,
        "used": used,
        "failures": failures,
        "plan": str(plan)[:LONGEST_TEXT],
    }


def judged(case: Any, shape: Any, seed: int, device: str) -> float:
    """The largest share of any of the gate's limits that one call uses. AssertionError when it
    fails the gate or differs from itself. The reference is computed on the CPU, from equal bits."""
    import attnengine as ae
    from attnengine import gate

    there = case.problem(shape, seed, device)
    here = case.problem(shape, seed, "cpu")

    def run(*_: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        poison(shape.B * shape.Hq * max(1, shape.L) * case.dims[1], case.dtype, device)
        out, stats = ae.attention(there.q, there.k, there.v, there.spec, return_aux=True)
        return out, dict(stats)

    with torch.no_grad():
        out, stats = run()
        again, stats_again = run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    expectation = gate.Expectation(here.spec, here.q, here.k, here.v, grads=False)
    on_cpu = {name: x.cpu() for name, x in stats.items()}
    reports = expectation.judge(out.cpu(), on_cpu, (here.q, here.k, here.v))
    for name, a, b in [("out", out, again), *[(n, stats[n], stats_again[n]) for n in stats]]:
        if not torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)):
            raise AssertionError(f"{name} differs between two runs on the same operands: a race")
    shares = [x / limit for r in reports for x, limit in r.measured.values() if limit > 0]
    return max(shares, default=0.0)


def poison(elements: int, dtype: torch.dtype, device: str) -> None:
    """Fill memory that the allocator will hand out next with NaN."""
    blocks = [torch.full((elements,), float("nan"), dtype=t, device=device)
              for t in (dtype, torch.float32)]  # fmt: skip
    del blocks
