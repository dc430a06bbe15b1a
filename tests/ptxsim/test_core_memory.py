"""ld and st of every width and space, address arithmetic, and what accesses cost."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import ptxsim

HEAD = ".version 9.0\n.target sm_80\n.address_size 64\n"
Bits = NDArray[np.generic]


def kernel(body: str, *, before: str = "", pointers: int = 2) -> str:
    """%q0, %q1, ...: the pointers; %t, %tw: the thread's index; %r, %rs, %w, %f: scratch."""
    parameters = ", ".join(f".param .u64 p{i}" for i in range(pointers))
    loads = " ".join(f"ld.param.u64 %q{i}, [p{i}];" for i in range(pointers))
    return (
        HEAD + f"{before}\n.visible .entry k({parameters}) {{\n"
        ".reg .b64 %q<8>, %w<16>, %tw; .reg .b32 %r<16>, %t; .reg .b16 %rs<16>; .reg .pred %p<4>;\n"
        f".reg .f32 %f<16>; .reg .f64 %d<8>; .shared .align 16 .b8 sm[1024];\n{loads}\n"
        f"mov.u32 %t, %tid.x; cvt.u64.u32 %tw, %t;\n{body}\nret; }}\n"
    )


def run(text: str, *args: Bits, threads: int = 32, **options: int) -> None:
    ptxsim.run(text, "k", 1, threads, args, **options)


@pytest.mark.parametrize("space", ["global", "shared", "local", ""])
@pytest.mark.parametrize(
    ("bits", "count"),
    [(b, c) for b in (8, 16, 32, 64) for c in (1, 2, 4) if b * c <= 128],
)
def test_widths(space: str, bits: int, count: int) -> None:
    """From global memory through `space` and back: bytes must come out as they went in."""
    size = bits // 8 * count
    vector = f".v{count}" if count > 1 else ""
    register = {8: "%rs", 16: "%rs", 32: "%r", 64: "%w"}[bits]
    first = 4
    names = ", ".join(f"{register}{first + i}" for i in range(count))
    data = f"{{{names}}}" if count > 1 else names
    where = {
        "global": "add.s64 %w0, %q0, %w1;",
        "shared": "mov.u32 %r0, sm; cvt.u64.u32 %w0, %r0; add.s64 %w0, %w0, %w1;",
        "local": "mov.u64 %w0, own; add.s64 %w0, %w0, 32;",
        "": "mov.u64 %w0, own; add.s64 %w0, %w0, 16; cvta.local.u64 %w0, %w0;",
    }[space]
    space_part = f".{space}" if space else ""
    clear = " ".join(f"mov.b{max(bits, 16)} {register}{first + i}, 0;" for i in range(count))
    body = f"""
    .local .align 16 .b8 own[64];
    mul.lo.u64 %w1, %tw, {size}; add.s64 %q1, %q1, %w1;
    {where}
    ld.global{vector}.b{bits} {data}, [%q1];
    st{space_part}{vector}.b{bits} [%w0], {data};
    {clear}
    ld{space_part}{vector}.u{bits} {data}, [%w0];
    add.s64 %w2, %q0, %w1;
    st.global{vector}.u{bits} [%w2], {data};"""
    rng = np.random.default_rng(bits + count)
    given = _aligned(rng.integers(0, 256, 32 * size, dtype=np.uint8))
    out = _aligned(np.zeros(32 * size, np.uint8))
    run(kernel(body), out, given)
    assert (out == given).all()


