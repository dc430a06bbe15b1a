"""Derives the backward pass of a traced spec: score mods, operand mods and row functions.

With weights w(s, c) of saved row statistics c, and dP_k = dO . v_k:

    dS_k = dP_k dw_k/ds + sum_i (G_i + dc_i) dc_i/ds_k,    G_i = sum_k dP_k dw_k/dc_i

where dc_i is the caller's gradient of statistic i, and dc_i/ds_k is the vjp of update + finalize
over a whole row. Every derivative is traced from ``torch.func.vjp``; none is written by hand.
Two simplifications are found by probing in fp64: dw/dc = kappa w (or kappa w / c) turns G into
kappa rowsum(dO o O), and dc/ds = kappa w needs no second exponential. A reduction over the keys
that remains costs one more pass over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .aten import Lowering
from .errors import TraceError
from .ir import (
    FLOATS,
    REDUCTIONS,
    TORCH_DTYPES,
    Node,
    evaluate,
    inputs_of,
    is_const,
    leaves,
    rename_inputs,
    substitute,
    walk,
)
from .lower import FxLowering
from .trace import KEYS, Traced, trace_fx


@dataclass(frozen=True)
class Scatter:
    """``capture[index] += value``; a vec value with row indices adds its sum over the keys."""

    capture: int
    index: tuple[Node, ...]
    value: Node


@dataclass(frozen=True)
class Derived:
    """What the backward kernel computes, in terms of: scores, score, dp, saved:*, final:*, delta,
    dstat:*, b, h, q, k (main pass); x, g (operand mods)."""

    weights: Node
    dscore: Node  # gradient of the scaled dot product
    scatters: tuple[Scatter, ...]
    row_scatters: tuple[Scatter, ...]
    passes: tuple[tuple[Node, ...], ...]  # reductions of each extra pass over the keys
    row_inputs: tuple[str, ...]  # saved:*, final:*, delta, dstat:* that are read
    final_states: tuple[str, ...]  # running states that forward must store for backward
    operands: dict[str, tuple[Node, tuple[Scatter, ...]]]
    grads: tuple[int, ...]  # captures that get a gradient
    notes: tuple[str, ...]  # what was found, for explain


def derive(traced: Traced, wanted: Sequence[int]) -> Derived:
    """The backward of ``traced``, with gradients for the captures numbered in ``wanted``."""
    return _Derivation(traced, frozenset(wanted)).run()


class _Derivation:
    def __init__(self, traced: Traced, wanted: frozenset[int]) -> None:
        self.t = traced
        self.g = traced.graph
        self.d = traced.dtype
        self.low = Lowering(self.g, KEYS)
        self.wanted = wanted
        self.notes: list[str] = []
        self.scatters: list[Scatter] = []
        self.row_scatters: list[Scatter] = []

    def run(self) -> Derived:
        row, g, d = self.t.row, self.g, self.d
        scores = g.input("scores", d, vec=True)
        dp = g.input("dp", d, vec=True)
        final_state, saved = self.whole_row()
        names = list(saved)
        read = [n for n in names if f"saved:{n}" in inputs_of([row.weights])]
        kappas = {n: self.probe_weights(n, saved) for n in read}
        slopes = {n: self.probe_statistic(n, saved) for n in names}

        # dP . dw
        plain = [g.input(f"saved:{n}", d) for n in read if kappas[n] is None]
        diff = self.diff_leaves([row.weights])
        grads, _ = self.vjp([row.weights], [scores, *plain, *diff], [dp])
        ds = grads[0]
        for leaf, grad in zip(diff, grads[1 + len(plain) :], strict=True):
            self.scatter(leaf, grad)
        through: dict[str, Node] = dict(zip([n.attr[0] for n in plain], grads[1:], strict=False))
        delta = g.input("delta", d)
        total: dict[str, Node] = {}
        for n in names:
            parts = [g.input(f"dstat:{n}", d)]
            kappa = kappas.get(n)
            if n in read and kappa is not None:
                factor, over = kappa
                part = self.times(delta, factor)
                if over:
                    part = self.low.emit("div", [part, g.input(f"saved:{n}", d)], d)
                parts.append(part)
                self.notes.append(
                    f"dw/d{n} = {factor:g} w{f' / {n}' if over else ''}: sum is rowsum(dO o O)"
                )
            elif n in read:
                parts.append(through[f"saved:{n}"])
                self.notes.append(f"dw/d{n} is not proportional to w: one more sum over the keys")
            total[n] = self.sum(parts)

        # dc/ds
        symbolic: list[str] = []
        for n in names:
            slope = slopes[n]
            if slope is None:
                symbolic.append(n)
            elif slope != 0:
                part = self.low.emit("mul", [self.times(total[n], slope), row.weights], d)
                ds = self.sum([ds, part])
                self.notes.append(f"d{n}/ds = {slope:g} w")
        grads_of = self.statistic_vjp(saved, final_state, total, symbolic)
        if grads_of is not None:
            ds = self.sum([ds, grads_of])

        # score_mod
        dscore = ds
        if self.t.score is not None:
            score = g.input("score", d, vec=True)
            diff = self.diff_leaves([self.t.score])
            grads, _ = self.vjp([self.t.score], [score, *diff], [ds])
            dscore = grads[0]
            for leaf, grad in zip(diff, grads[1:], strict=True):
                self.scatter(leaf, grad)
        operands = {name: self.operand(node) for name, node in self.t.operands.items()}
        return self.collect(row.weights, dscore, operands)

    # -- pieces ---------------------------------------------------------------------------------
    def whole_row(self) -> tuple[dict[str, Node], dict[str, Node]]:
        """Final states and saved statistics of a row that is one tile, from the initial states."""
        row = self.t.row
        init = {f"state:{n}": v for n, v in row.init.items()}
        states = rename_inputs(self.g, list(row.new_state.values()), init)
        final = dict(zip(row.new_state, states, strict=True))
        table = {f"state:{n}": v for n, v in final.items()}
        saved = rename_inputs(self.g, list(row.saved.values()), table)
        return final, dict(zip(row.saved, saved, strict=True))

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

    def statistic_vjp(
        self,
        saved: dict[str, Node],
        final: dict[str, Node],
        total: dict[str, Node],
        symbolic: list[str],
    ) -> Node | None:
        """Indirect dS of the statistics that probing did not simplify, and captured gradients."""
        g, d = self.g, self.d
        diff = self.diff_leaves(list(saved.values()))
        if not symbolic and not diff:
            return None
        scores = g.input("scores", d, vec=True)
        names = list(saved)
        outputs = [*saved.values(), *final.values()]
        zero = g.const(0, d)
        keep = symbolic if symbolic else []
        grads: list[Node] = []
        indirect: Node | None = None
        if keep:
            cot = [total[n] if n in keep else zero for n in names] + [zero] * len(final)
            grads, forward = self.vjp(outputs, [scores], cot)
            indirect = self.stored(grads, forward, names, final)[0]
            self.notes.append(f"gradient of {', '.join(keep)} from the vjp of update and finalize")
        if diff:
            cot = [total[n] for n in names] + [zero] * len(final)
            grads, forward = self.vjp(outputs, diff, cot)
            for leaf, grad in zip(diff, self.stored(grads, forward, names, final), strict=True):
                self.scatter(leaf, grad)
        return indirect

    def stored(
        self, grads: list[Node], forward: list[Node], names: list[str], final: dict[str, Node]
    ) -> list[Node]:
        """Row scalars that forward already knows are read instead of computed from the keys."""
        known: dict[Node, Node] = {}
        labels = [f"saved:{n}" for n in names] + [f"final:{n}" for n in final]
        for node, label in zip(forward, labels, strict=True):
            if node.op not in ("const", "input", "gather") and node not in known:
                known[node] = self.g.input(label, node.dtype)
        return substitute(self.g, grads, known)

    def scatter(self, leaf: Node, grad: Node) -> None:
        """Adds a gradient of one gather; sums over keys become per-key scatters."""
        if is_const(grad, 0):
            return
        capture = leaf.attr[0]
        for part in self.addends(grad):
            target = self.scatters if part.vec else self.row_scatters
            target.append(Scatter(capture, leaf.args, part))

    def addends(self, node: Node) -> list[Node]:
        """``node`` as a sum of terms: a sum over the keys becomes its per-key term, so that it is
        scattered key by key and needs no pass of its own."""
        emit, g, d = self.low.emit, self.g, self.d
        if node.vec or not _has_sum(node):
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
            if node.op == "mul" and _has_sum(b):
                a, b = b, a
            if not _has_sum(b):
                return [emit(node.op, [p, g.cast(b, p.dtype)], p.dtype) for p in self.addends(a)]
        if node.op == "select" and not _has_sum(node.args[0]):
            c, a, b = node.args
            left = [emit("select", [c, p, zero], p.dtype) for p in self.addends(a)]
            return left + [emit("select", [c, zero, p], p.dtype) for p in self.addends(b)]
        return [node]

    def operand(self, node: Node) -> tuple[Node, tuple[Scatter, ...]]:
        g, d = self.g, self.d
        x, cot = g.input("x", d, vec=True), g.input("g", d, vec=True)
        diff = self.diff_leaves([node])
        grads, _ = self.vjp([node], [x, *diff], [cot])
        out = []
        for leaf, grad in zip(diff, grads[1:], strict=True):
            if is_const(grad, 0):
                continue
            parts = self.addends(grad)
            if any(not p.vec and _has_sum(p) for p in parts):
                raise TraceError(
                    "the gradient of a captured tensor in q_mod, k_mod or v_mod is not a sum over "
                    "elements; apply that function before the call"
                )
            out += [Scatter(leaf.attr[0], leaf.args, p) for p in parts]
        return grads[0], tuple(out)

    def times(self, x: Node, factor: float) -> Node:
        if factor == 1:
            return x
        if factor == -1:
            return self.low.emit("neg", [x], self.d)
        return self.low.emit("mul", [x, self.g.const(factor, self.d)], self.d)

    def sum(self, parts: Sequence[Node]) -> Node:
        kept = [p for p in parts if not is_const(p, 0)]
        if not kept:
            return self.g.const(0, self.d)
        total = kept[0]
        for p in kept[1:]:
            total = self.low.emit("add", [total, p], self.d)
        return total

    def collect(
        self, weights: Node, dscore: Node, operands: dict[str, tuple[Node, tuple[Scatter, ...]]]
    ) -> Derived:
        main = [weights, dscore, *(s.value for s in self.scatters)]
        every = [*main, *(s.value for s in self.row_scatters)]
        level: dict[int, int] = {}
        passes: list[list[Node]] = []
        for n in walk(every):
            below = max((level[a.id] for a in n.args), default=0)
            if n.op in REDUCTIONS:
                while len(passes) <= below:
                    passes.append([])
                passes[below].append(n)
                below += 1
            level[n.id] = below
        names = sorted(
            i for i in inputs_of(every) if i.split(":")[0] in ("saved", "final", "delta", "dstat")
        )
        final = tuple(n.removeprefix("final:") for n in names if n.startswith("final:"))
        grads = sorted(
            {s.capture for s in [*self.scatters, *self.row_scatters]}
            | {s.capture for _, ss in operands.values() for s in ss}
        )
        return Derived(
            weights, dscore, tuple(self.scatters), tuple(self.row_scatters),
            tuple(tuple(p) for p in passes), tuple(names), final, operands, tuple(grads),
            tuple(self.notes),
        )  # fmt: skip

    # -- probes in fp64 -------------------------------------------------------------------------
    def trial(self, saved: dict[str, Node], seed: int) -> tuple[dict[Node, torch.Tensor], ...]:
        """Random scores and captures, and the saved statistics that they give."""
        gen = torch.Generator().manual_seed(seed)
        values: dict[Node, torch.Tensor] = {}
        roots = [*saved.values(), self.t.row.weights]
        for leaf in leaves(roots):
            if leaf.op == "input" and leaf.attr[0].startswith("saved:"):
                continue
            shape = (KEYS,) if leaf.vec else ()
            if leaf.dtype in FLOATS:
                values[leaf] = torch.randn(shape, dtype=torch.float64, generator=gen)
            else:
                values[leaf] = torch.ones(shape, dtype=TORCH_DTYPES[leaf.dtype])
        scores = self.g.input("scores", self.d, vec=True)
        values.setdefault(scores, torch.randn(KEYS, dtype=torch.float64, generator=gen))
        stats = evaluate(list(saved.values()), values, KEYS, torch.float64)
        table = {self.g.input(f"saved:{n}", self.d): v for n, v in zip(saved, stats, strict=True)}
        return values, table

    def probe_weights(self, name: str, saved: dict[str, Node]) -> tuple[float, bool] | None:
        """(kappa, False) if dw/dc = kappa w, (kappa, True) if dw/dc = kappa w / c, else None."""
        target = self.g.input(f"saved:{name}", self.d)
        ratios, scaled = [], []
        for seed in range(4):
            values, table = self.trial(saved, seed)
            c = table[target].detach().clone().requires_grad_()

            def weights(x: torch.Tensor, v: dict = values, t: dict = table) -> torch.Tensor:
                out = evaluate([self.t.row.weights], {**v, **t, target: x}, KEYS, torch.float64)
                return out[0].expand(KEYS)

            w = weights(c).detach()
            dw = torch.autograd.functional.jacobian(weights, c)
            live = w != 0
            if not bool(live.any()):
                continue
            if bool((dw[~live] != 0).any()):
                return None
            ratios.append(dw[live] / w[live])
            scaled.append(ratios[-1] * c.detach())
        for candidates, over in ((ratios, False), (scaled, True)):
            kappa = _constant(candidates)
            if kappa is not None:
                return kappa, over
        return None

    def probe_statistic(self, name: str, saved: dict[str, Node]) -> float | None:
        """kappa if dc/ds = kappa w over a whole row (0: not a function of the scores)."""
        scores = self.g.input("scores", self.d, vec=True)
        ratios = []
        for seed in range(4):
            values, table = self.trial(saved, seed)

            def statistic(x: torch.Tensor, v: dict = values) -> torch.Tensor:
                return evaluate([saved[name]], {**v, scores: x}, KEYS, torch.float64)[0]

            grad = torch.autograd.functional.jacobian(statistic, values[scores])
            (w,) = evaluate([self.t.row.weights], {**values, **table}, KEYS, torch.float64)
            w = w.expand(KEYS)
            if bool((grad == 0).all()):
                ratios.append(torch.zeros(1, dtype=torch.float64))
                continue
            live = w != 0
            if bool((grad[~live] != 0).any()) or not bool(live.any()):
                return None
            ratios.append(grad[live] / w[live])
        return _constant(ratios)


def _unrounded(node: Node) -> Node:
    """A gradient of a 16-bit capture before its cast: it is rounded once, when it is stored."""
    while node.op == "cast" and node.dtype in ("bf16", "f16") and node.args[0].dtype in FLOATS:
        node = node.args[0]
    return node


def _has_sum(node: Node) -> bool:
    return any(n.op in REDUCTIONS for n in walk([node]))


def _constant(values: list[torch.Tensor]) -> float | None:
    """The common value if all agree to 1e-9, snapped to an integer when it is one."""
    if not values:
        return None
    flat = torch.cat([v.reshape(-1) for v in values])
    if not bool(torch.isfinite(flat).all()):
        return None
    mean = float(flat.mean())
    if float((flat - mean).abs().max()) > 1e-9 * max(1.0, abs(mean)):
        return None
    return float(round(mean)) if abs(mean - round(mean)) < 1e-9 else mean


def _example(node: Node, vec: bool | None = None) -> torch.Tensor:
    shape = (KEYS,) if (node.vec if vec is None else vec) else ()
    dtype = TORCH_DTYPES[node.dtype]
    if node.dtype in FLOATS:
        values = torch.linspace(0.25, 0.75, KEYS, dtype=dtype)
        return values if shape else values[0].clone()
    return torch.ones(shape, dtype=dtype)
