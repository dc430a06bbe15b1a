"""Every callable of a spec as scalar graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import TraceError
from .ir import Graph, Node, is_const
from .row_graphs import RowGraphs, trace_row
from .tracer import Tracer, example, float_result, index_inputs, scalar_result
from .user_code import describe


def trace_mask(tr: Tracer, fn: Callable) -> Node:
    """mask_mod(b, h, q_idx, kv_idx) -> bool scalar."""
    out = tr.run(fn, index_inputs(tr.graph), "mask_mod")
    node = scalar_result(out, fn, "mask_mod")
    if node.dtype != "bool":
        raise TraceError(
            f"mask_mod {describe(fn)}: returned dtype {node.dtype}, expected bool "
            "(compare, or use .bool())"
        )
    return node


def trace_score(tr: Tracer, fn: Callable) -> Node:
    """score_mod(score, b, h, q_idx, kv_idx) -> score scalar."""
    d = tr.score_dtype
    score = ("score", tr.graph.input("score", d, vec=True), example(d))
    out = tr.run(fn, [score, *index_inputs(tr.graph)], "score_mod")
    return float_result(tr, out, fn, "score_mod")


def trace_operand(tr: Tracer, fn: Callable, what: str) -> Node:
    """q_mod, k_mod, v_mod: x -> x, elementwise."""
    d = tr.score_dtype
    out = tr.run(fn, [("x", tr.graph.input("x", d, vec=True), example(d))], what)
    return float_result(tr, out, fn, what)


@dataclass(frozen=True)
class Traced:
    """A whole spec as graphs over one hash-consed :class:`~attnengine.ir.Graph`.

    ``captures`` are the tensors that the graphs read, in capture-number order; ``positions`` says
    where each stands in the spec's captured tensors (or past their end: found only by tracing).
    """

    graph: Graph
    dtype: str
    mask: Node | None
    score: Node | None  # in terms of the scaled score, input "score"
    row: RowGraphs
    operands: dict[str, Node]  # "q", "k", "v" -> x -> x
    captures: tuple[torch.Tensor, ...]
    positions: tuple[int, ...]


def trace(spec: Any, tensors: Sequence[torch.Tensor], dtype: str) -> Traced:
    """Trace every callable of ``spec``. ``dtype`` is the score's: "f32", or "f64" for fp64 inputs.

    Raises TraceError naming the callable, its line, the operator and what to use instead.
    """
    tr = Tracer(Graph(), tensors, dtype)
    mask = trace_mask(tr, spec.mask_mod) if spec.mask_mod is not None else None
    if mask is not None and is_const(mask, 1):
        mask = None
    score = trace_score(tr, spec.score_mod) if spec.score_mod is not None else None
    if score is not None and score is tr.graph.input("score", dtype, vec=True):
        score = None
    row = trace_row(tr, spec.row_func)
    operands = {}
    for name in ("q", "k", "v"):
        fn = getattr(spec, f"{name}_mod")
        if fn is not None:
            node = trace_operand(tr, fn, f"{name}_mod")
            if node is not tr.graph.input("x", dtype, vec=True):
                operands[name] = node
    return Traced(
        tr.graph, dtype, mask, score, row, operands, tuple(tr.captured_tensors()), tuple(tr.used)
    )
