"""Generates the C++ unit of one kernel: a plan struct, the traced functors, one export macro."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .derive import Derived, Scatter
from .emit import (
    ELEMENT,
    SCALAR,
    VECTOR,
    Emitter,
    IntervalEmitter,
    Ranges,
    float_literal,
    is_key,
    strip,
)
from .ir import FLOATS, REDUCTIONS, Node, evaluate, gathers_of, inputs_of, leaves, walk
from .key import KernelKey
from .plan import Plan
from .trace import KEYS, Traced

IDENTITY = {"sum": 0.0, "prod": 1.0, "amax": float("-inf"), "amin": float("inf")}
_COMBINE = {
    "sum": "add", "prod": "mul", "amax": "maximum", "amin": "minimum",
    "any": "logical_or", "all": "logical_and",
}  # fmt: skip
_ACROSS = {
    "sum": "hsum", "prod": "hprod", "amax": "hmax", "amin": "hmin", "any": "any", "all": "all",
}  # fmt: skip


def plan_struct(plan: Plan, key: KernelKey) -> list[str]:
    def flag(x: bool) -> str:
        return "true" if x else "false"

    return [
        "struct Plan {",
        f"  using Elem = {ELEMENT[plan.element]};",
        f"  using Acc = {ELEMENT[plan.accumulator]};",
        f"  static constexpr int kD = {plan.head_dim}, kDv = {plan.value_dim};",
        f"  static constexpr int kBlockM = {plan.block_m}, kBlockN = {plan.block_n};",
        f"  static constexpr int kVirtualWorkers = {plan.virtual_workers};",
        f"  static constexpr bool kPackGroup = {flag(plan.pack_group)};",
        f"  static constexpr bool kSplitKV = {flag(plan.split_kv)};",
        f"  static constexpr bool kBf16Dot = {flag(plan.bf16_dot)};",
        f"  static constexpr int64_t kScratchBytes = {plan.scratch_bytes};",
        f'  static constexpr const char* kKey = "{key.digest()}";',
        "};",
    ]


class Unit:
    """What the functors of one unit share: the row struct, masks, scores and dead keys."""

    def __init__(self, traced: Traced, plan: Plan, key: KernelKey) -> None:
        self.t = traced
        self.plan = plan
        self.key = key
        self.g = traced.graph
        self.d = traced.dtype
        self.ranges = Ranges()
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
        for n in walk(roots):
            users = n.args if not self.is_static(n) else ()
            for a in users:
                if self.is_static(a) and a.op != "const":
                    found[a.id] = a
        for r in roots:
            if self.is_static(r) and r.op != "const":
                found[r.id] = r
        self.fields = [found[i] for i in sorted(found)]
        self.names = {n.id: f"row.f{i}" for i, n in enumerate(self.fields)}

    def row_struct(self) -> list[str]:
        e = Emitter(self.ranges, self.index_names(), indent=4)
        values = [e.expr(n) for n in self.fields]
        lines = ["  struct Row {"]
        lines += [f"    {SCALAR[e.rep(n)]} f{i};" for i, n in enumerate(self.fields)]
        lines += [
            "  };",
            "  static Row make_row(const ae::Env& env, int64_t b, int64_t h, int64_t q) {",
            "    (void)env, (void)b, (void)h, (void)q;",
            *e.lines,
            f"    return Row{{{', '.join(values)}}};",
            "  }",
        ]
        return lines

    def index_names(self) -> dict[int, str]:
        return {self.g.input(n, "i64").id: f"int32_t({n})" for n in ("b", "h", "q")}

    def emitter(self, **kw: object) -> Emitter:
        return Emitter(self.ranges, self.names, **kw)  # type: ignore[arg-type]

    # -- masks ----------------------------------------------------------------------------------
    def mask_members(self) -> list[str]:
        mask = self.t.mask
        used = inputs_of([mask]) if mask is not None else set()
        bits = 0
        for n in gathers_of([mask]) if mask is not None else []:
            bits |= 1 << n.attr[0]
        g = self.g
        names = {g.input(n, "i64").id: n for n in ("b", "h", "q")}
        names[g.input("k", "i64", vec=True).id] = "k"
        e = IntervalEmitter(self.ranges, names, indent=4, prefix="i")
        result = e.expr(mask) if mask is not None else "ae::iv::constant(1.0)"
        return [
            f"  static constexpr bool kHasMask = {_flag(mask is not None)};",
            f"  static constexpr bool kMaskUsesB = {_flag('b' in used)};",
            f"  static constexpr bool kMaskUsesH = {_flag('h' in used)};",
            f"  static constexpr uint64_t kMaskCaptures = {bits}u;",
            f"  static constexpr bool kScoreCanDie = {_flag(self.t.score is not None)};",
            "  static ae::Interval classify(const ae::IntervalEnv& env, ae::Interval b,",
            "                               ae::Interval h, ae::Interval q, ae::Interval k) {",
            "    (void)env, (void)b, (void)h, (void)q, (void)k;",
            *e.lines,
            f"    return {result};",
            "  }",
        ]

    # -- the start of every sweep over a tile row -----------------------------------------------
    def open_loop(self, e: Emitter, hoisted: Sequence[Node]) -> Emitter:
        """Emits the loop head up to the dead-key blend; returns the emitter of the loop body, with
        the inputs score, scores and k bound and ``live`` declared."""
        g, d, t = self.g, self.d, self.t
        k = g.input("k", "i64", vec=True)
        roots = [n for n in (t.mask, t.score) if n is not None] + list(hoisted)
        self.hoist(e, roots)
        e.line("for (int j = 0; j < Plan::kBlockN; j += L::W) {")
        body = e.child(live="live", run_start="(kv0 + j)")
        body.line("const V x = ae::mul(ae::load_vector<V>(s + j), scale);")
        body.names[g.input("score", d, vec=True).id] = "x"
        needs_k = any("k" in inputs_of([r]) for r in roots)
        if needs_k:
            body.line("const L::I32 k = ae::add(ae::iota<L::I32>(), int32_t(kv0 + j));")
            body.names[k.id] = "k"
        body.line("L::Mask live = ~L::Mask{};")
        body.line("if constexpr (kPartial) {")
        inner = body.child()
        inner.line("live = ae::lt(ae::iota<L::I32>(), int32_t(ncols - j));")
        if t.mask is not None:
            inner.line("if (!mask_full) {")
            masked = inner.child()
            text = masked.expr(t.mask)
            masked.line(f"live = ae::logical_and(live, {text});")
            inner.lines += masked.lines
            inner.line("}")
        body.lines += inner.lines
        body.line("}")
        score = body.expr(t.score) if t.score is not None else "x"
        body.line(f"V sm = ae::splat<V>({score});")
        body.line("if constexpr (kPartial) sm = ae::select(live, sm, low);")
        body.names[g.input("scores", d, vec=True).id] = "sm"
        return body

    def hoist(self, e: Emitter, roots: Sequence[Node]) -> None:
        """Row values that the vec nodes under ``roots`` read are computed before the loop."""
        for n in walk(roots):
            if n.vec:
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
            x = 2 * torch.randn(KEYS, dtype=torch.float64, generator=gen)
            x[::3] = float("-inf")
            values[scores] = x
            (out,) = evaluate([node], values, KEYS, torch.float64)
            if out.dim() == 0 or not bool((out[::3] == identity).all()):
                return False
        return True

    def operand_mods(self) -> list[str]:
        lines = []
        for name in ("q", "k", "v"):
            node = self.t.operands.get(name)
            lines.append(
                f"  static constexpr bool kHas{name.upper()}Mod = {_flag(node is not None)};"
            )
            if node is None:
                lines.append(f"  static V {name}_mod(const ae::Env&, V x) {{ return x; }}")
                continue
            names = {self.g.input("x", self.d, vec=True).id: "x"}
            e = Emitter(self.ranges, names, indent=4, live="(~L::Mask{})")
            text = e.expr(node)
            lines += [
                f"  static V {name}_mod(const ae::Env& env, V x) {{",
                "    (void)env;",
                *e.lines,
                f"    return ae::splat<V>({text});",
                "  }",
            ]
        return lines


def _flag(x: bool) -> str:
    return "true" if x else "false"


def _header(plan: Plan, key: KernelKey, include: str) -> list[str]:
    return [
        f"// attnengine {key.kind} kernel, {plan.target}, {key.element}, D {key.head_dim}, "
        f"Dv {key.value_dim}. Generated: do not edit.",
        f'#include "{include}"',
        '#include "cpu/capture.h"',
        '#include "cpu/math.h"',
        "namespace {",
        *plan_struct(plan, key),
        "struct Fn {",
        "  using A = Plan::Acc;",
        "  using L = ae::Lanes<A>;",
        "  using V = L::Acc;",
        f"  static constexpr int kCaptures = {len(key.captures)};",
    ]


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
    for n in reductions:
        (x,) = n.args
        rep = e.rep(n)
        vector = VECTOR[rep]
        init = _identity(n, rep)
        e.line(f"{vector} acc{n.id} = {init};")
        text = f"ae::splat<{vector}>({body.as_rep(x, rep)})"
        natural = n.op in IDENTITY and unit.dead_natural(x, IDENTITY[n.op])
        if not natural:
            text = f"ae::select(alive(), {text}, {init})".replace("alive()", ALIVE)
        body.line(f"acc{n.id} = ae::{_COMBINE[n.op]}(acc{n.id}, {text});")


ALIVE = "ae::ne(sm, low)"


def _identity(n: Node, rep: str) -> str:
    vector = VECTOR[rep]
    if rep == "bool":
        return f"{vector}{{}}" if n.op == "any" else f"~{vector}{{}}"
    value = IDENTITY[n.op]
    if rep in ("f32", "f64"):
        return f"ae::splat<{vector}>({float_literal(value, rep)})"
    if n.op in ("amax", "amin"):
        bits = 31 if rep == "i32" else 63
        limit = -(2**bits - 1) if n.op == "amax" else 2**bits - 1
        literal = f"int32_t({limit})" if rep == "i32" else f"INT64_C({limit})"
        return f"ae::splat<{vector}>({literal})"
    return f"ae::splat<{vector}>({SCALAR[rep]}({int(value)}))"


def forward_source(traced: Traced, plan: Plan, key: KernelKey, saved_states: Sequence[str]) -> str:
    """The forward unit. ``saved_states`` are running states stored after the user's statistics."""
    u = Unit(traced, plan, key)
    row, g, d = traced.row, traced.graph, traced.dtype
    states, stats = list(row.init), list(row.saved)
    roots = [n for n in (traced.mask, traced.score) if n is not None]
    roots += [row.weights_online, row.factor, row.out_factor, *row.new_state.values()]
    roots += [*row.saved.values(), *row.init.values()]
    if row.merged is not None and row.merge_factors is not None:
        roots += [*row.merged.values(), *row.merge_factors]
    u.collect_row(roots)
    state_names = {g.input(f"state:{n}", d).id: f"z{i}" for i, n in enumerate(states)}
    lines = _header(plan, key, "cpu/forward.h")
    lines += [
        f"  static constexpr int kStates = {len(states)};",
        f"  static constexpr int kUserStats = {len(stats)};",
        f"  static constexpr int kStats = {len(stats) + len(saved_states)};",
        f"  static constexpr bool kHasMerge = {_flag(row.merged is not None)};",
        *u.mask_members(),
        *u.row_struct(),
        *u.operand_mods(),
    ]

    e = u.emitter(indent=4)
    lines += [
        "  static void init(const ae::Env& env, const Row& row, A* state) {",
        "    (void)env, (void)row, (void)state;",
    ]
    for i, n in enumerate(row.init.values()):
        text = e.expr(n)
        e.line(f"state[{i}] = {text};")
    lines += [*e.lines, "  }"]
    lines += _tile_row(u, state_names)

    e = u.emitter(indent=4)
    used = inputs_of([row.out_factor, *row.saved.values()])
    for i, n in enumerate(states):
        if f"state:{n}" in used or n in saved_states:
            e.line(f"const A z{i} = state[{i}];")
    e.names |= state_names
    lines += [
        "  static void finalize(const ae::Env& env, const Row& row, const A* state,",
        "                       A& out_factor, A* stats) {",
        "    (void)env, (void)row, (void)state, (void)stats;",
    ]
    e.line(f"out_factor = {e.expr(row.out_factor)};")
    for i, n in enumerate(row.saved.values()):
        text = e.expr(n)
        e.line(f"stats[{i}] = {text};")
    for i, name in enumerate(saved_states):
        e.line(f"stats[{len(stats) + i}] = z{states.index(name)};")
    lines += [*e.lines, "  }"]
    if row.merged is not None and row.merge_factors is not None:
        e = u.emitter(indent=4)
        for side in ("a", "b"):
            for i, n in enumerate(states):
                e.line(f"const A {side}{i} = {side}[{i}];")
                e.names[g.input(f"{side}:{n}", d).id] = f"{side}{i}"
        lines += [
            "  static void merge(const ae::Env& env, const Row& row, const A* a, const A* b,",
            "                    A* merged, A& fa, A& fb) {",
            "    (void)env, (void)row, (void)a, (void)b, (void)merged;",
        ]
        for i, n in enumerate(row.merged.values()):
            text = e.expr(n)
            e.line(f"merged[{i}] = {text};")
        for name, n in zip(("fa", "fb"), row.merge_factors, strict=True):
            text = e.expr(n)
            e.line(f"{name} = {text};")
        lines += [*e.lines, "  }"]
    lines += ["};", "}  // namespace", "AE_EXPORT_FORWARD(Plan, Fn)", ""]
    return "\n".join(lines)


