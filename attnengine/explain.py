"""The stages of one kernel as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import dispatch, library
from .arch import CUDA
from .dispatch import Pipeline, Program
from .ir import text
from .key import Form
from .plan import Cost, DeviceCost, Plan
from .schedule import DeviceSchedule, Schedule, device_schedule, kernel_schedule
from .spec import AttentionSpec


@dataclass(frozen=True)
class CacheCall:
    """A call on caches, as far as its kernel and its schedule depend on it: keys of each sequence,
    the most that a cache has room for, (Hq, Hkv), query rows of each sequence, the cache's layout
    ("BSHD" or "BHSD"), and whether v is the first columns of k."""

    lengths: tuple[int, ...]
    capacity: int
    heads: tuple[int, int]
    rows: int = 1
    layout: str = "BSHD"
    shared_kv: bool = False

    @staticmethod
    def of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]) -> CacheCall:
        """The call of q [B, Hq, rows, D] on caches as k and v are. Raises ValueError where the
        lengths fit neither."""
        if len(lengths) != q.shape[0]:
            raise ValueError(f"lengths has {len(lengths)} sequences and q has batch {q.shape[0]}")
        for i, n in enumerate(lengths):
            if not 0 <= n <= k.shape[2]:
                raise ValueError(f"lengths[{i}]={n}: k has room for 0 to {k.shape[2]} keys")
        layout = "BSHD" if k.shape[1] > 1 and k.stride(1) < k.stride(2) else "BHSD"
        heads = q.shape[1], k.shape[1]
        shared = dispatch.shares_keys(k, v)
        if k.is_meta:  # has no address
            shared &= v is k or (v._base is not None and any(v._base is x for x in (k, k._base)))
        return CacheCall(tuple(lengths), k.shape[2], heads, q.shape[2], layout, shared)

    def form(self, isa: str) -> Form:
        """Of the kernel that serves it."""
        if isa not in CUDA:
            return Form()
        return Form.of_sequences(self.rows * (self.heads[0] // self.heads[1]), self.shared_kv)

    def schedule_on_device(self, plan: Plan, multiprocessors: int | None = None) -> DeviceSchedule:
        """How a CUDA launch shares its work; ``multiprocessors`` None: of this machine's GPU, or
        of the one that the target is planned for."""
        if multiprocessors is None and torch.cuda.is_available():
            multiprocessors = torch.cuda.get_device_properties().multi_processor_count
        known = multiprocessors or CUDA[plan.target.partition(":")[2]].multiprocessors
        return device_schedule(plan, self.lengths, self.heads, self.rows, self.capacity, known)

    def schedule(
        self, program: Program, plan: Plan, tensors: Sequence[torch.Tensor]
    ) -> Schedule | DeviceSchedule:
        """How a launch shares its work, and why; of a CPU the kernel is asked."""
        if program.is_cuda:
            return self.schedule_on_device(plan)
        of = tensors, self.lengths, self.heads, self.rows, self.layout
        return kernel_schedule(program.forward(), *of, plan.split_kv)


def explained(
    spec: AttentionSpec,
    element: torch.dtype,
    d: int,
    dv: int,
    isa: str,
    call: CacheCall | None = None,
) -> str:
    """Every stage of a spec's kernel for a target, compiled and described; it need not run here."""
    form = Form() if call is None else call.form(isa)
    of = spec, dispatch.captures_for(spec), element, d, dv, isa, form
    program, p = dispatch.program(*of), dispatch.pipeline(*of)
    plan = p.forward_plans[program.sources.candidate]
    tensors = dispatch.bound_tensors(program, of[1])
    return describe(program, p, None if call is None else call.schedule(program, plan, tensors))


