"""Arithmetic and comparisons of f16, f16x2, bf16 and bf16x2 in the simulator."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from tests.ptxsim.instruction import Negated, execute
from tests.ptxsim.rounding import FORMATS, Format, edge_bits

KINDS = ["f16", "bf16"]
LANES = 2048
NAN = 0x7FFF


def operands(kind: str, count: int, seed: int = 0) -> list[np.ndarray]:
    return [edge_bits(FORMATS[kind], 10 * seed + k, LANES) for k in range(count)]


def flush(format: Format, bits: int) -> int:
    magnitude = bits & 0x7FFF
    return bits & 0x8000 if magnitude < 1 << (format.digits - 1) else bits


def combine(format: Format, name: str, bits: tuple[int, ...]) -> int:
    """a op b (op c), exact and rounded once."""
    values = [format.value(b) for b in bits]
    signs = [b >> 15 for b in bits]
    if name == "sub":
        values[1], signs[1] = -values[1], 1 - signs[1]
    if any(isinstance(v, float) for v in values):
        with np.errstate(invalid="ignore"):
            v = [
                np.float64(float(x)) if isinstance(x, float) else np.float64(x > 0) - (x < 0)
                for x in values
            ]
            # Signs of finite factors and infinities decide; the magnitudes do not matter.
            if name in ("mul", "fma"):
                v[0] = v[0] * v[1]
                v = [v[0], *v[2:]]
            total = v[0] + v[1] if len(v) == 2 else v[0]
        return NAN if math.isnan(total) else format.infinity | (0x8000 if total < 0 else 0)
    if name in ("mul", "fma"):
        product, sign = values[0] * values[1], signs[0] ^ signs[1]
        if name == "mul":
            return format.round(product, zero_sign=sign)
        exact, zero = product + values[2], sign & signs[2] if product == 0 == values[2] else 0
        return format.round(exact, zero_sign=zero)
    exact = values[0] + values[1]
    zero = signs[0] & signs[1] if values[0] == 0 == values[1] else 0
    return format.round(exact, zero_sign=zero)


def saturate(format: Format, bits: int) -> int:
    value = format.value(bits)
    if math.isnan(value):
        return 0
    return 0 if value <= 0 else bits if value < 1 else format.round(Fraction(1))


ARITHMETIC = [
    (name, rounding, modifier, kind)
    for kind in KINDS
    for name in ("add", "sub", "mul", "fma")
    for modifier in ("", ".ftz", ".sat", ".ftz.sat", ".relu")
    for rounding in (".rn",)
    if not (kind == "bf16" and modifier not in ("", ".relu"))
    and not (modifier == ".relu" and name != "fma")
]


@pytest.mark.parametrize(("name", "rounding", "modifier", "kind"), ARITHMETIC)
def test_arithmetic(name: str, rounding: str, modifier: str, kind: str) -> None:
    format = FORMATS[kind]
    sources = operands(kind, 3 if name == "fma" else 2)
    got = execute(f"{name}{rounding}{modifier}.{kind}", ["b16"], *sources)[0]
    ftz = ".ftz" in modifier
    for lane, bits in enumerate(zip(*(s.tolist() for s in sources), strict=True)):
        if ftz:
            bits = tuple(flush(format, b) for b in bits)
        expected = combine(format, name, bits)
        if ftz:
            expected = flush(format, expected)
        if ".sat" in modifier:
            expected = saturate(format, expected)
        if ".relu" in modifier and expected & 0x8000:
            expected = 0
        assert got[lane] == expected, [hex(b) for b in (*bits, got[lane], expected)]


def test_fma_rounds_once() -> None:
    """Where rounding the sum to float first would give another half."""
    # 1.001 (in units of 2^-10) squared, beside an addend far below a tie of the product's half.
    cases = {
        "f16": (0x3C01, 0x3C20, 0x0001),  # product on a tie of f16, the addend decides
        "bf16": (0x3F81, 0x3FC0, 0x0001),
    }
    for kind, bits in cases.items():
        format = FORMATS[kind]
        for sign in (0, 0x8000):
            a, b, c = bits[0], bits[1], bits[2] | sign
            sources = [np.full(32, v, np.uint16) for v in (a, b, c)]
            got = execute(f"fma.rn.{kind}", ["b16"], *sources)[0]
            assert got[0] == combine(format, "fma", (a, b, c))
        # The two signs of the addend give different results: it is not lost.
    a, b = (Fraction(FORMATS["bf16"].value(v)) for v in cases["bf16"][:2])
    assert FORMATS["bf16"].round(a * b + Fraction(1, 2**140)) != FORMATS["bf16"].round(
        a * b - Fraction(1, 2**140)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma.rn", "min", "max", "neg", "abs"])
def test_packed_is_both_halves(name: str, kind: str) -> None:
    count = {"fma.rn": 3, "neg": 1, "abs": 1}.get(name, 2)
    low, high = operands(kind, count, 1), operands(kind, count, 2)
    packed = [a | b.astype(np.uint32) << 16 for a, b in zip(low, high, strict=True)]
    got = execute(f"{name}.{kind}x2", ["b32"], *packed)[0]
    assert np.array_equal(got & 0xFFFF, execute(f"{name}.{kind}", ["b16"], *low)[0])
    assert np.array_equal(got >> 16, execute(f"{name}.{kind}", ["b16"], *high)[0])


EXTREMA = [
    (name + modifier, kind)
    for kind in KINDS
    for name in ("min", "max")
    for modifier in ("", ".NaN", ".xorsign.abs", ".NaN.xorsign.abs", ".ftz")
    if not (kind == "bf16" and modifier == ".ftz")
]


@pytest.mark.parametrize(("name", "kind"), EXTREMA)
def test_extrema(name: str, kind: str) -> None:
    format = FORMATS[kind]
    a, b = operands(kind, 2, 3)
    a[:2], b[:2] = (0, 0x8000), (0x8000, 0)
    got = execute(f"{name}.{kind}", ["b16"], a, b)[0]
    for lane, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        if ".ftz" in name:
            x, y = flush(format, x), flush(format, y)
        sign = (x ^ y) & 0x8000 if "xorsign" in name else 0
        if "xorsign" in name:
            x, y = x & 0x7FFF, y & 0x7FFF
        nans = [math.isnan(format.value(v)) for v in (x, y)]
        if all(nans) or (any(nans) and ".NaN" in name):
            expected = NAN
        elif any(nans):
            expected = (y if nans[0] else x) | sign
        else:
            # -0 is below +0.
            key = [(format.value(v), not v >> 15) for v in (x, y)]
            first = key[0] < key[1] if name.startswith("min") else key[0] > key[1]
            expected = (x if first else y) | sign
        assert got[lane] == expected, [hex(v) for v in (x, y, got[lane], expected)]


@pytest.mark.parametrize("kind", KINDS)
def test_signs(kind: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(execute(f"neg.{kind}", ["b16"], bits)[0], bits ^ 0x8000)
    assert np.array_equal(execute(f"abs.{kind}", ["b16"], bits)[0], bits & 0x7FFF)
    flushed = [flush(FORMATS["f16"], int(b)) ^ 0x8000 for b in bits]
    assert np.array_equal(execute("neg.ftz.f16", ["b16"], bits)[0], flushed)


ORDERED: dict[str, Callable[[float, float], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt,
    "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


def compare(relation: str, x: float, y: float) -> bool:
    unordered = math.isnan(x) or math.isnan(y)
    if relation in ("num", "nan"):
        return unordered == (relation == "nan")
    if relation in ORDERED:
        return ORDERED[relation](x, y) and not unordered
    return ORDERED[relation[:-1]](x, y) or unordered


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relation", [*ORDERED, *(r + "u" for r in ORDERED), "num", "nan"])
def test_comparisons(relation: str, kind: str) -> None:
    format = FORMATS[kind]
    a, b = operands(kind, 2, 4)
    b[::5] = a[::5]
    c = np.arange(LANES) % 3 == 0
    x, y = ([float(format.value(v)) for v in s.tolist()] for s in (a, b))
    holds = np.array([compare(relation, *pair) for pair in zip(x, y, strict=True)])
    assert 0 < holds.sum() < LANES

    got = execute(f"setp.{relation}.{kind}", ["pred"], a, b)[0]
    assert np.array_equal(got, holds)
    boolean = {"and": np.logical_and, "or": np.logical_or, "xor": np.not_equal}
    for name, function in boolean.items():
        got = execute(f"setp.{relation}.{name}.{kind}", ["pred"], a, b, c)[0]
        assert np.array_equal(got, function(holds, c))
        got = execute(f"setp.{relation}.{name}.{kind}", ["pred"], a, b, Negated(c))[0]
        assert np.array_equal(got, function(holds, ~c))

    one = 0x3C00 if kind == "f16" else 0x3F80
    truths = [(kind, "b16", one), ("u32", "b32", 2**32 - 1), ("u16", "b16", 0xFFFF)]
    for result, bits, true in truths:
        got = execute(f"set.{relation}.{result}.{kind}", [bits], a, b)[0]
        assert np.array_equal(got, np.where(holds, true, 0))

    # Packed: the upper halves swapped, so that both predicates are told apart.
    packed = a.astype(np.uint32) | b.astype(np.uint32) << 16
    swapped = b.astype(np.uint32) | a.astype(np.uint32) << 16
    upper = np.array([compare(relation, *pair) for pair in zip(y, x, strict=True)])
    p, q = execute(f"setp.{relation}.{kind}x2", ["pred", "pred"], packed, swapped, pair=True)
    assert np.array_equal(p, holds) and np.array_equal(q, upper)
    got = execute(f"set.{relation}.{kind}x2.{kind}x2", ["b32"], packed, swapped)[0]
    assert np.array_equal(got, np.where(holds, one, 0) | np.where(upper, one, 0) << 16)
    got = execute(f"set.{relation}.u32.{kind}x2", ["b32"], packed, swapped)[0]
    assert np.array_equal(got, np.where(holds, 0xFFFF, 0) | np.where(upper, 0xFFFF, 0) << 16)


def test_flushed_comparison() -> None:
    a, b = (np.full(32, v, np.uint16) for v in (0x0001, 0x8003))
    assert execute("setp.eq.ftz.f16", ["pred"], a, b)[0].all()
    assert not execute("setp.eq.f16", ["pred"], a, b)[0].any()


@pytest.mark.parametrize(
    "opcode", ["add.rz.f16", "mul.relu.f16", "fma.rn.oob.f16", "max.sat.f16", "setp.zz.f16"]
)
def test_unknown_forms(opcode: str) -> None:
    sources = operands("f16", 3 if opcode.startswith("fma") else 2)
    with pytest.raises(Exception, match="modifier|comparison"):
        execute(opcode, ["pred" if opcode.startswith("setp") else "b16"], *sources)
