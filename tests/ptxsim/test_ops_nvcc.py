"""operations.cu, as nvcc spells it, in the simulator: operators and intrinsics of CUDA C++."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import ptxsim
from tests.ptxsim.sources import needs_nvcc, ptx_of

pytestmark = [
    needs_nvcc,
    pytest.mark.parametrize("target", [80, 90]),
]
BLOCKS, THREADS = 4, 128
LANES = BLOCKS * THREADS


def compiled(target: int, folder: Path) -> str:
    """For sm_90, which has more instructions for halves, also with fast approximations."""
    options = ["-use_fast_math"] if target == 90 else []
    return ptx_of("operations.cu", folder, *options, target=target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nvcc")


def launch(
    target: int, folder: Path, name: str, *arrays: np.ndarray, blocks: int = BLOCKS,
    threads: int = THREADS, seed: int = 0,
) -> None:  # fmt: skip
    ptxsim.device(target)
    try:
        ptxsim.run(compiled(target, folder), name, blocks, threads, arrays, seed=seed)
    finally:
        ptxsim.device(80)


def exact(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A double rounded once: through float rounded to odd, which no cast of torch does."""
    f = x.float()
    bits = f.view(torch.int32)
    too_far = f.double().abs() > x.abs()
    bits = torch.where(too_far, bits - 1, bits) | (f.double() != x)
    return bits.to(torch.int32).view(torch.float32).to(dtype)


@pytest.mark.parametrize("name", ["half", "bfloat"])
def test_halves(target: int, folder: Path, name: str) -> None:
    dtype = torch.float16 if name == "half" else torch.bfloat16
    rng = np.random.default_rng(1)
    x, y, z = (rng.normal(size=(LANES, 2)).astype(np.float32) for _ in range(3))
    x[::7] = y[::7]
    x[::11, 0], y[::13, 1] = np.nan, np.nan
    out = np.zeros((LANES, 20, 2), np.int16)
    launch(target, folder, f"{name}_arithmetic", x, y, z, out)
    a, b, c = (torch.from_numpy(v).to(dtype).double() for v in (x, y, z))
    got = torch.from_numpy(out).view(dtype).double()

    number = ~(a.isnan() | b.isnan())
    total, fused = exact(a + b, dtype).double(), exact(a * b + c, dtype).double()
    swapped, product = exact(a + b.flip(1), dtype).double(), exact(a * b.flip(1), dtype).double()
    one, no = torch.ones_like(a), torch.zeros_like(a)
    ax, ay, bx, by = a[:, 0], a[:, 1], b[:, 0], b[:, 1]
    expected = {
        0: total,
        1: exact(a - b, dtype).double(),
        2: exact(a * b, dtype).double(),
        3: fused,
        4: torch.fmax(a, b),
        5: torch.fmin(a, b),
        6: -a,
        7: a.abs(),
        8: torch.where(a == b, one, no),
        9: torch.where(a < b, one, no),
        10: torch.where(~(a < b), one, no),
        11: total.clamp(0, 1).nan_to_num(0),
        12: torch.where(fused.isnan(), fused, fused.clamp(min=0)),
        13: torch.stack([swapped[:, 0], product[:, 1]], 1),
        14: torch.stack([torch.where(ax < bx, ay, by),
                         torch.where((ax != bx) & ~ax.isnan() & ~bx.isnan(), bx, ax)], 1),
        15: torch.stack([ax.half().to(dtype).double(), exact(by + 1, dtype).double()], 1),
        17: torch.stack([torch.maximum(ax, bx), torch.minimum(ay, by)], 1),
    }  # fmt: skip
    for row, values in expected.items():
        same = (got[:, row] == values) | (got[:, row].isnan() & values.isnan())
        assert same.all(), (row, a[~same][:3], b[~same][:3], got[:, row][~same][:3])
    whole = torch.from_numpy(np.stack([np.trunc(x[:, 0]), np.rint(x[:, 1])], 1)).nan_to_num(0)
    assert torch.equal(got[:, 16], whole.double())
    assert np.array_equal(out[:, 18], -((a > b) & number).numpy().astype(np.int16))
    powers = torch.exp2(a)[number]
    bound = 2**-9.8 if name == "half" else 2**-6.9
    assert ((got[:, 19][number] - powers).abs() <= bound * powers).all()


def test_integers(target: int, folder: Path) -> None:
    rng = np.random.default_rng(2)
    x = (rng.normal(size=LANES) * np.exp2(rng.uniform(-2, 40, LANES))).astype(np.float32)
    x[:4] = [np.nan, np.inf, -np.inf, 2.5]
    d = rng.normal(size=LANES) * np.exp2(rng.uniform(-2, 60, LANES))
    n = rng.integers(-(2**63), 2**63, LANES) >> rng.integers(0, 60, LANES)
    out = np.zeros((LANES, 16), np.int64)
    launch(target, folder, "integers", x, d, n, out)

    def clamp(v: np.ndarray, low: int, high: int) -> list[int]:
        return [0 if np.isnan(e) else int(min(max(e, low), high)) for e in v.astype(np.float64)]

    s32, u32 = (-(2**31), 2**31 - 1), (0, 2**32 - 1)
    for column, function in enumerate([np.trunc, np.rint, np.ceil, np.floor]):
        assert out[:, column].tolist() == clamp(function(x), *s32), column
    assert out[:, 4].tolist() == clamp(np.trunc(x), *u32)
    bounded = np.clip(np.rint(x[1:].astype(np.float64)), -(2.0**63), 2.0**63)
    assert out[1:, 5].tolist() == [min(int(e), 2**63 - 1) for e in bounded]
    assert out[0, 5] == -(2**63)  # NaN
    assert out[:, 6].tolist() == clamp(np.trunc(d), *s32)
    assert out[:, 7].tolist() == [int(np.floor(e)) for e in d]
    for column, dtype in [(8, np.int8), (9, np.uint8), (10, np.int16), (11, np.uint32)]:
        assert np.array_equal(out[:, column], n.astype(dtype)), column
    assert np.array_equal(out[:, 12], n.astype(np.int32).astype(np.float32).astype(np.int64))
    assert out[:, 13].tolist() == [min(int(float(int(v))), 2**63 - 1) for v in n]
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    assert out[:, 14].tolist() == clamp(np.rint(half.astype(np.float64)), *s32)
    whole = [0 if np.isnan(e) else int(e) for e in np.floor(x[3:].astype(np.float64))]
    assert out[3:, 15].tolist() == [
        w + int(r) for w, r in zip(whole, np.rint(x[3:].astype(np.float64)), strict=True)
    ]


