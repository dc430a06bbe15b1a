"""Shape operators on arrays: each maps indices, so that only what is read is computed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .aten import Array, Index, Lowering, Unsupported, Value, element_of
from .ir import FLOATS, Node, const_value

UNROLL_LIMIT = 64  # elements of a captured row that a reduction may unroll

# -- positions in arrays ------------------------------------------------------------------------

_OUT_OF_RANGE = 2**31 - 1  # an index that no captured tensor has: its gather reports a fault


def _bounds(n: Node) -> tuple[float, float]:
    """Limits of an index that are evident from its last few operations."""
    if n.dtype == "bool":
        return 0, 1
    if n.op == "const":
        return (const_value(n),) * 2
    if n.op == "input":
        return 0, math.inf
    if n.op == "cast" and n.args[0].dtype not in FLOATS:
        return _bounds(n.args[0])
    if n.op in ("add", "mul", "floor_div", "remainder", "minimum", "maximum"):
        (a, b), (c, d) = (_bounds(x) for x in n.args)
        if n.op == "add":
            return a + c, b + d
        if n.op == "minimum":
            return min(a, c), min(b, d)
        if n.op == "maximum":
            return max(a, c), max(b, d)
        if n.op == "remainder" and c > 0:
            return 0, d - 1
        if n.op == "mul" and a >= 0 and c >= 0:
            return a * c, math.inf if math.inf in (b, d) else b * d
        if n.op == "floor_div" and a >= 0 and c > 0:
            return 0, b
    return (0, 255) if n.dtype == "u8" else (-math.inf, math.inf)


def position(low: Lowering, i: Node, size: int) -> Node:
    """``i`` as an index from 0 on: a negative one counts from the end."""
    if _bounds(i)[0] >= 0:
        return i
    wrapped = low.emit("add", [i, low.index_const(size)], "i64")
    return low.emit("select", [low.emit("lt", [i, low.index_const(0)], "bool"), wrapped, i], "i64")


def checked(low: Lowering, i: Node, size: int, at: Node) -> Node:
    """``at``, where the position ``i`` is below ``size``; elsewhere out of any tensor's range."""
    if low.sizes.get(i.id, size + 1) <= size:
        return at
    lo, hi = _bounds(i)
    for bad, op, limit in ((lo < 0, "ge", 0), (hi >= size, "lt", size)):
        if bad:
            fits = low.emit(op, [i, low.index_const(limit)], "bool")
            at = low.emit("select", [fits, at, low.index_const(_OUT_OF_RANGE)], "i64")
    return at


# -- shape operators on arrays ------------------------------------------------------------------


def select(low: Lowering, a: Array, dim: int, index: int) -> Value:
    dim %= len(a.shape)
    i = low.index_const(index % a.shape[dim])
    shape = a.shape[:dim] + a.shape[dim + 1 :]
    return _make(shape, a.dtype, lambda x: a.element(x[:dim] + (i,) + x[dim:]))


def _make(shape: tuple[int, ...], dtype: str, element: Callable[[Index], Node]) -> Value:
    return Array(shape, dtype, element) if shape else element(())


def slice_(low: Lowering, a: Array, dim: int, start: Any, end: Any, step: int) -> Value:
    dim %= len(a.shape)
    start, stop, step = slice(start, end, step).indices(a.shape[dim])
    size = max(0, math.ceil((stop - start) / step))
    g = low.graph

    def element(x: Index) -> Node:
        i = position(low, x[dim], size)
        scaled = low.emit("mul", [i, g.const(step, "i64")], "i64")
        at = low.emit("add", [scaled, g.const(start, "i64")], "i64")
        return a.element(x[:dim] + (checked(low, i, size, at),) + x[dim + 1 :])

    return Array(a.shape[:dim] + (size,) + a.shape[dim + 1 :], a.dtype, element)


def index(low: Lowering, a: Array, indices: Sequence[Value | None]) -> Value:
    """Advanced indexing: scalars and broadcastable index arrays, ``None`` keeps a dimension."""
    full = list(indices) + [None] * (len(a.shape) - len(indices))
    if any(isinstance(i, (Node, Array)) and i.dtype == "bool" for i in full):
        raise Unsupported("indexing with a boolean tensor", "use torch.where")
    shapes = [i.shape if isinstance(i, Array) else () for i in full if i is not None]
    common = tuple(torch.broadcast_shapes(*shapes)) if shapes else ()
    used = [d for d, i in enumerate(full) if i is not None]
    together = used == list(range(used[0], used[-1] + 1)) if used else True
    at = used[0] if used and together else 0
    kept = [s for s, i in zip(a.shape, full, strict=True) if i is None]
    shape = tuple(kept[:at]) + common + tuple(kept[at:])

    def element(x: Index) -> Node:
        broadcast, rest = x[at : at + len(common)], list(x[:at] + x[at + len(common) :])
        out = []
        for i in full:
            if i is None:
                out.append(rest.pop(0))
            elif isinstance(i, Node):
                out.append(low.graph.cast(i, "i64"))
            else:
                out.append(low.graph.cast(element_of(low, i, broadcast, common), "i64"))
        return a.element(tuple(out))

    return _make(shape, a.dtype, element)


