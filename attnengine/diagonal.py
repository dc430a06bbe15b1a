"""Values that a pair (q_idx, kv_idx) has through kv_idx - q_idx alone, such as relative-position
buckets and the biases read through them.

A kernel computes an expensive one once per launch for each of the L + S - 1 diagonals of the score
matrix, not for each of the L x S pairs (``templates/cpu/diagonal.h``). A gradient that is scattered
to such an index is first summed along the diagonals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .arch import LANE_LOOP, LANE_LOOP_OPS, OP_COST
from .derive import Derived, Scatter
from .ir import REDUCTIONS, Node, const_value, walk
from .trace import Traced

# Instructions per vector from which reading the value back costs less than computing it.
WORTH = 8.0
_INDEX_BOUND = 2**30  # lengths stay below it (emit.INDEX_LIMIT)


@dataclass(frozen=True)
class Line:
    """a * q_idx + b * kv_idx + c exactly, with |c| <= bound."""

    a: int
    b: int
    bound: int

    def fits(self, bits: int) -> bool:
        largest = max(abs(self.a), abs(self.b), abs(self.a + self.b))
        return largest * _INDEX_BOUND + self.bound < 2 ** (bits - 1)


class Pairs:
    """What nodes know of a pair of indices."""

    def __init__(self) -> None:
        self._lines: dict[int, Line | None] = {}
        self._kinds: dict[int, str] = {}

    def is_diagonal(self, node: Node) -> bool:
        """A function of kv_idx - q_idx (and perhaps of b and h)."""
        return self._kind(node) == "diagonal"

    def is_free(self, node: Node) -> bool:
        """A function of b and h alone."""
        return self._kind(node) == "free"

    def is_summed(self, scatter: Scatter) -> bool:
        """The gradients of a diagonal all go to one element: they are added up before."""
        kinds = {self._kind(i) for i in scatter.index}
        return "diagonal" in kinds and kinds <= {"diagonal", "free"}

    def _kind(self, node: Node) -> str:
        for n in walk([node], known=self._kinds):
            line = self._lines[n.id] = self._line(n)
            below = {self._kinds[a.id] for a in n.args}
            if line is not None and (line.a or line.b):
                kind = "diagonal" if line.a == -line.b else "other"
            elif n.op in REDUCTIONS or (n.op == "input" and n.attr[0] not in ("b", "h")):
                kind = "other"
            else:
                kind = next((k for k in ("other", "diagonal") if k in below), "free")
            self._kinds[n.id] = kind
        return self._kinds[node.id]

    def _line(self, n: Node) -> Line | None:
        if n.dtype not in ("i64", "i32"):
            return None
        if n.op == "const":
            line: Line | None = Line(0, 0, abs(int(const_value(n))))
        elif n.op == "input":
            line = {"q": Line(1, 0, 0), "k": Line(0, 1, 0)}.get(n.attr[0])
        else:
            parts = [self._lines[a.id] for a in n.args]
            line = _combined(n, [p for p in parts if p is not None])
        return line if line is not None and line.fits(32 if n.dtype == "i32" else 64) else None


def _combined(n: Node, parts: list[Line]) -> Line | None:
    if len(parts) != len(n.args):
        return None
    x = parts[0] if parts else Line(0, 0, 0)
    if n.op in ("cast", "splat", "detach"):
        return x
    if n.op == "neg":
        return Line(-x.a, -x.b, x.bound)
    if n.op not in ("add", "sub", "mul"):
        return None
    y = parts[1]
    if n.op == "add":
        return Line(x.a + y.a, x.b + y.b, x.bound + y.bound)
    if n.op == "sub":
        return Line(x.a - y.a, x.b - y.b, x.bound + y.bound)
    for other, line in zip(reversed(n.args), (x, y), strict=True):
        if other.op == "const":
            factor = int(const_value(other))
            return Line(line.a * factor, line.b * factor, line.bound * abs(factor))
    return None


@dataclass(frozen=True)
class Diagonals:
    """What one kernel keeps per diagonal: values read from ``tables`` instead of computed per pair,
    and ``sums`` of gradients before they are scattered."""

    tables: tuple[Node, ...]
    sums: tuple[Scatter, ...]

    def reach(self, roots: Iterable[Node]) -> Iterator[Node]:
        """Nodes that pairs still need: tables themselves, but not what they are made of."""
        tables = {n.id: n for n in self.tables}
        roots = list(roots)
        needed = {r.id for r in roots}
        for n in walk(roots, known=tables):
            needed.update(a.id for a in n.args)
            yield n
        yield from (n for n in self.tables if n.id in needed)


def find(traced: Traced, derived: Derived | None, lanes: int) -> Diagonals:
    """The largest diagonal values of the score (and of its gradient) that are worth a table."""
    pairs = Pairs()
    roots = [traced.score] if traced.score is not None else []
    sums: list[Scatter] = []
    if derived is not None:
        roots += [derived.weights, derived.dscore]
        for s in derived.scatters:
            roots.append(s.value)
            if pairs.is_summed(s):
                sums.append(s)
            else:
                roots += s.index
    found: dict[int, Node] = {}
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        n = stack.pop()
        if n.id in seen:
            continue
        seen.add(n.id)
        if n.dtype != "bool" and pairs.is_diagonal(n) and instructions([n], lanes) >= WORTH:
            found[n.id] = n
        else:
            stack.extend(n.args)
    return Diagonals(tuple(found[i] for i in sorted(found)), tuple(sums))


def instructions(roots: Sequence[Node], lanes: int, without: Diagonals | None = None) -> float:
    """Vector instructions per vector of scores; a table is one load."""
    without = without or Diagonals((), ())
    tables = {n.id for n in without.tables}
    total = 0.0
    for n in without.reach(roots):
        if n.id in tables:
            total += 1.0
        elif not n.vec or n.op in ("input", "const", "cast", "detach", "splat"):
            total += 2.0 if n.op in ("sum", "amax", "amin", "prod") else 0.0
        elif n.op in LANE_LOOP_OPS:
            total += LANE_LOOP * lanes
        else:
            total += OP_COST.get(n.op, 1.0)
    return total
