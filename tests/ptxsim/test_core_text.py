"""Reading PTX: what is refused, and how the refusal names it; and the driver's table."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator

import numpy as np
import pytest

from tests import ptxsim

HEAD = ".version 9.0\n.target sm_80\n.address_size 64\n"


def kernel(body: str) -> str:
    return (
        f"{HEAD}.visible .entry k(.param .u64 p)\n{{\n"
        ".reg .b64 %q<4>; .reg .b32 %r<8>; .reg .f32 %f<8>; .reg .pred %p<4>;\n"
        f"ld.param.u64 %q0, [p];\n{body}\nret;\n}}\n"
    )


def run(text: str, size: int = 8, threads: int = 1) -> list[int]:
    out = np.zeros(size, np.int32)
    ptxsim.run(text, "k", 1, threads, [out])
    return out.tolist()


REFUSED = {
    "frobnicate.u32 %r0, %r1;": "PTX line 9: frobnicate.u32: an instruction that the",
    "add.wrong.s32 %r0, %r1, %r2;": "PTX line 9: add.wrong.s32: modifier .wrong",
    "add.s32 %r0, %r1;": "add.s32: 2 operands",
    "add.s32 %r0, %r1, %nobody;": "a register, variable or special register is expected, "
    "not '%nobody'",
    "add.s32 %r0, %r1, %r99;": "not '%r99'",
    "add.s32 %r0, %r1, ;": "an operand is expected, not ';'",
    "add.s32 %r0, %r1, %r2": "PTX line 10: ',' is expected, not 'ret'",
    "bra NOWHERE;": "PTX line 9: unknown label NOWHERE",
    "A: A: ret;": "a label that is there already, not 'A'",
    "@%r9 bra A;": "a predicate is expected, not '%r9'",
    "ld.global.v2.u32 %r0, [%q0];": "the number of registers is not that of the opcode's vector",
    "ld.global.v2.u32 {%r0}, [%q0];": "the number of registers is not that",
    "st.shared.u32 %r0, %r1;": "an address in brackets is expected",
    "setp.foo.s32 %p0, %r0, %r1;": "setp.foo.s32: no comparison that is known",
    "setp.lt.b32 %p0, %r0, %r1;": "an order of untyped bits",
    "fma.f32 %f0, %f1, %f1, %f1;": "fma.f32: no rounding",
    "call.uni nobody, (p);": "a call of a function that is not declared",
    "mov.f32 %f0, 0f3F80;": "PTX line 9: a hexadecimal float has 8 digits",
    "mov.u32 %r0, 12abc;": "PTX line 9: a number that ends in 'a'",
    ".surprise 3;": "PTX line 9: an unknown directive, not '.surprise'",
    ".reg .v4 .f32 %v;": "vectors of registers are not supported",
    "/* never ends": "a comment does not end",
}


@pytest.mark.parametrize("body", REFUSED)
def test_refusals_name_the_place(body: str) -> None:
    with pytest.raises(ptxsim.Rejected) as error:
        run(kernel("mov.u32 %r7, 0;\n" + body))
    assert REFUSED[body] in str(error.value), str(error.value)


def test_refusals_outside_of_bodies() -> None:
    for extra, words in {
        ".tex .u32 t;": "PTX line 4: an unknown directive, not '.tex'",
        ".global .b128x x;": "an unknown type '.b128x'",
        ".global .u32 x = {1, 2};": "an initial value goes beyond its variable",
        ".global .u64 x = nobody;": "an unknown variable, not 'nobody'",
        ".func f() { call.uni f, (); ret; }": "PTX line 4: function f calls itself",
    }.items():
        body = "{ call.uni f, (); }" if "func" in extra else ""
        text = kernel(body).replace(HEAD, HEAD + extra + "\n")
        with pytest.raises(ptxsim.Rejected) as error:
            run(text)
        assert words in str(error.value), str(error.value)
    with pytest.raises(ptxsim.Rejected, match="there is no .target"):
        run(kernel("").replace(".target sm_80", ""))
    with pytest.raises(ptxsim.Rejected, match="only .address_size 64"):
        run(kernel("").replace("64\n", "32\n", 1))
    with pytest.raises(ptxsim.Rejected, match="cubin"):
        ptxsim.run("\x7fELF", "k", 1, 1, [])


def test_a_module_for_a_newer_device() -> None:
    text = kernel("").replace("sm_80", "sm_90a")
    with pytest.raises(ptxsim.Rejected, match="sm_90 and the simulated device is sm_80"):
        run(text)


def test_scopes_have_their_own_names() -> None:
    body = """
    .reg .b32 x; mov.u32 x, 1;
    { .reg .b32 x; mov.u32 x, 2; st.global.u32 [%q0], x;
      { .reg .b32 x<3>; mov.u32 x2, 3; st.global.u32 [%q0+4], x2; } }
    st.global.u32 [%q0+8], x; st.global.u32 [%q0+12], -7; // a comment
    /* two
       lines */ .pragma "nounroll"; .loc 1 2 3
    @!%p0 st.global.u32 [%q0+16], 0x7fffffff;
    mov.b32 %r0, 0b101; mov.b32 %r1, 017; mov.b32 %r2, 5U;
    st.global.v2.b32 [%q0+24], {%r0, %r1};"""
    assert run(kernel(body)) == [2, 3, 1, -7, 0x7FFFFFFF, 0, 5, 15]


def test_functions_with_registers_as_parameters() -> None:
    f = """.func (.reg .b32 out) twice(.reg .b32 a) { add.s32 out, a, a; ret; }
    .func (.reg .b32 out) quad(.reg .b32 a) { .reg .b32 t;
      call.uni (t), twice, (a); call.uni (out), twice, (t); ret; }\n"""
    body = """mov.u32 %r0, %tid.x; setp.gt.u32 %p0, %r0, 2; mov.u32 %r1, -1;
    @%p0 call (%r1), quad, (%r0);
    mul.wide.u32 %q1, %r0, 4; add.s64 %q0, %q0, %q1; st.global.u32 [%q0], %r1;"""
    assert run(kernel(body).replace(HEAD, HEAD + f), threads=8) == [-1, -1, -1, 12, 16, 20, 24, 28]


def test_registers_that_share_rows_keep_their_values() -> None:
    """More values alive across a loop than would fit if the loop's own took their rows."""
    lines = [f"mov.u32 %a{i}, {i * i};" for i in range(40)]
    lines += ["mov.u32 %n, 0;", "L:"]
    lines += [f"add.u32 %b{i}, %n, {i};" for i in range(40)]
    lines += [f"add.u32 %a{i}, %a{i}, %b{i};" for i in range(0, 40, 2)]
    lines += ["add.u32 %n, %n, 1; setp.lt.u32 %p0, %n, 5; @%p0 bra L;"]
    lines += [f"st.global.u32 [%q0+{4 * i}], %a{i};" for i in range(40)]
    body = ".reg .b32 %a<40>, %b<40>, %n;\n" + "\n".join(lines)
    want = [i * i + (0 if i % 2 else 5 * i + 10) for i in range(40)]
    assert run(kernel(body), size=40) == want


