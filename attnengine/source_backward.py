"""Generates the backward unit: row scalars, extra passes, gradients of scores and captures."""

from __future__ import annotations

from collections.abc import Sequence

from .derive import Derived, Scatter
from .dialect import CPU_DIALECT, flag
from .emit import Emitter, by_query, float_literal, is_key, strip
from .ir import REDUCTIONS, Node, walk
from .key import KernelKey
from .plan import Plan
from .trace import Traced
from .unit import ALIVE, COMBINE, IDENTITY, Unit, accumulate


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
    template = "A, true" if function == "scatter_run" and by_query(s.index) else "A"
    e.line(f"ae::{function}<{template}>({', '.join(args)});")


def _owned(u: Unit, derived: Derived, capture: int) -> str:
    """GradInfo: what is scattered once per diagonal is scattered when no task runs."""
    summed = u.diagonals.sums
    every = [s for s in (*derived.scatters, *derived.row_scatters) if s.capture == capture]
    scatters = [s for s in every if s not in summed]
    operands = any(s.capture == capture for _, ss in derived.operands.values() for s in ss)
    out = []
    for name in ("b", "h", "q", "k"):
        out.append(
            bool(every)
            and not operands
            and all(any(_plain(i, name) for i in s.index) for s in scatters)
            and len({_where(s, name) for s in scatters}) <= 1
        )
    needs = capture in derived.grads
    return "{" + ", ".join(flag(x) for x in (needs, *out)) + "}"


def _plain(index: Node, name: str) -> bool:
    index = strip(index)
    return is_key(index) if name == "k" else index.op == "input" and index.attr[0] == name


def _where(s: Scatter, name: str) -> int:
    return next((i for i, x in enumerate(s.index) if _plain(x, name)), -1)


def backward_source(
    traced: Traced, derived: Derived, plan: Plan, key: KernelKey, quiet: Derived | None = None
) -> str:
    """The backward unit; ``quiet``: what runs instead when no statistic has a gradient."""
    lines = _functors(traced, derived, plan, key)
    export = "AE_EXPORT_BACKWARD(Plan, Fn)"
    if quiet is not None:
        other = _functors(traced, quiet, plan, key)
        lines += ["struct Quiet {", *other[other.index("struct Fn {") + 1 :]]
        export = "AE_EXPORT_BACKWARD_EITHER(Plan, Fn, Quiet)"
    return "\n".join([*lines, "}  // namespace", export, ""])


def _functors(traced: Traced, derived: Derived, plan: Plan, key: KernelKey) -> list[str]:
    """The unit up to the end of its struct of functors."""
    u = Unit(traced, plan, key, derived)
    g, d, row = traced.graph, traced.dtype, traced.row
    stats = [f"saved:{n}" for n in row.saved] + [f"final:{n}" for n in derived.final_states]
    user = list(row.saved)
    reductions = [n for p in derived.passes for n in p]
    inputs = list(derived.row_inputs)
    roots = [n for n in (traced.mask, traced.score) if n is not None]
    every = [*derived.scatters, *derived.row_scatters]
    roots += [derived.weights, derived.dscore, *(s.value for s in every)]
    roots += [i for s in every if s not in u.diagonals.sums for i in s.index]
    u.collect_row(roots)
    lines = CPU_DIALECT.header(plan, key, {})
    lines.append(f"  static constexpr int kCaptures = {len(key.captures)};")
    bits = sum(1 << c for c in derived.grads)
    infos = ", ".join(_owned(u, derived, c) for c in range(max(1, len(key.captures))))
    accs = ", ".join(str(len(p)) for p in derived.passes) or "0"
    needs = ", ".join(flag(_uses_dp(p)) for p in derived.passes) or "false"
    lines += [
        f"  static constexpr int kUserStats = {len(user)};",
        f"  static constexpr int kStats = {len(stats)};",
        f"  static constexpr int kRowScalars = {len(inputs) + len(reductions)};",
        f"  static constexpr int kPasses = {len(derived.passes)};",
        f"  static constexpr int kPassAccs[] = {{{accs}}};",
        f"  static constexpr bool kPassNeedsDP[] = {{{needs}}};",
        f"  static constexpr bool kNeedsDelta = {flag('delta' in inputs)};",
        f"  static constexpr uint64_t kGradMask = {bits}u;",
        f"  static constexpr ae::GradInfo kGradInfo[] = {{{infos}}};",
        f"  static constexpr bool kHasRowGrads = {flag(bool(derived.row_scatters))};",
        *u.mask_members(),
        *u.row_struct(),
        *u.operand_mods(),
        *u.diagonal_members(),
        *_diagonal_sums(u),
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
    vec_roots += [i for s in derived.scatters if s not in u.diagonals.sums for i in s.index]
    e = _with_scalars(u, scalars, vec_roots)
    e.line(CPU_DIALECT.begin)
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
        if s in u.diagonals.sums:
            sums = f"grads[kCaptures + {u.diagonals.sums.index(s)}]"
            value = f"ae::splat<V>({body.as_rep(s.value, u.d)})"
            body.line(f"ae::diagonal_add({sums}, row.sums + (kv0 + j), alive, {value});")
        else:
            scatter_line(u, body, s, "alive")
    e.lines += body.lines
    e.line("}")
    lines += [*e.lines, "  }"]
    lines += _operand_vjps(u, derived)
    return [*lines, "};"]


def _diagonal_sums(u: Unit) -> list[str]:
    """The scatters that wait until the sums along diagonals are complete."""
    sums = u.diagonals.sums
    if not sums:
        return []
    lines = [
        f"  static constexpr int kDiagonalSums = {len(sums)};",
        "  template <int T>",
        "  static void scatter_diagonal(const ae::Env& env, int64_t b, int64_t h, int64_t q,",
        "                               int64_t kv0, L::Mask live, V value, A* const* grads) {",
        "    (void)env, (void)b, (void)h, (void)q;",
        "    const L::I32 k = ae::add(ae::iota<L::I32>(), int32_t(kv0));",
    ]
    for i, s in enumerate(sums):
        e = u.diagonal_emitter()
        indices = ", ".join(e.index(x) for x in s.index)
        lines += [
            f"    if constexpr (T == {i}) {{",
            *e.lines,
            f"      ae::scatter_add<A>(env, {s.capture}, grads[{s.capture}], live, value,",
            f"                         {indices});",
            "    }",
        ]
    return [*lines, "  }"]


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
        e.line(CPU_DIALECT.begin)
        body = u.open_loop(e, operands)
        head = e.lines.pop()
        if _uses_dp(reductions):
            body.line("const V dpv = ae::load_vector<V>(dp + j);")
            body.names[u.g.input("dp", u.d, vec=True).id] = "dpv"
        accumulate(u, e, body, reductions)
        e.lines += [head, *body.lines]
        e.line("}")
        for i, n in enumerate(reductions):
            across = f"A(ae::{CPU_DIALECT.across[n.op]}(acc{n.id}))"
            if n.op in ("any", "all"):
                combine = f"A(acc[{i}] != 0 {'||' if n.op == 'any' else '&&'} {across} != 0)"
            else:
                combine = f"ae::{COMBINE[n.op]}(acc[{i}], {across})"
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
