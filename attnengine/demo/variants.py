"""The demo's three attention variants, as a user would write them: plain PyTorch, forward only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import attnengine as ae

SOFTCAP = 20.0
WINDOW = 256


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """A query sees itself and what came before."""
    return q_idx >= kv_idx


def capped_alibi(slopes: Tensor) -> ae.AttentionSpec:
    """Soft-capped scores with a position penalty whose slope each head learns. `slopes`: [H]."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        capped = SOFTCAP * torch.tanh(score / SOFTCAP)
        return capped - torch.exp(slopes[h]) * (q_idx - kv_idx)

    return ae.AttentionSpec(score_mod=score_mod, mask_mod=causal)


def packed_documents(document: Tensor) -> ae.AttentionSpec:
    """Several documents in one row, each with a causal window. `document`: [L] int, id by token."""

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        near = (q_idx >= kv_idx) & (q_idx - kv_idx < WINDOW)
        return near & (document[q_idx] == document[kv_idx])

    return ae.AttentionSpec(mask_mod=mask_mod)


class TemperedSoftmaxPlusOne(ae.OnlineFunc):
    """weights = exp(s/T) / (1 + sum exp(s/T)): a head may attend to nothing at all.

    The "+1" is a key with score 0 and no value: the running maximum starts at 0 and the running sum
    at 1. Nothing else is written; the engine derives the gradient.
    """

    state = {"m": 0.0, "r": 1.0}

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def update(self, scores: Tensor, state: dict) -> tuple[Tensor, dict, Tensor]:
        scores = scores / self.temperature
        m = torch.maximum(state["m"], scores.amax().detach())
        factor = torch.exp(state["m"] - m)
        p = torch.exp(scores - m)
        return p, {"m": m, "r": state["r"] * factor + p.sum()}, factor

    def finalize(self, out: Tensor, state: dict) -> tuple[Tensor, dict]:
        return out / state["r"], {"lse": state["m"] + torch.log(state["r"])}

    def weights(self, scores: Tensor, saved: dict) -> Tensor:
        return torch.exp(scores / self.temperature - saved["lse"])

    def merge(self, a: dict, b: dict) -> tuple[dict, Tensor, Tensor]:
        m = torch.maximum(a["m"], b["m"])
        fa, fb = torch.exp(a["m"] - m), torch.exp(b["m"] - m)
        # Both parts counted the "+1" of their initial state.
        return {"m": m, "r": a["r"] * fa + b["r"] * fb - torch.exp(-m)}, fa, fb


def quiet() -> ae.AttentionSpec:
    """Causal attention through the row function above."""
    return ae.AttentionSpec(mask_mod=causal, row_func=TemperedSoftmaxPlusOne(0.8))


@dataclass(frozen=True)
class Entry:
    """One variant of the demo. `build(H, L)` gives the spec and its learnable tensors; `sdpa` says
    how torch's SDPA comes nearest: "mask" (same result, dense mask) or "causal" (a yardstick that
    computes something simpler). `flex`: FlexAttention can express it."""

    name: str
    build: Callable[[int, int], tuple[ae.AttentionSpec, list[Tensor]]]
    sdpa: str
    flex: bool


def _build_capped_alibi(heads: int, length: int) -> tuple[ae.AttentionSpec, list[Tensor]]:
    slopes = torch.linspace(-5.0, -1.0, heads).requires_grad_()
    return capped_alibi(slopes), [slopes]


def _build_packed_documents(heads: int, length: int) -> tuple[ae.AttentionSpec, list[Tensor]]:
    # Documents of growing length, none aligned to a tile.
    ends = torch.cumsum(torch.arange(37, 37 + 61 * 32, 61), 0)
    return packed_documents(torch.bucketize(torch.arange(length), ends, right=True)), []


def _build_quiet(heads: int, length: int) -> tuple[ae.AttentionSpec, list[Tensor]]:
    return quiet(), []


ENTRIES = (
    Entry("capped ALiBi, learned slopes", _build_capped_alibi, "causal", True),
    Entry("packed documents, window 256", _build_packed_documents, "mask", True),
    Entry("softmax plus one (row function)", _build_quiet, "causal", False),
)
