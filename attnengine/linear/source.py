"""Generates a CPU unit of linear attention: a plan struct, the hooks and their adjoints, one export
macro. The unit holds no text of the user's (see :mod:`attnengine.emit`)."""

from __future__ import annotations

from collections.abc import Sequence

from ..dialect import flag, opened
from ..emit import ELEMENT, VECTOR, Emitter, Ranges
from ..ir import Node, gathers_of, walk
from .elementwise import indices, is_place
from .key import LinearKey
from .plan import LinearPlan
from .spec import HOOKS
from .trace import TracedLinear

_DECAY = {"none": "kNone", "scalar": "kScalar", "channel": "kChannel"}
_AT = {"b": "int32_t(at.b)", "h": "int32_t(at.h)", "q": "int32_t(at.t)"}
_PREFIX = {h: "".join(w.capitalize() for w in h.split("_")) for h in HOOKS}  # q_mod: QMod


class HookEmitter(Emitter):
    """Reads a captured tensor at index 0 of the dimensions that it is broadcast along."""

    def indices(self, n: Node) -> list[str]:
        return [
            f"ae::spread({self.env}, {n.attr[0]}, {dim}, {text})" if is_place(a) else text
            for dim, (a, text) in enumerate(zip(n.args, super().indices(n), strict=True))
        ]


def linear_source(traced: TracedLinear, plan: LinearPlan, key: LinearKey) -> str:
    """The unit of a "forward" or "backward" kernel. The same arguments give the same text."""
    lines = [
        f"// attnengine linear {key.kind} kernel, {plan.target}, {plan.element}, D {plan.d}, "
        f"Dv {plan.dv}. Generated: do not edit.",
        f'#include "cpu/linear_{key.kind}.h"',
        '#include "cpu/hook.h"',
        '#include "cpu/math.h"',
        "namespace {",
        *plan_struct(plan, key),
        *functors(traced, key),
        "}  // namespace",
        f"AE_EXPORT_LINEAR_{key.kind.upper()}(Plan, Fn)",
        "",
    ]
    return "\n".join(lines)


def plan_struct(plan: LinearPlan, key: LinearKey) -> list[str]:
    return [
        "struct Plan {",
        f"  using Elem = {ELEMENT[plan.element]};",
        f"  using Acc = {ELEMENT[plan.accumulator]};",
        f"  using Decay = {ELEMENT[plan.decay]};",
        f"  using Beta = {ELEMENT[plan.beta]};",
        f"  static constexpr int kD = {plan.d}, kDv = {plan.dv};",
        f"  static constexpr int kChunk = {plan.chunk};",
        f"  static constexpr ae::DecayKind kDecay = ae::DecayKind::{_DECAY[plan.decay_kind]};",
        f"  static constexpr bool kDelta = {flag(plan.delta)};",
        f"  static constexpr bool kNormalizer = {flag(plan.normalizer)};",
        f"  static constexpr bool kBf16Dot = {flag(plan.bf16_dot)};",
        f"  static constexpr int kVirtualWorkers = {plan.virtual_workers};",
        f"  static constexpr int kScanTasks = {plan.scan_tasks};",
        f"  static constexpr int64_t kScanBytes = {plan.scan_bytes};",
        f"  static constexpr int64_t kScratchBytes = {plan.scratch_bytes};",
        f'  static constexpr const char* kKey = "{key.digest()}";',
        "};",
    ]


def functors(traced: TracedLinear, key: LinearKey) -> list[str]:
    lines = [
        "struct Fn {",
        "  using A = Plan::Acc;",
        "  using L = ae::Lanes<A>;",
        "  using V = L::Acc;",
        f"  static constexpr int kCaptures = {len(key.captures)};",
    ]
    for name in HOOKS:
        lines.append(f"  static constexpr bool kHas{_PREFIX[name]} = {flag(name in traced.hooks)};")
    ranges = Ranges()
    for name in HOOKS:
        lines += _hook(traced, name, ranges)
    if key.kind == "backward":
        lines += _adjoints(traced, ranges)
    return [*lines, "};"]


def _emitter(traced: TracedLinear, hook: str, ranges: Ranges, roots: Sequence[Node]) -> Emitter:
    """With the place of the operand and its live lanes bound, and declared where they are used."""
    scalar = hook == "decay_mod" and traced.request.decay_kind == "scalar"
    first = "at.t" if scalar else "at.d"
    g = traced.graph
    names = {n.id: _AT[n.attr[0]] for n in indices(g, 4)[:3]}
    lane = indices(g, 4)[3]
    names[lane.id] = "k"
    names[g.input("x", traced.dtype, vec=True).id] = "x"
    names[g.input("g", traced.dtype, vec=True).id] = "g"
    e = HookEmitter(ranges, names, live="live", run_start=first, indent=4)
    if any(n.vec for n in gathers_of(roots)):
        e.line("const L::Mask live = ae::lt(ae::iota<L::I32>(), int32_t(at.count));")
    if any(a is lane for n in walk(roots) for a in n.args) or lane in roots:
        e.line(f"const L::I32 k = ae::add(ae::iota<L::I32>(), int32_t({first}));")
        e.line("(void)k;")
    return e


def _hook(traced: TracedLinear, name: str, ranges: Ranges) -> list[str]:
    node = traced.hooks.get(name)
    if node is None:
        return [f"  static V {name}(const ae::Env&, const ae::HookAt&, V x) {{ return x; }}"]
    e = _emitter(traced, name, ranges, [node])
    text = e.expr(node)
    return [
        f"  static V {name}(const ae::Env& env, const ae::HookAt& at, V x) {{",
        "    (void)env, (void)at, (void)x;",
        *e.lines,
        f"    return ae::splat<{VECTOR[traced.dtype]}>({text});",
        "  }",
    ]


def _adjoints(traced: TracedLinear, ranges: Ranges) -> list[str]:
    gradients = traced.gradients()
    lines = [f"  static constexpr int kHookGrads = {len(traced.hook_grads)};"]
    first = 0
    for name in HOOKS:
        count = len(gradients[name].grads) if name in gradients else 0
        lines.append(
            f"  static constexpr int k{_PREFIX[name]}First = {first}, k{_PREFIX[name]}Grads = "
            f"{count};"
        )
        first += count
    for name in HOOKS:
        found = gradients.get(name)
        if found is None:
            lines += [
                f"  static V {name}_grad(const ae::Env&, const ae::HookAt&, V, V g, V*) "
                "{ return g; }"
            ]
            continue
        roots = [found.dx, *(grad.value for grad in found.grads)]
        e = _emitter(traced, name, ranges, roots)
        vector = VECTOR[traced.dtype]
        for i, grad in enumerate(found.grads):
            e.line(f"grads[{i}] = ae::splat<{vector}>({e.expr(grad.value)});")
        text = e.expr(found.dx)
        lines += [
            *opened(
                f"  static V {name}_grad(",
                "const ae::Env& env, const ae::HookAt& at, V x, V g, V* grads",
            ),
            "    (void)env, (void)at, (void)x, (void)g, (void)grads;",
            *e.lines,
            f"    return ae::splat<{vector}>({text});",
            "  }",
        ]
    return lines
