"""Hooks for tests of the code generator, and what traced graphs compute, element by element in
torch: the meaning that generated C++ must have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnengine.ir import TORCH_DTYPES, TORCH_OPS, Node, const_value, walk
from attnengine.linear.elementwise import indices
from attnengine.linear.request import LinearRequest
from attnengine.linear.spec import LinearAttentionSpec
from attnengine.linear.trace import TracedLinear, operand_shape, trace_linear

Spec = LinearAttentionSpec
B, HK, H, L, D, DV = 2, 2, 4, 6, 8, 5
SHAPES = (B, HK, H, L)


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def request(element: str = "f32", decay: str = "none", **more: Any) -> LinearRequest:
    more.setdefault("decay_dtype", None if decay == "none" else "f32")
    return LinearRequest(element, D, DV, decay, **more)


def traced(
    r: LinearRequest | None = None, shapes: tuple[int, int, int, int] = SHAPES, **hooks: Any
) -> TracedLinear:
    return trace_linear(Spec(**hooks), r or request(), shapes)


def interpret(
    t: TracedLinear, roots: Sequence[Node], shape: tuple[int, ...], **inputs: Tensor
) -> list[Tensor]:
    """The value of ``roots`` for every element of an operand of ``shape``."""
    dims = len(shape)
    known: dict[int, Tensor] = {}
    for axis, n in enumerate(indices(t.graph, dims)):
        at = [1] * dims
        at[axis] = shape[axis]
        known[n.id] = torch.arange(shape[axis]).view(at)
    for n in walk(roots):
        args = [known[a.id] for a in n.args]
        if n.id in known:
            continue
        if n.op == "input":
            known[n.id] = inputs[n.attr[0]]
        elif n.op == "const":
            known[n.id] = torch.tensor(const_value(n), dtype=TORCH_DTYPES[n.dtype])
        elif n.op == "cast":
            known[n.id] = args[0].to(TORCH_DTYPES[n.dtype])
        elif n.op == "splat":
            known[n.id] = args[0]
        elif n.op == "gather":
            capture = t.captures[n.attr[0]].detach()
            places = [a * (s != 1) for a, s in zip(args, capture.shape, strict=True)]
            known[n.id] = capture[tuple(places)]
        else:
            known[n.id] = TORCH_OPS[n.op](*args)
    return [known[r.id].expand(shape) for r in roots]


def hook_case(t: TracedLinear, name: str) -> tuple[Tensor, Tensor]:
    """An operand of hook ``name`` and a gradient of its result, in the accumulator dtype."""
    shape = operand_shape(name, t.request, SHAPES)
    g = torch.Generator().manual_seed(3)
    kind = TORCH_DTYPES[t.dtype]
    return torch.randn(shape, generator=g, dtype=kind), torch.randn(shape, generator=g, dtype=kind)


# -- specs of published models ---------------------------------------------------------------------


def feature_map() -> tuple[Spec, LinearRequest]:
    """Linear transformers: elu + 1, and its sum below the line."""
    r = LinearRequest("f32", 64, 64, normalizer=True)
    return Spec(q_mod=lambda x: F.elu(x) + 1, k_mod=lambda x: F.elu(x) + 1, normalizer="sum"), r


def gated() -> tuple[Spec, LinearRequest]:
    """Gated linear attention: a decay for each channel, and a gate on the output."""
    gate = leaf(2, 4, 6, 64)
    r = LinearRequest("bf16", 128, 64, "channel", "f32")
    return Spec(decay_mod=lambda x: F.logsigmoid(x) / 16, out_mod=lambda x: x * F.silu(gate)), r


def state_space() -> tuple[Spec, LinearRequest]:
    """Mamba-2: step sizes scale the decay and the values."""
    a_log, bias, step = leaf(4), leaf(4, seed=1), leaf(2, 4, 6)
    r = LinearRequest("f64", 24, 17, "scalar", "f64")
    return Spec(
        v_mod=lambda x: x * F.softplus(step)[..., None],
        decay_mod=lambda x: -torch.exp(a_log)[:, None] * F.softplus(x + bias.view(4, 1)),
    ), r


def delta_rule() -> tuple[Spec, LinearRequest]:
    r = LinearRequest("bf16", 128, 128, "scalar", "f32", "bf16")
    return Spec(), r
