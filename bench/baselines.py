"""The contestants, each as a callable on the operands.

SDPA cannot express a softcap; with ALiBi, documents or a window it needs a dense L x L mask, which
is built outside the clock. FlexAttention is compiled for the case outside the clock; on the CPU it
has no backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attnengine as ae

from .cases import Case
from .variants import Variant

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], tuple[Tensor, ...]]


def sdpa(case: Case) -> Attend:
    """torch's fused CPU attention, plain or `is_causal`."""
    is_causal = case.variant == "causal"
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def sdpa_mask(case: Case) -> Attend:
    """SDPA given the variant as a dense additive mask [1, H, L, L] in the operands' dtype."""
    length, variant = case.length, case.meaning()
    h = torch.arange(case.heads)[:, None, None]
    q_idx = torch.arange(length)[:, None]
    kv_idx = torch.arange(length)
    bias = torch.zeros(case.heads, length, length)
    if variant.score_mod is not None:
        bias = variant.score_mod(bias, torch.zeros(()), h, q_idx, kv_idx)
    if variant.mask_mod is not None:
        live = variant.mask_mod(torch.zeros(()), h, q_idx, kv_idx)
        bias = bias.masked_fill(~live, float("-inf"))
    mask = bias.to(case.dtype)[None]
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(case: Case) -> Attend:
    """torch's FlexAttention, compiled for this case alone."""
    torch._dynamo.reset()
    variant, block_mask = case.meaning(), None
    if variant.mask_mod is not None:
        block_mask = create_block_mask(
            variant.mask_mod, None, None, case.length, case.length, device="cpu"
        )
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    score_mod = variant.score_mod
    return lambda q, k, v: compiled(q, k, v, score_mod=score_mod, block_mask=block_mask)


PEERS: dict[str, Callable[[Case], Attend]] = {"sdpa": sdpa, "sdpa-mask": sdpa_mask, "flex": flex}


def ours(variant: Variant, operands: Sequence[Tensor], backward: bool) -> Attend:
    """attnengine through a prepared handle, as a model would hold it."""
    return ae.compile(variant.spec(), *operands, backward=backward)


def cotangent(operands: Sequence[Tensor]) -> Tensor:
    """The gradient of the output, [B, Hq, L, Dv], the same at every run."""
    q, _, v = operands
    shape = q.shape[:-1] + v.shape[-1:]
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(v.dtype)


def step(
    attend: Attend,
    operands: Sequence[Tensor],
    backward: bool,
    parameters: Sequence[Tensor] = (),
    grad: Tensor | None = None,
) -> Step:
    """What the clock sees: one forward, or one forward and its gradients for q, k, v and the
    captured parameters. `grad`: the cotangent, by default `cotangent(operands)`."""
    q, k, v = operands
    if not backward:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(q, k, v),)

        return forward
    leaves = tuple(x.detach().clone().requires_grad_() for x in operands)
    given = cotangent(operands) if grad is None else grad

    def forward_backward() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, (*leaves, *parameters), given))

    return forward_backward
