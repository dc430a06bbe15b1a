"""One run of the benchmark: what is wanted, how long it may take, what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .peaks import Peaks
from .rows import Row


@dataclass
class Session:
    """Collects rows and failures. `only`: groups, or starts of rows' names, that are wanted."""

    threads: int
    quick: bool = False
    only: tuple[str, ...] = ()
    peaks: list[Peaks] = field(default_factory=list)  # of one thread, of `threads`
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    show: Callable[[str], None] = lambda text: None

    @property
    def budget_s(self) -> float:
        """Seconds of rounds for one contest."""
        return 0.5 if self.quick else 3.0

    @property
    def min_rounds(self) -> int:
        """Rounds that a slow contest gets whatever its budget."""
        return 3 if self.quick else 7

    def peak_flops(self, dtype: torch.dtype) -> float:
        """The matmul peak of all threads for operands of `dtype`."""
        return self.peaks[-1].flops(dtype)

    def wanted(self, name: str) -> bool:
        """Whether a row or a group (or a part of it) is asked for."""
        return not self.only or any(
            name == part or name.startswith(part + "/") or part.startswith(name + "/")
            for part in self.only
        )

    def attempt(self, name: str, measure: Callable[[], list[Row]]) -> None:
        """Add what `measure` gives. An error is recorded and does not end the run."""
        if not self.wanted(name):
            return
        self.show(name)
        try:
            self.rows += measure()
        except Exception as error:  # a dtype that is not supported, a peer that cannot compile
            lines = str(error).strip().splitlines() or [""]
            self.failures.append(f"{name}: {type(error).__name__}: {lines[0]}")
