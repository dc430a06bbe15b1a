"""How wrong a correct kernel may be: the first-order effect of random roundings of every term of an
evaluated spec, on its output and on its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .reference import Evaluation

DRAWS = 2  # random roundings whose root mean square is the noise


@dataclass(frozen=True)
class Noise:
    """Random first-order errors of one tensor, in unit roundoffs: ``terms`` with one rounding per
    weight and score gradient, ``wide`` amplified by the size of the scores. ``count``: how many
    terms one element sums."""

    terms: list[Tensor] = field(default_factory=list)
    wide: list[Tensor] = field(default_factory=list)
    count: int = 1


def term_counts(q: Tensor, k: Tensor, captures: list[Tensor]) -> list[int]:
    """How many terms one element of out, dq, dk, dv and each captured gradient sums."""
    b, hq, length, _ = q.shape
    keys = max(1, k.shape[2])
    queries = max(1, length * (hq // k.shape[1]) * (b // max(1, k.shape[0])))
    pairs = max(1, b * hq * length * k.shape[2])
    each = [max(1, pairs // max(1, x.numel())) for x in captures]
    return [keys, keys, max(keys, queries), max(keys, queries), *each]


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of the inputs; zeros where no output depends on one."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        list(inputs),
        [c.to(o.dtype) for o, c in pairs],
        retain_graph=True,
        allow_unused=True,
    )
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def noises(
    true: Evaluation,
    stats: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    counts: Sequence[int],
    generator: torch.Generator,
) -> list[Noise]:
    """Noise of the output and, if it has a gradient, of each input's gradient.

    cotangents: of the output and of ``stats``, the saved statistics that have one.
    """

    def uniform(x: Tensor) -> Tensor:
        r = torch.rand(x.shape, generator=generator, dtype=torch.float64)
        return (2.0 * r - 1.0).to(x.device)

    grads, size = true.out.requires_grad, torch.zeros_like(true.scores)
    if grads:  # what each score's gradient is made of, before it cancels
        (dw,) = gradients([true.out], [true.weights], cotangents[:1])
        parts = [
            *gradients([true.weights], [true.scores], [dw]),
            *gradients(stats, [true.scores], cotangents[1:]),
        ]
        size = torch.stack(parts).abs().sum(0)
    loud = 1.0 + true.raw.detach().abs() + true.scores.detach().abs()
    found: list[list[list[Tensor]]] = []
    for amplify in (torch.ones_like(loud), loud):
        draws = []
        for _ in range(DRAWS):
            w = true.weights.detach() * uniform(true.weights) * amplify
            with torch.set_grad_enabled(grads):
                out = true.finish(true.aggregate(w))
                sums = true.finish(true.rows.detach() * uniform(true.rows))
            error = [out.detach()]
            if grads:
                seeds = [uniform(size) * size * amplify, cotangents[0], cotangents[0]]
                error += [g.double() for g in gradients([true.scores, out, sums], inputs, seeds)]
            draws.append(error)
        found.append([list(one) for one in zip(*draws, strict=True)])
    return [Noise(*given) for given in zip(*found, counts, strict=False)]
