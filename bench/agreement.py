"""Nothing is timed before its output is right: peers against ours, ours against the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import attnengine as ae

from .baselines import Attend, Step, cotangent, step
from .variants import Variant

# Two correct 16-bit kernels differ by rounding (2^-9 relative each for bf16 outputs and weights,
# 2^-12 for fp16); fp32 ones by the order of their sums.
AGREEMENT = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
# The dense reference is slow, so one head is computed, for its last queries (in a causal mask they
# meet the most keys); the peers then check every element.
CHECKED_QUERIES = 128
GRADIENT_LENGTH = 256  # gradients against the reference: one head of a problem this short


def difference(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 distance; infinite when anything is not finite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def require(name: str, distance: float, dtype: torch.dtype) -> float:
    """`distance` itself; AssertionError with the contestant's name when it is beyond rounding."""
    bound = AGREEMENT[dtype]
    if not distance <= bound:
        raise AssertionError(f"{name} differs by {distance:.3g} (limit {bound:.0e}); nothing timed")
    return distance


def check_output(
    name: str, out: Tensor, variant: Variant, operands: Sequence[Tensor], start: int = 0
) -> float:
    """Distance of the first head's last queries from the fp64 reference. out [B, H, L, Dv];
    `start`: index of the first query, where queries are fewer than keys and at their end."""
    q, k, v = operands
    first = max(0, q.shape[2] - CHECKED_QUERIES)
    spec = variant.spec(offset=start + first)
    golden = ae.reference(
        q[:, :1, first:].double(), k[:, :1].double(), v[:, :1].double(), spec, dtype=torch.float64
    )
    return require(name, difference(out[:, :1, first:], golden), q.dtype)


def check_gradients(
    name: str, attend: Attend, variant: Variant, operands: Sequence[Tensor]
) -> float:
    """Largest distance, over output and gradients (captured parameters too), from the fp64
    reference on one head of a short problem."""
    short = [x[:1, :1, :GRADIENT_LENGTH].contiguous() for x in operands]
    parameters = [p for _, p in variant.trainable]
    spec = variant.spec()
    mine = step(attend, short, True, parameters)()
    golden = step(
        lambda q, k, v: ae.reference(q, k, v, spec, dtype=torch.float64),
        [x.double() for x in short],
        True,
        parameters,
        cotangent(short).double(),
    )()
    return require(
        f"{name} (gradients)",
        max(difference(a, b) for a, b in zip(mine, golden, strict=True)),
        operands[0].dtype,
    )


def check_peers(
    name: str, mine: Sequence[Tensor], peers: Mapping[str, Step], dtype: torch.dtype
) -> None:
    """Every output and gradient of every peer against ours."""
    for peer, run in peers.items():
        distance = max(difference(a, b) for a, b in zip(run(), mine, strict=True))
        require(f"{name}: {peer}", distance, dtype)


def check_repeats(name: str, run: Step, times: int = 2) -> None:
    """Every run gives the same bits."""
    first = run()
    for _ in range(times - 1):
        for a, b in zip(first, run(), strict=True):
            if not torch.equal(a, b):
                raise AssertionError(f"{name}: two runs differ in their bits; nothing timed")
