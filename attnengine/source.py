"""Generates the forward unit: a plan struct, the traced functors, one export macro."""

from __future__ import annotations

from collections.abc import Sequence

from .ir import inputs_of
from .key import KernelKey
from .plan import Plan
from .trace import Traced
from .unit import ACROSS, ALIVE, END, Stages, Unit, accumulate, flag, header


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
    lines = header(plan, key, "cpu/forward.h")
    lines += [
        f"  static constexpr int kStates = {len(states)};",
        f"  static constexpr int kUserStats = {len(stats)};",
        f"  static constexpr int kStats = {len(stats) + len(saved_states)};",
        f"  static constexpr bool kHasMerge = {flag(row.merged is not None)};",
        *u.mask_members(),
        *u.row_struct(),
        *u.operand_mods(),
        *u.diagonal_members(),
    ]

    e = u.emitter(indent=4)
    lines += [
        "  static void init(const ae::Env& env, const Row& row, A* state) {",
        "    (void)env, (void)row, (void)state;",
    ]
    for i, value in enumerate(row.init.values()):
        text = e.expr(value)
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
    if row.saved or saved_states:
        e.line("if (stats == nullptr) return;")
    for i, value in enumerate(row.saved.values()):
        text = e.expr(value)
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
        for i, value in enumerate(row.merged.values()):
            text = e.expr(value)
            e.line(f"merged[{i}] = {text};")
        for name, value in zip(("fa", "fb"), row.merge_factors, strict=True):
            text = e.expr(value)
            e.line(f"{name} = {text};")
        lines += [*e.lines, "  }"]
    lines += ["};", "}  // namespace", "AE_EXPORT_FORWARD(Plan, Fn)", ""]
    return "\n".join(lines)


def _sums_scores(stages: Stages) -> bool:
    """Whether some sum over the keys reads every score, so that NaN reaches the row's state."""
    return any(
        n.op == "sum" and "scores" in inputs_of([n.args[0]])
        for level in stages.reductions
        for n in level
    )


def _tile_row(u: Unit, state_names: dict[int, str]) -> list[str]:
    row, g, d = u.t.row, u.g, u.d
    states = list(row.init)
    outputs = [row.weights_online, row.factor, *row.new_state.values()]
    stages = Stages(outputs)
    scores = g.input("scores", d, vec=True)
    head = [
        "  template <bool kPartial>",
        "  static bool tile_row(const ae::Env& env, const Row& row, A scale, A* s,",
        "                       ae::Multiply<Plan>* w, A* state, A& factor, int64_t kv0,",
        "                       int ncols, bool mask_full) {",
        "    (void)env, (void)row, (void)kv0, (void)ncols, (void)mask_full;",
        "    const V low = ae::splat<V>(-A(__builtin_inf()));",
        f"    {END}",
    ]
    e = u.emitter(indent=4)
    read = inputs_of(outputs)
    for i, name in enumerate(states):
        if f"state:{name}" in read:
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
            # Liveness and the largest score. NaN may get lost here: a sum of the row has it too.
            e.line("V top = low;")
            if last == 0:
                e.line("bool bad = false;")
                body.line("bad |= ae::any(ae::ne(sm, sm));")
            cheap = not tops or _sums_scores(stages)
            body.line(f"top = ae::{'max_or_second' if cheap else 'maximum'}(top, sm);")
            if last > 0:
                guard = "if constexpr (kPartial) " if u.raw else ""
                body.line(f"{guard}ae::store_vector(s + j, sm);")
        elif not vec_roots:
            continue
        else:
            u.hoist(e, vec_roots)
            body = e.child(live="live", run_start="(kv0 + j)")
            before = e.pad + "for (int j = 0; j < end; j += L::W) {"
            body.line("const V sm = ae::load_vector<V>(s + j);")
            u.bind_scores(body)
        accumulate(u, e, body, sweep)
        if t == last:
            text = f"ae::splat<V>({body.expr(row.weights_online)})"
            if not u.dead_natural(row.weights_online, 0.0):
                text = f"ae::select({ALIVE}, {text}, V{{}})"
            body.line(f"ae::store_multiply(w + j, {text});")
        e.lines += [before, *body.lines]
        e.line("}")
        if t == 0:
            e.line("A best = ae::hmax(top);")
            e.line("if (best == -A(__builtin_inf())) {")
            if last > 0:
                e.line("  if (!ae::any_nan<V>(s, end)) {")
                e.line("    ae::store_zeros<V>(w, end);")
                e.line("    factor = 1;")
                e.line("    return false;")
                e.line("  }")
                e.line('  best = A(__builtin_nan(""));')
            else:
                e.line("  factor = 1;")
                e.line("  return bad;")
            e.line("}")
            for n in tops:
                e.names[n.id] = "best"
            if tops and u.raw:
                e.line("const A largest = best * scale;")
                e.names |= {n.id: "largest" for n in tops}
        for n in sweep:
            e.line(f"const auto r{n.id} = ae::{ACROSS[n.op]}(acc{n.id});")
            e.names[n.id] = f"r{n.id}"
    values = [e.expr(n) for n in row.new_state.values()]
    factor = e.expr(row.factor)
    e.line(f"factor = {factor};")
    for i, text in enumerate(values):
        if text != f"z{i}":
            e.line(f"state[{i}] = {text};")
    e.line("return true;")
    return [*head, *e.lines, "  }"]