def _tile_row(u: Unit, state_names: dict[int, str]) -> list[str]:
    row, g, d = u.t.row, u.g, u.d
    states = list(row.init)
    outputs = [row.weights_online, row.factor, *row.new_state.values()]
    stages = Stages(outputs)
    scores = g.input("scores", d, vec=True)
    head = [
        "  template <bool kPartial>",
        "  static bool tile_row(const ae::Env& env, const Row& row, A scale, A* s, A* w, A* state,",
        "                       A& factor, int64_t kv0, int ncols, bool mask_full) {",
        "    (void)env, (void)row, (void)kv0, (void)ncols, (void)mask_full;",
        "    const V low = ae::splat<V>(-A(__builtin_inf()));",
    ]
    e = u.emitter(indent=4)
    read = inputs_of(outputs)
    for i, n in enumerate(states):
        if f"state:{n}" in read:
            e.line(f"const A z{i} = state[{i}];")
    e.names |= state_names
    # The weights are written by the last sweep: w may be the same memory as s.
    last = max(len(stages.reductions) - 1, stages.level[row.weights_online.id])
    for t in range(last + 1):
        reductions = stages.reductions[t] if t < len(stages.reductions) else []
        tops = [n for n in reductions if n.op == "amax" and n.args[0] is scores]
        sweep = [n for n in reductions if n not in tops]
        vec_roots = [n.args[0] for n in sweep] + ([row.weights_online] if t == last else [])
        if t == 0:
            body = u.open_loop(e, vec_roots)
            before = e.lines.pop()  # the loop head: declarations come first
            e.line("V top = low;")
            body.line("top = ae::maximum(top, sm);")
            if last > 0:
                body.line("ae::store_vector(s + j, sm);")
        elif not vec_roots:
            continue
        else:
            u.hoist(e, vec_roots)
            body = e.child(live="live", run_start="(kv0 + j)")
            before = e.pad + "for (int j = 0; j < Plan::kBlockN; j += L::W) {"
            body.line("const V sm = ae::load_vector<V>(s + j);")
            body.names[scores.id] = "sm"
        accumulate(u, e, body, sweep)
        if t == last:
            text = f"ae::splat<V>({body.expr(row.weights_online)})"
            if not u.dead_natural(row.weights_online, 0.0):
                text = f"ae::select({ALIVE}, {text}, V{{}})"
            body.line(f"ae::store_vector(w + j, {text});")
        e.lines += [before, *body.lines]
        e.line("}")
        if t == 0:
            e.line("const A best = ae::hmax(top);")
            e.line("if (best == -A(__builtin_inf())) {")
            e.line("  for (int j = 0; j < Plan::kBlockN; j += L::W) ae::store_vector(w + j, V{});")
            e.line("  factor = 1;")
            e.line("  return false;")
            e.line("}")
            for n in tops:
                e.names[n.id] = "best"
        for n in sweep:
            e.line(f"const auto r{n.id} = ae::{_ACROSS[n.op]}(acc{n.id});")
            e.names[n.id] = f"r{n.id}"
    values = [e.expr(n) for n in row.new_state.values()]
    factor = e.expr(row.factor)
    e.line(f"factor = {factor};")
    for i, text in enumerate(values):
        if text != f"z{i}":
            e.line(f"state[{i}] = {text};")
    e.line("return true;")
    return [*head, *e.lines, "  }"]