def test_a_guarded_write_keeps_the_other_lanes() -> None:
    body = """mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 1; setp.eq.u32 %p0, %r1, 0;
    mov.u32 %r2, 5; mov.u32 %r3, 6; @%p0 mov.u32 %r3, %r2; mov.u32 %r4, 9; @!%p0 mov.u32 %r4, 8;
    mul.wide.u32 %q1, %r0, 8; add.s64 %q0, %q0, %q1; st.global.v2.u32 [%q0], {%r3, %r4};"""
    assert run(kernel(body), threads=4) == [5, 9, 6, 8, 5, 9, 6, 8]


def test_reading_is_fast() -> None:
    body = "".join(f"fma.rn.f32 %x{i + 2}, %x{i}, %x{i + 1}, 0f3F800000;\n" for i in range(45_000))
    text = kernel(".reg .f32 %x<45002>;\n" + body)
    start = time.process_time()
    run(text)
    assert time.process_time() - start < 1.5  # 0.1 s where it was written


class Config(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_uint32 * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint32),
    ]


NAMES = (
    "Init DeviceGetCount DeviceGet DeviceGetAttribute DevicePrimaryCtxRetain CtxGetCurrent "
    "CtxSetCurrent CtxGetDevice ModuleLoadDataEx ModuleUnload ModuleGetFunction FuncGetAttribute "
    "FuncSetAttribute OccupancyMaxActiveBlocksPerMultiprocessor LaunchKernelEx MemAlloc MemFree "
    "MemsetD8Async MemcpyDtoHAsync StreamIsCapturing StreamSynchronize "
    "ThreadExchangeStreamCaptureMode GetErrorString describe_memory last_report"
).split()


