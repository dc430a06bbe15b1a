"""A measured line and its verdict, and the lines that follow from others. No clock, no tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measured line with at most one bar.

    `ratio` is what the bar is about. Against a peer: peer's time / ours where `at_least`, else ours
    / the peer's. Without a peer's time: a share (`ratio_unit` "%"), seconds ("s") or a cost ("x").
    """

    name: str
    unit: str  # ms, us, s or MB
    ours: float
    spread: float
    peer: str = ""
    peer_value: float | None = None
    ratio: float | None = None
    bar: float | None = None
    at_least: bool = True
    ratio_unit: str = "x"  # x, %, s
    gflops: float | None = None
    share_of_peak: float | None = None
    distance: float | None = None  # ours from the fp64 reference, relative L2
    intensity: float | None = None  # FLOPs per byte of operands and results, each moved once

    @property
    def group(self) -> str:
        """The first part of the name."""
        return self.name.partition("/")[0]

    @property
    def verdict(self) -> str:
        """pass, miss, or empty for a row without a bar."""
        if self.bar is None or self.ratio is None:
            return ""
        met = self.ratio >= self.bar if self.at_least else self.ratio <= self.bar
        return "pass" if met else "miss"

    @property
    def peer_gflops(self) -> float | None:
        """The peer's rate for the same FLOPs."""
        if self.gflops is None or not self.peer_value:
            return None
        return self.gflops * self.ours / self.peer_value

    @property
    def ratio_text(self) -> str:
        """2.20x, 65% or 0.11s; empty without a ratio."""
        return "" if self.ratio is None else _ratio(self.ratio, self.ratio_unit)

    @property
    def bar_text(self) -> str:
        """>= 3.5x; empty without a bar."""
        if self.bar is None:
            return ""
        sign = ">=" if self.at_least else "<="
        if self.ratio_unit == "%":
            return f"{sign} {self.bar:.0%}"
        return f"{sign} {self.bar:g}{self.ratio_unit}"

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of HEADINGS."""
        return (
            self.name,
            f"{self.ours:.3g} {self.unit}",
            f"±{self.spread:.0%}",
            self.peer,
            "" if self.peer_value is None else f"{self.peer_value:.3g} {self.unit}",
            self.ratio_text,
            self.bar_text,
            self.verdict,
            "" if self.gflops is None else f"{self.gflops:.0f}",
            "" if self.share_of_peak is None else f"{self.share_of_peak:.0%}",
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the verdict."""
        return {**dataclasses.asdict(self), "verdict": self.verdict}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Row:
        """The inverse. Unknown fields are dropped and missing ones get their defaults, so records
        of earlier versions stay readable; the verdict is computed anew."""
        known = {f.name for f in dataclasses.fields(Row)}
        return Row(**{key: value for key, value in data.items() if key in known})


HEADINGS = (
    "case",
    "attnengine",
    "spread",
    "against",
    "its time",
    "ratio",
    "bar",
    "verdict",
    "GFLOP/s",
    "of peak",
)


def share_row(row: Row, bar: float | None, peak: str) -> Row:
    """The same measurement held against a peak of the machine."""
    return dataclasses.replace(
        row,
        peer=peak,
        peer_value=None,
        ratio=row.share_of_peak,
        bar=bar,
        at_least=True,
        ratio_unit="%",
    )


def per_flop_row(row: Row, whole_gflops: float, bar: float | None) -> Row:
    """A causal measurement held against the rate of the same problem without a mask."""
    if row.gflops is None:
        raise ValueError(f"{row.name} has no FLOP rate")
    return dataclasses.replace(
        row,
        peer="full, per FLOP",
        peer_value=None,
        ratio=row.gflops / whole_gflops,
        bar=bar,
        at_least=True,
        ratio_unit="%",
    )


def per_work_row(
    row: Row, unit: str, work: float, base_ms: float, base_work: float, bar: float | None
) -> Row:
    """Time per unit of work (pairs, tiles) relative to that of a baseline; 1 is proportional."""
    return dataclasses.replace(
        row,
        peer=f"causal, per {unit}",
        peer_value=None,
        ratio=(row.ours / work) / (base_ms / base_work),
        bar=bar,
        at_least=False,
        ratio_unit="x",
    )


def count_bars(rows: list[Row]) -> tuple[int, int]:
    """(bars met, bars)."""
    verdicts = [row.verdict for row in rows if row.verdict]
    return verdicts.count("pass"), len(verdicts)


def _ratio(value: float, unit: str) -> str:
    return f"{value:.0%}" if unit == "%" else f"{value:.2f}{unit}"
