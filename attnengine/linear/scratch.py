"""Bytes of one worker's scratch in the CPU kernels of linear attention: the same arrays, in the
same order, as the structs of the templates, which static_assert the total."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 16  # kLinearBlock, tokens


@dataclass(frozen=True)
class Sizes:
    """What the scratch of a kernel depends on."""

    d: int
    dv: int
    chunk: int
    accumulator: int  # bytes
    multiply: int  # bytes: 2 under bf16 dot products, else those of the accumulator
    register: int  # bytes of a vector register
    channel: bool  # decay of each channel
    delta: bool
    normalizer: bool

    @property
    def lanes(self) -> int:
        return self.register // self.accumulator

    @property
    def pairs(self) -> int:
        """Consecutive channels of one product step."""
        return 1 if self.multiply == self.accumulator else 2

    @property
    def d_rows(self) -> int:
        return _round(self.d, self.pairs)

    @property
    def d_pitch(self) -> int:
        return _round(self.d, self.lanes)

    @property
    def panel(self) -> int:
        """Columns of v that are worked on together: at most 256 bytes of sums."""
        most = 256 // self.accumulator
        panels = -(-self.dv // most)
        return _round(-(-self.dv // panels), self.lanes)


def _round(n: int, to: int) -> int:
    return -(-n // to) * to


def _pitch(n: int, size: int) -> int:
    """``linear_pitch`` of ``templates/cpu/linear_backward_work.h``, of n elements."""
    return n + (64 // size if n * size % 512 == 0 else 0)


def line(n: int) -> int:
    """Every array starts on its own cache line."""
    return _round(n, 64)


def scratch_bytes(kind: str, s: Sizes) -> int:
    """Of a "forward" or "backward" kernel."""
    return sum(map(line, _forward(s) if kind == "forward" else _backward(s)))


def _forward(s: Sizes) -> Iterator[int]:
    """``LinearForwardScratch`` of ``templates/cpu/linear_forward_work.h``."""
    c, a, m = s.chunk, s.accumulator, s.multiply
    dot, blocks = s.pairs == 2, s.chunk // BLOCK
    rows, panel = c * s.d_pitch, c * s.panel
    tiles = (4 if s.channel else 3 if dot else 2) if s.delta else 2  # q and k, by row
    yield from [rows * m] * tiles
    yield from [rows * a] * (5 if s.channel else 2)
    if not s.channel or dot:
        yield s.d_rows * c * m
    yield from [c * c * a] * (3 if s.delta else 1)
    yield c * c * m
    yield from [panel * m] * 2
    yield from [panel * a] * (4 if s.delta else 2)
    if dot:
        yield s.d_rows * s.panel * m
    if s.delta:
        yield c * BLOCK * a
    if s.channel:
        yield from (blocks * s.d_pitch * a, (blocks + 1) * s.d_pitch * a, s.d_rows * c * a)


def _backward(s: Sizes) -> Iterator[int]:
    """``LinearBackwardScratch`` of ``templates/cpu/linear_backward_work.h``."""
    c, a, m = s.chunk, s.accumulator, s.multiply
    width = _round(s.dv, s.lanes)
    pitch = _pitch(width, a)
    rounds, delta, channel, shared = s.pairs == 2, s.delta, s.channel, not s.channel
    tile_d, tile_v, tile_c, rows_d = c * s.d_pitch, c * pitch, c * c, s.d_rows * c
    blocks = c // BLOCK
    keys = channel and delta
    # Of the key head.
    yield from [tile_d * a] * 4
    yield from [rounds * tile_d * m] * 4
    yield shared * tile_d * m
    yield from [shared * tile_c * a, shared * delta * tile_c * a] * 2
    # Of a value head.
    yield from [tile_v * a] * 3
    yield from (rounds * tile_v * m, c * width * m)
    yield from (rounds * tile_v * m, rounds * tile_v * m, tile_v * m)
    state = _round(s.dv, s.pairs) * _pitch(s.d_pitch, a)
    yield from (rounds * state * m, s.d_rows * pitch * m)
    yield from (tile_d * a, (channel or delta) * tile_d * a)
    yield from [tile_c * a] * 2 + [delta * tile_c * a] * 3
    yield from (delta * c * BLOCK * a, delta * tile_v * a)
    yield from (rounds * tile_c * m, (rounds or s.normalizer) * tile_c * m)
    # Channel decay: factors, then q and k with theirs.
    yield from [channel * tile_d * a] * 3
    yield from (channel * blocks * s.d_pitch * a, channel * (blocks + 1) * s.d_pitch * a)
    yield from [channel * tile_d * a] * 2 + [keys * tile_d * a] * 2 + [channel * tile_d * a] * 2
    yield from [channel * rounds * tile_d * m] * 2 + [keys * rounds * tile_d * m] * 4
    yield from (channel * rows_d * a, channel * rounds * rows_d * m)
    yield from [channel * tile_d * a] * 2
    yield from [channel * rounds * tile_d * m, *[keys * rounds * tile_c * m] * 2]
    # Of a token; the first three and one line are LinearGates.
    yield from [c * a] * 3 + [64] + [c * a] * 7
    yield from [s.d_pitch * a] * 2