def scatter_line(u: Unit, e: Emitter, s: Scatter, live: str) -> None:
    value = e.as_rep(s.value, u.d)
    function = "scatter_add"
    indices = [e.index(i) for i in s.index]
    if s.index and s.index[-1].vec and not any(i.vec for i in s.index[:-1]):
        start = e.run(s.index[-1]) if e.run_start is not None else None
        if start is not None:
            function, indices[-1] = "scatter_run", start
    vec = s.value.vec or any(i.vec for i in s.index)
    if vec:
        value = f"ae::splat<V>({value})"
    args = ["env", str(s.capture), f"grads[{s.capture}]", live if vec else "true", value, *indices]
    e.line(f"ae::{function}<A>({', '.join(args)});")


def _owned(traced: Traced, derived: Derived, capture: int) -> str:
    scatters = [s for s in (*derived.scatters, *derived.row_scatters) if s.capture == capture]
    operands = any(s.capture == capture for _, ss in derived.operands.values() for s in ss)
    out = []
    for name in ("b", "h", "q", "k"):
        out.append(
            bool(scatters)
            and not operands
            and all(any(_plain(i, name) for i in s.index) for s in scatters)
            and len({_where(s, name) for s in scatters}) == 1
        )
    needs = capture in derived.grads
    return "{" + ", ".join(_flag(x) for x in (needs, *out)) + "}"


