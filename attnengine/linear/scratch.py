"""Bytes of one worker's scratch in the CPU kernels of linear attention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What the scratch of a kernel depends on. Bytes of the accumulator and multiply types."""

    kind: str
    d: int
    dv: int
    chunk: int
    accumulator: int
    multiply: int
    register: int  # bytes of a vector register
    decay_kind: str
    delta: bool
    normalizer: bool


def line(n: int) -> int:
    """Every block of memory starts on its own cache line."""
    return -(-n // 64) * 64


def scratch_bytes(s: Sizes) -> int:
    """The total that ``templates/cpu/linear_work.h`` documents and static_asserts."""
    state = s.d * (s.dv + s.normalizer) * s.accumulator
    tiles = s.chunk * (2 * s.d + s.dv) * s.multiply + s.chunk * s.chunk * s.accumulator
    return line(state) + line(tiles)
