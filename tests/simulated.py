"""Runs the CUDA cases of tests/cuda_cases.py in the PTX simulator: numerics, reports, counters.

    python -m tests.simulated [--full] [--linear] [--case ID ...] [--seeds N] [--counters]
                              [--record]

prints one line per kernel. --full runs linear attention's, too; --linear those alone
(tests/cuda_linear_cases.py). --counters adds what its launch on the first shape did. --record
writes bench/results/simulated.json, simulated-linear.json and the tables of docs/status.md, which
tests compare with them; of kernels that were not run they stay.
Exit status 1 if any kernel fails. ``make test-full`` runs the full matrix and records it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
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
from tests import cuda_cases, cuda_linear_cases, ptxsim
from tests.cuda_cases import Case, Problem, Shape

TARGET = "sm_80"
SEEDS = 3
ROOT = Path(__file__).resolve().parent.parent
STATUS = ROOT / "docs" / "status.md"
RECORDS = ("simulated", "simulated-linear")  # files, and what marks their tables


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


def check_counters(counters: dict[str, Any], case: Case, shape: Shape, plan: Any) -> None:
    """What a launch of one head must not do, whatever the kernel: visit tiles without a live key,
    read K and V more than once per tile of rows, have bank conflicts in ldmatrix, or use local
    memory. Raises AssertionError."""
    visited = sum(case.tiles(shape, plan.block_m, plan.block_n))
    columns = sum(-(-d // 16) * 16 for d in case.dims)
    flops = 2 * plan.block_m * plan.block_n * columns * visited
    found = counters["mma_flops"]
    assert found == flops, f"{found} FLOPs of products, tiles with a live key take {flops}"
    read = sum(counters["regions"][name]["read"] for name in ("k", "v"))
    planned = 2 * plan.block_n * sum(case.dims) * visited
    assert read <= 1.02 * planned, f"{read} bytes of K and V read, the plan has {planned}"
    assert counters["matrix_bank_conflicts"] == 0, "ldmatrix has bank conflicts"
    # Before the loop over the keys, the classifier of a mask that reads tensors walks boxes of them
    # with arrays of indices, which lie in local memory.
    local = counters["local_read_bytes"] + counters["local_write_bytes"]
    assert case.mask == "document" or local == 0, f"{local} bytes of local memory read and written"


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
                regions = outcome.counters["regions"]  # without the module's own variables
                outcome.counters["regions"] = {
                    name: bytes_ for name, bytes_ in regions.items() if not name.startswith("_Z")
                }
                module = compiled(problem).module
                check_counters(outcome.counters, case, shape, plan)
                outcome.registers = module.registers
                outcome.spill_bytes = module.spill_bytes
        if outcome.spill_bytes:
            raise RuntimeError(f"{outcome.spill_bytes} bytes of registers are spilled")
    except Exception as error:  # one kernel's failure must not hide the others'
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.seconds = time.monotonic() - started
    return outcome


def run_linear(case: cuda_linear_cases.LinearCase, seeds: Sequence[int]) -> Outcome:
    """A case of linear attention on all its shapes and seeds."""
    outcome, started = Outcome(case.id), time.monotonic()
    try:
        ptxsim.install()
        for shape in case.all_shapes:
            cuda_linear_cases.check(case, shape, seeds)
            outcome.shapes += 1
        handle = cuda_linear_cases.handle_of(cuda_linear_cases.expectation(case, shape, 1).problem)
        plan, module = handle.pipeline.forward_plans[0], handle.program.loaded
        outcome.tile = f"{plan.chunk} tokens x {plan.value_block}, 4 warps"
        outcome.registers, outcome.spill_bytes = module.registers, module.spill_bytes
        if outcome.spill_bytes:
            raise RuntimeError(f"{outcome.spill_bytes} bytes of registers are spilled")
        if stack := [n for n, e in module.manifest["entries"].items() if e["stack_bytes"]]:
            raise RuntimeError(f"{', '.join(stack)}: local memory is used")
    except Exception as error:  # one kernel's failure must not hide the others'
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.seconds = time.monotonic() - started
    return outcome


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """The rows of docs/status.md."""
    lines = [
        "| kernel | tile | registers | spills | shapes | rung |",
        "|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        rung = "simulated" if not o.error else "compiles"
        lines.append(
            f"| {o.id} | {o.tile} | {o.registers} | {o.spill_bytes} | {o.shapes} | {rung} |"
        )
    return lines


def summary(counters: dict[str, Any]) -> str:
    """One launch in a line."""
    c, read = counters, counters["global_read"]
    return (
        f"{c['instructions']['total']} instructions, {c['mma_flops'] / 1e6:.1f} MFLOP of products, "
        f"{c['exp']} exp, {read['bytes']} bytes read in {read['sectors']} sectors "
        f"({read['ideal_sectors']} ideal), {c['bank_conflicts']} bank conflicts "
        f"({c['matrix_bank_conflicts']} of ldmatrix)"
    )


def record_path(name: str) -> Path:
    return ROOT / "bench" / "results" / f"{name}.json"


def recorded(name: str = RECORDS[0]) -> list[Outcome]:
    """What the last recorded run of a full matrix found."""
    return [Outcome(**entry) for entry in json.loads(record_path(name).read_text())]


def marked(name: str, text: str) -> tuple[str, str, str]:
    """A text before a record's table, the table, and what follows it, without their marks."""
    before, rest = text.split(f"<!-- {name}:begin -->\n")
    lines, after = rest.split(f"<!-- {name}:end -->")
    return before, lines, after


