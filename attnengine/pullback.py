"""Derivatives of scalar graphs: traced from ``torch.func.vjp``, never written by hand.

A gradient of a captured tensor is a :class:`Scatter`: where a graph reads an element, the gradient
of that read is added to the element's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .aten import Lowering
from .errors import TraceError
from .ir import FLOATS, REDUCTIONS, TORCH_DTYPES, Graph, Node, evaluate, is_const, leaves, walk
from .lower import FxLowering
from .row_graphs import KEYS
from .tracer import trace_fx


@dataclass(frozen=True)
class Scatter:
    """``capture[index] += value``; a vec value with row indices adds its sum over the keys."""

    capture: int
    index: tuple[Node, ...]
    value: Node


class Pullback:
    """Pulls gradients back through graphs whose values have the dtype ``dtype``; the captures
    numbered in ``wanted`` get theirs."""

    def __init__(self, graph: Graph, dtype: str, wanted: frozenset[int]) -> None:
        self.g = graph
        self.d = dtype
        self.low = Lowering(graph, KEYS)
        self.wanted = wanted

    def diff_leaves(self, roots: Sequence[Node]) -> list[Node]:
        return [
            n
            for n in leaves(roots)
            if n.op == "gather" and n.attr[0] in self.wanted and n.dtype in FLOATS
        ]

    def vjp(
        self, outputs: Sequence[Node], wrt: Sequence[Node], cotangents: Sequence[Node]
    ) -> tuple[list[Node], list[Node]]:
        """Gradients of ``wrt`` (in the score dtype) and the outputs as the trace sees them."""
        every = list(dict.fromkeys([*wrt, *leaves(outputs)]))
        count = len(every)
        examples = [_example(n) for n in every] + [
            _example(c, vec=o.vec) for c, o in zip(cotangents, outputs, strict=True)
        ]

        def run(*values: torch.Tensor) -> list[torch.Tensor]:
            fixed = values[len(wrt) : count]

            def forward(*x: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return tuple(evaluate(outputs, dict(zip(every, (*x, *fixed), strict=True)), KEYS))

            result: Any = torch.func.vjp(forward, *values[: len(wrt)])
            out, pull = result
            cot = tuple(
                v.expand_as(o).to(o.dtype) for v, o in zip(values[count:], out, strict=True)
            )
            return [*pull(cot), *out]

        try:
            module, _ = trace_fx(run, examples, "backward of a traced function")
        except TraceError as e:
            raise TraceError(f"no derivative: {e}") from e
        lowered = FxLowering(self.low, module, [*every, *cotangents], lambda t: None).run()
        grads = [self.g.cast(_unrounded(n), self.d) for n in lowered[: len(wrt)]]
        return grads, list(lowered[len(wrt) :])

    def addends(self, node: Node) -> list[Node]:
        """``node`` as a sum of terms: a sum over the keys becomes its per-key term, so that it is
        scattered key by key and needs no pass of its own."""
        emit, g, d = self.low.emit, self.g, self.d
        if node.vec or not has_sum(node):
            return [node]
        zero = g.const(0, node.dtype)
        if node.op == "sum":
            (x,) = node.args
            return [x if x.vec else g.node("splat", (x,), x.dtype, (), True)]
        if node.op == "add":
            return [*self.addends(node.args[0]), *self.addends(node.args[1])]
        if node.op == "sub":
            right = [emit("neg", [p], p.dtype) for p in self.addends(node.args[1])]
            return [*self.addends(node.args[0]), *right]
        if node.op in ("neg", "cast", "detach") and node.args[0].dtype in FLOATS:
            parts = self.addends(node.args[0])
            if node.op == "neg":
                return [emit("neg", [p], p.dtype) for p in parts]
            return [g.cast(p, d) for p in parts]
        if node.op in ("mul", "div"):
            a, b = node.args
            if node.op == "mul" and has_sum(b):
                a, b = b, a
            if not has_sum(b):
                return [emit(node.op, [p, g.cast(b, p.dtype)], p.dtype) for p in self.addends(a)]
        if node.op == "select" and not has_sum(node.args[0]):
            c, a, b = node.args
            left = [emit("select", [c, p, zero], p.dtype) for p in self.addends(a)]
            return left + [emit("select", [c, zero, p], p.dtype) for p in self.addends(b)]
        return [node]

    def operand(self, node: Node) -> tuple[Node, tuple[Scatter, ...]]:
        """Of an elementwise mod of ``x``, for the gradient ``g`` of its result: that of ``x``, and
        what each element adds to those of captured tensors."""
        g, d = self.g, self.d
        x, cot = g.input("x", d, vec=True), g.input("g", d, vec=True)
        diff = self.diff_leaves([node])
        grads, _ = self.vjp([node], [x, *diff], [cot])
        out = []
        for leaf, grad in zip(diff, grads[1:], strict=True):
            if is_const(grad, 0):
                continue
            parts = self.addends(grad)
            if any(not p.vec and has_sum(p) for p in parts):
                raise TraceError(
                    "the gradient of a captured tensor in an elementwise mod is not a sum over "
                    "elements; apply that function before the call"
                )
            out += [Scatter(leaf.attr[0], leaf.args, p) for p in parts]
        return grads[0], tuple(out)


def _unrounded(node: Node) -> Node:
    """A gradient of a 16-bit capture before its cast: it is rounded once, when it is stored."""
    while node.op == "cast" and node.dtype in ("bf16", "f16") and node.args[0].dtype in FLOATS:
        node = node.args[0]
    return node


def has_sum(node: Node) -> bool:
    return any(n.op in REDUCTIONS for n in walk([node]))


def _example(node: Node, vec: bool | None = None) -> torch.Tensor:
    shape = (KEYS,) if (node.vec if vec is None else vec) else ()
    dtype = TORCH_DTYPES[node.dtype]
    if node.dtype in FLOATS:
        values = torch.linspace(0.25, 0.75, KEYS, dtype=dtype)
        return values if shape else values[0].clone()
    return torch.ones(shape, dtype=dtype)
