"""The stages of one linear-attention kernel as text."""

from __future__ import annotations

from .. import library
from ..ir import text
from .dispatch import LinearProgram
from .plan import LinearPlan
from .stages import LinearPipeline


def describe(program: LinearProgram, p: LinearPipeline) -> str:
    """Traced hooks, captured tensors, candidates with predicted cost, plan, source, cache path."""
    out = [f"attnengine linear attention for {program.name}", "", "== traced =="]
    for name, node in p.traced.hooks.items():
        out += [f"-- {name}", text({"result": node})]
    if not p.traced.hooks:
        out.append("no hooks")
    for i, tensor in enumerate(p.traced.captures):
        grad = ", gradient" if i in program.trainable else ""
        out.append(f"capture {i}: {tensor.dtype} {tuple(tensor.shape)}{grad}")
    for name, size in p.sources.pins:
        out.append(f"the hooks depend on {name}={size}")
    for kind, plans in (("forward", p.forward_plans), ("backward", p.backward_plans)):
        out += ["", f"== {kind} plan =="]
        out += _plans(plans) if plans else [f"none: {p.sources.no_backward}"]
    out += ["", "== forward source ==", program.sources.forward]
    if program.sources.backward is not None:
        out += ["== backward source ==", program.sources.backward]
    out.append(f"module: {library.kernel_info(program.forward()).path}")
    return "\n".join(out)


def _plans(plans: list[LinearPlan]) -> list[str]:
    lines = ["candidates, predicted cycles per 1000 tokens of one head on one core:",
             "  chunk  multiply   solve  pointwise   cache  overhead   total"]  # fmt: skip
    for p in plans:
        c = p.cost
        lines.append(
            f"  {p.chunk:5d}  {c.multiply:8.0f}  {c.solve:6.0f}  {c.pointwise:9.0f}  "
            f"{c.cache:6.0f}  {c.overhead:8.0f}  {c.total:6.0f}"
        )
    best = plans[0]
    lines.append(f"chosen: chunks of {best.chunk} tokens on {best.target}")
    lines += [f"  because {r}" for r in best.reasons]
    for t in best.tensors:
        lines.append(f"  {t.name}: {t.rows} x {t.columns} in {t.level}, {t.bytes} bytes")
    lines.append(f"  scratch of one worker: {best.scratch_bytes} bytes")
    return lines
