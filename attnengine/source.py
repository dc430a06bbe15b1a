"""Generates the forward unit: a plan struct, the traced functors, one export macro."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .dialect import dialect, flag, opened
from .ir import Node, const_value, inputs_of
from .key import KernelKey
from .plan import Plan
from .trace import Traced
from .unit import ALIVE, Stages, Unit, accumulate


def forward_source(traced: Traced, plan: Plan, key: KernelKey, saved_states: Sequence[str]) -> str:
    """The forward unit. ``saved_states`` are running states stored after the user's statistics."""
    words = dialect(plan)
    u = Unit(traced, plan, key, words=words)
    row, g, d = traced.row, traced.graph, traced.dtype
    states, stats = list(row.init), list(row.saved)
    roots = [n for n in (traced.mask, traced.score) if n is not None]
    roots += [row.weights_online, row.factor, row.out_factor, *row.new_state.values()]
    roots += [*row.saved.values(), *row.init.values()]
    if row.merged is not None and row.merge_factors is not None:
        roots += [*row.merged.values(), *row.merge_factors]
    u.collect_row(roots)
    state_names = {g.input(f"state:{n}", d).id: f"z{i}" for i, n in enumerate(states)}
    facts = {
        "user_stats": len(stats), "stats": len(stats) + len(saved_states),
        "mask_captures": u.mask_captures(),
    }  # fmt: skip
    lines = words.header(plan, key, facts)
    lines += [
        f"  static constexpr int kCaptures = {len(key.captures)};",
        f"  static constexpr int kStates = {len(states)};",
        f"  static constexpr int kUserStats = {len(stats)};",
        f"  static constexpr int kStats = {len(stats) + len(saved_states)};",
        f"  static constexpr bool kHasMerge = {flag(row.merged is not None)};",
        *words.more_members(_needs_alive(u)),
        *u.mask_members(),
        *u.row_struct(),
        *u.operand_mods(),
        *u.diagonal_members(),
    ]

    function, a = words.function, words.accumulator
    e = u.emitter(indent=4)
    lines += [
        f"  {function} void init(const ae::Env& env, const Row& row, {a}* state) {{",
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
            e.line(f"const {a} z{i} = state[{i}];")
    e.names |= state_names
    lines += [
        *opened(
            f"  {function} void finalize(",
            f"const ae::Env& env, const Row& row, const {a}* state",
            f"{a}& out_factor, {a}* stats",
        ),
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
                e.line(f"const {a} {side}{i} = {side}[{i}];")
                e.names[g.input(f"{side}:{n}", d).id] = f"{side}{i}"
        lines += [
            *opened(
                f"  {function} void merge(",
                f"const ae::Env& env, const Row& row, const {a}* a, const {a}* b",
                f"{a}* merged, {a}& fa, {a}& fb",
            ),
            "    (void)env, (void)row, (void)a, (void)b, (void)merged;",
        ]
        for i, value in enumerate(row.merged.values()):
            text = e.expr(value)
            e.line(f"merged[{i}] = {text};")
        for name, value in zip(("fa", "fb"), row.merge_factors, strict=True):
            text = e.expr(value)
            e.line(f"{name} = {text};")
        lines += [*e.lines, "  }"]
    lines += ["};", "}  // namespace", *words.exports(key.kind, u.mask_captures(), plan), ""]
    return "\n".join(lines)


def _sums_scores(stages: Stages) -> bool:
    """Whether some sum over the keys reads every score, so that NaN reaches the row's state."""
    return any(
        n.op == "sum" and "scores" in inputs_of([n.args[0]])
        for level in stages.reductions
        for n in level
    )


def _is_finite_constant(node: Node) -> bool:
    return node.op == "const" and math.isfinite(const_value(node))


def _needs_alive(u: Unit) -> bool:
    """Whether a row without a live key in a tile must be told apart: a row that keeps nothing from
    tile to tile has weights 0 there, and that is all."""
    row = u.t.row
    outputs = [row.weights_online, row.factor, *row.new_state.values()]
    plain = _is_finite_constant(row.out_factor) and _is_finite_constant(row.factor)
    return bool(row.init or Stages(outputs).reductions or not plain or const_value(row.factor) != 1)


def _tile_row(u: Unit, state_names: dict[int, str]) -> list[str]:
    row, g, d, words = u.t.row, u.g, u.d, u.words
    states = list(row.init)
    outputs = [row.weights_online, row.factor, *row.new_state.values()]
    stages = Stages(outputs)
    scores = g.input("scores", d, vec=True)
    watched = words.always_watches or _needs_alive(u)
    e = u.emitter(indent=4)
    e.lines = words.open_tile_row()
    read = inputs_of(outputs)
    for i, name in enumerate(states):
        if f"state:{name}" in read or words.restores:
            e.line(f"const {words.accumulator} z{i} = state[{i}];")
    e.names |= state_names
    # The weights are written by the last sweep: w may be the same memory as s.
    last = max(len(stages.reductions) - 1, stages.level[row.weights_online.id])
    for t in range(last + 1):
        reductions = stages.reductions[t] if t < len(stages.reductions) else []
        tops = [n for n in reductions if n.op == "amax" and n.args[0] is scores]
        sweep = [n for n in reductions if n not in tops]
        vec_roots = [n.args[0] for n in sweep] + ([row.weights_online] if t == last else [])
        cheap = not tops or _sums_scores(stages)
        if t == 0:
            body = u.open_loop(e, vec_roots)
            before = e.lines.pop()  # the loop head: declarations come first
            if watched:
                # Liveness and the largest score. NaN may get lost here: a sum of the row has it.
                e.line(f"{words.value} top = low;")
                if last == 0:
                    e.line("bool bad = false;")
                    body.line(f"bad |= {words.any('ae::ne(sm, sm)')};")
                body.line(f"top = ae::{words.max_of_numbers if cheap else 'maximum'}(top, sm);")
            if last > 0:
                guard = "if constexpr (kPartial) " if u.raw else ""
                body.line(f"{guard}{words.store}")
        elif not vec_roots:
            continue
        else:
            u.hoist(e, vec_roots)
            body = e.child(live="live", run_start=words.first_key)
            before = words.loop_head(e.pad)
            body.line(f"const {words.value} sm = {words.load};")
            u.bind_scores(body)
        accumulate(u, e, body, sweep)
        if t == last:
            text = words.splat(words.value, body.expr(row.weights_online))
            if not u.dead_natural(row.weights_online, 0.0):
                text = f"ae::select({ALIVE}, {text}, {words.value}{{}})"
            body.line(words.store_weights(text))
        e.lines += [before, *body.lines]
        e.line("}")
        if t == 0 and watched:
            words.find_dead_row(e, swept_once=last == 0, cheap=cheap)
            for n in tops:
                e.names[n.id] = "best"
            if tops and u.raw:
                e.line(f"const {words.accumulator} largest = best * scale;")
                e.names |= {n.id: "largest" for n in tops}
        for n in sweep:
            e.line(f"const auto r{n.id} = ae::{words.across[n.op]}(acc{n.id});")
            e.names[n.id] = f"r{n.id}"
    values = [e.expr(n) for n in row.new_state.values()]
    words.close_tile_row(e, values, e.expr(row.factor), watched)
    return [*e.lines, "  }"]
