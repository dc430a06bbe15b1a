"""Runs the CUDA cases of tests/cuda_cases.py in the PTX simulator: numerics, reports, counters.

    python -m tests.simulated [--full] [--case ID ...] [--seeds N] [--out DIR]

prints one line per kernel and, with --out, writes simulated.json and simulated.md there. Exit
status 1 if any kernel fails. ``make test-full`` runs the full matrix.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import attnengine as ae
from attnengine import gate
from tests import cuda_cases, ptxsim
from tests.cuda_cases import Case, Problem, Shape

TARGET = "sm_80"
SEEDS = 3


def compiled(problem: Problem) -> Any:
    """The handle of a problem's spec for the simulated device."""
    p = problem
    return ae.compile(p.spec, p.q, p.k, p.v, target=TARGET, backward=False)


def planned(case: Case) -> Any:
    """The plan of a case's kernel: its tiles decide the shapes that it is run on."""
    return compiled(case.problem(Shape("plan", 1, 1, 1, 1, 1))).plan


def shapes_of(case: Case) -> list[Shape]:
    plan = planned(case)
    return case.shapes(block_m=plan.block_m, block_n=plan.block_n, stages=plan.stages)


def check(problem: Problem, seeds: Iterable[int]) -> list[gate.Report]:
    """One problem through the numerics gate, once per order of execution. Raises GateError, or
    RuntimeError with the simulator's report."""
    p = problem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = gate.Expectation(p.spec, p.q, p.k, p.v, grads=False)
    handle, reports = compiled(p), []
    for seed in seeds:
        ptxsim.seed(seed)
        reports += expected.check(lambda q, k, v: handle(q, k, v, return_aux=True))
    return reports


@dataclass
class Outcome:
    """What one kernel did."""

    id: str
    tile: str = ""
    registers: int = 0
    spill_bytes: int = 0
    shapes: int = 0
    seconds: float = 0.0
    counters: dict[str, Any] = field(default_factory=dict)  # of the launch on the first shape
    error: str = ""


def run(case: Case, seeds: Sequence[int]) -> Outcome:
    """A case on all its shapes and seeds."""
    outcome, started = Outcome(case.id), time.monotonic()
    try:
        ptxsim.install()
        plan = planned(case)
        outcome.tile = f"{plan.block_m}x{plan.block_n}, {plan.warps} warps, {plan.stages} stages"
        for number, shape in enumerate(shapes_of(case)):
            problem = case.problem(shape, seed=number)
            check(problem, seeds)
            outcome.shapes += 1
            if number == 0:
                outcome.counters = ptxsim.counters()
                module = compiled(problem).module
                outcome.registers = module.registers
                outcome.spill_bytes = module.spill_bytes
        if outcome.spill_bytes:
            raise RuntimeError(f"{outcome.spill_bytes} bytes of registers are spilled")
    except Exception as error:  # one kernel's failure must not hide the others'
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.seconds = time.monotonic() - started
    return outcome


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| kernel | tile | registers | spills | shapes | simulated |",
        "|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        verdict = "passed" if not o.error else o.error.splitlines()[0][:120]
        lines.append(
            f"| {o.id} | {o.tile} | {o.registers} | {o.spill_bytes} | {o.shapes} | {verdict} |"
        )
    failed = sum(bool(o.error) for o in outcomes)
    lines.append(f"\n{len(outcomes) - failed} of {len(outcomes)} kernels passed.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulated", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the full matrix, not the cover")
    parser.add_argument("--case", action="append", default=[], metavar="ID")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    cases: Sequence[Case] = cuda_cases.FULL if options.full else cuda_cases.COVER
    if options.case:
        cases = [cuda_cases.by_id(name) for name in options.case]
    seeds = range(1, options.seeds + 1)
    outcomes = []
    with ProcessPoolExecutor(options.processes) as pool:
        for outcome in pool.map(run, cases, [seeds] * len(cases)):
            state = outcome.error or "passed"
            print(f"{outcome.id:48s} {outcome.tile:28s} {outcome.seconds:6.1f} s  {state}", flush=True)
            outcomes.append(outcome)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "simulated.json").write_text(
            json.dumps([asdict(o) for o in outcomes], indent=1) + "\n"
        )
        (options.out / "simulated.md").write_text(table(outcomes) + "\n")
    return int(any(o.error for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
