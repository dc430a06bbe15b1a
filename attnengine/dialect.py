"""How functors are written for a kind of target. A CPU kernel keeps a row of scores in memory and
sweeps over it in vectors; in a CUDA kernel a thread holds some keys of a row in registers, and the
four lanes that share the row exchange what they reduce. Graphs, their order and the rules of dead
keys are the same for both (``unit``, ``source``); what differs is here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence

from .arch import CUDA
from .emit import ELEMENT, SCALAR, VECTOR, Emitter, float_literal
from .ir import Node
from .key import KernelKey
from .plan import Plan


class Dialect:
    """The words that differ between targets. This class is the CPU's; ``Registers`` replaces."""

    name = "cpu"
    emitter: type[Emitter] = Emitter
    accumulator = "A"  # the type of scores, states and factors of one row
    value = "V"  # of the scores that one statement works on
    types: Mapping[str, str] = VECTOR  # what values that change with the key are held in
    function = "static"
    host_function = "static"  # of what the host calls, too
    index = "int64_t"
    across = {
        "sum": "hsum", "prod": "hprod", "amax": "hmax", "amin": "hmin", "any": "any", "all": "all",
    }  # fmt: skip
    max_of_numbers = "max_or_second"  # may lose a NaN
    always_watches = True  # tile_row tells whether the row has a live key even where nobody asks
    restores = False  # a row that turns out dead needs its old states

    # -- a sweep over the keys of a tile row ----------------------------------------------------
    loop = "for (int j = 0; j < end; j += L::W) {"
    first_key: str | None = "(kv0 + j)"  # of the vector, where lanes hold consecutive keys
    load = "ae::load_vector<V>(s + j)"
    store = "ae::store_vector(s + j, sm);"
    keys = "const L::I32 k = ae::add(ae::iota<L::I32>(), int32_t(kv0 + j));"
    in_range = "ae::lt(ae::iota<L::I32>(), int32_t(ncols - j))"
    # The mask is skipped where it is known to hold: in a tile that is only short of keys.
    mask_guard: str | None = "if (!mask_full) {"
    all_live = "~L::Mask{}"
    none_live = "L::Mask{}"
    # Whole vectors that hold the keys of a tile row.
    begin = "const int end = kPartial ? int(ae::round_up(ncols, L::W)) : ncols;"
    low = "const V low = ae::splat<V>(-A(__builtin_inf()));"

    def loop_head(self, pad: str) -> str:
        return pad + self.loop

    def splat(self, vector: str, text: str) -> str:
        return f"ae::splat<{vector}>({text})"

    def any(self, text: str) -> str:
        return f"ae::any({text})"

    def store_weights(self, text: str) -> str:
        return f"ae::store_multiply(w + j, {text});"

    # -- the unit -------------------------------------------------------------------------------
    def header(self, plan: Plan, key: KernelKey, facts: Mapping[str, object]) -> list[str]:
        """Up to the first member of ``Fn``. ``facts``: what a manifest says besides the plan."""
        return [
            title(plan, key),
            f'#include "cpu/{key.kind}.h"',
            '#include "cpu/capture.h"',
            '#include "cpu/math.h"',
            "namespace {",
            *self.plan_struct(plan, key),
            "struct Fn {",
            "  using A = Plan::Acc;",
            "  using L = ae::Lanes<A>;",
            "  using V = L::Acc;",
        ]

    def plan_struct(self, plan: Plan, key: KernelKey) -> list[str]:
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

    def more_members(self, needs_alive: bool) -> list[str]:
        return []

    def exports(self, kind: str, mask_captures: int, plan: Plan) -> list[str]:
        return [f"AE_EXPORT_{kind.upper()}(Plan, Fn)"]

    # -- a tile row -----------------------------------------------------------------------------
    def open_tile_row(self) -> list[str]:
        return [
            "  template <bool kPartial>",
            *opened(
                "  static bool tile_row(",
                "const ae::Env& env, const Row& row, A scale, A* s",
                "ae::Multiply<Plan>* w, A* state, A& factor, int64_t kv0",
                "int ncols, bool mask_full",
            ),
            "    (void)env, (void)row, (void)kv0, (void)ncols, (void)mask_full;",
            f"    {self.low}",
            f"    {self.begin}",
        ]

    def find_dead_row(self, e: Emitter, *, swept_once: bool, cheap: bool) -> None:
        """After the first sweep: from ``top`` to ``best``, and leave if no key of the row is live.

        ``cheap``: NaN may have got lost in ``top``. ``swept_once``: ``bad`` tells whether there
        was one, for the scores are gone."""
        e.line("A best = ae::hmax(top);")
        e.line("if (best == -A(__builtin_inf())) {")
        if swept_once:
            e.line("  factor = 1;")
            e.line("  return bad;")
        else:
            e.line("  if (!ae::any_nan<V>(s, end)) {")
            e.line("    ae::store_zeros<V>(w, end);")
            e.line("    factor = 1;")
            e.line("    return false;")
            e.line("  }")
            e.line('  best = A(__builtin_nan(""));')
        e.line("}")

    def close_tile_row(self, e: Emitter, states: Sequence[str], factor: str, watched: bool) -> None:
        """The factor of the output so far, and the new states."""
        e.line(f"factor = {factor};")
        for i, text in enumerate(states):
            if text != f"z{i}":
                e.line(f"state[{i}] = {text};")
        e.line("return true;")


