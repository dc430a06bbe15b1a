"""How wrong a correct kernel may be: the spec evaluated in fp64 with random errors in its terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .products import Precision

UNIT = 2.0**-14  # relative size of the injected errors: small enough to be of first order, large
# enough to show in the gradient of a captured fp32 tensor


@dataclass(frozen=True)
class Noise:
    """Random errors of one tensor, per unit of relative error: ``terms`` in every weight, score
    gradient and output row; ``loud`` in every term of a dot product too, so that it grows with the
    scores (exp turns their absolute error into a relative one). ``count``: how many terms one
    element sums."""

    terms: list[Tensor] = field(default_factory=list)
    loud: list[Tensor] = field(default_factory=list)
    count: int = 1


def noises(
    evaluate: Callable[[Precision], list[Tensor]],
    golden: Sequence[Tensor],
    counts: Sequence[int],
    terms: int,
    loud: int,
    upcast: bool,
) -> list[Noise]:
    """Noise of each tensor that ``evaluate`` returns, from so many random evaluations of a kind."""
    generator = torch.Generator().manual_seed(0)

    def draw(is_loud: bool) -> list[Tensor]:
        precision = Precision(
            torch.float64, upcast=upcast, unit=UNIT, loud=is_loud, random=generator
        )
        return [(x - y) / UNIT for x, y in zip(evaluate(precision), golden, strict=True)]

    quiet = [draw(False) for _ in range(terms)]
    noisy = [draw(True) for _ in range(loud)]
    return [
        Noise([d[i] for d in quiet], [d[i] for d in noisy], counts[i]) for i in range(len(golden))
    ]


def term_counts(q: Tensor, k: Tensor, captures: list[Tensor]) -> list[int]:
    """How many terms one element of out, dq, dk, dv and each captured gradient sums."""
    b, hq, length, _ = q.shape
    keys = max(1, k.shape[2])
    queries = max(1, length * (hq // k.shape[1]) * (b // max(1, k.shape[0])))
    pairs = max(1, b * hq * length * k.shape[2])
    each = [max(1, pairs // max(1, x.numel())) for x in captures]
    return [keys, keys, max(keys, queries), max(keys, queries), *each]


def overflowed(want: Tensor, got: Tensor, stored: torch.dtype) -> Tensor:
    """Golden values as ``stored`` has room for them. An error of a few roundings at the limit
    decides between its largest number and infinity: either is right there."""
    info = torch.finfo(stored)
    slack, sign = 4.0 * info.eps, want.sign()
    large = want.abs() >= info.max * (1.0 + slack)
    near = (want.abs() >= info.max * (1.0 - slack)) & (got == sign * math.inf)
    held = want.clamp(-info.max, info.max)
    return torch.where(large | near, sign * math.inf, held)
