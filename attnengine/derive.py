"""Derives the backward pass of a traced spec: score mods, operand mods and row functions.

With weights w(s, c) of saved row statistics c, and dP_k = dO . v_k:

    dS_k = dP_k dw_k/ds + sum_i (G_i + dc_i) dc_i/ds_k,    G_i = sum_k dP_k dw_k/dc_i

where dc_i is the caller's gradient of statistic i, and dc_i/ds_k is the vjp of update + finalize
over a whole row. Every derivative is traced from ``torch.func.vjp``; none is written by hand.
Simplifications are found by probing in fp64: dw/ds = kappa w saves a second exponential; dw/dc =
kappa w (or kappa w / c) turns G into kappa rowsum(dO o O); dc/ds = kappa w needs no vjp; and where
only the sum over i of G_i dc_i/ds_k is kappa rowsum(dO o O) w, as for a softmax that saves (max,
sum), no statistic needs one by itself unless the caller gives it a gradient. A reduction over the
keys that remains costs one more pass over them: :func:`derive_quiet` derives the pass that backward
makes when no statistic has a gradient, if it is shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .ir import REDUCTIONS, Node, inputs_of, is_const, rename_inputs, substitute, walk
from .probe import Probes
from .pullback import Pullback, Scatter
from .trace import Traced


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


def derive_quiet(traced: Traced, wanted: Sequence[int], full: Derived) -> Derived | None:
    """The backward when the caller gives no statistic a gradient; None unless it makes fewer passes
    than ``full``, what :func:`derive` found. It reads what forward stores for ``full``, and has
    gradients for the same captures."""
    if not full.passes:
        return None
    quiet = _Derivation(traced, frozenset(wanted), statistics=False).run()
    if len(quiet.passes) >= len(full.passes) or not set(quiet.final_states) <= set(
        full.final_states
    ):
        return None
    return replace(quiet, final_states=full.final_states, grads=full.grads)


class _Derivation(Pullback):
    def __init__(self, traced: Traced, wanted: frozenset[int], statistics: bool = True) -> None:
        super().__init__(traced.graph, traced.dtype, wanted)
        self.t = traced
        self.statistics = statistics  # the caller may give them gradients
        self.notes: list[str] = []
        self.scatters: list[Scatter] = []
        self.row_scatters: list[Scatter] = []

    def run(self) -> Derived:
        row, g, d = self.t.row, self.g, self.d
        scores = g.input("scores", d, vec=True)
        dp = g.input("dp", d, vec=True)
        final_state, saved = self.whole_row()
        names = list(saved)
        probes = Probes(self.t, saved)
        read = [n for n in names if f"saved:{n}" in inputs_of([row.weights])]
        kappas = {n: probes.weights(n) for n in read}
        slopes = {n: probes.statistic(n) for n in names}
        symbolic = [n for n in names if slopes[n] is None]
        known = {n: k for n, k in kappas.items() if k is not None}
        whole = None  # kappa if the read statistics together give kappa rowsum(dO o O) w
        if len(known) == len(read) and any(n in known for n in symbolic):
            whole = probes.together(known)

        # dP . dw
        plain = [g.input(f"saved:{n}", d) for n in read if kappas[n] is None]
        diff = self.diff_leaves([row.weights])
        grads, _ = self.vjp([row.weights], [scores, *plain, *diff], [dp])
        ds = grads[0]
        own = probes.own()
        if own is not None:
            ds = self.low.emit("mul", [self.times(dp, own), row.weights], d)
        for leaf, grad in zip(diff, grads[1 + len(plain) :], strict=True):
            self.scatter(leaf, grad)
        through: dict[str, Node] = dict(zip([n.attr[0] for n in plain], grads[1:], strict=False))
        delta = g.input("delta", d)
        given: dict[str, Node] = {}  # by the caller
        total: dict[str, Node] = {}
        for n in names:
            parts = [g.input(f"dstat:{n}", d)] if self.statistics else []
            given[n] = self.sum(parts)
            if n in known:
                factor, over = known[n]
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
        if whole is not None:
            ds = self.sum([ds, self.along_weights(delta, whole)])
            self.notes.append(f"sum of G dc/ds over {', '.join(read)} = {whole:g} rowsum(dO o O) w")
        rest = total if whole is None else given
        for n in names:
            slope = slopes[n]
            if slope:
                ds = self.sum([ds, self.along_weights(rest[n], slope)])
                self.notes.append(f"d{n}/ds = {slope:g} w")
        symbolic = [n for n in symbolic if not is_const(rest[n], 0)]
        grads_of = self.statistic_vjp(saved, final_state, rest, total, symbolic)
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

    def statistic_vjp(
        self,
        saved: dict[str, Node],
        final: dict[str, Node],
        rest: dict[str, Node],
        total: dict[str, Node],
        symbolic: list[str],
    ) -> Node | None:
        """Indirect dS of the statistics that probing did not simplify, from what of their gradients
        is left, and captured gradients, from all of them."""
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
            cot = [rest[n] if n in keep else zero for n in names] + [zero] * len(final)
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

    def times(self, x: Node, factor: float) -> Node:
        if factor == 1:
            return x
        if factor == -1:
            return self.low.emit("neg", [x], self.d)
        return self.low.emit("mul", [x, self.g.const(factor, self.d)], self.d)

    def along_weights(self, factor: Node, slope: float) -> Node:
        if is_const(factor, 0):
            return factor
        return self.low.emit("mul", [self.times(factor, slope), self.t.row.weights], self.d)

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
