"""`python -m bench cpu`: time attnengine against its peers on this machine.

Exit status: 0 when every row was measured, whatever the verdicts; 1 when outputs disagreed or,
with --strict, when a bar was missed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from . import baselines, calls, peaks, report, startup
from .cases import Case, attention_cases
from .report import Row
from .runner import interleave


def measure_case(case: Case, budget_s: float, peak_flops: float) -> list[Row]:
    """Check every contestant of the case, then time them together: one row per peer, the first with
    the bar."""
    operands = case.operands()
    steps = {"attnengine": baselines.step(baselines.ours(case), operands, case.backward)}
    for peer in case.peers:
        attend = baselines.BASELINES[peer](case)
        steps[peer] = baselines.step(attend, operands, case.backward)
    distances = baselines.check_equal(case, steps)
    times = interleave(steps, budget_s)
    ours = times["attnengine"]
    rows = []
    for i, peer in enumerate(case.peers):
        rows.append(
            Row(
                name=case.name,
                unit="ms",
                ours=ours.median * 1e3,
                spread=ours.spread,
                peer=peer,
                peer_value=times[peer].median * 1e3,
                ratio=times[peer].median / ours.median,
                bar=case.bar if i == 0 else None,
                gflops=case.flops / ours.median / 1e9,
                share_of_peak=case.flops / ours.median / peak_flops,
                distance=distances["attnengine"],
            )
        )
    return rows


def cpu(args: argparse.Namespace, console: Console) -> int:
    """Everything the CPU backend is held to."""
    torch.set_num_threads(args.threads)
    where = report.environment(args.threads)
    budget_s = 1.0 if args.quick else 4.0

    def wanted(name: str) -> bool:
        return not args.only or any(part in name for part in args.only)

    cases = [case for case in attention_cases(args.quick) if wanted(case.name)]
    rows: list[Row] = []
    failures: list[str] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring peaks", total=len(cases) + 3)
        peak_list = peaks.measure(sorted({1, args.threads}))
        progress.advance(task)
        for case in cases:
            progress.update(task, description=case.name)
            peak = peak_list[-1].flops(case.dtype)
            try:
                rows += measure_case(case, budget_s, peak)
            except AssertionError as wrong:
                failures.append(str(wrong))
            progress.advance(task)
        progress.update(task, description="calls")
        rows += calls.measure(budget_s, wanted)
        progress.advance(task)
        progress.update(task, description="startup")
        rows += startup.measure(1 if args.quick else 3, args.threads, wanted)
        progress.advance(task)
    report.summary(console, rows, peak_list, where)
    for failure in failures:
        console.print(f"WRONG RESULT {failure}", style="bold red")
    command = "python -m bench " + shlex.join(sys.argv[1:])
    folder = args.out or (None if args.quick or args.only else report.RESULTS)
    if folder is not None:
        for path in report.write(folder, "cpu", rows, peak_list, where, command):
            console.print(f"wrote {path}")
    missed = any(row.verdict == "miss" for row in rows)
    return 1 if failures or (args.strict and missed) else 0


def main() -> int:
    """Parse the command line and run one target."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    targets = parser.add_subparsers(dest="target", required=True)
    on_cpu = targets.add_parser("cpu", help="CPU kernels against SDPA and compiled FlexAttention")
    on_cpu.add_argument("--quick", action="store_true", help="one shape per group, short rounds")
    on_cpu.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="rows whose name has TEXT"
    )
    on_cpu.add_argument("--threads", type=int, default=torch.get_num_threads())
    on_cpu.add_argument("--out", type=Path, help="folder for cpu.json and cpu.md")
    on_cpu.add_argument("--strict", action="store_true", help="a missed bar is a failure")
    args = parser.parse_args()
    return cpu(args, Console(width=None if sys.stdout.isatty() else 150))


if __name__ == "__main__":
    raise SystemExit(main())
