"""`python -m bench cpu`: time attnengine against its peers on this machine.
`python -m bench report`: write the report from the recorded run again.
`python -m bench schedule`: the model of how decode work is cut among the SMs of a GPU.

Exit status of cpu: 0 when every row was measured, whatever the verdicts; 1 when a case failed
(outputs disagreed, a dtype is not supported) or, with --strict, when a bar was missed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from . import (
    attention,
    calls,
    decode,
    linear,
    memory,
    peaks,
    record,
    report,
    schedule,
    serving,
    siblings,
    startup,
    token_statistics,
)
from .cases import GROUPS
from .session import Session

MEASURES = (
    attention, siblings, decode, serving, linear, token_statistics, memory, calls, startup,
)  # fmt: skip
ALL_GROUPS = (
    *GROUPS, "windows", "rows", "bias", "decode", "serving", "linear", "statistics", "memory",
    "calls", "startup",
)  # fmt: skip


def cpu(args: argparse.Namespace, console: Console) -> int:
    """Everything the CPU backend is held to."""
    torch.set_num_threads(args.threads)
    only = tuple(part for text in args.only for part in text.split(",") if part)
    unknown = [part for part in only if part.partition("/")[0] not in ALL_GROUPS]
    if unknown:
        console.print(f"--only {unknown[0]}: no such group; there are {', '.join(ALL_GROUPS)}")
        return 2
    began = time.monotonic()
    where = record.environment(args.threads)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring peaks", total=None)
        session = Session(
            args.threads,
            args.quick,
            only,
            peaks.measure(sorted({1, args.threads})),
            show=lambda text: progress.update(task, description=text),
        )
        for group in MEASURES:
            group.measure(session)
    found = record.Record(
        "python -m bench " + shlex.join(sys.argv[1:]),
        where,
        tuple(session.peaks),
        tuple(session.rows),
        tuple(session.failures),
    )
    record.summary(console, found)
    console.print(f"The run took {(time.monotonic() - began) / 60:.1f} minutes.")
    folder = args.out or (None if args.quick or only else record.RESULTS)
    if folder is not None:
        paths = record.write(folder, "cpu", found)
        if args.report:
            paths += report.write(folder, found)
        for path in paths:
            console.print(f"wrote {path}")
    elif args.report:
        console.print("a partial run is not reported; give --out FOLDER to see its report")
    missed = any(row.verdict == "miss" for row in found.rows)
    return 1 if found.failures or (args.strict and missed) else 0


def main() -> int:
    """Parse the command line and run one target."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    targets = parser.add_subparsers(dest="target", required=True)
    on_cpu = targets.add_parser("cpu", help="CPU kernels against SDPA and compiled FlexAttention")
    on_cpu.add_argument("--quick", action="store_true", help="small shapes, short rounds: a smoke")
    on_cpu.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="GROUP[,GROUP]",
        help=f"groups ({', '.join(ALL_GROUPS)}) or starts of rows' names",
    )
    on_cpu.add_argument("--threads", type=int, default=torch.get_num_threads())
    on_cpu.add_argument("--out", type=Path, help="folder for cpu.json and cpu.md")
    on_cpu.add_argument("--strict", action="store_true", help="a missed bar is a failure")
    on_cpu.add_argument(
        "--report", action="store_true", help="write the report and README's section too"
    )
    again = targets.add_parser("report", help="write the report from a recorded run")
    again.add_argument("--out", type=Path, default=record.RESULTS, help="folder of cpu.json")
    model = targets.add_parser("schedule", help="how decode work is cut among SMs: a model")
    model.add_argument("--out", type=Path, default=record.RESULTS, help="folder of schedule.json")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)
    if args.target == "cpu":
        return cpu(args, console)
    if args.target == "schedule":
        written = schedule.run(args.out, console)
    else:
        written = report.write(args.out, record.load(args.out / "cpu.json"))
    for path in written:
        console.print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
