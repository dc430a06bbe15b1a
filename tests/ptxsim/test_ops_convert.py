"""cvt of the simulator, against exact arithmetic, numpy and torch."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptxsim.instruction import execute
from tests.ptxsim.rounding import FORMATS, Format, edge_bits

INTEGERS = ["u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64"]
FLOATS = ["f16", "bf16", "f32", "f64"]
LANES = 1024
NANS = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}


def width(kind: str) -> int:
    return int(kind.lstrip("usbft"))


def register(kind: str) -> str:
    """The kind of register that holds a type: there are none of 8 bits."""
    return f"b{max(16, width(kind))}"


def illegal(one: str, other: str) -> bool:
    """bf16 wants registers of exactly its operands: none has 8 bits."""
    return "bf16" in (one, other) and 8 in (width(one), width(other))


def limits(kind: str) -> tuple[int, int]:
    bits = width(kind)
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def integers(kind: str, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """Register contents, with garbage above 8-bit types, and the values that they stand for."""
    low, high = limits(kind)
    rng = np.random.default_rng(seed)
    edges = [low, low + 1, high, high - 1, 0, 1, 127, 128, 255, 256, 32767, 32768, 65535, 65536,
             2**24 + 1, 2**24 + 3, 2**25 + 2, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**53 + 3,
             2**63 - 1, 2**63, 65519, 65520, 2049, 2051]  # fmt: skip
    edges += [-e for e in edges]
    values = [e for e in edges if low <= e <= high]
    # Of all magnitudes.
    shift = rng.integers(64 - width(kind), 64, LANES - len(values)).astype(np.uint64)
    random = rng.integers(0, 2**64, len(shift), dtype=np.uint64) >> shift
    values += [wrap(kind, v) for v in random.tolist()]
    size = int(register(kind)[1:])
    bits = [v & ((1 << width(kind)) - 1) for v in values]
    if width(kind) == 8:
        bits = [b | int(g) << 8 for b, g in zip(bits, rng.integers(0, 256, LANES), strict=True)]
    return np.array(bits, dtype=f"u{size // 8}"), values


def stored(kind: str, value: int) -> int:
    """What the register holds: .s8 is extended to the register."""
    return value & ((1 << int(register(kind)[1:])) - 1)


def wrap(kind: str, value: int) -> int:
    low, _ = limits(kind)
    return (value - low) % (1 << width(kind)) + low


@pytest.mark.parametrize("source", INTEGERS)
def test_integers(source: str) -> None:
    bits, values = integers(source)
    for target in INTEGERS:
        got = execute(f"cvt.{target}.{source}", [register(target)], bits)[0]
        assert got.tolist() == [stored(target, wrap(target, v)) for v in values], target
        low, high = limits(target)
        if low <= limits(source)[0] and limits(source)[1] <= high:
            continue  # nothing to saturate: not legal
        got = execute(f"cvt.sat.{target}.{source}", [register(target)], bits)[0]
        assert got.tolist() == [stored(target, min(max(v, low), high)) for v in values], target


def test_wider_registers() -> None:
    """Sources are cut to their type; signed results are extended to their register, others not."""
    bits, values = integers("s64", 9)
    for target, to in [("s8", 32), ("s8", 64), ("s16", 32), ("s16", 64), ("s32", 64), ("u8", 32)]:
        for source in ("s8", "u16", "s32"):
            got = execute(f"cvt.{target}.{source}", [f"b{to}"], bits)[0]
            expected = [wrap(target, wrap(source, v)) % (1 << to) for v in values]
            assert got.tolist() == expected, (target, to, source)
    x = np.resize(np.array([-3.0, 200.0, -1000.0, np.nan], np.float32), 32)
    got = execute("cvt.rni.s8.f32", ["b32"], x)[0]
    assert got[:4].view(np.int32).tolist() == [-3, 127, -128, 0]


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("source", INTEGERS)
def test_integer_to_float(source: str, mode: str) -> None:
    bits, values = integers(source, 1)
    for target in FLOATS:
        if illegal(target, source):
            continue
        format = FORMATS[target]
        got = execute(f"cvt.{mode}.{target}.{source}", [register(target)], bits)[0]
        expected = [format.round(Fraction(v), mode) for v in values]
        assert got.tolist() == expected, target


ROUND = {
    "rni": lambda x: round(x),  # ties to even
    "rzi": lambda x: math.trunc(x),
    "rmi": lambda x: math.floor(x),
    "rpi": lambda x: math.ceil(x),
}


def floats_near_integers(kind: str, seed: int) -> tuple[np.ndarray, list[Fraction | float]]:
    format = FORMATS[kind]
    bits = edge_bits(format, seed, LANES)
    rng = np.random.default_rng(seed)
    for lane in range(0, LANES, 2):  # halves, and the ends of the integers' ranges
        x = Fraction(int(rng.integers(-600, 600)), 2)
        if lane % 8 == 0:
            x = Fraction(2) ** int(rng.choice([7, 8, 15, 16, 31, 32, 63, 64])) * rng.choice([1, -1])
            x += rng.choice([0, 1, -1])
        bits[lane] = format.round(x)
    return bits, [format.value(int(b)) for b in bits]


@pytest.mark.parametrize("mode", ROUND)
@pytest.mark.parametrize("source", FLOATS)
def test_float_to_integer(source: str, mode: str) -> None:
    bits, values = floats_near_integers(source, 2)
    for target in INTEGERS:
        if illegal(target, source):
            continue
        low, high = limits(target)
        got = execute(f"cvt.{mode}.{target}.{source}", [register(target)], bits)[0]
        for lane, x in enumerate(values):
            if isinstance(x, Fraction):
                expected = min(max(ROUND[mode](x), low), high)
            elif math.isnan(x):
                zero = source != "f64" and width(target) < 64
                expected = 0 if zero else wrap(target, 1 << width(target) - 1)
            else:
                expected = low if x < 0 else high
            assert got[lane] == stored(target, expected), (target, x)


@pytest.mark.parametrize("mode", ROUND)
@pytest.mark.parametrize("kind", FLOATS)
def test_round_to_integral_float(kind: str, mode: str) -> None:
    format = FORMATS[kind]
    bits, values = floats_near_integers(kind, 3)
    got = execute(f"cvt.{mode}.{kind}.{kind}", [register(kind)], bits)[0]
    for lane, x in enumerate(values):
        if isinstance(x, Fraction):
            sign = int(bits[lane]) >> (format.width - 1)
            expected = format.round(Fraction(ROUND[mode](x)), zero_sign=sign)
        else:
            expected = NANS[kind] if math.isnan(x) else int(bits[lane])
        assert got[lane] == expected, x


def narrowed(format: Format, kind: str, bits: int, source: str, mode: str) -> int:
    x = FORMATS[source].value(bits)
    sign = bits >> (FORMATS[source].width - 1)
    if isinstance(x, Fraction):
        return format.round(x, mode, zero_sign=sign)
    return NANS[kind] if math.isnan(x) else format.infinity | sign << (format.width - 1)


@pytest.mark.parametrize(("target", "source"), list(itertools.permutations(FLOATS, 2)))
def test_float_to_float(target: str, source: str) -> None:
    format = FORMATS[target]
    bits = edge_bits(FORMATS[source], 4, LANES)
    # Close to ties of the target.
    for lane in range(0, LANES, 4):
        x = FORMATS[target].value(int(edge_bits(format, 5, 64)[lane % 64]) & ~1 | 1)
        if isinstance(x, Fraction):
            unit = abs(x) / 2**format.digits
            bits[lane] = FORMATS[source].round(x + unit * Fraction(lane % 3 - 1, 2))
    exact = FORMATS[source].width < format.width
    for mode in [""] if exact else ["rn", "rz", "rm", "rp"]:
        opcode = f"cvt.{mode}.{target}.{source}".replace("..", ".")
        got = execute(opcode, [register(target)], bits)[0]
        expected = [narrowed(format, target, b, source, mode or "rn") for b in bits.tolist()]
        assert got.tolist() == expected, opcode


def test_all_halves_widen() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    for kind, wide in [
        ("f16", bits.view(np.float16).astype(np.float32)),
        ("bf16", torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()),
    ]:
        expected = np.where(np.isnan(wide), NANS["f32"], wide.view(np.uint32))
        assert np.array_equal(execute(f"cvt.f32.{kind}", ["b32"], bits)[0], expected)


@pytest.fixture(scope="module")
def f32_bits() -> np.ndarray:
    """Random and special f32 of all magnitudes."""
    bits = edge_bits(FORMATS["f32"], 6, 8192)
    bits[::2] = np.random.default_rng(7).normal(size=4096).astype(np.float32).view(np.uint32)
    return bits


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_packed_halves(kind: str, dtype: torch.dtype, f32_bits: np.ndarray) -> None:
    """The first source is the upper half; as torch rounds."""
    a, b = f32_bits, f32_bits[::-1].copy()

    def cast(bits: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(bits.view(np.float32))
        half = x.to(dtype).view(torch.int16).numpy().view(np.uint16)
        return np.where(np.isnan(bits.view(np.float32)), NANS[kind], half).astype(np.uint32)

    assert np.array_equal(execute(f"cvt.rn.{kind}.f32", ["b16"], a)[0], cast(a))
    got = execute(f"cvt.rn.{kind}x2.f32", ["b32"], a, b)[0]
    assert np.array_equal(got, cast(a) << 16 | cast(b))
    for form in ["rz", "rn.relu", "rn.satfinite", "rz.relu.satfinite"]:
        upper, lower = (execute(f"cvt.{form}.{kind}.f32", ["b16"], s)[0] for s in (a, b))
        got = execute(f"cvt.{form}.{kind}x2.f32", ["b32"], a, b)[0]
        assert np.array_equal(got, upper.astype(np.uint32) << 16 | lower), form


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_relu_and_satfinite(kind: str, f32_bits: np.ndarray) -> None:
    format = FORMATS[kind]
    plain = execute(f"cvt.rn.{kind}.f32", ["b16"], f32_bits)[0]
    negative = (plain & 0x8000) != 0
    got = execute(f"cvt.rn.relu.{kind}.f32", ["b16"], f32_bits)[0]
    assert np.array_equal(got, np.where(negative, 0, plain))
    infinite = (plain & 0x7FFF) == format.infinity
    assert infinite.any()
    got = execute(f"cvt.rn.satfinite.{kind}.f32", ["b16"], f32_bits)[0]
    assert np.array_equal(got, np.where(infinite, plain - 1, plain))


def test_saturation_to_one(f32_bits: np.ndarray) -> None:
    x = f32_bits.view(np.float32)
    clipped = np.where(x > 0, np.minimum(x, 1), np.float32(0)).astype(np.float32)
    got = execute("cvt.sat.f32.f32", ["b32"], f32_bits)[0]
    assert np.array_equal(got, clipped.view(np.uint32))
    got = execute("cvt.rn.sat.f16.f32", ["b16"], f32_bits)[0]
    assert np.array_equal(got, clipped.astype(np.float16).view(np.uint16))


def test_flush(f32_bits: np.ndarray) -> None:
    subnormal = (f32_bits & 0x7F800000) == 0
    assert subnormal.sum() > 4
    flushed = np.where(subnormal, f32_bits & 0x80000000, f32_bits)
    number = ~np.isnan(f32_bits.view(np.float32))
    got = execute("cvt.ftz.f32.f32", ["b32"], f32_bits)[0]
    assert np.array_equal(got[number], flushed[number])
    got = execute("cvt.rpi.ftz.s32.f32", ["b32"], f32_bits)[0]
    assert (got[subnormal] == 0).all()
    assert (execute("cvt.rpi.s32.f32", ["b32"], f32_bits)[0][subnormal] == 1).any()
    wide = np.full(32, 1e-40)
    assert (execute("cvt.rn.ftz.f32.f64", ["b32"], wide)[0] == 0).all()
    assert (execute("cvt.rn.f32.f64", ["b32"], wide)[0] == np.float32(1e-40).view(np.uint32)).all()
    # Halves that are subnormal are normal as f32.
    half = np.full(32, 1, np.uint16)
    assert (execute("cvt.ftz.f32.f16", ["b32"], half)[0].view(np.float32) == 2**-24).all()


def test_tf32(f32_bits: np.ndarray) -> None:
    number = ~np.isnan(f32_bits.view(np.float32))
    bits, finite = f32_bits[number], np.isfinite(f32_bits.view(np.float32))[number]
    bits = np.resize(bits, 8192)
    finite = np.resize(finite, 8192)
    away = np.where(finite, (bits + 0x1000) & 0xFFFFE000, bits)
    even = np.where(finite, (bits + 0xFFF + (bits >> 13 & 1)) & 0xFFFFE000, bits)
    zero = np.where(finite, bits & 0xFFFFE000, bits)
    for mode, expected in [("rna", away), ("rn", even), ("rz", zero)]:
        got = execute(f"cvt.{mode}.tf32.f32", ["b32"], bits.astype(np.uint32))[0]
        assert np.array_equal(got, expected), mode
    got = execute("cvt.rn.relu.tf32.f32", ["b32"], bits.astype(np.uint32))[0]
    assert np.array_equal(got, np.where(bits >> 31, 0, even))
    nan = execute("cvt.rna.tf32.f32", ["b32"], np.full(32, 0xFFC00001, np.uint32))[0]
    assert np.isnan(nan.view(np.float32)).all()


EIGHTS = [("e4m3", torch.float8_e4m3fn, 448.0), ("e5m2", torch.float8_e5m2, 57344.0)]


@pytest.mark.parametrize(("kind", "dtype", "largest"), EIGHTS)
def test_eight_bit_floats(
    kind: str, dtype: torch.dtype, largest: float, f32_bits: np.ndarray
) -> None:
    def cast(x: np.ndarray, relu: bool = False) -> np.ndarray:
        t = torch.from_numpy(x.astype(np.float32)).clamp(0 if relu else -largest, largest)
        bits = t.to(dtype).view(torch.uint8).numpy()
        bits = np.where(relu & (bits == 0x80), 0, bits)
        return np.where(np.isnan(x), 0x7F, bits).astype(np.uint16)

    x = f32_bits.view(np.float32).copy()
    x[::2] *= np.float32(2.0) ** np.random.default_rng(8).integers(-16, 12, 4096).astype(np.float32)
    y = x[::-1].copy()
    with np.errstate(over="ignore"):
        for form, relu in [("rn.satfinite", False), ("rn.satfinite.relu", True)]:
            got = execute(f"cvt.{form}.{kind}x2.f32", ["b16"], x, y)[0]
            assert np.array_equal(got, cast(x, relu) << 8 | cast(y, relu))
        low, high = x.astype(np.float16), y.astype(np.float16)
    packed = low.view(np.uint16) | high.view(np.uint16).astype(np.uint32) << 16
    got = execute(f"cvt.rn.satfinite.{kind}x2.f16x2", ["b16"], packed)[0]
    assert np.array_equal(got, cast(high) << 8 | cast(low))

    every = np.arange(65536, dtype=np.uint16)
    halves = torch.arange(256, dtype=torch.uint8).view(dtype).half().view(torch.int16).numpy()
    halves = halves.view(np.uint16).astype(np.uint32)
    halves[np.isnan(halves.astype(np.uint16).view(np.float16))] = 0x7FFF
    got = execute(f"cvt.rn.f16x2.{kind}x2", ["b32"], every)[0]
    assert np.array_equal(got, halves[every & 0xFF] | halves[every >> 8] << 16)


@pytest.mark.parametrize(
    ("opcode", "reason"),
    [
        ("cvt.s32.f32", "needs .rni"),
        ("cvt.rn.s32.f32", "needs .rni"),
        ("cvt.f32.s32", "needs a rounding"),
        ("cvt.f16.f32", "needs a rounding"),
        ("cvt.rn.f32.f16", "no rounding"),
        ("cvt.rzi.f32.s32", "cannot round"),
        ("cvt.rna.f16.f32", "rna"),
        ("cvt.rn.ftz.f16.f64", "modifier .ftz"),
        ("cvt.rn.e4m3x2.f16x2", "satfinite"),
        ("cvt.rn.f16x2.s32", "types"),
        ("cvt.rn.f32.e4m3", "types"),
        ("cvt.pack.sat.s8.s32", "modifier .pack"),
    ],
)
def test_unknown_forms(opcode: str, reason: str) -> None:
    source = opcode.split(".")[-1]
    size = {"f64": 8, "f16": 2, "e4m3": 2}.get(source, 4)
    bits = np.zeros(32, f"u{size}")
    with pytest.raises(Exception, match=reason):
        execute(opcode, ["b16" if "f16.f" in opcode or "e4m3x2" in opcode else "b32"], bits)


def test_every_pair_of_scalar_types_is_known() -> None:
    """No pair falls through to a missing case: the modes that PTX demands make it decode."""
    for target, source in itertools.product(INTEGERS + FLOATS, INTEGERS + FLOATS):
        if illegal(target, source):
            continue
        mode = ""
        if target in FLOATS and source in INTEGERS:
            mode = "rn."
        elif target in INTEGERS and source in FLOATS:
            mode = "rzi."
        elif target in FLOATS and target != source and width(target) <= width(source):
            mode = "rn."
        bits = np.zeros(32, f"u{int(register(source)[1:]) // 8}")
        got = execute(f"cvt.{mode}{target}.{source}", [register(target)], bits)[0]
        assert not got.any()
