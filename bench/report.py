"""Rows of a run: terminal table, JSON and Markdown."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from rich.console import Console
from rich.table import Table

import attnengine as ae

from .peaks import Peaks

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Row:
    """One measured line. `ratio` is what the bar is about: peer time / our time where `at_least`,
    else our cost (relative to the peer when there is one)."""

    name: str
    unit: str  # ms, us or s
    ours: float
    spread: float
    peer: str = ""
    peer_value: float | None = None
    ratio: float | None = None
    bar: float | None = None
    at_least: bool = True
    gflops: float | None = None
    share_of_peak: float | None = None
    distance: float | None = None  # ours from the fp64 reference, relative L2

    @property
    def verdict(self) -> str:
        """pass, miss, or empty for a row without a bar."""
        if self.bar is None or self.ratio is None:
            return ""
        met = self.ratio >= self.bar if self.at_least else self.ratio <= self.bar
        return "pass" if met else "miss"

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of HEADINGS."""
        sign = ">=" if self.at_least else "<="
        suffix = "s" if self.unit == "s" and not self.peer else "x"
        return (
            self.name,
            f"{self.ours:.3g} {self.unit}",
            f"±{self.spread:.0%}",
            self.peer,
            "" if self.peer_value is None else f"{self.peer_value:.3g} {self.unit}",
            "" if self.ratio is None else f"{self.ratio:.2f}{suffix}",
            "" if self.bar is None else f"{sign} {self.bar:g}{suffix}",
            self.verdict,
            "" if self.gflops is None else f"{self.gflops:.0f}",
            "" if self.share_of_peak is None else f"{self.share_of_peak:.0%}",
        )


HEADINGS = (
    "case",
    "attnengine",
    "spread",
    "peer",
    "peer time",
    "ratio",
    "bar",
    "verdict",
    "GFLOP/s",
    "of peak",
)
NOTES = (
    "Medians of interleaved rounds in one process; spread is half the interquartile range. "
    "FLOPs: 4·pairs·D forward, 14·pairs·D forward and backward; causal counts half, a window its "
    "live pairs. Of peak: share of the measured fp32 FMA (or bf16 dot) rate above. Outputs and "
    "gradients were compared before timing."
)


def environment(threads: int) -> dict[str, str]:
    """What the numbers depend on: CPU, threads, versions."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            cpu = next(line.split(":", 1)[1].strip() for line in info if "model name" in line)
    except (OSError, StopIteration):
        pass
    return {
        "cpu": cpu,
        "logical cpus": str(os.cpu_count()),
        "threads": str(threads),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "torch CPU capability": torch.backends.cpu.get_cpu_capability(),
        "attnengine": ae.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def table(rows: list[Row]) -> Table:
    """The rows as a rich table."""
    view = Table(*HEADINGS, title="python -m bench cpu", title_justify="left")
    colour = {"pass": "green", "miss": "red", "": None}
    for row in rows:
        view.add_row(*row.cells(), style=colour[row.verdict])
    return view


def markdown(rows: list[Row], peaks: list[Peaks], where: dict[str, str], command: str) -> str:
    """The same as a Markdown page."""
    lines = [f"# `{command}`", ""]
    lines += [", ".join(f"{key} {value}" for key, value in where.items()) + ".", ""]
    lines += [f"- {peak.line()}" for peak in peaks]
    lines += ["", NOTES, "", "| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write(
    folder: Path,
    stem: str,
    rows: list[Row],
    peaks: list[Peaks],
    where: dict[str, str],
    command: str,
) -> list[Path]:
    """Write `stem`.json and `stem`.md under `folder`; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "command": command,
        "environment": where,
        "peaks": [dataclasses.asdict(p) for p in peaks],
        "rows": [{**dataclasses.asdict(r), "verdict": r.verdict} for r in rows],
    }
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    paths[0].write_text(json.dumps(record, indent=1) + "\n")
    paths[1].write_text(markdown(rows, peaks, where, command))
    return paths


def summary(console: Console, rows: list[Row], peaks: list[Peaks], where: dict[str, str]) -> None:
    """Print environment, peaks, table and the count of bars met."""
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    for peak in peaks:
        console.print(peak.line())
    console.print(table(rows))
    barred = [row for row in rows if row.verdict]
    met = sum(row.verdict == "pass" for row in barred)
    console.print(f"{met} of {len(barred)} bars met.")
    console.print(NOTES, style="dim")
