"""Values of the tracer, and the nodes that pointwise operators on them make.

Values are scalars of the graph (:class:`~attnengine.ir.Node`) or :class:`Array`, a small tensor
whose elements are computed only when something asks for them (so ``bias[h][q_idx, kv_idx]`` is one
gather and ``any`` over four captured numbers is three ``or``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .ir import DTYPE_NAMES, INTS, Graph, Node, const_value, is_const

Index = tuple[Node, ...]


@dataclass(frozen=True)
class Array:
    """A tensor with sizes ``shape``; ``element`` maps index nodes (int64) to a scalar node."""

    shape: tuple[int, ...]
    dtype: str
    element: Callable[[Index], Node]


Value = Node | Array


class Unsupported(Exception):
    """Something that the scalar graph cannot express; ``hint`` says what to use instead.

    ``message`` names it, or with ``stated`` is a whole sentence.
    """

    def __init__(self, message: str, hint: str = "", stated: bool = False) -> None:
        super().__init__(message)
        self.hint = hint
        self.stated = stated

    def explained(self) -> str:
        text = f"{self}" if self.stated else f"{self} is not supported"
        return f"{text}; {self.hint}" if self.hint else text


class Lowering:
    """Builds graph nodes from aten calls. ``keys`` is the traced length of a row of scores.
    ``sizes`` gives the size of the dimension that an index node (by id) runs through. ``sided``:
    clamps are comparisons, whose derivative is torch's at the bound; a maximum halves it there."""

    def __init__(
        self,
        graph: Graph,
        keys: int | None = None,
        sizes: Mapping[int, int] | None = None,
        sided: bool = False,
    ) -> None:
        self.graph = graph
        self.keys = keys
        self.sizes = sizes or {}
        self.sided = sided

    # -- scalars --------------------------------------------------------------------------------
    def index_const(self, i: int) -> Node:
        return self.graph.const(i, "i64")

    def scalar(self, x: Any, dtype: str) -> Value:
        """``x`` (node, array or Python number) as a value of ``dtype``."""
        if isinstance(x, Node):
            return self.graph.cast(x, dtype)
        if isinstance(x, Array):
            return Array(x.shape, dtype, lambda i: self.graph.cast(x.element(i), dtype))
        return self.graph.const(x, dtype)

    def pointwise(self, op: str, args: Sequence[Any], compute: str, result: str) -> Value:
        values = [self.scalar(a, compute) for a in args]
        return self.broadcast(values, lambda nodes: self.emit(op, nodes, result), result)

    def broadcast(
        self, values: Sequence[Value], make: Callable[[list[Node]], Node], dtype: str
    ) -> Value:
        arrays = [v for v in values if isinstance(v, Array)]
        if not arrays:
            return make([v for v in values if isinstance(v, Node)])
        shape = tuple(torch.broadcast_shapes(*[a.shape for a in arrays]))

        def element(index: Index) -> Node:
            return make(
                [v if isinstance(v, Node) else element_of(self, v, index, shape) for v in values]
            )

        return Array(shape, dtype, element)

    def emit(self, op: str, args: list[Node], dtype: str) -> Node:
        """One node, after the few rewrites that keep graphs (and kernel keys) small."""
        g = self.graph
        if all(a.op == "const" for a in args) and op not in ("gather",):
            folded = _fold(op, args, dtype)
            if folded is not None:
                return g.const(folded, dtype)
        a = args[0]
        b = args[1] if len(args) > 1 else None
        if b is not None:
            if op in ("mul", "div") and is_const(b, 1) and a.dtype == dtype:
                return a
            if op == "mul" and is_const(a, 1) and b.dtype == dtype:
                return b
            if op in ("add", "sub") and is_const(b, 0) and dtype in INTS and a.dtype == dtype:
                return a
            if op == "add" and is_const(a, 0) and dtype in INTS and b.dtype == dtype:
                return b
            if op == "logical_and" and is_const(a, 1):
                return b
            if op == "logical_and" and is_const(b, 1):
                return a
            if op == "logical_or" and is_const(a, 0):
                return b
            if op == "logical_or" and is_const(b, 0):
                return a
        if op == "select" and a.op == "const":
            return args[1] if const_value(a) else args[2]
        if op == "select" and args[1] is args[2]:
            return args[1]
        return g.node(op, args, dtype)

    def gather(self, capture: int, shape: tuple[int, ...], dtype: str) -> Value:
        def element(index: Index) -> Node:
            for axis, (i, size) in enumerate(zip(index, shape, strict=True)):
                if i.op == "const" and not -size <= const_value(i) < size:
                    raise Unsupported(
                        f"captured tensor of shape {shape}: index {const_value(i)} is out of range "
                        f"for dimension {axis} of size {size}",
                        stated=True,
                    )
            return self.graph.node("gather", index, dtype, (capture,), any(i.vec for i in index))

        return element(()) if not shape else Array(shape, dtype, element)


def _fold(op: str, args: list[Node], dtype: str) -> float | int | bool | None:
    from .ir import TORCH_DTYPES, TORCH_OPS

    if op not in TORCH_OPS:
        return None
    tensors = [torch.tensor(const_value(a), dtype=TORCH_DTYPES[a.dtype]) for a in args]
    try:
        return TORCH_OPS[op](*tensors).to(TORCH_DTYPES[dtype]).item()
    except (RuntimeError, ZeroDivisionError):
        return None


def element_of(low: Lowering, a: Array, index: Index, shape: tuple[int, ...]) -> Node:
    """Element of ``a`` at an index of the broadcast ``shape``."""
    skip = len(shape) - len(a.shape)
    zero = low.index_const(0)
    return a.element(
        tuple(zero if s == 1 else i for s, i in zip(a.shape, index[skip:], strict=True))
    )


# -- type promotion -----------------------------------------------------------------------------


def dtype_of(meta: Any) -> str:
    """IR dtype of an fx value's metadata."""
    name = DTYPE_NAMES.get(meta.dtype)
    if name is None:
        raise Unsupported(
            f"dtype {meta.dtype} in a mod", "convert the captured tensor before the call"
        )
    return name


def promoted(metas: Sequence[Any]) -> str:
    """The dtype in which torch would compute an operation on ``metas`` (tensors and numbers)."""
    out = metas[0]
    dtype = out.dtype if hasattr(out, "dtype") else None
    acc = out
    for m in metas[1:]:
        dtype = torch.result_type(acc, m)
        shape = torch.broadcast_shapes(_shape(acc), _shape(m))
        acc = torch.empty(shape, dtype=dtype, device="meta")
    if dtype is None:
        dtype = torch.result_type(acc, acc)
    return DTYPE_NAMES[dtype]


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape) if hasattr(x, "shape") else ()