def test_functions(target: int, folder: Path) -> None:
    x = np.exp2(np.random.default_rng(3).uniform(-6, 2.5, LANES)).astype(np.float32)
    runs = []
    for seed in range(2):
        runs.append(np.zeros((LANES, 16), np.float32))
        launch(target, folder, "functions", x, runs[-1], seed=seed)
    a = x.astype(np.float64)
    columns = [
        *(np.exp2(-a), np.exp(-a), np.exp(-a), np.log2(a), np.log(a), np.log(a), a**-0.5, a**0.5),
        *(1 / a, 3 / a, 3 / a, np.tanh(a), np.sin(a), np.cos(a), 1 / a, np.tanh(a)),
    ]
    for out in runs:
        for column, expected in enumerate(columns):
            loose = 2**-10.9 if column == 15 or (column == 11 and target == 90) else 2**-20
            error = np.abs(out[:, column] - expected)
            assert (error <= loose * np.maximum(np.abs(expected), 1)).all(), column
    assert np.array_equal(runs[0][:, 14], (1 / a).astype(np.float32))
    assert (runs[0] != runs[1]).any(axis=0)[[0, 1, 15]].all()


def test_lanes(target: int, folder: Path) -> None:
    x = np.random.default_rng(4).integers(0, 1000, LANES).astype(np.int32)
    x[:32] = x[:32] * 4 + 1  # a warp whose lanes agree
    x[40] = 7
    out = np.zeros((LANES, 16), np.int32)
    launch(target, folder, "lanes", x, out)
    lane = np.arange(32)
    for a, o in zip(x.reshape(-1, 32), out.reshape(-1, 32, 16), strict=True):
        assert (o[:, 0] == a.sum()).all() and (o[:, 10] == a.sum()).all()
        assert np.array_equal(o[:, 1], np.cumsum(a))
        down = np.where(lane % 16 + 3 < 16, lane + 3, lane)
        assert np.array_equal(o[:, 2], a[down])
        assert np.array_equal(o[:, 3], a[lane // 8 * 8 + lane * 5 % 8])
        bits = (1 << lane.astype(np.uint64)).astype(np.uint32)
        odd = a % 2 == 1
        assert (o[:, 4].view(np.uint32) == bits[odd].sum(dtype=np.uint32)).all()
        assert (o[:, 5] == (a == 7).any()).all() and (o[:, 6] == 1).all()
        for k in range(32):
            assert o.view(np.uint32)[k, 7] == bits[a % 4 == a[k] % 4].sum(dtype=np.uint32)
        agree = len(set(odd)) == 1
        assert (o[:, 9] == agree).all() and (o[:, 8] == (-1 if agree else 0)).all()
        assert (o[:, 11] == a.max()).all()
        assert (o[:, 12] == np.bitwise_xor.reduce(a)).all()
        even = lane[::2]
        assert (o[even, 13] == 0x55555555).all()
        assert (o[even, 14] == a[4]).all()
        assert np.array_equal(o[even, 15], a[even ^ 2])


def test_atomics(target: int, folder: Path) -> None:
    x = np.random.default_rng(5).integers(1, 1000, LANES).astype(np.int32)
    x[5] = 3
    ints = np.zeros(12, np.int32)
    ints[2], ints[4] = 10**6, -1
    longs, doubles = np.zeros(2, np.uint64), np.zeros(1)
    floats, sums = np.zeros(1, np.float32), np.zeros(BLOCKS, np.int32)
    halves, bfloats = np.zeros(2, np.float16), np.zeros(2, np.int16)
    launch(target, folder, "atomics", x, ints, longs, floats, doubles, halves, bfloats, sums)
    total = int(x.sum())
    assert ints[:4].tolist() == [total, -total, x.min(), x.max()]
    functions = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
    assert ints[4:7].tolist() == [int(f.reduce(x)) for f in functions]
    assert ints[7] == LANES % 10 and ints[8] == -LANES % 10
    assert ints[9] in x and ints[10] == 1 and ints[11] == total
    assert longs.tolist() == [total, x.max()]
    assert floats[0] == total and doubles[0] == total
    assert (halves == (x % 2).sum()).all()
    assert (torch.from_numpy(bfloats).view(torch.bfloat16).float() == (x == 3).sum()).all()
    assert np.array_equal(sums, 2 * x.reshape(BLOCKS, -1).sum(axis=1))


def test_matrix_product(target: int, folder: Path) -> None:
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(16, 64)).astype(np.float16), rng.normal(size=(64, 8)).astype(np.float16)
    c = np.zeros((16, 8), np.float32)
    launch(target, folder, "product", a, b, c, blocks=1, threads=32)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    assert np.abs(c - expected).max() < 1e-5
    # Twice 64 products a row, four instructions of 16 by 8 by 16.
    assert ptxsim.counters()["mma_flops"] == 2 * 16 * 8 * 64