class Table:
    """The driver's table, called as the launcher calls it."""

    def __init__(self) -> None:
        address = ptxsim.library().ptxsim_driver()
        head = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint32))
        pointers = ctypes.cast(address + 8, ctypes.POINTER(ctypes.c_void_p))
        assert head[1] == 16 + 8 * len(NAMES)
        self.name = ctypes.cast(pointers[0], ctypes.c_char_p).value
        self._functions = {
            name: ctypes.CFUNCTYPE(ctypes.c_int)(pointers[i + 1] or 0)
            for i, name in enumerate(NAMES)
        }

    def __call__(self, name: str, *args: object) -> int:
        return self._functions[name](*args)


@pytest.fixture
def loaded() -> Iterator[tuple[Table, ctypes.c_void_p]]:
    table, module, function = Table(), ctypes.c_void_p(), ctypes.c_void_p()
    text = kernel(".shared .align 4 .b8 s[1000]; mov.u32 %r0, s; st.global.u32 [%q0], 3;")
    text = text.replace("(.param .u64 p)", "(.param .u64 p) .maxntid 64, 1, 1")
    assert table("ModuleLoadDataEx", ctypes.byref(module), text.encode(), 0, None, None) == 0
    assert table("ModuleGetFunction", ctypes.byref(function), module, b"k") == 0
    yield table, function
    assert table("ModuleUnload", module) == 0


def test_attributes(loaded: tuple[Table, ctypes.c_void_p]) -> None:
    table, function = loaded
    assert table.name == b"simulator"
    value = ctypes.c_int()

    def device(attribute: int) -> int:
        assert table("DeviceGetAttribute", ctypes.byref(value), attribute, 0) == 0
        return value.value

    assert (device(75), device(76), device(97)) == (8, 0, 163 * 1024)
    ptxsim.device(89)
    assert (device(75), device(76), device(97)) == (8, 9, 99 * 1024)
    ptxsim.device(80)

    def attribute(which: int) -> int:
        assert table("FuncGetAttribute", ctypes.byref(value), which, function) == 0
        return value.value

    assert attribute(0) == 64 and attribute(1) == 1000 and attribute(8) == 48 * 1024
    assert table("FuncSetAttribute", function, 8, 160 * 1024) == 0 and attribute(8) == 160 * 1024
    assert table("FuncSetAttribute", function, 8, 163 * 1024) == 1
    assert "at most" in ptxsim.report()


def test_launches_that_are_refused(loaded: tuple[Table, ctypes.c_void_p]) -> None:
    table, function = loaded
    address = ctypes.c_uint64()
    assert table("MemAlloc", ctypes.byref(address), 4) == 0
    params = (ctypes.c_void_p * 1)(ctypes.addressof(address))

    def launch(*size: int) -> int:
        config = Config((ctypes.c_uint32 * 7)(*size), None, None, 0)
        return table("LaunchKernelEx", ctypes.byref(config), function, params, None)

    assert launch(1, 1, 1, 64, 1, 1, 0) == 0
    out = ctypes.c_int32()
    assert table("MemcpyDtoHAsync", ctypes.byref(out), address, 4, None) == 0 and out.value == 3
    assert launch(1, 1, 1, 65, 1, 1, 0) == 1 and "65 threads" in ptxsim.report()
    assert launch(0, 1, 1, 64, 1, 1, 0) == 1 and "a grid of 0" in ptxsim.report()
    assert launch(1, 1, 1, 64, 1, 1, 50_000) == 1 and "50000 bytes" in ptxsim.report()
    assert table("MemFree", address) == 0
    assert launch(1, 1, 1, 64, 1, 1, 0) == 719
    assert ptxsim.report().startswith("out-of-bounds: ")
    assert table("MemFree", address) == 1
