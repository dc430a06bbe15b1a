"""What forward and backward units share: the plan struct, the row struct, masks, scores and dead
keys, and sweeps over a row of scores that gather its reductions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from . import diagonal
from .derive import Derived
from .dialect import CPU_DIALECT, Dialect, flag, opened
from .emit import SCALAR, VECTOR, Emitter, IntervalEmitter, Ranges, float_literal
from .ir import FLOATS, REDUCTIONS, Node, evaluate, gathers_of, inputs_of, leaves, walk
from .key import KernelKey
from .plan import Plan
from .row_graphs import KEYS
from .trace import Traced

IDENTITY = {"sum": 0.0, "prod": 1.0, "amax": float("-inf"), "amin": float("inf")}
COMBINE = {
    "sum": "add", "prod": "mul", "amax": "maximum", "amin": "minimum",
    "any": "logical_or", "all": "logical_and",
}  # fmt: skip


class Unit:
    """What the functors of one unit share: the row struct, masks, scores and dead keys."""

    def __init__(
        self,
        traced: Traced,
        plan: Plan,
        key: KernelKey,
        derived: Derived | None = None,
        words: Dialect = CPU_DIALECT,
    ) -> None:
        self.t = traced
        self.plan = plan
        self.key = key
        self.g = traced.graph
        self.d = traced.dtype
        # Without a score_mod, weights that are rounded to 16 bits come straight from the raw dot
        # products: exp2 of one fused multiply-add replaces scale, subtract and multiply. The scale
        # is positive (a handle folds its sign into q), so dot products of dead keys stay -inf.
        self.words = words
        device = words is not CPU_DIALECT
        self.raw = (plan.bf16_dot or device) and traced.score is None
        self.ranges = Ranges(before=key.form.sequences)
        self.diagonals = (  # a CPU kernel's: on a device a gather costs what a table's value would
            diagonal.Diagonals((), ()) if device else diagonal.find(traced, derived, plan.lanes)
        )
        self.static: dict[int, bool] = {}
        self.fields: list[Node] = []
        self.names: dict[int, str] = {}

    # -- values of a row that do not depend on the key, kept in struct Row ----------------------
    def is_static(self, root: Node) -> bool:
        """Depends only on b, h, q, constants and captures."""
        for n in walk([root]):
            if n.id not in self.static:
                self.static[n.id] = (
                    not n.vec
                    and n.op not in REDUCTIONS
                    and (n.op != "input" or n.attr[0] in ("b", "h", "q"))
                    and all(self.static[a.id] for a in n.args)
                )
        return self.static[root.id]

    def collect_row(self, roots: Iterable[Node]) -> None:
        found: dict[int, Node] = {}
        tables = set(self.diagonals.tables)
        for n in self.diagonals.reach(roots):
            users = () if n in tables or self.is_static(n) else n.args
            for a in users:
                if self.is_static(a) and a.op != "const":
                    found[a.id] = a
        for r in roots:
            if self.is_static(r) and r.op != "const":
                found[r.id] = r
        self.fields = [found[i] for i in sorted(found)]
        self.names = {n.id: f"row.f{i}" for i, n in enumerate(self.fields)}

    def row_struct(self) -> list[str]:
        e = self.words.emitter(self.ranges, self.index_names(), indent=4)
        values = [e.expr(n) for n in self.fields]
        fields = [f"{SCALAR[e.rep(n)]} f{i};" for i, n in enumerate(self.fields)]
        for i in range(len(self.diagonals.tables)):
            fields.append(f"int64_t t{i};  // where this row's key 0 stands in table {i}")
            values.append(f"env.tables[{i}].row(b, h, q)")
        if self.diagonals.sums:
            fields.append("int64_t sums;  // the same for sums along diagonals")
            values.append("env.sums.row(h, q)")
        function, index = self.words.function, self.words.index
        lines = ["  struct Row {", *(f"    {f}" for f in fields)]
        lines += [
            "  };",
            f"  {function} Row make_row(const ae::Env& env, {index} b, {index} h, {index} q) {{",
            "    (void)env, (void)b, (void)h, (void)q;",
            *e.lines,
            f"    return Row{{{', '.join(values)}}};",
            "  }",
        ]
        return lines

    def index_names(self) -> dict[int, str]:
        return {self.g.input(n, "i64").id: f"int32_t({n})" for n in ("b", "h", "q")}

    def emitter(self, **kw: object) -> Emitter:
        return self.words.emitter(self.ranges, self.names, **kw)  # type: ignore[arg-type]

    # -- masks ----------------------------------------------------------------------------------
    def mask_captures(self) -> int:
        """Bit i: the mask reads captured tensor i."""
        bits = 0
        for n in gathers_of([self.t.mask]) if self.t.mask is not None else []:
            bits |= 1 << n.attr[0]
        return bits

    def mask_members(self) -> list[str]:
        mask = self.t.mask
        used = inputs_of([mask]) if mask is not None else set()
        g = self.g
        names = {g.input(n, "i64").id: n for n in ("b", "h", "q")}
        names[g.input("k", "i64", vec=True).id] = "k"
        e = IntervalEmitter(self.ranges, names, indent=4, prefix="i")
        result = e.expr(mask) if mask is not None else "ae::iv::constant(1.0)"
        return [
            f"  static constexpr bool kHasMask = {flag(mask is not None)};",
            f"  static constexpr bool kMaskUsesB = {flag('b' in used)};",
            f"  static constexpr bool kMaskUsesH = {flag('h' in used)};",
            f"  static constexpr uint64_t kMaskCaptures = {self.mask_captures()}u;",
            f"  static constexpr bool kScoreCanDie = {flag(self.t.score is not None)};",
            *opened(
                f"  {self.words.host_function} ae::Interval classify(",
                "const ae::IntervalEnv& env, ae::Interval b",
                "ae::Interval h, ae::Interval q, ae::Interval k",
            ),
            "    (void)env, (void)b, (void)h, (void)q, (void)k;",
            *e.lines,
            f"    return {result};",
            "  }",
        ]

    # -- the start of every sweep over a tile row -----------------------------------------------
    def open_loop(self, e: Emitter, hoisted: Sequence[Node]) -> Emitter:
        """Emits the loop head up to the dead-key blend; returns the emitter of the loop body, with
        the inputs score, scores and k bound and ``live`` declared."""
        g, d, t, words = self.g, self.d, self.t, self.words
        k = g.input("k", "i64", vec=True)
        roots = [n for n in (t.mask, t.score) if n is not None] + list(hoisted)
        self.hoist(e, roots)
        e.lines.append(words.loop_head(e.pad))
        body = e.child(live="live", run_start=words.first_key)
        if self.raw:
            body.line(f"{words.value} sm = {words.load};")
        else:
            body.line(f"const {words.value} x = ae::mul({words.load}, scale);")
            body.names[g.input("score", d, vec=True).id] = "x"
        reached = list(self.diagonals.reach(roots))
        keyed = t.mask is not None and "k" in inputs_of([t.mask])
        needs_k = keyed or any(n.op == "input" and n.attr[0] == "k" for n in reached)
        if needs_k:
            body.line(words.keys)
            body.names[k.id] = "k"
        body.line(f"{words.types['bool']} live = {words.all_live};")
        body.line("if constexpr (kPartial) {")
        inner = body.child()
        inner.line(f"live = {words.in_range};")
        if t.mask is not None:
            guard = words.mask_guard
            masked = inner.child(more=2 if guard else 0)
            text = masked.expr(t.mask)
            masked.line(f"live = ae::logical_and(live, {text});")
            inner.lines += (
                [inner.pad + guard, *masked.lines, inner.pad + "}"] if guard else masked.lines
            )
        body.lines += inner.lines
        body.line("}")
        for i, n in enumerate(self.diagonals.tables):
            if n in reached:
                vector = VECTOR[body.rep(n)]
                at = f"row.t{i} + (kv0 + j)"
                body.line(f"const auto t{i} = ae::diagonal_run<{vector}>(env, {i}, live, {at});")
                body.names[n.id] = f"t{i}"
        if not self.raw:
            score = body.expr(t.score) if t.score is not None else "x"
            body.line(f"{words.value} sm = {words.splat(words.value, score)};")
        body.line("if constexpr (kPartial) sm = ae::select(live, sm, low);")
        self.bind_scores(body)
        return body

    def bind_scores(self, body: Emitter) -> None:
        """``sm`` holds the scores, or (raw) dot products that the scale still multiplies."""
        scores = self.g.input("scores", self.d, vec=True).id
        if self.raw:
            body.lazy[scores] = "ae::mul(sm, scale)"
            body.raw_scores = scores
        else:
            body.names[scores] = "sm"

    def hoist(self, e: Emitter, roots: Sequence[Node]) -> None:
        """Row values that the vec nodes under ``roots`` read are computed before the loop."""
        tables = set(self.diagonals.tables)
        for n in self.diagonals.reach(roots):
            if n.vec and n not in tables:
                for a in n.args:
                    if not a.vec and a.op != "const" and self.available(a, e):
                        e.expr(a)
        for r in roots:
            if not r.vec and r.op != "const" and self.available(r, e):
                e.expr(r)

    def available(self, node: Node, e: Emitter) -> bool:
        """Whether ``node`` can be computed from what ``e`` knows."""
        stack, seen = [node], set()
        while stack:
            n = stack.pop()
            if n.id in e.names or n.id in seen:
                continue
            seen.add(n.id)
            if n.op == "input" or n.op in REDUCTIONS:
                return False
            stack.extend(n.args)
        return True

    # -- diagonals ------------------------------------------------------------------------------
    def diagonal_members(self) -> list[str]:
        """The tables' functors (``templates/cpu/diagonal.h``); none for most kernels."""
        tables = self.diagonals.tables
        if not tables:
            return []
        infos, cases = [], []
        for i, n in enumerate(tables):
            e = self.diagonal_emitter()
            text, used = e.expr(n), inputs_of([n])
            size = 8 if e.rep(n) in ("f64", "i64") else 4
            flags = (flag(x) for x in ("b" in used, "h" in used, bool(gathers_of([n]))))
            infos.append(f"{{{', '.join([str(size), *flags])}}}")
            vector = VECTOR[e.rep(n)]
            cases += [
                f"    if constexpr (T == {i}) {{",
                *e.lines,
                f"      ae::store_vector(out, ae::splat<{vector}>({text}));",
                "    }",
            ]
        return [
            f"  static constexpr int kDiagonals = {len(tables)};",
            f"  static constexpr ae::DiagonalInfo kDiagonalInfo[] = {{{', '.join(infos)}}};",
            "  template <int T>",
            "  static void diagonal(const ae::Env& env, int64_t b, int64_t h, int64_t q,",
            "                       int64_t kv0, L::Mask live, void* out) {",
            "    (void)env, (void)b, (void)h, (void)q, (void)live;",
            "    const L::I32 k = ae::add(ae::iota<L::I32>(), int32_t(kv0));",
            *cases,
            "  }",
        ]

    def diagonal_emitter(self) -> Emitter:
        """For code that runs once per diagonal: of b, h, q and a vector of keys k from kv0 on."""
        names = self.index_names() | {self.g.input("k", "i64", vec=True).id: "k"}
        return Emitter(self.ranges, names, live="live", run_start="kv0", indent=6)

    # -- dead keys ------------------------------------------------------------------------------
    def dead_natural(self, node: Node, identity: float) -> bool:
        """Whether ``node`` is exactly ``identity`` at a score of -inf whatever the row's state."""
        if node.dtype not in FLOATS:
            return False
        scores = self.g.input("scores", self.d, vec=True)
        gen = torch.Generator().manual_seed(0)
        for _ in range(4):
            values: dict[Node, torch.Tensor] = {}
            for leaf in leaves([node]):
                shape = (KEYS,) if leaf.vec else ()
                values[leaf] = 2 * torch.randn(shape, dtype=torch.float64, generator=gen)
                if leaf.op == "input" and leaf.attr[0] == "dp":
                    values[leaf][::3] = float("nan")  # V of a dead key may hold anything
            x = 2 * torch.randn(KEYS, dtype=torch.float64, generator=gen)
            x[::3] = float("-inf")
            values[scores] = x
            (out,) = evaluate([node], values, KEYS, torch.float64)
            if out.dim() == 0 or not bool((out[::3] == identity).all()):
                return False
        return True

    def operand_mods(self) -> list[str]:
        lines, words = [], self.words
        for name in ("q", "k", "v"):
            node = self.t.operands.get(name)
            head = f"  {words.function} {words.value} {name}_mod("
            lines.append(
                f"  static constexpr bool kHas{name.upper()}Mod = {flag(node is not None)};"
            )
            if node is None:
                lines.append(f"{head}const ae::Env&, {words.value} x) {{ return x; }}")
                continue
            names = {self.g.input("x", self.d, vec=True).id: "x"}
            e = words.emitter(self.ranges, names, indent=4, live=f"({words.all_live})")
            text = e.expr(node)
            lines += [
                f"{head}const ae::Env& env, {words.value} x) {{",
                "    (void)env;",
                *e.lines,
                f"    return {words.splat(words.value, text)};",
                "  }",
            ]
        return lines


