"""Registry of timed attention cases: the variant, its shape, its peers and its bar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import attnengine as ae

BATCH, HEADS, LENGTH = 1, 8, 2048
WINDOW = 256
SOFTCAP = 20.0


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Mask of a decoder."""
    return q_idx >= kv_idx


def window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Causal mask over the last WINDOW keys."""
    return (q_idx >= kv_idx) & (q_idx - kv_idx < WINDOW)


def softcap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Scores squashed into (-SOFTCAP, SOFTCAP), as Gemma 2 does."""
    return SOFTCAP * torch.tanh(score / SOFTCAP)


def make_alibi(slopes: Tensor) -> Callable[..., Tensor]:
    """Linear position bias per head. `slopes`: [H] fp32."""

    def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + slopes[h] * (kv_idx - q_idx)

    return alibi


def alibi_slopes(heads: int) -> Tensor:
    """The slopes of the ALiBi paper for a power of two of heads: [H] fp32."""
    return torch.tensor([2.0 ** (-8.0 * (i + 1) / heads) for i in range(heads)])


@dataclass(frozen=True)
class Variant:
    """One attention variant. `live` counts (query, key) pairs that cost FLOPs, per head."""

    name: str
    score_mod: Callable[..., Tensor] | None
    mask_mod: Callable[..., Tensor] | None
    live: Callable[[int], float]

    def spec(self) -> ae.AttentionSpec:
        """The variant as attnengine takes it."""
        return ae.AttentionSpec(score_mod=self.score_mod, mask_mod=self.mask_mod)


def half(length: int) -> float:
    """Causal counts half: the field's convention."""
    return length * length / 2


VARIANTS = {
    "full": Variant("full", None, None, lambda n: float(n * n)),
    "causal": Variant("causal", None, causal, half),
    "alibi": Variant("alibi", make_alibi(alibi_slopes(HEADS)), causal, half),
    "softcap": Variant("softcap", softcap, causal, half),
    "window": Variant(
        "window", None, window, lambda n: float(sum(min(i + 1, WINDOW) for i in range(n)))
    ),
}


@dataclass(frozen=True)
class Case:
    """One timed row. The bar is against `peers[0]`; the ratio is peer time / our time."""

    group: str
    variant: Variant
    dtype: torch.dtype
    dim: int
    backward: bool
    peers: tuple[str, ...]
    bar: float
    length: int = LENGTH

    @property
    def name(self) -> str:
        """Unique, and what `--only` matches."""
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{self.group}/{dtype}/d{self.dim}/{self.variant.name}"

    @property
    def flops(self) -> float:
        """Two matmuls forward (4*pairs*D); five more backward (10*pairs*D)."""
        return (
            (14.0 if self.backward else 4.0)
            * BATCH
            * HEADS
            * self.variant.live(self.length)
            * self.dim
        )

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of [B, H, L, D] in the case's dtype, the same at every run."""
        generator = torch.Generator().manual_seed(0)
        shape = (BATCH, HEADS, self.length, self.dim)
        q, k, v = (torch.randn(shape, generator=generator).to(self.dtype) for _ in range(3))
        return q, k, v


def attention_cases(quick: bool) -> list[Case]:
    """Every row of the forward, training and variants groups. `quick` keeps one shape of each."""
    cases = []
    dims = (64,) if quick else (64, 128)
    for group, backward in (("forward", False), ("training", True)):
        for dtype in (torch.bfloat16, torch.float32):
            bar = 1.5 if backward else {torch.bfloat16: 2.5, torch.float32: 1.6}[dtype]
            for dim in dims:
                for name in ("causal",) if quick else ("full", "causal"):
                    case = Case(group, VARIANTS[name], dtype, dim, backward, ("sdpa",), bar)
                    cases.append(case)
    for dtype in (torch.bfloat16, torch.float32):
        for name in ("alibi", "softcap", "window"):
            peers = ("flex",) if name == "softcap" else ("flex", "sdpa-mask")
            cases.append(Case("variants", VARIANTS[name], dtype, 64, False, peers, 2.0))
    return cases
