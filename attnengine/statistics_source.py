"""The units of token statistics attention: a plan struct and one export over the template. There is
nothing to trace, so a kernel is decided by its kind, dtype and head dim."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from .arch import CPU
from .emit import ELEMENT
from .ir import DTYPE_NAMES

KINDS = ("forward", "backward")


@dataclass(frozen=True)
class StatisticsPlan:
    """What a unit is compiled for.

    ``tile``: tokens between a head's sums and the softmax over the heads; whole vectors of tokens
    on every instruction set. ``cache_bytes``, ``core_bytes``: of the last-level cache, as cores of
    servers share it, and of a core's own; where a launch reads w again is chosen by them.
    """

    kind: str  # "forward" or "backward"
    element: torch.dtype
    head_dim: int
    tile: int = 16
    cache_bytes: int = 32 << 20
    core_bytes: int = CPU["portable"].l2_bytes

    @property
    def label(self) -> str:
        return f"statistics {self.kind} {DTYPE_NAMES[self.element]} D{self.head_dim}"


def statistics_source(plan: StatisticsPlan) -> str:
    """The C++ unit of a plan; its key is the digest of the rest."""
    accumulator = "double" if plan.element == torch.float64 else "float"
    body = [
        f'#include "cpu/statistics_{plan.kind}.h"',
        "",
        "namespace {",
        "struct Plan {",
        f"  using Elem = {ELEMENT[DTYPE_NAMES[plan.element]]};",
        f"  using Acc = {accumulator};",
        f"  static constexpr int kD = {plan.head_dim}, kTile = {plan.tile};",
        f"  static constexpr int64_t kCacheBytes = {plan.cache_bytes};",
        f"  static constexpr int64_t kCoreBytes = {plan.core_bytes};",
    ]
    key = hashlib.sha256("\n".join(body).encode()).hexdigest()[:32]
    body += [
        f'  static constexpr const char* kKey = "{key}";',
        "};",
        "}  // namespace",
        f"AE_EXPORT_STATISTICS_{plan.kind.upper()}(Plan)",
        "",
    ]
    return "\n".join(body)
