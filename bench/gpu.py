"""`python -m bench.gpu --out DIR`: build, check and time the CUDA kernels on this machine's GPU.

In this order, until --minutes are over: what the machine is and can do; the kernels, built in
parallel; the numerics suite, each kernel through the gate; then attnengine against SDPA by back
end, installed peers and (second pass) compiled ones. DIR gets gpu.json and gpu.md, written anew
after every case. Exit status: 0 when nothing was wrong, 1 when a kernel gave a wrong result or
broke, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from . import gpu_machine, gpu_peers, gpu_report, gpu_suite
from .gpu_cases import by_name, one_per_kernel, timed_cases
from .gpu_crew import Answer, Crew, Job
from .gpu_deadline import Deadline
from .gpu_report import Results

NO_GPU = 2
CHECK_SHARE = 0.5  # of the time, at most, until timing begins
CLOSING_S = 5.0  # to write and leave
SUITE_LIMIT_S, TIMED_LIMIT_S, COMPILED_LIMIT_S, MACHINE_LIMIT_S = 180.0, 60.0, 120.0, 60.0
LEAST_S = 3.0  # a case is not begun when less is left


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it (default 8)")
    parser.add_argument(
        "--suite", choices=("cover", "full", "none"), default="cover", help="kernels to check"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME",
        help="timed cases whose names start so, such as llama or decode/B8; 'none' times nothing",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that build"
    )
    parser.add_argument("--budget", type=float, default=0.4, help="seconds per contestant")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu needs an NVIDIA GPU that torch can use, and torch sees none here.")
        return NO_GPU
    command = "python -m bench.gpu " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    results = Results(command, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))
    return Run(args, results, Deadline(60.0 * args.minutes - CLOSING_S)).go()


class Stopped(Exception):
    """The run was asked to end."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


class Run:
    """One run: its phases, and what is written after each answer."""

    def __init__(
        self,
        args: argparse.Namespace,
        results: Results,
        deadline: Deadline,
        crew: Callable[..., Crew] = Crew,
        show: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        self.args, self.results, self.deadline = args, results, deadline
        self.crew, self.show = crew, show

    def go(self) -> int:
        """All phases; whatever ends them, what was found is written."""
        before = signal.signal(signal.SIGTERM, _stop)
        try:
            self.machine()
            self.kernels()
            self.timings()
            over = bool(self.results.not_reached)
            self.results.state = "stopped at its time limit" if over else "complete"
        except (Stopped, KeyboardInterrupt):
            self.results.state = "interrupted"
        finally:
            signal.signal(signal.SIGTERM, before)
            self.save()
        self.show(gpu_report.markdown(self.results))
        return 1 if self.results.wrong else 0

    def save(self) -> None:
        """Write what is known."""
        self.results.spent_s = self.deadline.spent
        gpu_report.write(self.args.out, self.results)

    def missed(self, kind: str, jobs: list[Job]) -> None:
        """Remember what was not begun."""
        self.results.not_reached += [f"{kind} {job['name']}" for job in jobs]

    # -- phases -----------------------------------------------------------------------------------

    def machine(self) -> None:
        """Facts and ceilings, measured alone."""
        self.results.facts = gpu_machine.facts()

        def done(job: Job, found: Answer) -> None:
            self.results.ceilings = found.get("ceilings", {"error": found.get("error", "")})
            self.results.clocks = found.get("clocks", {})
            for line in gpu_machine.ceiling_lines(self.results.ceilings):
                self.show(line)
            self.save()

        with self.crew(1) as crew:
            crew.run([{"do": "machine"}], self.deadline, MACHINE_LIMIT_S, done)

    def kernels(self) -> None:
        """The kernels that will be timed, then those of the suite: many processes at a time."""
        jobs: list[Job] = [
            {"do": "build", "name": case.name} for case in one_per_kernel(self.wanted())
        ]
        try:
            jobs += [{"do": "suite", "name": name} for name in gpu_suite.suite(self.args.suite)]
        except Exception as error:  # attnengine cannot be imported: the baselines are still timed
            self.results.suite["(all)"] = {"ok": False, "error": f"{type(error).__name__}: {error}"}

        def done(job: Job, found: Answer) -> None:
            if job["do"] == "build":
                self.results.builds[job["name"]] = found
                state = f"{found['build_s']:.0f} s" if found.get("ok") else first_line(found)
            else:
                self.results.suite[job["name"]] = found
                state = gpu_report.verdict(found)
                state += "" if found.get("ok") else f": {first_line(found)}"
            self.show(f"{self.deadline.spent:4.0f} s  {job['do']} {job['name']}: {state}")
            self.save()

        part = self.deadline.part(CHECK_SHARE if self.wanted() else 1.0)
        one_thread = {"OMP_NUM_THREADS": "1"}
        with self.crew(max(1, self.args.jobs), one_thread) as crew:
            self.missed("check", crew.run(jobs, part, SUITE_LIMIT_S, done))

    def timings(self) -> None:
        """All cases against what needs no compiling, then against what does."""
        with self.crew(1) as crew:
            for compiled in (False, True):
                limit = COMPILED_LIMIT_S if compiled else TIMED_LIMIT_S
                jobs = [self.job(case.name, compiled) for case in self.wanted()]
                for at, job in enumerate(jobs):
                    if not self.deadline.allows(LEAST_S):
                        self.missed("compiled peers of" if compiled else "time", jobs[at:])
                        break
                    self.one(crew, job, limit)

    def wanted(self) -> list[Any]:
        """The timed cases that are asked for."""
        return timed_cases(tuple(self.args.only))

    def job(self, name: str, compiled: bool) -> Job:
        """Time one case."""
        budget = self.args.budget
        return {"do": "time", "name": name, "compiled": compiled, "budget_s": budget}

    def one(self, crew: Crew, job: Job, limit: float) -> None:
        """One case. When a contestant breaks the process, the others get a second try."""
        found = self.attempt(crew, job, limit)
        if found.get("fatal") and self.deadline.allows(LEAST_S):
            rows = {name: row for name, row in found.get("rows", {}).items() if "ms" not in row}
            # Without rows it hung or died: what is new here is ours, or slow to compile.
            compiles = gpu_peers.contestants(by_name(job["name"]), True)
            default = compiles[0] if job["compiled"] else gpu_peers.OURS
            blamed = list(rows)[-1] if rows else default
            row = rows.get(blamed, {"status": first_line(found)})
            found = self.attempt(crew, {**job, "skip": [blamed]}, limit)
            if found.get("ok") and not found.get("fatal"):  # without it, the others can run
                row = {**row, "broke": True}
            found = {**found, "rows": {**found.get("rows", {}), blamed: row}}
        passes = self.results.timed.setdefault(job["name"], {})
        passes["compiled" if job["compiled"] else "peers"] = found
        times = {n: f"{r['ms']:.4g} ms" for n, r in found.get("rows", {}).items() if "ms" in r}
        text = ", ".join(f"{n} {t}" for n, t in times.items()) or first_line(found)
        self.show(f"{self.deadline.spent:4.0f} s  {job['name']}: {text}")
        self.save()

    def attempt(self, crew: Crew, job: Job, limit: float) -> Answer:
        """The answer of one job, begun now."""
        answers: list[Answer] = [{"ok": False, "error": "not begun: time was up"}]
        crew.run([job], self.deadline, limit, lambda _, found: answers.append(found))
        return answers[-1]


def first_line(found: Answer) -> str:
    """Of an error."""
    return (found.get("error", "").strip().splitlines() or ["no contestant could run"])[0]


if __name__ == "__main__":
    raise SystemExit(main())
