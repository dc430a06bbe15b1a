"""The variants that are timed, each in the words of a user: mods, masks and row functions.

A variant belongs to a length and a number of heads: `VARIANTS[name](length, heads)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import attnengine as ae

WINDOW = 256
SOFTCAP = 20.0
# Where documents end, as shares of the length: unequal, and no multiple of a tile.
DOCUMENT_ENDS = (0.147, 0.35, 0.501, 0.733, 0.902, 1.0)
T5_BUCKETS, T5_MAX_DISTANCE = 32, 128


class UserSoftmax(ae.OnlineFunc):
    """Softmax as a user writes it (the design page's example); saves lse."""

    state = {"m": float("-inf"), "r": 0.0}

    def update(self, scores, state):
        m = torch.maximum(state["m"], scores.amax().detach())
        alpha = torch.exp(state["m"] - m)
        p = torch.exp(scores - m)
        return p, {"m": m, "r": state["r"] * alpha + p.sum()}, alpha

    def finalize(self, out, state):
        return out / state["r"], {"lse": state["m"] + torch.log(state["r"])}

    def weights(self, scores, saved):
        return torch.exp(scores - saved["lse"])


class UserSoftmaxPair(UserSoftmax):
    """The same, saving the running pair (m, r) instead of its log-sum-exp."""

    def finalize(self, out, state):
        return out / state["r"], {"m": state["m"], "r": state["r"]}

    def weights(self, scores, saved):
        return torch.exp(scores - saved["m"]) / saved["r"]


@dataclass(frozen=True)
class Variant:
    """One attention variant. `live`: (query, key) pairs that cost FLOPs, per head. `trainable`: the
    captured parameters, by name."""

    name: str
    live: float
    score_mod: Callable[..., Tensor] | None = None
    mask_mod: Callable[..., Tensor] | None = None
    row_func: ae.OnlineFunc | None = None
    trainable: tuple[tuple[str, Tensor], ...] = ()

    def spec(self, offset: int = 0) -> ae.AttentionSpec:
        """As attnengine takes it; `offset` is added to the index of the query."""

        def shifted(mod: Callable[..., Tensor] | None) -> Callable[..., Tensor] | None:
            if mod is None or offset == 0:
                return mod
            return lambda *args: mod(*args[:-2], args[-2] + offset, args[-1])

        return ae.AttentionSpec(
            score_mod=shifted(self.score_mod),
            mask_mod=shifted(self.mask_mod),
            row_func=self.row_func or ae.Softmax(),
        )


def causal_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Mask of a decoder."""
    return q_idx >= kv_idx


def full(length: int, heads: int) -> Variant:
    """Every query meets every key."""
    return Variant("full", float(length) ** 2)


def causal(length: int, heads: int) -> Variant:
    """Causal counts half: the field's convention."""
    return Variant("causal", length**2 / 2, mask_mod=causal_mask)


def alibi(length: int, heads: int) -> Variant:
    """Causal with a linear position bias per head."""
    slopes = ae.variants.alibi_slopes(heads)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    return Variant("alibi", length**2 / 2, score_mod, causal_mask)


def softcap(length: int, heads: int) -> Variant:
    """Causal, scores squashed into (-SOFTCAP, SOFTCAP), as Gemma 2 does."""

    def score_mod(score, b, h, q_idx, kv_idx):
        return SOFTCAP * torch.tanh(score / SOFTCAP)

    return Variant("softcap", length**2 / 2, score_mod, causal_mask)


def window(length: int, heads: int, size: int = WINDOW) -> Variant:
    """Causal over the last `size` keys."""

    def mask_mod(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx < size)

    live = float(sum(min(i + 1, size) for i in range(length)))
    return Variant(f"window{size}", live, mask_mod=mask_mod)


def document(length: int, heads: int) -> Variant:
    """Causal inside documents of unequal length, packed into one sequence."""
    ends = torch.tensor([int(share * length) for share in DOCUMENT_ENDS])
    ids = torch.bucketize(torch.arange(length), ends, right=True)

    def mask_mod(b, h, q_idx, kv_idx):
        return (ids[q_idx] == ids[kv_idx]) & (q_idx >= kv_idx)

    sizes = ends.diff(prepend=torch.zeros(1, dtype=ends.dtype)).double()
    return Variant("document", float(sizes.square().sum()) / 2, mask_mod=mask_mod)


VARIANTS: dict[str, Callable[[int, int], Variant]] = {
    "full": full,
    "causal": causal,
    "alibi": alibi,
    "softcap": softcap,
    f"window{WINDOW}": window,
    "document": document,
}


def row_functions(length: int) -> dict[str, Variant]:
    """Row functions over every pair, the built-in softmax first."""
    live = float(length) ** 2
    functions = {
        "softmax": ae.Softmax(),
        "sigmoid": ae.Sigmoid(bias=-torch.log(torch.tensor(float(length))).item()),
        "relu": ae.ReLU(),
        "user-softmax-lse": UserSoftmax(),
        "user-softmax-mr": UserSoftmaxPair(),
    }
    return {name: Variant(name, live, row_func=f) for name, f in functions.items()}


def learned_bias(length: int, heads: int, dtype: torch.dtype) -> Variant:
    """score + bias[h, q_idx, kv_idx], a parameter [H, S, S]."""
    bias = torch.randn(heads, length, length, generator=torch.Generator().manual_seed(2))
    bias = bias.to(dtype).requires_grad_()

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + bias[h, q_idx, kv_idx]

    return Variant("bias", float(length) ** 2, score_mod, trainable=(("bias", bias),))


def t5(length: int, heads: int, dtype: torch.dtype) -> Variant:
    """score + table[bucket of the distance, h], a parameter [buckets, H]."""
    table = torch.randn(T5_BUCKETS, heads, generator=torch.Generator().manual_seed(2))
    table = table.to(dtype).requires_grad_()
    spec = ae.variants.t5_bias(table, max_distance=T5_MAX_DISTANCE)
    return Variant("t5", float(length) ** 2, spec.score_mod, trainable=(("table", table),))
