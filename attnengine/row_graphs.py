"""A row function as scalar graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .aten import Array
from .errors import TraceError
from .ir import TORCH_DTYPES, Graph, Node, is_const, rename_inputs
from .tracer import Tracer, example, index_inputs, scalar_result

KEYS = 7  # traced length of a row of scores; no graph may depend on it


@dataclass(frozen=True)
class RowGraphs:
    """A traced row function. Inputs: ``scores`` (vec), ``state:NAME``, ``saved:NAME``, ``out``."""

    init: dict[str, Node]
    weights_online: Node
    new_state: dict[str, Node]
    factor: Node
    out_factor: Node
    saved: dict[str, Node]  # in terms of state:NAME
    weights: Node  # in terms of scores and saved:NAME
    merged: dict[str, Node] | None  # in terms of a:NAME and b:NAME
    merge_factors: tuple[Node, Node] | None


def trace_row(tr: Tracer, func: Any) -> RowGraphs:
    g, d = tr.graph, tr.score_dtype
    name = type(func).__name__

    def number(x: Any) -> Any:
        return x if isinstance(x, torch.Tensor) else torch.as_tensor(x, dtype=TORCH_DTYPES[d])

    def cast(x: Any, what: str) -> Node:
        if not isinstance(x, (Node, Array)):
            return g.const(float(x), d)
        return g.cast(scalar_result(x, func.update, f"{name}.{what}"), d)

    if callable(getattr(func, "init", None)):
        indices = index_inputs(g)[:3]
        keys = list(func.init(*[i[2] for i in indices]))
        out = tr.run(
            lambda *a: [number(v) for v in func.init(*a).values()], indices, f"{name}.init"
        )
        init = {k: cast(v, "init") for k, v in zip(keys, out, strict=True)}
    else:
        init = {k: g.const(float(v), d) for k, v in func.state.items()}
    names = tuple(init)
    states = [(f"state:{n}", g.input(f"state:{n}", d), example(d)) for n in names]
    scores = ("scores", g.input("scores", d, vec=True), example(d, KEYS))

    def run_update(x: torch.Tensor, *state: torch.Tensor) -> list:
        w, new, factor = func.update(x, dict(zip(names, state, strict=True)))
        if not isinstance(new, dict) or set(new) != set(names):
            raise TraceError(
                f"{name}.update: the new state has keys {sorted(new)}, expected {sorted(names)}"
            )
        for n in names:
            if isinstance(new[n], torch.Tensor) and new[n].numel() != 1:
                raise TraceError(
                    f"{name}.update: state {n!r} became shape {tuple(new[n].shape)}, expected a "
                    "scalar; reduce it over the keys"
                )
        if not isinstance(w, torch.Tensor) or w.shape != x.shape:
            shape = tuple(w.shape) if isinstance(w, torch.Tensor) else type(w).__name__
            raise TraceError(f"{name}.update: weights have shape {shape}, expected [N] like scores")
        return [w, number(factor), *[number(new[n]) for n in names]]

    out = tr.run(_like(run_update, func.update), [scores, *states], f"{name}.update", keys=KEYS)
    online = as_vec(g, g.cast(out[0], d))
    factor = cast(out[1], "update")
    new_state = {n: cast(v, "update") for n, v in zip(names, out[2:], strict=True)}

    saved_names: list[str] = []

    def run_finalize(x: torch.Tensor, *state: torch.Tensor) -> list:
        y, saved = func.finalize(x, dict(zip(names, state, strict=True)))
        saved_names[:] = list(saved)
        return [y, *[number(v) for v in saved.values()]]

    o = ("out", g.input("out", d), example(d))
    out = tr.run(_like(run_finalize, func.finalize), [o, *states], f"{name}.finalize")
    out_row = cast(out[0], "finalize")
    saved = {n: cast(v, "finalize") for n, v in zip(saved_names, out[1:], strict=True)}
    (out_factor,) = rename_inputs(g, [out_row], {"out": g.const(1.0, d)})
    out_factor = _simplified(g, out_factor)

    stats = [(f"saved:{n}", g.input(f"saved:{n}", d), example(d)) for n in saved]

    def run_weights(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return func.weights(x, dict(zip(saved, values, strict=True)))

    w = tr.run(_like(run_weights, func.weights), [scores, *stats], f"{name}.weights", keys=KEYS)
    weights = as_vec(g, g.cast(w, d))
    merged, factors = None, None
    if has_merge(func):
        a = [(f"a:{n}", g.input(f"a:{n}", d), example(d)) for n in names]
        b = [(f"b:{n}", g.input(f"b:{n}", d), example(d)) for n in names]

        def run_merge(*values: torch.Tensor) -> list:
            left = dict(zip(names, values[: len(names)], strict=True))
            right = dict(zip(names, values[len(names) :], strict=True))
            new, fa, fb = func.merge(left, right)
            return [number(fa), number(fb), *[number(new[n]) for n in names]]

        out = tr.run(_like(run_merge, func.merge), [*a, *b], f"{name}.merge")
        factors = (cast(out[0], "merge"), cast(out[1], "merge"))
        merged = {n: cast(v, "merge") for n, v in zip(names, out[2:], strict=True)}
    return RowGraphs(init, online, new_state, factor, out_factor, saved, weights, merged, factors)


def has_merge(func: Any) -> bool:
    """Whether a row function defines ``merge`` (the base class's declines)."""
    from .spec import OnlineFunc

    return getattr(type(func), "merge", None) not in (None, OnlineFunc.merge)


def _like(wrapper: Callable, user: Callable) -> Callable:
    """``wrapper`` with the user's function findable for line numbers."""
    wrapper.__wrapped_user__ = user  # type: ignore[attr-defined]
    return wrapper


def as_vec(g: Graph, node: Node) -> Node:
    return node if node.vec else g.node("splat", (node,), node.dtype, (), True)


def _simplified(g: Graph, node: Node) -> Node:
    if node.op == "mul" and is_const(node.args[0], 1):
        return node.args[1]
    return node
