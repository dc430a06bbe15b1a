"""The peers, each as a callable on the case's operands, and the check that all compute the same.

SDPA cannot express a softcap; with ALiBi or a window it needs a dense L x L mask, which is built
outside the clock. FlexAttention is compiled for the case outside the clock; on the CPU it has no
backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attnengine as ae

from .cases import HEADS, Case

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# Two correct 16-bit kernels differ by rounding (2^-9 relative each for bf16 outputs and weights);
# fp32 ones by the order of their sums.
AGREEMENT = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
# Heads that the dense reference is computed for: a head is independent of the others.
CHECKED_HEADS = 1


def sdpa(case: Case) -> Attend:
    """torch's fused CPU attention, plain or `is_causal`."""
    is_causal = case.variant.name == "causal"
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def sdpa_mask(case: Case) -> Attend:
    """SDPA given the variant as a dense additive mask [1, H, L, L] in the operands' dtype."""
    length = case.length
    h = torch.arange(HEADS)[:, None, None]
    q_idx = torch.arange(length)[:, None]
    kv_idx = torch.arange(length)
    bias = torch.zeros(HEADS, length, length)
    if case.variant.score_mod is not None:
        bias = case.variant.score_mod(bias, torch.zeros(()), h, q_idx, kv_idx)
    if case.variant.mask_mod is not None:
        live = case.variant.mask_mod(torch.zeros(()), h, q_idx, kv_idx)
        bias = bias.masked_fill(~live, float("-inf"))
    mask = bias.to(case.dtype)[None]
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(case: Case) -> Attend:
    """torch's FlexAttention, compiled for this case alone."""
    torch._dynamo.reset()
    block_mask = None
    if case.variant.mask_mod is not None:
        block_mask = create_block_mask(
            case.variant.mask_mod, None, None, case.length, case.length, device="cpu"
        )
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    score_mod = case.variant.score_mod
    return lambda q, k, v: compiled(q, k, v, score_mod=score_mod, block_mask=block_mask)


BASELINES: dict[str, Callable[[Case], Attend]] = {
    "sdpa": sdpa,
    "sdpa-mask": sdpa_mask,
    "flex": flex,
}


def ours(case: Case) -> Attend:
    """attnengine through a prepared handle, as a model would hold it."""
    q, k, v = case.operands()
    if case.backward:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
    return ae.compile(case.variant.spec(), q, k, v)


def step(attend: Attend, operands: tuple[Tensor, ...], backward: bool) -> Callable:
    """What the clock sees: one forward, or one forward and its gradients for q, k and v."""
    q, k, v = operands
    if not backward:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(q, k, v),)

        return forward
    leaves = tuple(x.detach().clone().requires_grad_() for x in operands)
    grad = torch.randn(q.shape[:-1] + v.shape[-1:], generator=torch.Generator().manual_seed(1))
    grad = grad.to(v.dtype)

    def forward_backward() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    return forward_backward


def difference(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 distance; infinite when anything is not finite."""
    actual, expected = actual.double(), expected.double()
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def check_equal(case: Case, steps: dict[str, Callable]) -> dict[str, float]:
    """Compare every contestant's output and gradients, ours with the fp64 reference and the peers
    with ours. Returns the worst relative L2 distance of each; raises AssertionError with the case,
    the contestant and the distance when one is beyond the rounding of its dtype."""
    bound = AGREEMENT[case.dtype]
    mine = steps["attnengine"]()
    operands = tuple(x[:, :CHECKED_HEADS] for x in case.operands())
    spec = case.variant.spec()
    golden_step = step(
        lambda q, k, v: ae.reference(q, k, v, spec),
        tuple(x.double() for x in operands),
        False,
    )
    worst = {"attnengine": difference(mine[0][:, :CHECKED_HEADS], golden_step()[0])}
    for name, run in steps.items():
        if name != "attnengine":
            worst[name] = max(difference(a, b) for a, b in zip(run(), mine, strict=True))
    for name, distance in worst.items():
        if not distance <= bound:
            raise AssertionError(
                f"{case.name}: {name} differs by {distance:.3g} (limit {bound:.0e}); nothing timed"
            )
    return worst
