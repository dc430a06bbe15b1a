"""f32 and f64 arithmetic against numpy (round to nearest) and exact fractions (other roundings)."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.ptxsim.instruction import HEAD, Bits, execute, launch
from tests.ptxsim.rounding import Format

LANES = 512
KINDS = {"f32": np.float32, "f64": np.float64}
FORMATS = {"f32": Format(24, 32), "f64": Format(53, 64)}
NAN = 0x7FFFFFFF


def values(kind: str, seed: int) -> Bits:
    """Bits of random floats: of all magnitudes, near one, subnormal, and edges."""
    rng = np.random.default_rng(seed)
    width = int(kind[1:])
    bits = rng.integers(0, 1 << width, LANES, dtype=np.uint64).astype(f"u{width // 8}")
    floats = bits.view(KINDS[kind])
    floats[: LANES // 2] = rng.standard_normal(LANES // 2)
    tiny = np.finfo(KINDS[kind]).smallest_normal
    floats[LANES // 2 : LANES // 2 + 64] = rng.standard_normal(64) * tiny
    edges = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, tiny, -tiny / 2]
    edges += [float(np.finfo(KINDS[kind]).max), 0.5, 1.5]
    floats[rng.permutation(LANES)[:144]] = np.resize(np.array(edges, KINDS[kind]), 144)
    return bits


def same(kind: str, got: Bits, want: Bits) -> None:
    want = want.astype(KINDS[kind])
    nan = np.isnan(want)
    bits = want.view(got.dtype)
    if kind == "f32":
        assert (got[nan] == NAN).all()
    else:
        assert np.isnan(got.view(np.float64)[nan]).all()
    wrong = np.flatnonzero((got != bits) & ~nan)
    assert wrong.size == 0, (wrong[:5], got[wrong[:5]], bits[wrong[:5]])


def flush(x: Bits) -> Bits:
    bits = x.view(np.uint32).copy()
    bits[(bits & 0x7F800000) == 0] &= 0x80000000
    return bits.view(np.float32)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_arithmetic(kind: str) -> None:
    t = KINDS[kind]
    a, b, c = (values(kind, s) for s in range(3))
    x, y, z = a.view(t), b.view(t), c.view(t)
    out = [f"b{kind[1:]}"]
    with np.errstate(all="ignore"):
        same(kind, execute(f"add.{kind}", out, a, b)[0], x + y)
        same(kind, execute(f"add.rn.{kind}", out, a, b)[0], x + y)
        same(kind, execute(f"sub.{kind}", out, a, b)[0], x - y)
        same(kind, execute(f"mul.{kind}", out, a, b)[0], x * y)
        same(kind, execute(f"div.rn.{kind}", out, a, b)[0], x / y)
        if kind == "f32":
            add = execute("add.ftz.f32", out, a, b)[0]
            same(kind, add, flush(flush(x) + flush(y)))
            same(kind, execute("mul.ftz.f32", out, a, b)[0], flush(flush(x) * flush(y)))
            sat = np.nan_to_num(np.clip(x * y, 0, 1), nan=0.0) + 0.0
            same(kind, execute("mul.sat.f32", out, a, b)[0], sat)
    assert z.size == LANES


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_roundings(kind: str, mode: str) -> None:
    t, form = KINDS[kind], FORMATS[kind]
    a, b, c = (values(kind, s) for s in range(3))
    out = [f"b{kind[1:]}"]
    results = {
        "add": execute(f"add.{mode}.{kind}", out, a, b)[0],
        "mul": execute(f"mul.{mode}.{kind}", out, a, b)[0],
        "fma": execute(f"fma.{mode}.{kind}", out, a, b, c)[0],
        "div": execute(f"div.{mode}.{kind}", out, a, b)[0],
    }
    checked = 0
    for lane in range(LANES):
        floats = [float(v.view(t)[lane]) for v in (a, b, c)]
        if not all(math.isfinite(v) for v in floats):
            continue
        x, y, z = map(Fraction, floats)
        exact = {"add": x + y, "mul": x * y, "fma": x * y + z}
        if y:
            exact["div"] = x / y
        for name, value in exact.items():
            if value == 0:  # the sign of zero: test_signs_of_zero
                assert int(results[name][lane]) << 1 & (1 << int(kind[1:])) - 1 == 0
                continue
            assert int(results[name][lane]) == form.round(value, mode), (name, floats)
            checked += 1
    assert checked > LANES


def test_signs_of_zero() -> None:
    zero, minus = np.zeros(32, np.uint32), np.full(32, 0x80000000, np.uint32)
    assert (execute("add.rn.f32", ["b32"], zero, minus)[0] == 0).all()
    assert (execute("add.rm.f32", ["b32"], zero, minus)[0] == 0x80000000).all()
    assert (execute("min.f32", ["b32"], zero, minus)[0] == 0x80000000).all()
    assert (execute("max.f32", ["b32"], minus, zero)[0] == 0).all()


def test_a_product_and_a_sum_round_twice() -> None:
    """The host's compiler must not fuse them."""
    x = np.full(32, 1 + 2.0**-12, np.float32)
    (p,) = execute("mul.rn.f32", ["b32"], x, x)
    (s,) = execute("add.rn.f32", ["b32"], p, np.full(32, -1, np.float32))
    assert (s.view(np.float32) == (x * x) - np.float32(1)).all()


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_extremes(kind: str) -> None:
    t = KINDS[kind]
    a, b = values(kind, 1), values(kind, 2)
    b[::5] = a[::5]
    x, y = a.view(t), b.view(t)
    out = [f"b{kind[1:]}"]
    for name, f in {"min": np.fmin, "max": np.fmax}.items():
        (got,) = execute(f"{name}.{kind}", out, a, b)
        want = f(x, y)
        both_zero = (x == 0) & (y == 0)
        sign = np.signbit(x) | np.signbit(y) if name == "min" else np.signbit(x) & np.signbit(y)
        want[both_zero] = np.where(sign[both_zero], t(-0.0), t(0.0))
        same(kind, got, want)
    if kind == "f32":
        (got,) = execute("max.NaN.f32", out, a, b)
        nan = np.isnan(x) | np.isnan(y)
        assert (got[nan] == NAN).all()
        assert (got[~nan].view(t) == np.maximum(x, y)[~nan]).all()
        (got,) = execute("min.ftz.f32", out, a, b)
        want = np.fmin(flush(x), flush(y))
        assert np.array_equal(got.view(t), want, equal_nan=True)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_signs_and_classes(kind: str) -> None:
    t, n = KINDS[kind], int(kind[1:])
    a, b = values(kind, 1), values(kind, 2)
    top = a.dtype.type(1 << (n - 1))
    x = a.view(t)
    assert (execute(f"neg.{kind}", [f"b{n}"], a)[0] == a ^ top).all()
    assert (execute(f"abs.{kind}", [f"b{n}"], a)[0] == a & ~top).all()
    got = execute(f"copysign.{kind}", [f"b{n}"], a, b)[0]
    assert (got == (a & top) | (b & ~top)).all()
    tiny = np.finfo(t).smallest_normal
    with np.errstate(invalid="ignore"):
        subnormal = (x != 0) & (abs(x) < tiny)
    classes = {
        "finite": np.isfinite(x),
        "infinite": np.isinf(x),
        "number": ~np.isnan(x),
        "notanumber": np.isnan(x),
        "normal": np.isfinite(x) & (abs(x) >= tiny),
        "subnormal": subnormal,
    }
    for name, want in classes.items():
        assert (execute(f"testp.{name}.{kind}", ["pred"], a)[0] == want).all(), name


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_comparisons(kind: str) -> None:
    t = KINDS[kind]
    a, b = values(kind, 1), values(kind, 2)
    b[::5] = a[::5]
    x, y = a.view(t), b.view(t)
    nan = np.isnan(x) | np.isnan(y)
    ordered = {
        "eq": x == y,
        "ne": (x != y) & ~nan,
        "lt": x < y,
        "le": x <= y,
        "gt": x > y,
        "ge": x >= y,
        "num": ~nan,
        "nan": nan,
    }
    for name, want in ordered.items():
        assert (execute(f"setp.{name}.{kind}", ["pred"], a, b)[0] == want).all(), name
        if name not in ("num", "nan"):
            (got,) = execute(f"setp.{name}u.{kind}", ["pred"], a, b)
            assert (got == (want | nan)).all(), name
    (got,) = execute(f"set.lt.f32.{kind}", ["b32"], a, b)
    assert (got == np.where(x < y, 0x3F800000, 0)).all()
    if kind == "f32":
        (got,) = execute("setp.eq.ftz.f32", ["pred"], a, b)
        assert (got == (flush(x) == flush(y))).all()


def test_selection_by_a_float() -> None:
    a, b, c = values("f32", 1), values("f32", 2), values("f32", 3)
    (got,) = execute("slct.f32.f32", ["b32"], a, b, c)
    assert (got == np.where(c.view(np.float32) >= 0, a, b)).all()


def test_immediates() -> None:
    out = np.zeros(8, np.uint32)
    text = """.visible .entry test(.param .u64 p) { .reg .b64 %q<3>; .reg .f32 %f<9>; .reg .f64 %d;
        ld.param.u64 %q0, [p];
        mov.f32 %f0, 0f3FC00000; mov.f32 %f1, 1.5; mov.f32 %f2, 0d3FF8000000000000;
        add.f32 %f3, %f0, -0.25; mov.f64 %d, 2.5;
        st.global.f32 [%q0], %f0; st.global.f32 [%q0+4], %f1; st.global.f32 [%q0+8], %f2;
        st.global.f32 [%q0+12], %f3; st.global.f64 [%q0+16], %d; ret; }"""
    launch(HEAD + text, 1, 1, [out])
    assert out[:4].view(np.float32).tolist() == [1.5, 1.5, 1.5, 1.25]
    assert out[4:6].view(np.float64)[0] == 2.5
