"""Control flow, calls and memory of kernels that nvcc compiled (core.cu), against Python."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import ptxsim
from tests.ptxsim.sources import needs_nvcc, ptx_of

N = 230  # not a multiple of a warp, nor of a block
SOURCE = Path(__file__).parent / "core.cu"

pytestmark = needs_nvcc


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ptx_of(SOURCE.name, tmp_path_factory.mktemp("core"), "-lineinfo")


def line_of(text: str) -> int:
    lines = SOURCE.read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if text in line)


def int32(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def nested(x: int) -> int:
    if x & 1:
        if x & 2:
            return int32(x * 3 + 1)
        x = int32(x - 7)
        return x ^ 0x55 if x & 8 else x
    return ~x if x & 4 else x


def loop(x: int) -> int:
    x &= 0xFFFFFFFF
    turns = 0
    while x != 1 and turns < 300:
        if x % 3 == 0 and turns > 100:
            break
        if x & 1:
            x = (3 * x + 1) & 0xFFFFFFFF
        else:
            x >>= 1
            turns += sum(k & 1 for k in range(1, (x & 3) + 1))
        turns += 1
    return turns


def switch(x: int) -> int:
    case = x & 15
    quotient = abs(x) // 7 * (1 if x >= 0 else -1)
    rest = abs(x) % 11 * (1 if x >= 0 else -1)
    return {
        0: int32(x + 11),
        1: int32(x * 5) ^ 0x1234,
        2: x ^ 0x1234,
        3: int32(-x),
        4: x >> 2,
        5: quotient,
        6: rest,
        7: x | 0x40,
        8: x & 0xFF,
        9: int32(x << 3),
    }.get(case, 99)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kernel", "expected"),
    [("nested_branches", nested), ("loops", loop), ("switches", switch)],
)
def test_divergence(core: str, kernel: str, expected: Callable[[int], int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(-(2**31), 2**31, N, dtype=np.int64).astype(np.int32)
    x[::3] = rng.integers(0, 40, len(x[::3]))
    out = np.full(256, -5, np.int32)
    ptxsim.run(core, kernel, 2, 128, [out, ptxsim.ReadOnly(x), N], seed=seed)
    assert out[:N].tolist() == [expected(int(v)) for v in x]
    assert (out[N:] == -5).all()


def test_indexed_branches() -> None:
    text = """.version 9.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 p) { .reg .b64 %q<3>; .reg .b32 %r<4>;
  ld.param.u64 %q0, [p]; mov.u32 %r0, %tid.x; mul.wide.u32 %q1, %r0, 4; add.s64 %q0, %q0, %q1;
  and.b32 %r1, %r0, 3;
  targets: .branchtargets A, B, C, B;
  brx.idx %r1, targets;
A: mov.u32 %r2, 10; bra END;
B: mov.u32 %r2, 20; bra END;
C: mov.u32 %r2, 30;
END: st.global.u32 [%q0], %r2; ret; }"""
    out = np.zeros(64, np.int32)
    ptxsim.run(text, "k", 1, 64, [out])
    assert out.tolist() == [10, 20, 30, 20] * 16
    with pytest.raises(ptxsim.Fault, match="index 3 of 3 targets"):
        ptxsim.run(text.replace("A, B, C, B", "A, B, C"), "k", 1, 64, [out])


def test_calls(core: str) -> None:
    x = np.random.default_rng(1).standard_normal(N).astype(np.float32)
    sums, counts = np.zeros(N, np.float32), np.zeros(N, np.int32)
    squares = np.zeros(N)
    arguments = [sums, counts, squares, ptxsim.ReadOnly(x), N]
    ptxsim.run(core, "calls", 2, 128, arguments)

    def step(v: np.float32, k: int) -> np.float32:
        return v * np.float32(0.5) if k & 1 else v + np.float32(k)

    for i in range(N):
        total, count, square = np.float32(-1), -1, -1.0
        if i % 3:
            total, count, square, v = np.float32(0), 0, 0.0, x[i]
            for k in range(i % 7):
                v = step(v, k)
                total += v
                square += float(v) * float(v)
                count += 1
        if i % 5 == 0:
            total += step(x[i], i)
        assert (sums[i], counts[i]) == (total, count), i
        assert squares[i] == pytest.approx(square, rel=1e-12)  # fused in the kernel


def test_generic_addresses(core: str) -> None:
    x = np.random.default_rng(2).integers(-1000, 1000, 32).astype(np.int32)
    out = np.zeros(64, np.int32)
    ptxsim.run(core, "spaces", 1, 32, [out, ptxsim.ReadOnly(x), 7], shared=128)
    table = [3, 1, 4, 1, 5, 9, 2, 6]
    for i in range(32):
        other = (i + 1) & 31
        own = {k * 5 & 15: int(x[i]) + k for k in range(16)}
        start = 3 if i >> 2 & 1 else 0
        value = [own[int(x[i]) & 15], x[other] * 2, x[other] * 3, table[start + (i >> 4)]][i % 4]
        assert out[i] == value + (i % 4) * 2 + 1 + 7
        assert out[32 + i] == [4, 1, 1, 2][i % 4] | 8


def test_parameters_by_value(core: str) -> None:
    x = np.arange(32, dtype=np.int32) * 3
    big = struct.pack("<i4x3dQ2h4x", 5, 0.5, 1.5, 2.5, x.ctypes.data, -3, 40)
    out = np.zeros(32)
    arguments = [out, big, np.int16(-300), np.int8(-7), np.float32(0.25)]
    with pytest.raises(ptxsim.Fault, match="out-of-bounds"):  # a pointer that nobody described
        ptxsim.run(core, "by_value", 1, 32, arguments)
    both = np.concatenate([out.view(np.int32), x])  # one region holds both
    address = both.ctypes.data + out.nbytes
    big = struct.pack("<i4x3dQ2h4x", 5, 0.5, 1.5, 2.5, address, -3, 40)
    ptxsim.run(core, "by_value", 1, 32, [both, big, *arguments[2:]])
    i = np.arange(32)
    want = 5 + 0.5 + i % 3 + 3 * i + np.where(i & 1, 40, -3) - 300 - 7 + 0.25
    assert both[:64].view(np.float64).tolist() == want.tolist()


def test_axes(core: str) -> None:
    out = np.full((2, 3, 2, 2, 4, 5), -1, np.int32)  # block z, y, x; thread z, y, x
    ptxsim.run(core, "axes", (2, 3, 2), (5, 4, 2), [out])
    bz, by, bx, tz, ty, tx = np.indices(out.shape)
    want = tx | ty << 4 | tz << 8 | bx << 12 | by << 16 | bz << 20
    assert (out == want).all()


@pytest.mark.parametrize("seed", range(4))
def test_barriers(core: str, seed: int) -> None:
    x = np.random.default_rng(seed).integers(-99, 99, 5 * 256).astype(np.int32)
    out = np.zeros(5, np.int32)
    arguments = [out, ptxsim.ReadOnly(x), 3]
    ptxsim.run(core, "reduce", 5, 256, arguments, shared=1024, seed=seed)
    assert out.tolist() == (x.reshape(5, 256).sum(1) + 3).tolist()


def test_results_and_counters_do_not_depend_on_host_threads(core: str) -> None:
    x = np.random.default_rng(3).integers(0, 40, N).astype(np.int32)
    seen = []
    out = np.zeros(N, np.int32)  # one, for its alignment decides how many sectors it fills
    for threads in (1, 2, 5):
        ptxsim.threads(threads)
        try:
            ptxsim.run(core, "loops", 8, 32, [out, ptxsim.ReadOnly(x), N], seed=9)
            seen.append((out.tolist(), ptxsim.counters()))
            with pytest.raises(ptxsim.Fault) as error:
                ptxsim.run(core, "loops", 8, 32, [out[:100], ptxsim.ReadOnly(x), N], seed=9)
            seen[-1] += (str(error.value).split(" at 0x")[0], str(error.value).split(", ")[2:])
        finally:
            ptxsim.threads(0)
    assert seen[0] == seen[1] == seen[2]
    assert "thread block (3, 0, 0)" in ", ".join(seen[0][3])


def test_a_module_starts_with_its_initial_values(core: str) -> None:
    for _ in range(2):
        out = np.zeros(8, np.int32)
        ptxsim.run(core, "carries_counters", 1, 8, [out])
        assert out.tolist() == [3, 1, 4, 1, 5, 9, 2, 6]


def test_lanes_that_spin_do_not_starve_others(core: str) -> None:
    lock, count = np.zeros(1, np.int32), np.zeros(1, np.int32)
    ptxsim.run(core, "spin_lock", 2, 64, [lock, count])
    assert count[0] == 128


def test_a_program_that_does_not_end(core: str) -> None:
    ptxsim.instruction_limit(5000)
    try:
        with pytest.raises(ptxsim.Fault, match="runaway"):
            ptxsim.run(core, "forever", 1, 32, [np.zeros(1, np.int32)])
    finally:
        ptxsim.instruction_limit(0)


def test_a_failed_assertion(core: str) -> None:
    with pytest.raises(ptxsim.Fault) as error:
        ptxsim.run(core, "asserts", 1, 64, [np.zeros(64, np.int32)])
    line = line_of("assert(threadIdx.x")
    for part in ("trap: assertion failed: threadIdx.x != 37", f"core.cu:{line}", "warp 1, lane 5"):
        assert part in str(error.value), str(error.value)


def read(array: NDArray[np.int32], n: int, core: str) -> str:
    out = np.zeros(N, np.int32)
    with pytest.raises(ptxsim.Fault) as error:
        ptxsim.run(core, "nested_branches", 2, 128, [out, ptxsim.ReadOnly(array), n])
    return str(error.value)


def test_reports_name_everything(core: str) -> None:
    """One warp alone, so that no order of warps decides which comes first."""
    array, out = np.zeros(12, np.int32), np.zeros(N, np.int32)
    with pytest.raises(ptxsim.Fault) as error:
        ptxsim.run(core, "nested_branches", 2, 32, [out, ptxsim.ReadOnly(array), N])
    for part in (
        "out-of-bounds: lane 12 reads 4 bytes at 0x",
        "0 bytes past the end of 'argument 1' (48 bytes)",
        "kernel nested_branches, thread block (0, 0, 0) of (2, 1, 1), warp 0, lanes 12-31",
        "PTX line ",
        f"ld.global.u32 (core.cu:{line_of('int x = in[i];')})",
    ):
        assert part in str(error.value)


def test_misaligned(core: str) -> None:
    raw = np.zeros(4 * N + 8, np.uint8)
    start = -raw.ctypes.data % 4 + 2
    report = read(raw[start : start + 4 * N], N, core)  # type: ignore[arg-type]
    assert report.startswith("misaligned: ") and "not a multiple of 4" in report


def test_each_seed_has_its_own_order_of_warps(core: str) -> None:
    def order(seed: int) -> list[int]:
        out = np.zeros(128, np.int32)
        ptxsim.run(core, "order", 1, 256, [out], seed=seed)
        assert sorted(out.tolist()) == list(range(128))
        return out.tolist()

    orders = [order(seed) for seed in range(6)]
    assert len({tuple(o) for o in orders}) == 6
    assert orders == [order(seed) for seed in range(6)]
    firsts = {o.index(0) % 8 for o in orders}
    assert len(firsts) > 1


def test_lanes_that_meet_again_go_on_together() -> None:
    """Each instruction behind the branches is counted once for the warp."""
    text = """.version 9.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 p) { .reg .b64 %q<3>; .reg .b32 %r<4>; .reg .pred %p<3>;
  ld.param.u64 %q0, [p]; mov.u32 %r0, %laneid; mul.wide.u32 %q1, %r0, 4; add.s64 %q0, %q0, %q1;
  setp.lt.u32 %p0, %r0, 7; setp.lt.u32 %p1, %r0, 20; mov.u32 %r1, 0;
  @%p0 bra A; @%p1 bra B;
  cvt.u16.u32 %r2, %r0; bra JOIN;
A: cvt.u16.u32 %r2, %r0; bra JOIN;
B: cvt.u16.u32 %r2, %r0;
JOIN: ex2.approx.f32 %r3, 0f00000000; nanosleep.u32 20; ex2.approx.f32 %r3, 0f00000000;
  mov.u32 %r1, %clock; st.global.u32 [%q0], %r1; ret; }"""
    out = np.zeros(32, np.int32)
    ptxsim.run(text, "k", 1, 32, [out])
    counts = ptxsim.counters()
    assert counts["instructions"]["convert"] == 3  # once for each side
    assert counts["instructions"]["exp"] == 2 and counts["exp"] == 64
    assert counts["instructions"]["store"] == 1
    assert len(set(out.tolist())) == 1 and out[0] > 10