def _plain(index: Node, name: str) -> bool:
    index = strip(index)
    return is_key(index) if name == "k" else index.op == "input" and index.attr[0] == name


def _where(s: Scatter, name: str) -> int:
    return next((i for i, x in enumerate(s.index) if _plain(x, name)), -1)


def backward_source(traced: Traced, derived: Derived, plan: Plan, key: KernelKey) -> str:
    """The backward unit."""
    u = Unit(traced, plan, key)
    g, d, row = traced.graph, traced.dtype, traced.row
    stats = [f"saved:{n}" for n in row.saved] + [f"final:{n}" for n in derived.final_states]
    user = list(row.saved)
    reductions = [n for p in derived.passes for n in p]
    inputs = list(derived.row_inputs)
    roots = [n for n in (traced.mask, traced.score) if n is not None]
    every = [*derived.scatters, *derived.row_scatters]
    roots += [derived.weights, derived.dscore, *(s.value for s in every)]
    roots += [i for s in every for i in s.index]
    u.collect_row(roots)
    lines = _header(plan, key, "cpu/backward.h")
    bits = sum(1 << c for c in derived.grads)
    infos = ", ".join(_owned(traced, derived, c) for c in range(max(1, len(key.captures))))
    accs = ", ".join(str(len(p)) for p in derived.passes) or "0"
    needs = ", ".join(_flag(_uses_dp(p)) for p in derived.passes) or "false"
    lines += [
        f"  static constexpr int kUserStats = {len(user)};",
        f"  static constexpr int kStats = {len(stats)};",
        f"  static constexpr int kRowScalars = {len(inputs) + len(reductions)};",
        f"  static constexpr int kPasses = {len(derived.passes)};",
        f"  static constexpr int kPassAccs[] = {{{accs}}};",
        f"  static constexpr bool kPassNeedsDP[] = {{{needs}}};",
        f"  static constexpr bool kNeedsDelta = {_flag('delta' in inputs)};",
        f"  static constexpr uint64_t kGradMask = {bits}u;",
        f"  static constexpr ae::GradInfo kGradInfo[] = {{{infos}}};",
        f"  static constexpr bool kHasRowGrads = {_flag(bool(derived.row_scatters))};",
        *u.mask_members(),
        *u.row_struct(),
        *u.operand_mods(),
        "  static void begin(const ae::Env& env, const Row& row, const A* stats, const A* dstats,",
        "                    A delta, A* r) {",
        "    (void)env, (void)row, (void)stats, (void)dstats, (void)delta, (void)r;",
    ]
    for i, name in enumerate(inputs):
        kind, _, field = name.partition(":")
        source = {
            "delta": "delta",
            "dstat": f"dstats[{user.index(field)}]" if kind == "dstat" else "",
        }.get(kind) or f"stats[{stats.index(name)}]"
        lines.append(f"    r[{i}] = {source};")
    lines.append("  }")
    scalars = {g.input(name, d).id: i for i, name in enumerate(inputs)}
    scalars |= {n.id: len(inputs) + i for i, n in enumerate(reductions)}
    lines += _passes(u, derived, scalars)

    lines += [
        "  static void row_grads(const ae::Env& env, const Row& row, const A* r,",
        "                        A* const* grads) {",
        "    (void)env, (void)row, (void)r, (void)grads;",
    ]
    e = _with_scalars(u, scalars, [s.value for s in derived.row_scatters])
    for s in derived.row_scatters:
        scatter_line(u, e, s, "true")
    lines += [*e.lines, "  }"]

    lines += [
        "  template <bool kPartial>",
        "  static void tile_row(const ae::Env& env, const Row& row, A scale, const A* r, A* s,",
        "                       A* dp,",
        "                       A* const* grads, int64_t kv0, int ncols, bool mask_full) {",
        "    (void)env, (void)row, (void)r, (void)grads, (void)kv0, (void)ncols, (void)mask_full;",
        "    const V low = ae::splat<V>(-A(__builtin_inf()));",
    ]
    vec_roots = [derived.weights, derived.dscore, *(s.value for s in derived.scatters)]
    vec_roots += [i for s in derived.scatters for i in s.index]
    e = _with_scalars(u, scalars, vec_roots)
    body = u.open_loop(e, vec_roots)
    body.line(f"const L::Mask alive = {ALIVE};")
    body.live = "alive"
    body.line("const V dpv = ae::load_vector<V>(dp + j);")
    body.names[g.input("dp", d, vec=True).id] = "dpv"
    weights = body.expr(derived.weights)
    body.line(f"ae::store_vector(s + j, ae::select(alive, ae::splat<V>({weights}), V{{}}));")
    ds = body.expr(derived.dscore)
    body.line(f"const V ds = ae::mul(ae::splat<V>({ds}), scale);")
    body.line("ae::store_vector(dp + j, ae::select(alive, ds, V{}));")
    for s in derived.scatters:
        scatter_line(u, body, s, "alive")
    e.lines += body.lines
    e.line("}")
    lines += [*e.lines, "  }"]
    lines += _operand_vjps(u, derived)
    lines += ["};", "}  // namespace", "AE_EXPORT_BACKWARD(Plan, Fn)", ""]
    return "\n".join(lines)


