"""The record of a run: environment, peaks, rows, failures; JSON, Markdown and terminal table."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.table import Table

import attnengine as ae

from .peaks import Peaks
from .rows import HEADINGS, Row, count_bars
from .tables import markdown_table

RESULTS = Path(__file__).with_name("results")
NOTES = (
    "Medians of interleaved rounds in one process; spread is half the interquartile range. "
    "FLOPs: 4·pairs·D forward, 14·pairs·D forward and backward; causal counts half, a window its "
    "live pairs. Of peak: share of the measured fp32 FMA (or bf16 dot) rate above; decode: of the "
    "measured streaming read. Outputs and gradients were compared first. Ratio: the other's "
    "time by ours where the bar is >=; ours by the other's where it is <=."
)


@dataclass(frozen=True)
class Record:
    """Everything that one run found."""

    command: str
    environment: dict[str, str]
    peaks: tuple[Peaks, ...]
    rows: tuple[Row, ...]
    failures: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "command": self.command,
            "environment": self.environment,
            "peaks": [dataclasses.asdict(p) for p in self.peaks],
            "rows": [row.as_dict() for row in self.rows],
            "failures": list(self.failures),
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Record:
        """The inverse; also reads records of earlier versions."""
        return Record(
            data["command"],
            data["environment"],
            tuple(Peaks(**p) for p in data["peaks"]),
            tuple(Row.from_dict(r) for r in data["rows"]),
            tuple(data.get("failures", ())),
        )

    def groups(self) -> dict[str, list[Row]]:
        """Rows by group, in the order of the run."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found


def load(path: Path) -> Record:
    """A record written by `write`. Raises FileNotFoundError naming the command that makes it."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; `python -m bench cpu` writes it")
    return Record.from_dict(json.loads(path.read_text()))


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


def markdown(record: Record) -> str:
    """The record as a Markdown page: one table."""
    lines = [f"# `{record.command}`", ""]
    lines += [", ".join(f"{key} {value}" for key, value in record.environment.items()) + ".", ""]
    lines += [f"- {peak.line()}" for peak in record.peaks]
    lines += ["", NOTES, ""]
    lines += markdown_table(HEADINGS, [row.cells() for row in record.rows])
    if record.failures:
        lines += ["", "Not measured:", "", *[f"- {failure}" for failure in record.failures]]
    return "\n".join(lines) + "\n"


def write(folder: Path, stem: str, record: Record) -> list[Path]:
    """Write `stem`.json and `stem`.md under `folder`; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    paths[0].write_text(json.dumps(record.as_dict(), indent=1) + "\n")
    paths[1].write_text(markdown(record))
    return paths


def summary(console: Console, record: Record) -> None:
    """Print environment, peaks, table and the count of bars met."""
    console.print(", ".join(f"{key} {value}" for key, value in record.environment.items()))
    for peak in record.peaks:
        console.print(peak.line())
    console.print(table(list(record.rows)))
    met, barred = count_bars(list(record.rows))
    console.print(f"{met} of {barred} bars met.")
    console.print(NOTES, style="dim")
    for failure in record.failures:
        console.print(f"NOT MEASURED {failure}", style="bold red", markup=False)
