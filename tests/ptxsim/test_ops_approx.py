"""ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh and div of the simulator."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.ptxsim.instruction import execute

F32 = np.float32
INF, NAN = np.inf, np.nan


def floats(seed: int, low: float, high: float, lanes: int = 8192) -> np.ndarray:
    """Uniform in the exponent between two positive numbers."""
    rng = np.random.default_rng(seed)
    return np.exp2(rng.uniform(math.log2(low), math.log2(high), lanes)).astype(F32)


def signed(x: np.ndarray) -> np.ndarray:
    return x * np.where(np.arange(len(x)) % 2, -1, 1).astype(F32)


def result(opcode: str, *sources: np.ndarray, seed: int = 0) -> np.ndarray:
    return execute(opcode, ["b32"], *sources, seed=seed)[0].view(F32)


def ulps(y: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """How many floats y is away from the correctly rounded result."""
    nearest = exact.astype(F32)
    assert np.array_equal(np.signbit(y), np.signbit(nearest))
    return (y.view(np.int32) - nearest.view(np.int32)).astype(np.int64)


def relative(y: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return (y.astype(np.float64) - exact) / exact


def absolute(y: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return y.astype(np.float64) - exact


Error = Callable[[np.ndarray, np.ndarray], np.ndarray]
CASES: list[tuple[str, np.ndarray, Callable[[np.ndarray], np.ndarray], Error, float]] = [
    ("ex2.approx.f32", signed(floats(1, 2**-20, 126)), np.exp2, ulps, 2),
    ("ex2.approx.ftz.f32", signed(floats(2, 2**-20, 125)), np.exp2, ulps, 2),
    ("ex2.approx.f32", -floats(3, 127, 140), np.exp2, ulps, 2),
    ("rcp.approx.f32", signed(floats(4, 2**-126, 2**126)), np.reciprocal, ulps, 1),
    ("rcp.approx.ftz.f32", signed(floats(5, 2**-125, 2**125)), np.reciprocal, ulps, 1),
    ("lg2.approx.f32", floats(6, 0.501, 1.99), np.log2, absolute, 2**-22),
    ("lg2.approx.f32", floats(7, 2, 2**127), np.log2, relative, 2**-22),
    ("lg2.approx.ftz.f32", floats(8, 2**-126, 0.5), np.log2, relative, 2**-22),
    ("lg2.approx.f32", floats(9, 2**-148, 2**-127), np.log2, relative, 2**-22),
    ("sqrt.approx.f32", floats(10, 2**-140, 2**127), np.sqrt, relative, 2**-23),
    ("sqrt.approx.ftz.f32", floats(11, 2**-126, 2**127), np.sqrt, relative, 2**-23),
    ("rsqrt.approx.f32", floats(12, 2**-140, 2**127), lambda x: x**-0.5, relative, 2**-22.9),
    ("rsqrt.approx.ftz.f32", floats(13, 2**-126, 2**127), lambda x: x**-0.5, relative, 2**-22.9),
    ("sin.approx.f32", signed(floats(14, 2**-8, 6.28)), np.sin, absolute, 2**-20.5),
    ("sin.approx.ftz.f32", signed(floats(15, 6.3, 314)), np.sin, absolute, 2**-14.7),
    ("cos.approx.f32", signed(floats(16, 2**-8, 6.28)), np.cos, absolute, 2**-20.5),
    ("cos.approx.ftz.f32", signed(floats(17, 6.3, 314)), np.cos, absolute, 2**-14.7),
    ("tanh.approx.f32", signed(floats(18, 2**-120, 20)), np.tanh, relative, 2**-11),
]


@pytest.mark.parametrize(("opcode", "x", "function", "error", "bound"), CASES)
def test_error_fills_the_bound(
    opcode: str, x: np.ndarray, function: Callable, error: Error, bound: float
) -> None:
    exact = function(x.astype(np.float64))
    y = result(opcode, x)
    distance = error(y, exact)
    slack = 1 + 1e-6  # the reference is rounded too
    assert np.abs(distance).max() <= bound * slack
    # Both directions, and most of the way: a result that is merely rounded would not do.
    assert distance.min() <= -0.5 * bound
    assert distance.max() >= (0.4 if "tanh" in opcode else 0.5) * bound


def test_seeds_decide_the_error() -> None:
    x = signed(floats(20, 0.01, 100))
    first, again, other = (result("ex2.approx.f32", x, seed=s) for s in (5, 5, 6))
    assert np.array_equal(first, again)
    assert (first != other).mean() > 0.5


SPECIAL = [
    ("ex2.approx.f32", [(-INF, 0.0), (-0.0, 1), (0.0, 1), (INF, INF), (-200, 0.0), (128, INF)]),
    ("ex2.approx.ftz.f32", [(1e-40, 1), (-1e-40, 1), (-127, 0.0), (-INF, 0.0), (INF, INF)]),
    ("lg2.approx.f32", [(-INF, NAN), (-1, NAN), (-0.0, -INF), (0.0, -INF), (INF, INF)]),
    ("lg2.approx.ftz.f32", [(1e-40, -INF), (-1e-40, -INF)]),
    ("rcp.approx.f32", [(-INF, -0.0), (-0.0, -INF), (0.0, INF), (INF, 0.0)]),
    ("rcp.approx.ftz.f32", [(1e-40, INF), (-1e-40, -INF), (2.0**127, 0.0), (-(2.0**127), -0.0)]),
    ("rcp.rn.f32", [(-INF, -0.0), (-0.0, -INF), (0.0, INF), (INF, 0.0)]),
    ("sqrt.approx.f32", [(-INF, NAN), (-1, NAN), (-0.0, -0.0), (0.0, 0.0), (INF, INF)]),
    ("sqrt.approx.ftz.f32", [(-1e-40, -0.0), (1e-40, 0.0)]),
    ("sqrt.rn.f32", [(-INF, NAN), (-1, NAN), (-0.0, -0.0), (0.0, 0.0), (INF, INF), (4, 2)]),
    ("rsqrt.approx.f32", [(-INF, NAN), (-1, NAN), (-0.0, -INF), (0.0, INF), (INF, 0.0)]),
    ("rsqrt.approx.ftz.f32", [(-1e-40, -INF), (1e-40, INF)]),
    ("sin.approx.f32", [(-INF, NAN), (-0.0, -0.0), (0.0, 0.0), (INF, NAN)]),
    ("cos.approx.f32", [(-INF, NAN), (-0.0, 1), (0.0, 1), (INF, NAN)]),
    ("tanh.approx.f32", [(-INF, -1), (-0.0, -0.0), (0.0, 0.0), (INF, 1), (1e-40, 1e-40)]),
]


@pytest.mark.parametrize(("opcode", "table"), SPECIAL)
def test_special_values(opcode: str, table: list[tuple[float, float]]) -> None:
    x, expected = (np.array(column, F32) for column in zip(*[*table, (NAN, NAN)], strict=True))
    for seed in range(3):
        y = result(opcode, np.resize(x, 32), seed=seed)[: len(x)]
        bits = np.where(np.isnan(expected), 0x7FFFFFFF, expected.view(np.uint32))
        assert np.array_equal(y.view(np.uint32), bits), (x, y)


def directed(exact: np.ndarray, mode: str) -> np.ndarray:
    """A double rounded to f32."""
    y = exact.astype(F32)
    up = np.nextafter(y, F32(INF))
    down = np.nextafter(y, F32(-INF))
    wide = y.astype(np.float64)
    if mode == "rz":
        return np.where(np.abs(wide) > np.abs(exact), np.where(exact > 0, down, up), y)
    if mode == "rm":
        return np.where(wide > exact, down, y)
    if mode == "rp":
        return np.where(wide < exact, up, y)
    return y


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_ieee_results(mode: str) -> None:
    x = signed(floats(30, 2**-140, 2**125))
    y = signed(floats(31, 2**-60, 2**60))[::-1].copy()
    wide = x.astype(np.float64)
    pairs = [
        (f"rcp.{mode}.f32", (x,), 1 / wide),
        (f"sqrt.{mode}.f32", (np.abs(x),), np.sqrt(np.abs(wide))),
        (f"div.{mode}.f32", (x, y), wide / y),
    ]
    for opcode, sources, exact in pairs:
        with np.errstate(over="ignore"):
            expected = directed(exact, mode)
        assert np.array_equal(result(opcode, *sources), expected), opcode


def test_doubles() -> None:
    rng = np.random.default_rng(32)
    x, y = rng.normal(size=(2, 1024))
    for opcode, sources, expected in [
        ("div.rn.f64", (x, y), x / y),
        ("rcp.rn.f64", (x,), 1 / x),
        ("sqrt.rn.f64", (np.abs(x),), np.sqrt(np.abs(x))),
    ]:
        got = execute(opcode, ["b64"], *sources)[0].view(np.float64)
        assert np.array_equal(got, expected), opcode


@pytest.mark.parametrize("opcode", ["div.approx.f32", "div.approx.ftz.f32", "div.full.f32"])
def test_division(opcode: str) -> None:
    x = signed(floats(33, 2**-50, 2**50))
    y = floats(34, 2**-50, 2**50)
    distance = ulps(result(opcode, x, y), x.astype(np.float64) / y)
    assert set(distance) == {-2, -1, 0, 1, 2}


def test_approximate_division_by_the_largest() -> None:
    x = np.resize(np.array([1.0, -3.0, INF, 2.0, NAN], F32), 32)
    y = np.resize(np.array([2.0**127, 1.5 * 2.0**126, 2.0**127, INF, 2.0**127], F32), 32)
    z = result("div.approx.f32", x, y)[:5]
    assert np.array_equal(z[[0, 1, 3]], F32([0, -0.0, 0])) and np.isnan(z[[2, 4]]).all()


def widen(bits: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaN
        if kind == "f16":
            return bits.view(np.float16).astype(np.float64)
        return (bits.astype(np.uint32) << 16).view(F32).astype(np.float64)


ALL_HALVES = np.arange(65536, dtype=np.uint16)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_ex2_of_halves(kind: str) -> None:
    opcode = "ex2.approx.f16" if kind == "f16" else "ex2.approx.ftz.bf16"
    y = execute(opcode, ["b16"], ALL_HALVES)[0]
    x, got = widen(ALL_HALVES, kind), widen(y, kind)
    smallest, largest = (2**-14, 65504) if kind == "f16" else (2**-126, 3.3e38)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.exp2(x)
        # Away from the ends, where moving a result would leave the range.
        normal = (exact >= 1.1 * smallest) & (exact <= 0.9 * largest) & (x != 0)
    error = got[normal] / exact[normal] - 1
    bound = 2**-9.9 if kind == "f16" else 2**-7
    assert bound * 0.5 < np.abs(error).max() <= bound * (1 + 1e-6)
    zero = (ALL_HALVES & 0x7FFF) == 0
    assert (got[zero] == 1).all()
    assert (y[np.isnan(x)] == 0x7FFF).all()
    assert (got[x == INF] == INF).all() and (y[x == -INF] == 0).all()
    if kind == "bf16":
        assert (y[(exact < smallest) & ~np.isnan(x)] == 0).all()  # flushed
    else:
        small = (exact < 0.9 * smallest) & (exact > 2**-23)
        assert (got[small] == exact[small].astype(np.float16)).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_tanh_of_halves(kind: str) -> None:
    y = execute(f"tanh.approx.{kind}", ["b16"], ALL_HALVES)[0]
    x, got = widen(ALL_HALVES, kind), widen(y, kind)
    number = ~np.isnan(x)
    error = np.abs(got - np.tanh(x))[number]
    bound = 2**-10.987 if kind == "f16" else 2**-8
    assert bound * 0.5 < error.max() <= bound
    assert np.array_equal(np.signbit(got)[number], np.signbit(x)[number])
    assert np.abs(got[number]).max() == 1
    assert (y[~number] == 0x7FFF).all()
    assert (np.abs(got[np.isinf(x)]) == 1).all() and (got[x == 0] == 0).all()


@pytest.mark.parametrize("opcode", ["ex2.approx.f16x2", "tanh.approx.bf16x2"])
def test_packed_halves_are_independent(opcode: str) -> None:
    function = np.exp2 if opcode.startswith("ex2") else np.tanh
    kind = opcode.split(".")[-1][:-2]
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    low = torch.linspace(-2, 2, 256).to(dtype).view(torch.int16).numpy().view(np.uint16)
    high = low[::-1].copy()
    packed = low.astype(np.uint32) | high.astype(np.uint32) << 16
    y = execute(opcode, ["b32"], packed)[0]
    for part, source in [(y & 0xFFFF, low), (y >> 16, high)]:
        exact = function(widen(source, kind))
        assert np.abs(widen(part.astype(np.uint16), kind) - exact).max() < 2**-7 * 4
        assert (widen(part.astype(np.uint16), kind) != exact).any()


@pytest.mark.parametrize(
    ("opcode", "reason"),
    [
        ("ex2.f32", "neither .approx nor known"),
        ("ex2.approx.f64", "type"),
        ("rcp.f32", "rounding"),
        ("tanh.approx.sat.f32", "modifier .sat"),
        ("sqrt.rz.f64", "only .rn"),
    ],
)
def test_unknown_forms(opcode: str, reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        execute(opcode, ["b64" if "64" in opcode else "b32"], floats(1, 1, 2, 32))