def describe(program: Program, p: Pipeline, shared: object = None) -> str:
    """Traced functions, derivation, candidates with predicted cost, plan, source and cache path;
    ``shared``: how a call shares its work, printed after the plan."""
    t = p.traced
    out = [f"attnengine kernel for {program.name}", "", "== traced =="]
    for name, node in (("mask_mod", t.mask), ("score_mod", t.score)):
        if node is not None:
            out += [f"-- {name}", text({"result": node})]
    for name, node in t.operands.items():
        out += [f"-- {name}_mod", text({"result": node})]
    row = t.row
    update = {"weights": row.weights_online, "factor": row.factor}
    update |= {f"state.{n}": v for n, v in row.new_state.items()}
    out += ["-- row function: update", text(update)]
    out += ["-- row function: finalize", text({"out factor": row.out_factor, **row.saved})]
    out += ["-- row function: weights", text({"weights": row.weights})]
    for i, tensor in enumerate(t.captures):
        grad = ", gradient" if i in p.sources.grads else ""
        out.append(f"capture {i}: {tensor.dtype} {tuple(tensor.shape)}{grad}")
    out += ["", "== derived backward =="]
    if p.derived is None:
        out.append(f"none: {p.no_backward}")
    else:
        d = p.derived
        out += [f"extra passes over the keys: {len(d.passes)}", *d.notes]
        if p.quiet is not None:
            out.append(
                f"extra passes when no statistic has a gradient: {len(p.quiet.passes)}; dscore is "
                "then\n" + text({"dscore": p.quiet.dscore})
            )
        out.append(f"row scalars read: {', '.join(d.row_inputs) or 'none'}")
        out.append(text({"weights": d.weights, "dscore": d.dscore}))
        for s in (*d.scatters, *d.row_scatters):
            kind = "per key" if s.value.vec else "per row"
            out.append(f"gradient of capture {s.capture}: {kind}")
    chosen = {"forward": program.sources.candidate, "backward": 0}
    for kind, plans in (("forward", p.forward_plans), ("backward", p.backward_plans)):
        if plans:
            out += ["", f"== {kind} plan ==", *_plans(plans, chosen[kind])]
    if shared is not None:
        out += ["", "== schedule ==", str(shared)]
    out += ["", "== forward source ==", program.sources.forward]
    if program.sources.backward is not None:
        out += ["== backward source ==", program.sources.backward]
    out.append(f"module: {library.kernel_info(program.forward()).path}")
    return "\n".join(out)


def describe_plans(p: Pipeline, shared: object = None) -> str:
    """Candidates of both kernels with predicted cost by resource, and each choice with reasons;
    ``shared`` as in :func:`describe`."""
    first = p.forward_plans[0]
    out = [
        f"attnengine plan for {first.element} D{first.head_dim}x{first.value_dim} {first.target}",
        "the kernel serves every batch, head count, length and stride; nothing was compiled",
        "", "== forward plan ==", *_plans(p.forward_plans), "", "== backward plan ==",
    ]  # fmt: skip
    out += _plans(p.backward_plans) or [f"none: {p.no_backward}"]
    return "\n".join(out if shared is None else [*out, "", "== schedule ==", str(shared)])


def _plans(plans: list[Plan], chosen: int = 0) -> list[str]:
    if not plans:
        return []
    lines = _device_candidates(plans) if plans[0].warps else _candidates(plans)
    best = plans[chosen]
    shape = f"{best.block_m} x {best.block_n}"
    if best.warps:
        shape += f", {best.warps} warps, {best.stages} stages"
    lines.append(f"chosen: {shape} on {best.target}, {best.partition}")
    if chosen > 0:
        lines.append("  because cheaper ones spill registers")
    lines += [f"  because {r}" for r in best.reasons]
    for t in best.tensors:
        stages = f" x {t.stages} stages" if t.stages > 1 else ""
        lines.append(f"  {t.name}: {t.rows} x {t.columns} in {t.level}, {t.bytes} bytes{stages}")
    if best.warps:
        lines.append(f"  dynamic shared memory of a block: {best.shared_bytes} bytes")
    else:
        lines.append(f"  scratch of one worker: {best.scratch_bytes} bytes")
    return lines


def _candidates(plans: list[Plan]) -> list[str]:
    lines = ["candidates, predicted cycles per 1000 scores of one core:",
             "  rows x keys  multiply  pointwise  cache  overhead  total"]  # fmt: skip
    for p in plans:
        c = p.cost
        assert isinstance(c, Cost)
        lines.append(
            f"  {p.block_m:4d} x {p.block_n:4d}  {c.multiply:8.0f}  {c.pointwise:9.0f}  "
            f"{c.cache:5.0f}  {c.overhead:8.0f}  {c.total:5.0f}"
        )
    return lines


def _device_candidates(plans: list[Plan]) -> list[str]:
    lines = [
        "candidates, predicted cycles per 1000 scores of one SM, by resource and together:",
        "  rows x keys  warps  stages  tensor  exp  pointwise  shared  memory  overhead  total",
    ]
    for p in plans:
        c = p.cost
        assert isinstance(c, DeviceCost)
        lines.append(
            f"  {p.block_m:4d} x {p.block_n:4d}  {p.warps:5d}  {p.stages:6d}  {c.tensor:6.0f}  "
            f"{c.exp:3.0f}  {c.pointwise:9.0f}  {c.shared:6.0f}  {c.memory:6.0f}  "
            f"{c.overhead:8.0f}  {c.total:5.0f}"
        )
    return lines