def reshape(low: Lowering, a: Array, shape: Sequence[int]) -> Value:
    numel = math.prod(a.shape)
    sizes = list(shape)
    if -1 in sizes:
        known = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = numel // known if known else 0
    g = low.graph

    def element(x: Index) -> Node:
        flat: Node = g.const(0, "i64")
        places = [position(low, i, s) for i, s in zip(x, sizes, strict=True)]
        for i, s in zip(places, sizes, strict=True):
            flat = low.emit("mul", [flat, g.const(s, "i64")], "i64")
            flat = low.emit("add", [flat, i], "i64")
        out: list[Node] = []
        for d, s in reversed(list(enumerate(a.shape))):
            rest = low.emit("floor_div", [flat, g.const(s, "i64")], "i64")
            out.append(low.emit("remainder", [flat, g.const(s, "i64")], "i64") if d else flat)
            flat = rest
        if out:
            for i, s in zip(places, sizes, strict=True):
                out[-1] = checked(low, i, s, out[-1])
        return a.element(tuple(reversed(out)))

    return _make(tuple(sizes), a.dtype, element)


def permute(a: Array, dims: Sequence[int]) -> Value:
    dims = [d % len(a.shape) for d in dims]

    def element(x: Index) -> Node:
        out: list[Node | None] = [None] * len(dims)
        for i, d in zip(x, dims, strict=True):
            out[d] = i
        return a.element(tuple(o for o in out if o is not None))

    return Array(tuple(a.shape[d] for d in dims), a.dtype, element)


def unsqueeze(a: Value, dim: int) -> Value:
    if isinstance(a, Node):
        return Array((1,), a.dtype, lambda x: a)
    dim %= len(a.shape) + 1
    return Array(
        a.shape[:dim] + (1,) + a.shape[dim:], a.dtype, lambda x: a.element(x[:dim] + x[dim + 1 :])
    )


def squeeze(low: Lowering, a: Array, dims: Sequence[int]) -> Value:
    dims = [d % len(a.shape) for d in dims]
    dims = [d for d in dims if a.shape[d] == 1]
    keep = [d for d in range(len(a.shape)) if d not in dims]
    zero = low.index_const(0)

    def element(x: Index) -> Node:
        rest = list(x)
        return a.element(tuple(zero if d in dims else rest.pop(0) for d in range(len(a.shape))))

    return _make(tuple(a.shape[d] for d in keep), a.dtype, element)


def expand(low: Lowering, a: Value, shape: Sequence[int]) -> Value:
    if isinstance(a, Node):
        return _make(tuple(shape), a.dtype, lambda x: a)
    skip = len(shape) - len(a.shape)
    sizes = tuple(s if s != -1 else a.shape[d - skip] for d, s in enumerate(shape))
    return Array(sizes, a.dtype, lambda x: element_of(low, a, x, sizes))


def reduce(
    low: Lowering, a: Array, op: str, dims: Sequence[int] | None, keepdim: bool, result: str
) -> Value:
    """A reduction over a small captured row, unrolled element by element."""
    rank = len(a.shape)
    axes = sorted(d % rank for d in dims) if dims else list(range(rank))
    count = math.prod(a.shape[d] for d in axes)
    if not 0 < count <= UNROLL_LIMIT:
        raise Unsupported(
            f"a reduction over {count} captured elements (1 to {UNROLL_LIMIT} are unrolled)",
            "reduce before the call and capture the result",
        )
    fold = {
        "sum": "add", "amax": "maximum", "amin": "minimum", "prod": "mul",
        "any": "logical_or", "all": "logical_and",
    }[op]  # fmt: skip
    zero = low.index_const(0)

    def element(x: Index) -> Node:
        rest = list(x)
        fixed: list[Node | None] = []
        for d in range(rank):
            if d in axes:
                fixed.append(None)
                if keepdim:
                    rest.pop(0)
            else:
                fixed.append(rest.pop(0))
        total: Node | None = None
        for combo in itertools.product(*[range(a.shape[d]) for d in axes]):
            picks = iter(combo)
            at = tuple(low.index_const(next(picks)) if f is None else f for f in fixed)
            item = low.graph.cast(a.element(at), result)
            total = item if total is None else low.emit(fold, [total, item], result)
        return total if total is not None else zero

    shape = tuple(
        (1 if d in axes else s) for d, s in enumerate(a.shape) if keepdim or d not in axes
    )
    return _make(shape, result, element)


def concatenate(low: Lowering, parts: Sequence[Array], dim: int) -> Value:
    dim %= len(parts[0].shape)
    sizes = [p.shape[dim] for p in parts]

    def element(x: Index) -> Node:
        i = position(low, x[dim], sum(sizes))
        offset = sum(sizes)
        out: Node | None = None
        for p, size in zip(reversed(parts), reversed(sizes), strict=True):
            offset -= size
            local = low.emit("sub", [i, low.index_const(offset)], "i64")
            local = low.emit("maximum", [local, low.index_const(0)], "i64")
            local = low.emit("minimum", [local, low.index_const(size - 1)], "i64")
            local = checked(low, i, sum(sizes), local)
            item = p.element(x[:dim] + (local,) + x[dim + 1 :])
            if out is None:
                out = item
            else:
                here = low.emit("lt", [i, low.index_const(offset + size)], "bool")
                out = low.emit("select", [here, item, out], item.dtype)
        assert out is not None
        return out

    shape = parts[0].shape[:dim] + (sum(sizes),) + parts[0].shape[dim + 1 :]
    return Array(shape, parts[0].dtype, element)