class Stages:
    """Levels of a row graph: stage t needs reductions of t sweeps over the tile row."""

    def __init__(self, roots: Sequence[Node]) -> None:
        self.level: dict[int, int] = {}
        self.reductions: list[list[Node]] = []
        for n in walk(roots):
            below = max((self.level[a.id] for a in n.args), default=0)
            if n.op in REDUCTIONS:
                while len(self.reductions) <= below:
                    self.reductions.append([])
                self.reductions[below].append(n)
                below += 1
            self.level[n.id] = below


def accumulate(unit: Unit, e: Emitter, body: Emitter, reductions: Sequence[Node]) -> None:
    """Declares accumulators in ``e`` (before the loop) and updates them in ``body``."""
    words = unit.words
    for n in reductions:
        (x,) = n.args
        rep = e.rep(n)
        vector = words.types[rep]
        init = _identity(n, rep, words)
        e.line(f"{vector} acc{n.id} = {init};")
        text = words.splat(vector, body.as_rep(x, rep))
        natural = n.op in IDENTITY and unit.dead_natural(x, IDENTITY[n.op])
        if not natural:
            text = f"ae::select(alive(), {text}, {init})".replace("alive()", ALIVE)
        body.line(f"acc{n.id} = ae::{COMBINE[n.op]}(acc{n.id}, {text});")


ALIVE = "ae::ne(sm, low)"


def _identity(n: Node, rep: str, words: Dialect) -> str:
    vector = words.types[rep]
    if rep == "bool":
        return words.none_live if n.op == "any" else words.all_live
    value = IDENTITY[n.op]
    if rep in ("f32", "f64"):
        return words.splat(vector, float_literal(value, rep))
    if n.op in ("amax", "amin"):
        bits = 31 if rep == "i32" else 63
        limit = -(2**bits - 1) if n.op == "amax" else 2**bits - 1
        literal = f"int32_t({limit})" if rep == "i32" else f"INT64_C({limit})"
        return words.splat(vector, literal)
    return words.splat(vector, f"{SCALAR[rep]}({int(value)})")
