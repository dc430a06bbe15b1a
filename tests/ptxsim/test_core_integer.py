"""Integer and bit instructions against Python's integers and numpy, on random values and edges."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.ptxsim.instruction import HEAD, Bits, Negated, execute, launch

LANES = 256
TYPES = ["s16", "u16", "s32", "u32", "s64", "u64"]


def bits_of(kind: str) -> int:
    return int(kind[1:])


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def as_type(x: int, kind: str) -> int:
    bits = bits_of(kind)
    return signed(x, bits) if kind[0] == "s" else x & ((1 << bits) - 1)


def values(bits: int, seed: int) -> Bits:
    rng = np.random.default_rng(seed)
    top = 1 << (bits - 1)
    edges = [0, 1, 2, (1 << bits) - 1, (1 << bits) - 2, top, top - 1, top + 1, 31, 32, 33]
    x = rng.integers(0, 1 << bits, LANES, dtype=np.uint64)
    x[: LANES // 2] >>= rng.integers(0, bits, LANES // 2).astype(np.uint64)
    chosen = rng.permutation(LANES)[: 10 * len(edges)]
    x[chosen] = np.resize(np.array(edges, np.uint64), len(chosen))
    return x.astype(f"u{bits // 8}")


def check(
    opcode: str,
    kind: str,
    expected: Callable[..., int],
    *,
    sources: tuple[int, ...],
    result: int = 0,
    raw: bool = False,
) -> None:
    """`expected` gets the sources as integers of `kind` (as bits if raw)."""
    inputs = [values(bits, i + 1) for i, bits in enumerate(sources)]
    width = result or bits_of(kind)
    (got,) = execute(opcode, [f"b{width}"], *inputs)
    for lane in range(LANES):
        args = [int(x[lane]) for x in inputs]
        if not raw:
            args = [as_type(a, f"{kind[0]}{bits}") for a, bits in zip(args, sources, strict=True)]
        want = expected(*args) & ((1 << width) - 1)
        assert int(got[lane]) == want, (opcode, lane, args, hex(int(got[lane])), hex(want))


def quotient(a: int, b: int) -> int:
    if b == 0:
        return -1
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


@pytest.mark.parametrize("kind", TYPES)
def test_arithmetic(kind: str) -> None:
    n = bits_of(kind)
    check(f"add.{kind}", kind, lambda a, b: a + b, sources=(n, n))
    check(f"sub.{kind}", kind, lambda a, b: a - b, sources=(n, n))
    check(f"mul.lo.{kind}", kind, lambda a, b: a * b, sources=(n, n))
    check(f"mul.hi.{kind}", kind, lambda a, b: a * b >> n, sources=(n, n))
    check(f"mad.lo.{kind}", kind, lambda a, b, c: a * b + c, sources=(n, n, n))
    check(f"mad.hi.{kind}", kind, lambda a, b, c: (a * b >> n) + c, sources=(n, n, n))
    check(f"min.{kind}", kind, min, sources=(n, n))
    check(f"max.{kind}", kind, max, sources=(n, n))
    check(f"sad.{kind}", kind, lambda a, b, c: c + abs(a - b), sources=(n, n, n))
    check(f"div.{kind}", kind, quotient, sources=(n, n))
    check(f"rem.{kind}", kind, lambda a, b: a - b * quotient(a, b) if b else a, sources=(n, n))
    if kind[0] == "s":
        check(f"abs.{kind}", kind, abs, sources=(n,))
        check(f"neg.{kind}", kind, lambda a: -a, sources=(n,))


@pytest.mark.parametrize("kind", TYPES[:4])
def test_wide_products(kind: str) -> None:
    n = bits_of(kind)
    check(f"mul.wide.{kind}", kind, lambda a, b: a * b, sources=(n, n), result=2 * n)
    check(f"mad.wide.{kind}", kind, lambda a, b, c: a * b + c, sources=(n, n, 2 * n), result=2 * n)


def test_mad_wide_sign_extends_its_immediate() -> None:
    a = np.full(32, 3, np.uint32)
    (got,) = execute("mad.wide.s32", ["b64"], a, -5, -1)
    assert got.view(np.int64).tolist() == [-16] * 32


def test_saturation() -> None:
    def clamp(x: int) -> int:
        return min(max(x, -(2**31)), 2**31 - 1)

    check("add.sat.s32", "s32", lambda a, b: clamp(a + b), sources=(32, 32))
    check("sub.sat.s32", "s32", lambda a, b: clamp(a - b), sources=(32, 32))
    check("mad.hi.sat.s32", "s32", lambda a, b, c: clamp((a * b >> 32) + c), sources=(32, 32, 32))


def test_24_bits() -> None:
    def low(x: int, kind: str) -> int:
        return signed(x, 24) if kind == "s32" else x & 0xFFFFFF

    for k in ["u32", "s32"]:
        check(f"mul24.lo.{k}", k, lambda a, b, k=k: low(a, k) * low(b, k), sources=(32, 32))
        check(
            f"mad24.hi.{k}",
            k,
            lambda a, b, c, k=k: (low(a, k) * low(b, k) >> 16) + c,
            sources=(32, 32, 32),
        )


@pytest.mark.parametrize("kind", ["u32", "u64"])
def test_carries(kind: str) -> None:
    n = bits_of(kind)
    a, b, c, d = (values(n, s) for s in range(4))
    for low, high in (("add.cc", "addc"), ("sub.cc", "subc")):
        first, second = _pair(low, high, kind, a, b, c, d)
        for lane in range(LANES):
            x = int(a[lane]) | int(c[lane]) << n
            y = int(b[lane]) | int(d[lane]) << n
            want = x + y if low == "add.cc" else x - y
            got = int(first[lane]) | int(second[lane]) << n
            assert got == want & ((1 << 2 * n) - 1)


def _pair(low: str, high: str, kind: str, *inputs: Bits) -> tuple[Bits, Bits]:
    """low.kind r0, a, b; high.kind r1, c, d; in one kernel."""
    size = bits_of(kind) // 8
    out = [np.zeros(LANES, f"u{size}") for _ in range(2)]
    arrays = [*inputs, *out]
    lines = [
        ".reg .b32 %t;",
        ".reg .b64 %q<7>;",
        f".reg .b{8 * size} %x<7>;",
        "mov.u32 %t, %tid.x;",
    ]
    for k in range(6):
        lines += [f"ld.param.u64 %q{k}, [p{k}];", f"mad.wide.u32 %q{k}, %t, {size}, %q{k};"]
    lines += [f"ld.global.b{8 * size} %x{k}, [%q{k}];" for k in range(4)]
    lines += [f"{low}.{kind} %x4, %x0, %x1;", f"{high}.{kind} %x5, %x2, %x3;"]
    lines += [f"st.global.b{8 * size} [%q{k}], %x{k};" for k in (4, 5)]
    parameters = ", ".join(f".param .u64 p{k}" for k in range(6))
    body = "\n".join(lines)
    launch(HEAD + f".visible .entry test({parameters}) {{ {body} ret; }}", 1, LANES, arrays)
    return out[0], out[1]


@pytest.mark.parametrize("n", [16, 32, 64])
def test_logic(n: int) -> None:
    check(f"and.b{n}", f"u{n}", lambda a, b: a & b, sources=(n, n))
    check(f"or.b{n}", f"u{n}", lambda a, b: a | b, sources=(n, n))
    check(f"xor.b{n}", f"u{n}", lambda a, b: a ^ b, sources=(n, n))
    check(f"not.b{n}", f"u{n}", lambda a: ~a, sources=(n,))
    check(f"cnot.b{n}", f"u{n}", lambda a: int(a == 0), sources=(n,))
    check(f"shl.b{n}", f"u{n}", lambda a, b: a << min(b, 64), sources=(n, 32))
    check(f"shr.u{n}", f"u{n}", lambda a, b: a >> min(b, 64), sources=(n, 32))
    check(f"shr.b{n}", f"u{n}", lambda a, b: a >> min(b, 64), sources=(n, 32))
    small = np.arange(LANES, dtype=np.uint32) % 70
    a = values(n, 1)
    (got,) = execute(f"shr.s{n}", [f"b{n}"], a, small)
    want = [signed(int(x), n) >> min(int(s), n) for x, s in zip(a, small, strict=True)]
    assert got.view(f"i{n // 8}").tolist() == want


def test_predicates() -> None:
    rng = np.random.default_rng(1)
    p, q = rng.integers(0, 2, (2, LANES)).astype(bool)
    for name, f in {"and": p & q, "or": p | q, "xor": p ^ q}.items():
        (got,) = execute(f"{name}.pred", ["pred"], p, q)
        assert (got == f).all()
    (got,) = execute("not.pred", ["pred"], p)
    assert (got == ~p).all()
    (got,) = execute("mov.pred", ["pred"], p)
    assert (got == p).all()


def test_lop3() -> None:
    a, b, c = (values(32, s) for s in range(3))
    for table in [0x80, 0xFE, 0x96, 0xCA, 0x1B, 0xF8]:
        (got,) = execute("lop3.b32", ["b32"], a, b, c, table)
        want = np.zeros(LANES, np.uint32)
        for bit in range(32):
            index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
            want |= (np.uint32(table) >> index & 1) << np.uint32(bit)
        assert (got == want).all()


def test_funnel_shifts() -> None:
    mask = 0xFFFFFFFF
    for mode in ["clamp", "wrap"]:

        def by(c: int, mode: str = mode) -> int:
            return min(c, 32) if mode == "clamp" else c & 31

        check(
            f"shf.l.{mode}.b32",
            "u32",
            lambda a, b, c, by=by: (b << 32 | a) << by(c) >> 32 & mask,
            sources=(32, 32, 32),
        )
        check(
            f"shf.r.{mode}.b32",
            "u32",
            lambda a, b, c, by=by: (b << 32 | a) >> by(c) & mask,
            sources=(32, 32, 32),
        )


def extract(a: int, b: int, c: int, kind: str) -> int:
    n = bits_of(kind)
    position, length = b & 255, c & 255
    if kind[0] == "u" or length == 0:
        sign = 0
    else:
        sign = a >> min(position + length - 1, n - 1) & 1
    result = 0
    for i in range(n):
        bit = a >> (position + i) & 1 if i < length and position + i < n else sign
        result |= bit << i
    return result


def insert(a: int, b: int, c: int, d: int, n: int) -> int:
    position, length = c & 255, d & 255
    for i in range(length):
        if position + i < n:
            b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return b


def test_bit_fields() -> None:
    for kind in ["u32", "s32", "u64", "s64"]:
        n = bits_of(kind)
        check(
            f"bfe.{kind}",
            kind,
            lambda a, b, c, kind=kind: extract(a, b, c, kind),
            sources=(n, 32, 32),
            raw=True,
        )
    rng = np.random.default_rng(2)
    for n in (32, 64):
        a, b = values(n, 1), values(n, 2)
        c, d = rng.integers(0, 80, (2, LANES), dtype=np.uint32)
        (got,) = execute(f"bfi.b{n}", [f"b{n}"], a, b, c, d)
        want = [
            insert(*map(int, x), n)  # type: ignore[call-arg]
            for x in zip(a, b, c, d, strict=True)
        ]
        assert got.tolist() == want


def test_counts_of_bits() -> None:
    for n in (32, 64):
        check(f"popc.b{n}", f"u{n}", lambda a: a.bit_count(), sources=(n,), result=32)
        check(f"clz.b{n}", f"u{n}", lambda a, n=n: n - a.bit_length(), sources=(n,), result=32)
        check(f"brev.b{n}", f"u{n}", lambda a, n=n: int(f"{a:0{n}b}"[::-1], 2), sources=(n,))
        check(f"bfind.u{n}", f"u{n}", lambda a: a.bit_length() - 1, sources=(n,), result=32)
        check(
            f"bfind.s{n}",
            f"s{n}",
            lambda a: (~a if a < 0 else a).bit_length() - 1,
            sources=(n,),
            result=32,
        )
        check(
            f"bfind.shiftamt.u{n}",
            f"u{n}",
            lambda a, n=n: n - a.bit_length() if a else -1,
            sources=(n,),
            result=32,
        )


def test_masks_and_extensions() -> None:
    def ones(a: int, b: int) -> int:
        return 0 if a >= 32 else ((1 << min(b, 32)) - 1) << a

    check("bmsk.clamp.b32", "u32", ones, sources=(32, 32))
    check("bmsk.wrap.b32", "u32", lambda a, b: ones(a & 31, b & 31), sources=(32, 32))
    check(
        "szext.clamp.s32",
        "u32",
        lambda a, b: 0 if b == 0 else signed(a, min(b, 32)),
        sources=(32, 32),
    )
    check("szext.wrap.u32", "u32", lambda a, b: a & ((1 << (b & 31)) - 1), sources=(32, 32))


def test_permute() -> None:
    a, b, c = (values(32, s) for s in range(3))
    (got,) = execute("prmt.b32", ["b32"], a, b, c)
    for lane in range(LANES):
        both = int(b[lane]) << 32 | int(a[lane])
        want = 0
        for i in range(4):
            selector = int(c[lane]) >> 4 * i & 15
            byte = both >> 8 * (selector & 7) & 255
            if selector & 8:
                byte = 255 if byte & 128 else 0
            want |= byte << 8 * i
        assert int(got[lane]) == want
    (got,) = execute("prmt.b32.f4e", ["b32"], a, b, c)
    both = b.astype(np.uint64) << np.uint64(32) | a
    assert (got == (both >> (8 * (c & 3)).astype(np.uint64)).astype(np.uint32)).all()


def test_dot_products() -> None:
    a, b, c = (values(32, s) for s in range(3))
    for ka, ta in (("s32", np.int8), ("u32", np.uint8)):
        for kb, tb in (("s32", np.int8), ("u32", np.uint8)):
            (got,) = execute(f"dp4a.{ka}.{kb}", ["b32"], a, b, c)
            x = a.view(ta).reshape(-1, 4).astype(np.int64)
            y = b.view(tb).reshape(-1, 4).astype(np.int64)
            want = (c.astype(np.int64) + (x * y).sum(1)).astype(np.uint32)
            assert (got == want).all()


def test_comparisons() -> None:
    names = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    for kind in TYPES:
        n = bits_of(kind)
        a, b = values(n, 1), values(n, 2)
        b[::3] = a[::3]
        view = f"{'i' if kind[0] == 's' else 'u'}{n // 8}"
        for name, f in names.items():
            want = f(a.view(view), b.view(view))
            (got,) = execute(f"setp.{name}.{kind}", ["pred"], a, b)
            assert (got == want).all(), (name, kind)
            if n == 32:
                (got,) = execute(f"set.{name}.u32.{kind}", ["b32"], a, b)
                assert (got == np.where(want, 0xFFFFFFFF, 0)).all()
    a, b = values(32, 1), values(32, 2)
    for name, f in {"lo": a < b, "ls": a <= b, "hi": a > b, "hs": a >= b}.items():
        (got,) = execute(f"setp.{name}.u32", ["pred"], a, b)
        assert (got == f).all()


def test_comparisons_combined_with_a_predicate() -> None:
    a, b = values(32, 1), values(32, 2)
    c = np.random.default_rng(3).integers(0, 2, LANES).astype(bool)
    less = a < b
    for name, f in {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.items():
        p, q = execute(f"setp.lt.{name}.u32", ["pred", "pred"], a, b, c, pair=True)
        assert (p == f(less, c)).all() and (q == f(~less, c)).all()
        (p,) = execute(f"setp.lt.{name}.u32", ["pred"], a, b, Negated(c))
        assert (p == f(less, ~c)).all()


def test_selections() -> None:
    for n in (16, 32, 64):
        a, b = values(n, 1), values(n, 2)
        p = np.random.default_rng(4).integers(0, 2, LANES).astype(bool)
        (got,) = execute(f"selp.b{n}", [f"b{n}"], a, b, p)
        assert (got == np.where(p, a, b)).all()
        c = values(32, 3)
        (got,) = execute(f"slct.b{n}.s32", [f"b{n}"], a, b, c)
        assert (got == np.where(c.view(np.int32) >= 0, a, b)).all()


def test_moves_of_vectors() -> None:
    a, b = values(32, 1), values(32, 2)
    (got,) = execute("mov.b64", ["b64"], [a, b])
    assert (got == a | b.astype(np.uint64) << np.uint64(32)).all()
    x, y = execute("mov.b64", [("b32", "b32")], got)
    assert (x == a).all() and (y == b).all()
    (y,) = execute("mov.b64", [("_", "b32")], got)
    assert (y == b).all()
    parts = execute("mov.b64", [("b16", "b16", "b16", "b16")], got)
    assert (np.stack(parts, 1).view(np.uint64).ravel() == got).all()
    h, k = values(16, 1), values(16, 2)
    (got,) = execute("mov.b32", ["b32"], [h, k])
    assert (got == h | k.astype(np.uint32) << 16).all()
    (got,) = execute("mov.b32", ["b32"], a, active=np.arange(LANES) % 3 == 0, initial=7)
    assert (got == np.where(np.arange(LANES) % 3 == 0, a, 7)).all()
