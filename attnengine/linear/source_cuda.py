"""Generates a CUDA unit of linear attention: a manifest, a plan struct, the hooks, the exports."""

from __future__ import annotations

import json

from ..arch import CUDA
from ..dialect import DeviceEmitter, flag
from ..emit import ELEMENT, Ranges
from ..ir import TORCH_DTYPES, Node
from ..library import DTYPE_CODES
from .elementwise import indices, is_place
from .key import LinearKey
from .plan_cuda import CHUNK, THREADS, LinearCudaPlan
from .request import DECAY_KINDS, LinearRequest
from .source import _DECAY, _PREFIX
from .spec import HOOKS
from .trace import TracedLinear

KIND = "linear_forward"


class DeviceHookEmitter(DeviceEmitter):
    """Reads a captured tensor at index 0 of the dimensions that it is broadcast along."""

    def _gather(self, n: Node) -> str:
        args = [self.env, str(n.attr[0]), "true"]
        for dim, a in enumerate(n.args):
            text = self.index(a)
            if is_place(a):
                text = f"ae::spread({self.env}, {n.attr[0]}, {dim}, {text})"
            args.append(f"ae::nonnegative({text})" if self.ranges.of(a)[0] >= 0 else text)
        return f"ae::gather<{ELEMENT[n.dtype]}>({', '.join(args)})"


def linear_cuda_source(traced: TracedLinear, plan: LinearCudaPlan, key: LinearKey) -> str:
    """The unit of a forward kernel. The same arguments give the same text."""
    chunks = "DELTA" if plan.delta else "CHUNKS"
    exports = [f"AE_EXPORT_LINEAR_{name}(Plan, Fn)" for name in (chunks, "STEP")]
    lines = [
        f"// attnengine linear forward kernel, {plan.target}, {plan.element}, D {plan.d}, "
        f"Dv {plan.dv}. Generated: do not edit.",
        f"// manifest: {json.dumps(_manifest(plan, key))}",
        '#include "linear/forward.cuh"',
        '#include "linear/step.cuh"',
        "namespace {",
        *_plan_struct(plan),
        "struct Fn {",
        f"  static constexpr int kCaptures = {len(key.captures)};",
    ]
    for name in HOOKS:
        found = flag(name in traced.hooks)
        lines.append(f"  static constexpr bool kHas{_PREFIX[name]} = {found};")
    ranges = Ranges()
    for name in HOOKS:
        lines += _hook(traced, name, ranges)
    return "\n".join([*lines, "};", "}  // namespace", *exports, ""])


def code(plan: LinearCudaPlan) -> str:
    """What a plan's unit is compiled for."""
    return CUDA[plan.target.partition(":")[2]].code


def operands(r: LinearRequest) -> int:
    """AE_LINEAR_OPERANDS of common/linear_abi.h: what a kernel reads, for the operator's checks."""

    def dtype(name: str | None) -> int:
        return 0 if name is None else DTYPE_CODES[TORCH_DTYPES[name]]

    declared = 1 << 30
    decay = DECAY_KINDS.index(r.decay_kind) | dtype(r.decay_dtype) << 4
    beta = int(r.delta) << 8 | dtype(r.beta_dtype) << 9
    return declared | decay | beta | int(r.normalizer) << 13


def _manifest(plan: LinearCudaPlan, key: LinearKey) -> dict[str, object]:
    return {
        "kind": KIND, "dtype": plan.element, "head_dim": plan.d, "value_dim": plan.dv,
        "capture_count": len(key.captures), "user_stats": operands(key.request), "stats": 0,
        "mask_captures": 0, "block_m": CHUNK, "block_n": plan.value_block, "pack_group": False,
        "threads": THREADS, "shared_bytes": plan.output_bytes, "state_bytes": plan.state_bytes,
        "split_bytes": plan.split_bytes, "delta": plan.delta, "key": key.digest(),
    }  # fmt: skip


def _plan_struct(plan: LinearCudaPlan) -> list[str]:
    return [
        "struct Plan {",
        f"  using Elem = {ELEMENT[plan.element]};",
        f"  using Decay = {ELEMENT[plan.decay]};",
        f"  using Beta = {ELEMENT[plan.beta]};",
        f"  static constexpr int kD = {plan.d}, kDv = {plan.dv};",
        f"  static constexpr ae::DecayKind kDecay = ae::DecayKind::{_DECAY[plan.decay_kind]};",
        f"  static constexpr bool kDelta = {flag(plan.delta)};",
        f"  static constexpr bool kNormalizer = {flag(plan.normalizer)};",
        f"  static constexpr int kValueBlock = {plan.value_block};",
        f"  static constexpr int kOutputBytes = {plan.output_bytes};",
        f"  static constexpr int kStateBytes = {plan.state_bytes};",
        f"  static constexpr int kSplitBytes = {plan.split_bytes};",
        "};",
    ]


def _hook(traced: TracedLinear, name: str, ranges: Ranges) -> list[str]:
    node = traced.hooks.get(name)
    if node is None:
        return []
    g = traced.graph
    scalar = name == "decay_mod" and traced.request.decay_kind == "scalar"
    places = {"b": "int32_t(at.b)", "h": "int32_t(at.h)", "q": "int32_t(at.t)"}
    names = {n.id: places[n.attr[0]] for n in indices(g, 4)[:3]}
    names[indices(g, 4)[3].id] = "int32_t(at.t)" if scalar else "int32_t(at.d)"
    names[g.input("x", traced.dtype, vec=True).id] = "x"
    e = DeviceHookEmitter(ranges, names, indent=4)
    text = e.expr(node)
    return [
        f"  static __device__ float {name}(const ae::Env& env, const ae::HookAt& at, float x) {{",
        "    (void)env, (void)at, (void)x;",
        *e.lines,
        f"    return {text};",
        "  }",
    ]