class DeviceEmitter(Emitter):
    """For scalars in a thread's registers (``templates/cuda/math.cuh``)."""

    def _minus_row(self, x: Node) -> tuple[Node, Node, bool] | None:
        """``x`` is a - b or a + b for a row scalar b: (a, b, whether it is added)."""
        if x.op not in ("add", "sub") or x.dtype != "f32":
            return None
        a, b = x.args
        if x.op == "add" and b.vec:
            a, b = b, a
        return (a, b, x.op == "add") if a.vec and not b.vec else None

    def _reciprocal(self, c: float) -> str:  # rounded here: nvcc warns of digits that get lost
        return float_literal(struct.unpack("f", struct.pack("f", 1 / c))[0], "f32")

    def _only_raw(self, n: Node, root: Node) -> bool:
        return super()._only_raw(n, root) or (n is not root and self._minus_row(n) is not None)

    def _compute(self, n: Node) -> str:
        if n.op == "exp" and n.dtype == "f32" and self._raw_shift(n.args[0]) is None:
            shifted = self._minus_row(n.args[0]) if n.args[0].id not in self.names else None
            if shifted is not None:  # one fused multiply-add instead of two operations
                a, row = (self.as_rep(x, "f32") for x in shifted[:2])
                return f"ae::exp_minus({a}, {f'-({row})' if shifted[2] else row})"
        return super()._compute(n)

    def _gather(self, n: Node) -> str:
        args = [self.env, str(n.attr[0]), self.live if n.vec else "true"]
        for a in n.args:
            text = self.index(a)
            args.append(f"ae::nonnegative({text})" if self.ranges.of(a)[0] >= 0 else text)
        return f"ae::gather<{ELEMENT[n.dtype]}>({', '.join(args)})"


