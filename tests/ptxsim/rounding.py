"""Rounding to narrow floats in exact arithmetic: the reference of the simulator's tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Format:
    """`digits` of the significand with the hidden one, of `width` bits in all."""

    digits: int
    width: int

    @property
    def bias(self) -> int:
        return int(2 ** (self.width - self.digits - 1) - 1)

    @property
    def infinity(self) -> int:
        return ((1 << (self.width - self.digits)) - 1) << (self.digits - 1)

    def value(self, bits: int) -> Fraction | float:
        """What the bits stand for; a float if it is infinite or NaN."""
        sign = -1 if bits >> (self.width - 1) else 1
        magnitude = bits & ((1 << (self.width - 1)) - 1)
        if magnitude >= self.infinity:
            return sign * math.inf if magnitude == self.infinity else math.nan
        fraction = magnitude & ((1 << (self.digits - 1)) - 1)
        exponent = magnitude >> (self.digits - 1)
        if exponent:
            fraction |= 1 << (self.digits - 1)
        power = max(exponent, 1) - self.bias - (self.digits - 1)
        return sign * fraction * Fraction(2) ** power

    def round(self, x: Fraction, mode: str = "rn", zero_sign: int = 0) -> int:
        """The bits of x rounded once. `zero_sign` is the sign bit of an exact zero."""
        top = 1 << (self.width - 1)
        if x == 0:
            return top if zero_sign else 0
        sign, x = (top, -x) if x < 0 else (0, x)
        least = 1 - self.bias  # the exponent of the smallest normal value
        exponent = x.numerator.bit_length() - x.denominator.bit_length()
        exponent -= x < Fraction(2) ** exponent
        exponent = max(exponent, least)
        units = x / Fraction(2) ** (exponent - self.digits + 1)
        whole = math.floor(units)
        rest = units - whole
        # The hidden one of a normal value counts into the exponent's bits.
        low = (exponent - least << self.digits - 1) + whole
        if low >= self.infinity:
            low, rest = self.infinity - 1, Fraction(1)
        if rest == 0:
            up = False
        elif mode == "rn":
            up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1)
        elif mode == "rna":
            up = rest >= Fraction(1, 2)
        else:
            up = mode == "rp" and not sign or mode == "rm" and bool(sign)
        overflow = low == self.infinity - 1 and rest >= 1
        if overflow and mode in ("rz", "rp", "rm"):
            up = mode == "rp" and not sign or mode == "rm" and bool(sign)
        return sign | (low + up)


F16 = Format(11, 16)
BF16 = Format(8, 16)
F32 = Format(24, 32)
F64 = Format(53, 64)
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}


def edge_bits(format: Format, seed: int, count: int) -> np.ndarray:
    """Bits of zeros, subnormals, the largest values, infinities, NaN, and random ones."""
    top = 1 << (format.width - 1)
    one = format.bias << (format.digits - 1)
    least = 1 << (format.digits - 1)
    edges = [0, 1, 2, least - 1, least, least + 1, one - 1, one, one + 1, one + 3]
    edges += [format.infinity - 1, format.infinity, format.infinity + 1]
    both = [e | s for e in edges for s in (0, top)]
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << format.width, count, dtype=np.uint64, endpoint=False)
    # Half of them near one another in magnitude, so that sums cancel and ties happen.
    near = one + rng.integers(-8 * least, 8 * least, count)
    signs = rng.integers(0, 2, count).astype(np.uint64) * np.uint64(top)
    bits = np.where(rng.random(count) < 0.5, bits, near.astype(np.uint64) | signs)
    bits[: len(both)] = both
    return rng.permutation(bits).astype(f"u{format.width // 8}")
