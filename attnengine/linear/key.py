"""The canonical, hashable meaning of one linear-attention kernel.

As in :mod:`attnengine.key`: what the generated code depends on and nothing else. Batch, heads,
lengths, strides, the scale and the values of captured tensors are run-time values.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir import DTYPE_NAMES, digest, text
from .request import LinearRequest
from .trace import TracedLinear

__all__ = ["KINDS", "LinearKey", "LinearRequest", "linear_key"]
KINDS = ("forward", "backward")


@dataclass(frozen=True)
class LinearKey:
    """``graphs`` is the canonical text of every hook, and in backward of its derivatives."""

    kind: str  # "forward" or "backward"
    request: LinearRequest
    graphs: str
    captures: tuple[tuple[str, int], ...]  # (dtype, rank) of each captured tensor
    grads: tuple[tuple[str, int], ...]  # (hook, capture) of each hook gradient, in their order

    def digest(self) -> str:
        return digest(repr(self))


def linear_key(kind: str, traced: TracedLinear) -> LinearKey:
    """The key of a traced spec's "forward" or "backward" kernel."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    roots = dict(traced.hooks)
    grads: tuple[tuple[str, int], ...] = ()
    if kind == "backward":
        pullbacks = traced.gradients()
        for name, pullback in pullbacks.items():
            roots[f"d.{name}"] = pullback.dx
            for i, grad in enumerate(pullback.grads):
                roots[f"d.{name}.{i}"] = grad.value
        grads = tuple((g.hook, g.capture) for g in traced.hook_grads)
    captures = tuple((DTYPE_NAMES[t.dtype], t.dim()) for t in traced.captures)
    return LinearKey(kind, traced.request, text(roots), captures, grads)