def _uses_dp(reductions: Sequence[Node]) -> bool:
    return "dp" in _own_inputs(reductions)


def _own_inputs(reductions: Sequence[Node]) -> set[str]:
    """Inputs of the operands of reductions, not looking through earlier reductions."""
    found: set[str] = set()
    stack = [n.args[0] for n in reductions]
    seen: set[int] = set()
    while stack:
        n = stack.pop()
        if n.id in seen or n.op in REDUCTIONS:
            continue
        seen.add(n.id)
        if n.op == "input":
            found.add(n.attr[0])
        stack.extend(n.args)
    return found


def _with_scalars(u: Unit, scalars: dict[int, int], roots: Sequence[Node]) -> Emitter:
    e = u.emitter(indent=4)
    used = {n.id for n in walk(roots)}
    for node_id, i in scalars.items():
        if node_id in used:
            e.line(f"const A r{i} = r[{i}];")
            e.names[node_id] = f"r{i}"
    return e


def _passes(u: Unit, derived: Derived, scalars: dict[int, int]) -> list[str]:
    lines = ["  template <int P>", "  static void begin_pass(A* acc) {", "    (void)acc;"]
    for p, reductions in enumerate(derived.passes):
        init = []
        for i, n in enumerate(reductions):
            value = IDENTITY.get(n.op, 1.0 if n.op == "all" else 0.0)
            init.append(f"acc[{i}] = {float_literal(value, u.d)};")
        lines.append(f"    if constexpr (P == {p}) {{ {' '.join(init)} }}")
    lines += [
        "  }",
        "  template <int P>",
        "  static void end_pass(const ae::Env& env, const Row& row, const A* acc, A* r) {",
        "    (void)env, (void)row, (void)acc, (void)r;",
    ]
    for p, reductions in enumerate(derived.passes):
        done = " ".join(f"r[{scalars[n.id]}] = acc[{i}];" for i, n in enumerate(reductions))
        lines.append(f"    if constexpr (P == {p}) {{ {done} }}")
    lines += [
        "  }",
        "  template <int P, bool kPartial>",
        "  static void pass_row(const ae::Env& env, const Row& row, A scale, A* s, const A* dp,",
        "                       const A* r, A* acc, int64_t kv0, int ncols, bool mask_full) {",
        "    (void)env, (void)row, (void)scale, (void)s, (void)dp, (void)r, (void)acc;",
        "    (void)kv0, (void)ncols, (void)mask_full;",
        "    const V low = ae::splat<V>(-A(__builtin_inf()));",
        "    (void)low;",
    ]
    for p, reductions in enumerate(derived.passes):
        operands = [n.args[0] for n in reductions]
        e = _with_scalars(u, scalars, operands)
        body = u.open_loop(e, operands)
        head = e.lines.pop()
        if _uses_dp(reductions):
            body.line("const V dpv = ae::load_vector<V>(dp + j);")
            body.names[u.g.input("dp", u.d, vec=True).id] = "dpv"
        accumulate(u, e, body, reductions)
        e.lines += [head, *body.lines]
        e.line("}")
        for i, n in enumerate(reductions):
            across = f"A(ae::{_ACROSS[n.op]}(acc{n.id}))"
            if n.op in ("any", "all"):
                combine = f"A(acc[{i}] != 0 {'||' if n.op == 'any' else '&&'} {across} != 0)"
            else:
                combine = f"ae::{_COMBINE[n.op]}(acc[{i}], {across})"
            e.line(f"acc[{i}] = {combine};")
        lines += [f"    if constexpr (P == {p}) {{", *e.lines, "    }"]
    lines.append("  }")
    return lines


def _operand_vjps(u: Unit, derived: Derived) -> list[str]:
    lines = []
    for name in ("q", "k", "v"):
        if name not in derived.operands:
            lines.append(
                f"  static V {name}_mod_vjp(const ae::Env&, V, V g, L::Mask, A* const*) "
                "{ return g; }"
            )
            continue
        node, scatters = derived.operands[name]
        names = {
            u.g.input("x", u.d, vec=True).id: "x",
            u.g.input("g", u.d, vec=True).id: "g",
        }
        e = Emitter(u.ranges, names, indent=4, live="live")
        text = e.expr(node)
        for s in scatters:
            scatter_line(u, e, s, "live")
        lines += [
            f"  static V {name}_mod_vjp(const ae::Env& env, V x, V g, L::Mask live,",
            "                       A* const* grads) {",
            "    (void)env, (void)x, (void)g, (void)live, (void)grads;",
            *e.lines,
            f"    return ae::splat<V>({text});",
            "  }",
        ]
    return lines