class Registers(Dialect):
    """A CUDA kernel: ``s`` is an array of registers, one of the row's columns each."""

    name = "cuda"
    emitter = DeviceEmitter
    accumulator = "float"
    value = "float"
    types = SCALAR
    function = "static __device__"
    host_function = "static AE_HD"
    index = "int"
    across = {
        "sum": "quad_sum", "prod": "quad_prod", "amax": "quad_maximum", "amin": "quad_minimum",
        "any": "quad_any", "all": "quad_all",
    }  # fmt: skip
    max_of_numbers = "max_or_other"
    always_watches = False
    restores = True
    loop = "for (int c = 0; c < kCols; ++c) {"
    first_key = None
    load = "s[c]"
    store = "s[c] = sm;"
    keys = "const int32_t k = first + ae::column(c);"
    in_range = "ae::column(c) < count"
    mask_guard = None  # the mask of such a tile is true anyway, and a branch per key costs more
    all_live = "true"
    none_live = "false"
    begin = (
        "const int first = kv0 + ae::first_column(lane), count = ncols - ae::first_column(lane);"
    )
    low = "const float low = -__builtin_inff();"

    def loop_head(self, pad: str) -> str:
        return f"#pragma unroll\n{pad}{self.loop}"

    def splat(self, vector: str, text: str) -> str:
        return text

    def any(self, text: str) -> str:
        return text

    def store_weights(self, text: str) -> str:
        return f"s[c] = {text};"

    def header(self, plan: Plan, key: KernelKey, facts: Mapping[str, object]) -> list[str]:
        family = CUDA[plan.target.partition(":")[2]].code.replace("_", "")
        manifest = {
            "kind": key.kind, "dtype": key.element, "head_dim": key.head_dim,
            "value_dim": key.value_dim, "capture_count": len(key.captures), **facts,
            "block_m": plan.block_m, "block_n": plan.block_n, "pack_group": plan.pack_group,
            "threads": 32 * plan.warps, "shared_bytes": plan.shared_bytes, "key": key.digest(),
        }  # fmt: skip
        if plan.sequences:
            manifest |= {
                "sequences": True, "slot_bytes": plan.slot_bytes, "tile_cycles": plan.tile_cycles,
                "shared_kv": plan.shared_kv, "crowded": plan.crowded,
            }  # fmt: skip
        return [
            title(plan, key),
            f"// manifest: {json.dumps(manifest)}",
            f'#include "{family}/{key.kind}.cuh"',
            "namespace {",
            *self.plan_struct(plan, key),
            "struct Fn {",
        ]

    def plan_struct(self, plan: Plan, key: KernelKey) -> list[str]:
        return [
            "struct Plan {",
            f"  using Elem = {ELEMENT[plan.element]};",
            f"  static constexpr int kD = {plan.head_dim}, kDv = {plan.value_dim};",
            f"  static constexpr int kBlockM = {plan.block_m}, kBlockN = {plan.block_n};",
            f"  static constexpr int kWarps = {plan.warps}, kStages = {plan.stages};",
            f"  static constexpr int kSharedBytes = {plan.shared_bytes};",
            f"  static constexpr bool kPackGroup = {flag(plan.pack_group)};",
            f"  static constexpr bool kHoldQ = {flag(plan.hold_q)};",
            f"  static constexpr int kColumnWarps = {plan.column_warps};",
            f"  static constexpr bool kSharedKV = {flag(plan.shared_kv)};",
            f"  static constexpr bool kSequences = {flag(plan.sequences)};",
            f"  static constexpr bool kScheduled = {flag(plan.slot_bytes > 0)};",
            f"  static constexpr int kSlotBytes = {plan.slot_bytes};",
            "};",
        ]

    def more_members(self, needs_alive: bool) -> list[str]:
        return [f"  static constexpr bool kNeedsAlive = {flag(needs_alive)};"]

    def exports(self, kind: str, mask_captures: int, plan: Plan) -> list[str]:
        more = ["TABLES"] if mask_captures else []
        more += ["SCHEDULE", "COMBINE"] if plan.slot_bytes else []
        first = "SEQUENCES" if plan.sequences else kind.upper()
        return [f"AE_EXPORT_{name}(Plan, Fn)" for name in (first, *more)]

    def open_tile_row(self) -> list[str]:
        return [
            "  template <bool kPartial, int kCols>",
            *opened(
                "  static __device__ __forceinline__ bool tile_row(",
                "const ae::Env& env, const Row& row, float scale",
                "float (&s)[kCols], float* state, float& factor",
                "int kv0, int ncols, bool mask_full, int lane",
            ),
            "    (void)env, (void)row, (void)scale, (void)state, (void)mask_full;",
            f"    {self.low}",
            f"    {self.begin}",
            "    (void)low, (void)first, (void)count;",
        ]

    def find_dead_row(self, e: Emitter, *, swept_once: bool, cheap: bool) -> None:
        # Lanes of other rows take part in what follows, so a dead row goes on with numbers that
        # mean nothing, and they are taken back at the end.
        e.line(f"float best = ae::{'quad_max' if cheap else 'quad_maximum'}(top);")
        e.line("bool alive = best != low;")
        e.line("const bool some_dead = ae::any_row(!alive);")
        if not cheap:
            return
        e.line("if (some_dead) {")
        if swept_once:
            e.line("  alive |= ae::quad_any(bad);")
        else:
            e.line("  bool bad = false;")
            e.lines.append(self.loop_head(e.pad + "  "))
            e.line("    bad |= ae::isnan(s[c]);")
            e.line("  }")
            e.line("  bad = !alive & ae::quad_any(bad);")
            e.line("  alive |= bad;")
            e.line('  best = ae::select(bad, __builtin_nanf(""), best);')
        e.line("}")

    def close_tile_row(self, e: Emitter, states: Sequence[str], factor: str, watched: bool) -> None:
        e.line(f"factor = {factor};")
        if not watched:
            e.line("return true;")
            return
        changed = [(i, text) for i, text in enumerate(states) if text != f"z{i}"]
        for i, text in changed:
            e.line(f"float n{i} = {text};")
        e.line("if (some_dead) {")
        e.line("  factor = ae::select(alive, factor, 1.0f);")
        for i, _ in changed:
            e.line(f"  n{i} = ae::select(alive, n{i}, z{i});")
        e.lines.append(self.loop_head(e.pad + "  "))
        e.line("    s[c] = ae::select(alive, s[c], 0.0f);")
        e.line("  }")
        e.line("}")
        for i, _ in changed:
            e.line(f"state[{i}] = n{i};")
        e.line("return alive;")


def flag(x: bool) -> str:
    return "true" if x else "false"


def title(plan: Plan, key: KernelKey) -> str:
    return (
        f"// attnengine {key.kind} kernel, {plan.target}, {key.element}, D {key.head_dim}, "
        f"Dv {key.value_dim}. Generated: do not edit."
    )


def opened(start: str, *parameters: str) -> list[str]:
    """A function up to its opening brace, each of ``parameters`` on a line of its own."""
    lines = [f"{',' if i + 1 < len(parameters) else ') {'}" for i in range(len(parameters))]
    pads = [start, *([" " * len(start)] * (len(parameters) - 1))]
    return [pad + text + end for pad, text, end in zip(pads, parameters, lines, strict=True)]


CPU_DIALECT, CUDA_DIALECT = Dialect(), Registers()


def dialect(plan: Plan) -> Dialect:
    return CUDA_DIALECT if plan.target.startswith("cuda:") else CPU_DIALECT
