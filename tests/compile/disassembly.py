"""The innermost loops of a compiled module, read from its disassembly.

A loop is the range of a backward jump inside one function. It is innermost when it calls nothing
and holds no other loop; what it does per round is then the count of its instructions.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(r"^\s*([0-9a-f]+):\t(\S+)\s*([^#<]*)(?:<([^>]*)>)?")
FUNCTION = re.compile(r"^([0-9a-f]+) <(.*)>:$")
VECTOR = re.compile(r"%[xyz]mm\d+")
STACK = re.compile(r"\(%r[sb]p[,)]")
PRODUCT = re.compile(r"^(vdpbf16ps|vfn?m(add|sub)\d+p[sd])$")
# Every exp2 scales by a power of two, or rounds, or builds an exponent; no product does.
EXPONENT = re.compile(r"^(vscalefp[sd]|vrndscalep[sd]|vroundp[sd]|vpsll[dq]|vcvtt?p[sd]2(dq|qq))$")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str
    target: int | None  # of a jump

    @property
    def spills(self) -> bool:
        """Whether it moves a vector to or from the stack."""
        return bool(STACK.search(self.operands) and VECTOR.search(self.operands))

    @property
    def stores(self) -> bool:
        return self.operands.endswith(")")  # AT&T: the destination comes last

    def __str__(self) -> str:
        return f"{self.address:8x}: {self.name} {self.operands}"


@dataclass(frozen=True)
class Loop:
    """``body`` from the first instruction to the backward jump."""

    function: str
    body: tuple[Instruction, ...]

    @property
    def products(self) -> int:
        return sum(bool(PRODUCT.match(i.name)) for i in self.body)

    @property
    def dots(self) -> int:
        """Products that multiply bf16 pairs."""
        return sum(i.name == "vdpbf16ps" for i in self.body)

    @property
    def is_exponential(self) -> bool:
        """Holds an exp2: its polynomial is fused multiply-adds too, but no product."""
        return self.products > 2 and any(EXPONENT.match(i.name) for i in self.body)

    @property
    def spills(self) -> list[Instruction]:
        return [i for i in self.body if i.spills]

    @property
    def share(self) -> float:
        """Products per instruction."""
        return self.products / len(self.body)

    def __str__(self) -> str:
        names = Counter(i.name for i in self.body).most_common(6)
        mix = ", ".join(f"{count} {name}" for name, count in names)
        head = (
            f"{self.body[0].address:x}-{self.body[-1].address:x}: {self.products:3d} products of "
            f"{len(self.body):3d} instructions ({self.share:.0%}), {len(self.spills)} spills: {mix}"
        )
        return "\n".join([head, f"    in {self.function}", *(f"    {i}" for i in self.spills)])


def innermost_loops(module: Path) -> list[Loop]:
    """The innermost loops of every function of a shared object, by ``objdump -d -C``."""
    text = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(module)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    loops: list[Loop] = []
    name, body = "", []
    for line in text.splitlines():
        start = FUNCTION.match(line)
        if start:
            loops += _loops(name, body)
            name, body = start[2], []
            continue
        found = LINE.match(line)
        if found:
            address, mnemonic, operands, _ = found.groups()
            jump = mnemonic.startswith("j") and re.fullmatch(r"[0-9a-f]+", operands.strip())
            target = int(operands, 16) if jump else None
            body.append(Instruction(int(address, 16), mnemonic, operands.strip(), target))
    return loops + _loops(name, body)


def _loops(function: str, body: list[Instruction]) -> list[Loop]:
    index = {x.address: i for i, x in enumerate(body)}
    ranges = {
        (index[x.target], i)
        for i, x in enumerate(body)
        if x.target is not None and x.target in index and index[x.target] <= i
    }
    inner = [
        r for r in ranges
        if not any(o != r and r[0] <= o[0] and o[1] <= r[1] for o in ranges)
        and not any(x.name.startswith("call") for x in body[r[0] : r[1] + 1])
    ]  # fmt: skip
    return [Loop(function, tuple(body[a : b + 1])) for a, b in sorted(inner)]
