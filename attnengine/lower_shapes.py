"""Operators that make tensors or only move their elements."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from . import arrays as A
from .aten import Array, Index, Unsupported, Value
from .fx_values import FxValues
from .ir import Node


class ShapeOperators(FxValues):
    """Handlers as in :mod:`attnengine.lower_pointwise`."""

    # factories
    def filled(self, node: torch.fx.Node, value: Any, out: str) -> Value:
        if isinstance(value, (Node, Array)):
            return A.expand(self.low, self.low.scalar(value, out), self.meta(node).shape)
        shape = tuple(self.meta(node).shape)
        scalar = self.g.const(value, out)
        if self.low.keys is not None and shape == (self.low.keys,):
            return scalar
        return Array(shape, out, lambda i: scalar) if shape else scalar

    def op_scalar_tensor(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.filled(node, v[0], out)

    def op_full(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.filled(node, v[1], out)

    def op_full_like(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.filled(node, v[1], out)

    def op_new_full(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.filled(node, v[2], out)

    def op_fill(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.filled(node, v[1], out)

    def op_zeros(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.filled(node, 0, out)

    op_zeros_like = op_new_zeros = op_zero = op_zeros
    op_empty = op_empty_permuted = op_empty_strided = op_new_empty_strided = op_zeros

    def op_ones(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.filled(node, 1, out)

    op_ones_like = op_new_ones = op_ones

    def op_arange(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        size = self.meta(node).shape[0]
        start = v[0] if len(v) > 1 else 0
        step: Any = v[2] if len(v) > 2 else node.kwargs.get("step", 1)

        def element(i: Index) -> Node:
            at = self.g.cast(A.position(self.low, i[0], size), out)
            scaled = self.low.emit("mul", [at, self.g.const(step, out)], out)
            return self.low.emit("add", [scaled, self.g.const(start, out)], out)

        return Array((size,), out, element)

    # shapes
    def array(self, x: Any, what: str) -> Array:
        if isinstance(x, Array):
            return x
        raise Unsupported(f"{what} of a score or an index")

    def op_index(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return A.index(self.low, self.array(v[0], "indexing"), v[1])

    def op_select(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        if isinstance(v[0], Node):
            return v[0]
        return A.select(self.low, v[0], v[1], v[2])

    def op_slice(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        dim, start, end, step = (list(v[1:]) + [None] * 4)[:4]
        if isinstance(v[0], Node):
            return v[0]
        return A.slice_(self.low, v[0], dim or 0, start, end, step or 1)

    def same(self, node: torch.fx.Node, x: Value) -> bool:
        """A scalar or a row of scores that only gains or loses dimensions of size one."""
        shape = [s for s in self.meta(node).shape if s != 1]
        return isinstance(x, Node) and (not shape or shape == [self.low.keys])

    def op_unsqueeze(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return v[0] if self.same(node, v[0]) else A.unsqueeze(v[0], v[1])

    def op_squeeze(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        if isinstance(v[0], Node):
            return v[0]
        dims = v[1] if len(v) > 1 else list(range(len(v[0].shape)))
        return A.squeeze(self.low, v[0], [dims] if isinstance(dims, int) else dims)

    def op_expand(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return v[0] if self.same(node, v[0]) else A.expand(self.low, v[0], v[1])

    def op_view(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        if self.same(node, v[0]):
            return v[0]
        return A.reshape(self.low, self.array(v[0], "a view"), v[1])

    op_reshape = op__unsafe_view = op_view

    def op_permute(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return A.permute(self.array(v[0], "permute"), v[1])

    def op_t(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        if isinstance(v[0], Node) or len(v[0].shape) < 2:
            return v[0]
        return A.permute(v[0], (1, 0))

    def op_transpose(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        x = self.array(v[0], "transpose")
        dims = list(range(len(x.shape)))
        dims[v[1]], dims[v[2]] = dims[v[2]], dims[v[1]]
        return A.permute(x, dims)

    def op_flip(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        x = self.array(v[0], "flip")
        dims = [d % len(x.shape) for d in v[1]]

        def element(index: Index) -> Node:
            out = list(index)
            for d in dims:
                i = A.position(self.low, index[d], x.shape[d])
                at = self.low.emit("sub", [self.low.index_const(x.shape[d] - 1), i], "i64")
                out[d] = A.checked(self.low, i, x.shape[d], at)
            return x.element(tuple(out))

        return Array(x.shape, out, element)

    def op_split_with_sizes(self, node: torch.fx.Node, v: list[Any], out: str) -> list[Value]:
        x, dim, ends = self.array(v[0], "split"), v[2] if len(v) > 2 else 0, [0]
        for size in v[1]:
            ends.append(ends[-1] + size)
        return [A.slice_(self.low, x, dim, a, b, 1) for a, b in zip(ends, ends[1:], strict=False)]

    def op_cat(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        parts = [self.array(self.low.scalar(p, out), "cat") for p in v[0]]
        return A.concatenate(self.low, parts, v[1] if len(v) > 1 else 0)

    def op_stack(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        parts = [A.unsqueeze(self.low.scalar(p, out), 0) for p in v[0]]
        if len(v) > 1 and v[1] not in (0,):
            raise Unsupported("stack along a dimension other than 0", "stack along dimension 0")
        return A.concatenate(self.low, [self.array(p, "stack") for p in parts], 0)

    def op_dot(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        product = self.low.pointwise("mul", v[:2], out, out)
        return A.reduce(self.low, self.array(product, "dot"), "sum", None, False, out)
