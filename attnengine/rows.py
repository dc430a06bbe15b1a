"""The built-in row functions, each written through :class:`attnengine.spec.OnlineFunc`."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .spec import OnlineFunc, Softmax, State

__all__ = ["Identity", "ReLU", "Retention", "Sigmoid", "Softmax", "SoftmaxSink"]


class SoftmaxSink(Softmax):
    """exp(s - lse), lse = log(exp(sink[h]) + sum exp(s)): softmax with a learnable per-head sink.

    sink: floating Tensor [H]. The sink takes weight and has no value, as in gpt-oss (OpenAI 2025,
    arXiv:2508.10925); sink = 0 is "softmax off by one". A row with no live key saves lse = sink[h].
    It joins in ``finalize``, so that the parts of a split row do not each count it.
    """

    def __init__(self, sink: Tensor, max_scores: bool = False) -> None:
        super().__init__(max_scores)
        if not isinstance(sink, Tensor) or not sink.is_floating_point():
            raise TypeError(f"sink={sink!r}: expected a floating tensor [H]")
        if sink.dim() != 1:
            raise ValueError(f"sink has shape {tuple(sink.shape)}, expected [H]")
        self.sink = sink

    def init(self, b: Tensor, h: Tensor, q_idx: Tensor) -> State:
        return {"m": -math.inf, "r": 0.0, "sink": self.sink[h]}

    def update(self, scores: Tensor, state: State) -> tuple[Tensor, State, Any]:
        p, new, alpha = super().update(scores, state)
        return p, {**new, "sink": state["sink"]}, alpha

    def finalize(self, out: Tensor, state: State) -> tuple[Tensor, State]:
        top = torch.maximum(state["m"], state["sink"].detach())
        none = top == -math.inf  # neither a key nor a sink: lse is -inf, and no gradient is 0 / 0
        shift = torch.where(none, 0.0, top)
        alpha = torch.exp(state["m"] - shift)
        r = torch.where(none, 1.0, state["r"] * alpha + torch.exp(state["sink"] - shift))
        saved = {"lse": top + torch.log(r)}
        if self.max_scores:
            saved["max_scores"] = state["m"].detach()
        return out * (alpha / r), saved

    def merge(self, a: State, b: State) -> tuple[State, Any, Any]:
        new, fa, fb = super().merge(a, b)
        return {**new, "sink": a["sink"]}, fa, fb


class Sigmoid(OnlineFunc):
    """sigmoid(s + bias): sigmoid attention, Ramapuram et al., arXiv:2409.04431 (bias = -log(keys)).

    bias: float, 0-d Tensor, or Tensor [H] (one per query head; saved as the statistic ``bias``).
    """

    def __init__(self, bias: float | Tensor = 0.0) -> None:
        if isinstance(bias, Tensor):
            if bias.dim() > 1 or not bias.is_floating_point():
                kind = f"{bias.dtype} of shape {tuple(bias.shape)}"
                raise ValueError(f"bias is {kind}, expected a floating tensor, 0-d or [H]")
        elif isinstance(bias, bool) or not isinstance(bias, Real) or not math.isfinite(bias):
            raise ValueError(f"bias={bias!r}: expected a finite number or a tensor")
        self.bias = bias if isinstance(bias, Tensor) else float(bias)

    def init(self, b: Tensor, h: Tensor, q_idx: Tensor) -> State:
        if isinstance(self.bias, Tensor) and self.bias.dim() == 1:
            return {"bias": self.bias[h]}
        return {}

    def update(self, scores: Tensor, state: State) -> tuple[Tensor, State, Any]:
        return self.weights(scores, state), state, 1.0

    def finalize(self, out: Tensor, state: State) -> tuple[Tensor, State]:
        return out, state

    def weights(self, scores: Tensor, saved: State) -> Tensor:
        return torch.sigmoid(scores + saved.get("bias", self.bias))

    def merge(self, a: State, b: State) -> tuple[State, Any, Any]:
        return a, 1.0, 1.0


class Identity(OnlineFunc):
    """s itself: attention without a normaliser ("linear" scores)."""

    def update(self, scores: Tensor, state: State) -> tuple[Tensor, State, Any]:
        return self.weights(scores, state), state, 1.0

    def finalize(self, out: Tensor, state: State) -> tuple[Tensor, State]:
        return out, state

    def weights(self, scores: Tensor, saved: State) -> Tensor:
        return scores

    def merge(self, a: State, b: State) -> tuple[State, Any, Any]:
        return a, 1.0, 1.0


class ReLU(Identity):
    """max(s, 0): ReLU attention, Wortsman et al., arXiv:2309.08586 (divide by the length in
    ``scale`` or in a score_mod)."""

    def weights(self, scores: Tensor, saved: State) -> Tensor:
        return torch.relu(scores)


class Retention(OnlineFunc):
    """s / max(1, sum |s|), the normaliser detached: retention, Sun et al., arXiv:2307.08621 and its
    published code. Saves the normaliser as ``norm``."""

    state = {"r": 0.0}

    def update(self, scores: Tensor, state: State) -> tuple[Tensor, State, Any]:
        return scores, {"r": state["r"] + scores.detach().abs().sum()}, 1.0

    def finalize(self, out: Tensor, state: State) -> tuple[Tensor, State]:
        norm = torch.clamp(state["r"], min=1.0)
        return out / norm, {"norm": norm}

    def weights(self, scores: Tensor, saved: State) -> Tensor:
        return scores / saved["norm"].detach()

    def merge(self, a: State, b: State) -> tuple[State, Any, Any]:
        return {"r": a["r"] + b["r"]}, 1.0, 1.0