def record(name: str, outcomes: Sequence[Outcome], seeds: Sequence[int]) -> None:
    """Writes the results and their table in docs/status.md."""
    record_path(name).write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    before, _, after = marked(name, STATUS.read_text())
    passed = sum(not o.error for o in outcomes)
    lines = [
        f"<!-- {name}:begin -->",
        f"{passed} of {len(outcomes)} kernels passed every shape with {len(seeds)} orders of "
        "execution each.",
        "",
        *table(outcomes),
        f"<!-- {name}:end -->",
    ]
    STATUS.write_text(before + "\n".join(lines) + after)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulated",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--full", action="store_true", help="the full matrix, not the cover")
    parser.add_argument("--linear", action="store_true", help="linear attention alone")
    parser.add_argument("--case", action="append", default=[], metavar="ID")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--counters", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args(arguments)
    cases: Sequence[Case] = cuda_cases.FULL if options.full else cuda_cases.COVER
    if options.case:
        cases = [cuda_cases.by_id(name) for name in options.case if "linear" not in name]
    linear = cuda_linear_cases.FULL if options.full else cuda_linear_cases.COVER
    if options.case:
        linear = tuple(case for case in linear if case.id in options.case)
    elif options.linear:
        cases = []
    elif not options.full:
        linear = ()
    seeds = range(1, options.seeds + 1)
    outcomes = []
    # Processes of their own: a fork would copy torch's threads.
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for outcome in pool.map(run, cases, [seeds] * len(cases)):
            state = outcome.error or "passed"
            line = f"{outcome.id:44s} {outcome.tile:28s} {outcome.seconds:6.1f} s  {state}"
            print(line, flush=True)
            if options.counters and outcome.counters:
                print(f"    {summary(outcome.counters)}", flush=True)
            outcomes.append(outcome)
        others = []
        for outcome in pool.map(run_linear, linear, [seeds] * len(linear)):
            state = outcome.error or f"passed, {outcome.registers} registers"
            line = f"{outcome.id:44s} {outcome.tile:28s} {outcome.seconds:6.1f} s  {state}"
            print(line, flush=True)
            others.append(outcome)
    for name, found in zip(RECORDS, (outcomes, others), strict=True):
        if options.record and found:
            record(name, found, seeds)
    failed = sum(bool(o.error) for o in (*outcomes, *others))
    print(f"{len(outcomes) + len(others) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
