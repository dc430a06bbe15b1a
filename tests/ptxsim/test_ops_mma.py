"""mma.sync and movmatrix of the simulator, against matrix products in double."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptxsim.instruction import execute

WARPS = 16
Fragment = list[tuple[np.ndarray, np.ndarray]]  # (row, column) of each element, over the lanes

LANE = np.arange(32)
GROUP, THREAD = LANE >> 2, LANE & 3


def fragment_a(element_bits: int, depth: int) -> Fragment:
    """Rows and columns of a0, a1, ...: the figures of the PTX ISA, one formula per shape."""
    places: Fragment = []
    if element_bits == 16:
        for i in range(4 if depth == 8 else 8):
            row = GROUP + (8 if i in (2, 3, 6, 7) else 0)
            places.append((row, THREAD * 2 + (i & 1) + (8 if i >= 4 else 0)))
    elif element_bits == 32:
        for i in range(2 if depth == 4 else 4):
            places.append((GROUP + 8 * (i % 2), THREAD + (4 if i >= 2 else 0)))
    else:
        for i in range(8 if depth == 16 else 16):
            row = GROUP + (8 if 4 <= i < 8 or i >= 12 else 0)
            places.append((row, THREAD * 4 + (i & 3) + (16 if i >= 8 else 0)))
    return places


def fragment_b(element_bits: int, depth: int) -> Fragment:
    if element_bits == 16:
        return [(THREAD * 2 + (i & 1) + (8 if i >= 2 else 0), GROUP) for i in range(depth // 4)]
    if element_bits == 32:
        return [(THREAD + 4 * i, GROUP) for i in range(depth // 4)]
    return [(THREAD * 4 + (i & 3) + (16 if i >= 4 else 0), GROUP) for i in range(depth // 4)]


SUMS: Fragment = [(GROUP + (8 if i >= 2 else 0), THREAD * 2 + (i & 1)) for i in range(4)]


def scatter(matrices: np.ndarray, places: Fragment) -> list[np.ndarray]:
    """Registers of 32 bits from (WARPS, rows, columns) of bits."""
    elements = np.stack([matrices[:, r, c].reshape(-1) for r, c in places], axis=1)
    words = np.ascontiguousarray(elements).view(np.uint32)
    return [np.ascontiguousarray(words[:, k]) for k in range(words.shape[1])]


def gather(registers: list[np.ndarray], places: Fragment, dtype: str, shape: tuple) -> np.ndarray:
    words = np.ascontiguousarray(np.stack(registers, axis=1))
    elements = words.view(dtype).reshape(WARPS, 32, -1)
    matrices = np.zeros((WARPS, *shape), dtype)
    for k, (r, c) in enumerate(places):
        matrices[:, r, c] = elements[:, :, k]
    return matrices


def bits_of(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    if kind == "bf16":
        return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)


def value_of(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(np.float32).astype(np.float64)


CASES = [
    ("f16", 8, "f32"), ("f16", 16, "f32"), ("f16", 8, "f16"), ("f16", 16, "f16"),
    ("bf16", 8, "f32"), ("bf16", 16, "f32"), ("tf32", 4, "f32"), ("tf32", 8, "f32"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "depth", "sums"), CASES)
def test_float_products(kind: str, depth: int, sums: str) -> None:
    rng = np.random.default_rng(depth)
    size = 32 if kind == "tf32" else 16
    a = bits_of(rng.normal(size=(WARPS, 16, depth)), kind)
    b = bits_of(rng.normal(size=(WARPS, depth, 8)), kind)
    c = rng.normal(size=(WARPS, 16, 8)).astype(np.float16 if sums == "f16" else np.float32)
    c[0] = 0
    c[1] *= 1e4 if sums == "f32" else 100
    ignored = rng.integers(0, 2**13, 2, dtype=np.uint32) if kind == "tf32" else a.dtype.type([0, 0])
    got = execute(
        f"mma.sync.aligned.m16n8k{depth}.row.col.{sums}.{kind}.{kind}.{sums}",
        [("b32",) * (4 if sums == "f32" else 2)],
        scatter(a | ignored[0], fragment_a(size, depth)),
        scatter(b | ignored[1], fragment_b(size, depth)),
        scatter(c.view("u2" if sums == "f16" else "u4"), SUMS),
    )
    y = gather(got, SUMS, "f2" if sums == "f16" else "f4", (16, 8))
    # Products of these types are exact in double, and their sums nearly so.
    exact = value_of(a, kind) @ value_of(b, kind) + c.astype(np.float64)
    expected = exact.astype(c.dtype)
    assert (y == expected).mean() > 0.999  # rounded once; but for ties that double decides
    assert np.abs(y.astype(np.float64) - exact).max() <= np.spacing(np.abs(expected)).max()


def test_infinities_and_nan() -> None:
    a, b = np.ones((WARPS, 16, 16)), np.ones((WARPS, 16, 8))
    c = np.zeros((WARPS, 16, 8), np.float32)
    a[0, 3, 5], b[0, 5, 2] = np.inf, 0
    a[1, 3, 5] = np.inf
    a[2, 3, 5], c[2, 3, 1] = -np.inf, np.inf
    c[3, 15, 7] = np.nan
    got = execute(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        [("b32",) * 4],
        scatter(bits_of(a, "f16"), fragment_a(16, 16)),
        scatter(bits_of(b, "f16"), fragment_b(16, 16)),
        scatter(c.view(np.uint32), SUMS),
    )
    y = gather(got, SUMS, "f4", (16, 8))
    assert np.isnan(y[0, 3, 2]) and np.isinf(np.delete(y[0, 3], 2)).all()
    assert (y[1, 3] == np.inf).all()
    assert np.isnan(y[2, 3, 1]) and (np.delete(y[2, 3], 1) == -np.inf).all()
    assert y[3].view(np.uint32)[15, 7] == 0x7FFFFFFF
    assert np.isnan(y).sum() == 3 and (y[4:] == 16).all()


@pytest.mark.parametrize("depth", [16, 32])
@pytest.mark.parametrize("types", ["s8.s8", "s8.u8", "u8.s8", "u8.u8"])
def test_integer_products(types: str, depth: int) -> None:
    rng = np.random.default_rng(depth)
    left, right = (np.int8 if t[0] == "s" else np.uint8 for t in types.split("."))
    a = rng.integers(0, 256, (WARPS, 16, depth), dtype=np.uint8)
    b = rng.integers(0, 256, (WARPS, depth, 8), dtype=np.uint8)
    c = rng.integers(-(2**31), 2**31, (WARPS, 16, 8)).astype(np.int32)
    c[1], c[2] = 2**31 - 1, -(2**31)
    exact = a.view(left).astype(np.int64) @ b.view(right).astype(np.int64) + c
    sources = (
        scatter(a, fragment_a(8, depth)),
        scatter(b, fragment_b(8, depth)),
        scatter(c.view(np.uint32), SUMS),
    )
    for form, expected in [
        ("", exact.astype(np.int32)),
        (".satfinite", np.clip(exact, -(2**31), 2**31 - 1)),
    ]:
        opcode = f"mma.sync.aligned.m16n8k{depth}.row.col{form}.s32.{types}.s32"
        y = gather(execute(opcode, [("b32",) * 4], *sources), SUMS, "i4", (16, 8))
        assert np.array_equal(y, expected), form


def test_transpose_within_registers() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2**16, (WARPS, 8, 8), dtype=np.uint16)
    packed = x.reshape(WARPS * 32, 2).copy().view(np.uint32).reshape(-1)
    got = execute("movmatrix.sync.aligned.m8n8.trans.b16", ["b32"], packed)[0]
    assert np.array_equal(got.view(np.uint16).reshape(WARPS, 8, 8), x.transpose(0, 2, 1))


@pytest.mark.parametrize(
    ("opcode", "reason"),
    [
        ("mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32", "layout of B"),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32", "shape"),
        ("mma.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32", "shape for this type"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32", "types"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.tf32.tf32.f32", "shape for this type"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", "fragment"),
    ],
)
def test_unknown_forms(opcode: str, reason: str) -> None:
    x = np.zeros(32, np.uint32)
    with pytest.raises(Exception, match=reason):
        execute(opcode, [("b32",) * 4], [x] * 4, [x] * 2, [x] * 4)