def _aligned(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    room = np.zeros(len(array) + 32, np.uint8)
    start = -room.ctypes.data % 32
    room[start : start + len(array)] = array
    return room[start : start + len(array)]


def test_sign_extension_fills_the_register() -> None:
    body = """
    ld.global.s8 %rs0, [%q1]; st.global.b16 [%q0], %rs0;
    ld.global.s8 %r0, [%q1]; st.global.b32 [%q0+8], %r0;
    ld.global.s16 %w0, [%q1]; st.global.b64 [%q0+16], %w0;
    ld.global.u8 %w0, [%q1]; st.global.b64 [%q0+24], %w0;
    ld.global.s32 %w0, [%q1]; st.global.b64 [%q0+32], %w0;
    ld.global.v2.s8 {%r0, %r1}, [%q1]; st.global.v2.b32 [%q0+40], {%r0, %r1};
    ld.global.s8 %rs0, [%q1]; mov.b32 %r0, {%rs0, 0}; st.global.b32 [%q0+48], %r0;"""
    out = np.zeros(7, np.int64)
    given = np.array([0x80, 0xFF, 0xFF, 0xFF], np.uint8).view(np.uint32)
    run(kernel(body), out, given, threads=1)
    assert out.view(np.int16)[0] == -128
    assert out.view(np.int32)[2] == -128
    assert out[2:5].tolist() == [-128, 128, -128]
    assert out.view(np.int32)[10:12].tolist() == [-128, -1]
    assert out.view(np.uint32)[12] == 0xFF80


HINTS = """
ld.global.nc.L1::no_allocate.L2::128B.v4.f32 {%f0, %f1, %f2, %f3}, [%q1];
ld.global.ca.b32 %r0, [%q1]; ld.global.cg.b32 %r1, [%q1]; ld.global.lu.b32 %r1, [%q1];
ld.volatile.global.u32 %r2, [%q1]; ld.relaxed.gpu.global.u32 %r3, [%q1];
ld.acquire.sys.global.u32 %r4, [%q1]; ld.weak.global.u32 %r5, [%q1]; ldu.global.u32 %r6, [%q1];
createpolicy.fractional.L2::evict_first.b64 %w0, 1.0;
ld.global.L1::evict_last.L2::cache_hint.b32 %r7, [%q1], %w0;
prefetch.global.L2 [%q1]; prefetch.L1 [%q1]; prefetchu.L1 [%q1];
fence.acq_rel.gpu; fence.sc.sys; membar.gl; membar.cta;
st.volatile.global.u32 [%q0], %r2; st.release.gpu.global.u32 [%q0+4], %r3;
st.global.cs.f32 [%q0+8], %f2; st.global.L1::no_allocate.b32 [%q0+12], %r7;"""


def test_hints_change_nothing() -> None:
    out, given = np.zeros(4, np.int32), _aligned(np.arange(16, dtype=np.uint8))
    run(kernel(HINTS), out, given, threads=1)
    words = given.view(np.int32)
    assert out.tolist() == [words[0], words[0], words[2], words[0]]


def test_variables() -> None:
    before = """
    .visible .global .align 8 .u64 table[3] = {numbers, generic(numbers)+4, 7};
    .global .align 4 .b8 bytes[6] = {1, 2, 0xff};
    .global .align 4 .u32 numbers[2][2] = {{10, 11}, {12, 13}};
    .const .align 4 .f32 constants[3] = {0f3F800000, 2.5, -3.0};
    .global .f64 one = 0d3FF0000000000000;"""
    body = """
    mov.u64 %w0, table; ld.global.u64 %w1, [%w0]; ld.global.u64 %w2, [table+8];
    ld.global.u32 %r0, [%w1]; ld.u32 %r1, [%w2+4]; ld.global.u32 %r2, [numbers+12];
    st.global.v2.b32 [%q0], {%r0, %r1}; st.global.b32 [%q0+8], %r2;
    ld.const.f32 %f0, [constants+4]; mov.u64 %w3, constants; ld.const.f32 %f1, [%w3+8];
    st.global.v2.f32 [%q0+16], {%f0, %f1};
    cvta.const.u64 %w3, %w3; ld.f32 %f2, [%w3]; st.global.f32 [%q0+24], %f2;
    ld.global.f64 %d0, [one]; st.global.f64 [%q0+32], %d0;
    ld.global.u8 %rs0, [bytes+2]; st.global.b16 [%q0+40], %rs0;
    isspacep.const %p0, %w3; isspacep.global %p1, %w0; isspacep.global %p2, %w3;
    selp.u32 %r3, 1, 0, %p0; @%p1 add.u32 %r3, %r3, 2; @%p2 add.u32 %r3, %r3, 4;
    st.global.u32 [%q0+44], %r3;"""
    out = _aligned(np.zeros(48, np.uint8))
    run(kernel(body, before=before, pointers=1), out, threads=1)
    assert out.view(np.uint32)[:3].tolist() == [10, 12, 13]
    assert out.view(np.float32)[4:7].tolist() == [2.5, -3.0, 1.0]
    assert out.view(np.float64)[4] == 1.0
    assert out.view(np.uint16)[20] == 0xFF and out.view(np.uint32)[11] == 3


def test_windows() -> None:
    """cvta both ways, and isspacep."""
    body = """
    .local .align 8 .b8 own[8];
    cvta.shared.u64 %w0, 16; cvta.to.shared.u64 %w1, %w0; st.global.u64 [%q0], %w1;
    mov.u64 %w2, own; cvta.local.u64 %w3, %w2; cvta.to.local.u64 %w4, %w3;
    sub.s64 %w4, %w4, %w2; st.global.u64 [%q0+8], %w4;
    cvta.to.global.u64 %w5, %q0; sub.s64 %w5, %w5, %q0; st.global.u64 [%q0+16], %w5;
    isspacep.shared %p0, %w0; isspacep.local %p1, %w3; isspacep.shared %p2, %w3;
    isspacep.global %p3, %w0;
    selp.u64 %w6, 1, 0, %p0; @%p1 add.u64 %w6, %w6, 2; @%p2 add.u64 %w6, %w6, 4;
    @%p3 add.u64 %w6, %w6, 8; st.global.u64 [%q0+24], %w6;"""
    out = np.zeros(4, np.uint64)
    run(kernel(body, pointers=1), out, threads=1)
    assert out.tolist() == [16, 0, 0, 3]


FAULTS = {
    "out-of-bounds: lane 31 reads 4 bytes at 0x400, byte 1024 of shared memory, of which the block "
    "has 1024 bytes": "mad.lo.u32 %r0, %t, 4, 900; ld.shared.u32 %r1, [%r0];",
    "misaligned: lane 1 writes 8 bytes at 0x4, 'sm' + 4 (byte 4 of shared memory): not a multiple "
    "of 8": "mul.lo.u32 %r0, %t, 4; st.shared.u64 [%r0], %tw;",
    "out-of-bounds: lane 0 writes 4 bytes at 0x10, byte 16 of local memory, of which a thread has "
    "16 bytes": ".local .b8 own[16]; mov.u64 %w0, own; st.local.u32 [%w0+16], %t;",
    "out-of-bounds: lane 0 reads 4 bytes at 0x10, byte 16 of parameter memory, of which the kernel "
    "has 16 bytes": "ld.param.u32 %r0, [p1+8];",
    "read-only: lane 0 writes 4 bytes at": "mov.u64 %w0, p0; cvta.param.u64 %w1, %w0;"
    "st.u32 [%w1], 0;",
    "read-only: lane 0 writes 4 bytes at 0x0, byte 0": "st.param.u32 [p0], 1;",
    "out-of-bounds: lane 2 reads 4 bytes at 0x2, near no memory": "setp.eq.u32 %p0, %t, 2;"
    "@%p0 ld.global.u8 %rs0, [2];",
}


@pytest.mark.parametrize("report", FAULTS)
def test_faults(report: str) -> None:
    out, given = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    with pytest.raises(ptxsim.Fault) as error:
        run(kernel(FAULTS[report]), out, given)
    got = str(error.value)
    assert report.replace("reads 4 bytes at 0x2", "reads 1 bytes at 0x2") in got, got


def test_what_was_never_written_is_not_zero() -> None:
    body = ".local .align 4 .b8 own[4]; ld.local.u32 %r0, [own]; st.global.u32 [%q0], %r0;"
    out = np.zeros(1, np.uint32)
    run(kernel(body, pointers=1), out, threads=1)
    assert out[0] == 0xFFFFFFFF


def counted(body: str, *, threads: int = 32) -> dict[str, object]:
    arrays = [_aligned(np.zeros(8192, np.uint8)) for _ in range(2)]
    run(kernel(body), *arrays, threads=threads)
    return ptxsim.counters()


@pytest.mark.parametrize(
    ("stride", "size", "sectors", "ideal"),
    [(4, 4, 4, 4), (8, 4, 8, 4), (32, 4, 32, 4), (0, 4, 1, 1), (16, 16, 16, 16), (128, 8, 32, 8)],
)
def test_sectors(stride: int, size: int, sectors: int, ideal: int) -> None:
    data = {4: "%r0", 8: "%w0", 16: "{%r0, %r1, %r2, %r3}"}[size]
    kind = {4: "b32", 8: "b64", 16: "v4.b32"}[size]
    body = f"mul.lo.u64 %w1, %tw, {stride}; add.s64 %w1, %w1, %q1; ld.global.{kind} {data}, [%w1];"
    counts = counted(body)
    assert counts["regions"] == {
        "argument 0": {"read": 0, "written": 0},
        "argument 1": {"read": 32 * size, "written": 0},
    }
    read = counts["global_read"]
    assert read == {"bytes": 32 * size, "sectors": sectors, "ideal_sectors": ideal}


@pytest.mark.parametrize(
    ("stride", "kind", "extra"),
    [
        (4, "b32", 0),
        (8, "b32", 1),
        (128 // 4, "b32", 7),  # eight lanes to each of four banks
        (0, "b32", 0),  # one word for all
        (8, "b64", 0),
        (16, "b64", 2),  # two of 16 lanes to each bank, twice
        (16, "v4.b32", 0),
        (32, "v4.b32", 4),  # two of eight lanes, four times
        (2, "b16", 0),
    ],
)
def test_bank_conflicts(stride: int, kind: str, extra: int) -> None:
    data = {"b32": "%r2", "b64": "%w2", "v4.b32": "{%r2, %r3, %r4, %r5}", "b16": "%rs2"}[kind]
    clear = "".join(f"mov.b32 %r{i}, 0;" for i in range(2, 6)) + "mov.b64 %w2, 0; mov.b16 %rs2, 0;"
    body = f"{clear} mul.lo.u32 %r0, %t, {stride}; st.shared.{kind} [%r0], {data};"
    if stride == 0:
        body = f"{clear} mov.u32 %r0, 0; setp.eq.u32 %p0, %t, 0; @%p0 st.shared.b32 [%r0], %r2;"
        body += "bar.sync 0; ld.shared.b32 %r2, [%r0];"
    assert counted(body)["bank_conflicts"] == extra


def test_counts_of_instructions() -> None:
    body = """
    setp.lt.u32 %p0, %t, 8; @%p0 bra A; add.u32 %r0, %t, 1; bra.uni A;
    A: ex2.approx.f32 %f0, 0f3F800000; bar.sync 0; st.shared.u32 [0], 1;"""
    got = counted(
        "setp.eq.u32 %p1, %t, 99; @%p1 bra B;" + body.replace("st.shared", "B:@%p1 st.shared")
    )
    instructions = got["instructions"]
    assert isinstance(instructions, dict)
    assert instructions["exp"] == 1 and got["exp"] == 32
    assert instructions["barrier"] == 1 and instructions["store"] == 0
    assert got["thread_blocks"] == 1
    assert instructions["total"] == sum(v for k, v in instructions.items() if k != "total")
