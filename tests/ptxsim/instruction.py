"""One instruction, executed for many lanes: what the tests of each family are written with.

The kernels are for sm_90, which has every instruction that the families know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests import ptxsim

HEAD = ".version 8.6\n.target sm_90\n.address_size 64\n"

Bits = NDArray[np.generic]
# A destination: "b16", "b32", "b64", "pred", "_" (dropped), or a tuple of them for "{a, b}".
Result = str | tuple[str, ...]


@dataclass
class Negated:
    """A predicate written "!p"."""

    values: NDArray[np.bool_]


# A source: one value per lane, an immediate, "{a, b}", or a predicate.
Source = Bits | int | Sequence[Bits] | Negated


class _Kernel:
    """The text of a kernel that loads, executes and stores, and the arrays that it is run on."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.arrays: list[Bits] = []
        self.registers: list[str] = []
        self.before: list[str] = []
        self.after: list[str] = []

    def _parameter(self, array: Bits) -> str:
        self.arrays.append(array)
        return f"%rd{len(self.arrays)}"

    def _register(self, kind: str) -> str:
        name = f"%v{len(self.registers)}"
        self.registers.append(f".reg .{kind} {name};")
        return name

    def source(self, value: Source) -> str:
        if isinstance(value, Negated):
            return "!" + self.source(value.values)
        if isinstance(value, int):
            return str(value)
        if not isinstance(value, np.ndarray):
            return "{" + ", ".join(self.source(item) for item in value) + "}"
        assert value.shape == (self.lanes,), (value.shape, self.lanes)
        if value.dtype == np.bool_:
            bits = self.source(value.astype(np.uint32))
            name = self._register("pred")
            self.before.append(f"setp.ne.b32 {name}, {bits}, 0;")
            return name
        kind = f"b{8 * value.dtype.itemsize}"
        name = self._register(kind)
        address = self._parameter(np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}"))
        self.before.append(f"ld.global.{kind} {name}, [{address}];")
        return name

    def result(self, kind: Result, initial: int) -> str:
        if isinstance(kind, tuple):
            return "{" + ", ".join(self.result(item, initial) for item in kind) + "}"
        if kind == "_":
            return "_"
        name = self._register(kind)
        stored, width = name, kind
        if kind == "pred":
            self.before.append(f"setp.ne.s32 {name}, {initial & 1}, 0;")
            stored, width = self._register("b32"), "b32"
            self.after.append(f"selp.b32 {stored}, 1, 0, {name};")
        else:
            self.before.append(f"mov.{kind} {name}, {initial};")
        array = np.zeros(self.lanes, f"u{int(width[1:]) // 8}")
        self.after.append(f"st.global.{width} [{self._parameter(array)}], {stored};")
        return name

    def text(self, statement: str, active: str | None) -> str:
        count = len(self.arrays)
        parameters = ", ".join(f".param .u64 p{k}" for k in range(1, count + 1))
        lines = [f".reg .b64 %rd<{count + 1}>;", ".reg .b32 %t<4>;", *self.registers]
        lines += ["mov.u32 %t0, %tid.x;", "mov.u32 %t1, %ctaid.x;", "mov.u32 %t2, %ntid.x;"]
        lines += ["mad.lo.u32 %t3, %t1, %t2, %t0;"]
        for k, array in enumerate(self.arrays, 1):
            lines += [f"ld.param.u64 %rd{k}, [p{k}];"]
            lines += [f"mad.wide.u32 %rd{k}, %t3, {array.dtype.itemsize}, %rd{k};"]
        lines += self.before
        lines += [f"@!{active} bra SKIP;", statement, "SKIP:"] if active else [statement]
        lines += [*self.after, "ret;"]
        return HEAD + f".visible .entry test({parameters})\n{{\n" + "\n".join(lines) + "\n}\n"


def launch(text: str, blocks: int, threads: int, arrays: Sequence[Bits], *, seed: int = 0) -> None:
    """Runs the kernel `test` of a text."""
    ptxsim.device(90)
    try:
        ptxsim.run(text, "test", blocks, threads, arrays, seed=seed)
    finally:
        ptxsim.device(80)


def execute(
    opcode: str,
    results: Sequence[Result],
    *sources: Source,
    pair: bool = False,
    active: NDArray[np.bool_] | None = None,
    initial: int = 0,
    seed: int = 0,
) -> list[Bits]:
    """What the destinations of `opcode results, sources` hold, as bits, flat and in order.

    `pair` writes the two destinations as "d|p". Lanes that are not `active` jump over the
    instruction and keep `initial`.
    """
    lanes = len(next(a for a in _flat([*sources, active]) if isinstance(a, np.ndarray)))
    assert lanes % 32 == 0
    kernel = _Kernel(lanes)
    written = [kernel.result(kind, initial) for kind in results]
    first = ["|".join(written)] if pair else written
    operands = ", ".join(first + [kernel.source(s) for s in sources])
    guard = None if active is None else kernel.source(active)
    text = kernel.text(f"{opcode} {operands};", guard)
    block = 256 if lanes % 256 == 0 else 32
    launch(text, lanes // block, block, kernel.arrays, seed=seed)
    count = sum(kind != "_" for kind in _flat(results))
    return kernel.arrays[:count]


def _flat(items: Sequence[object]) -> list[object]:
    flat: list[object] = []
    for item in items:
        if isinstance(item, Negated):
            flat.append(item.values)
        elif isinstance(item, (tuple, list)):
            flat += _flat(item)
        else:
            flat.append(item)
    return flat
