"""Registry of the cases that have peers outside: variant, shape, contestants and bars."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .variants import VARIANTS, WINDOW, Variant

BATCH, HEADS, LENGTH = 1, 8, 2048
QUICK_LENGTH = 512  # more than a window, so that every class of tile is met
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Peer:
    """A contestant and the bar against it. sdpa, sdpa-mask and flex compute the same; plain is our
    kernel of the same mask without mods, full our kernel without a mask."""

    name: str
    bar: float | None = None

    @property
    def same(self) -> bool:
        """Whether it must give the same output as ours."""
        return self.name not in ("plain", "full")


@dataclass(frozen=True)
class Case:
    """One timed problem. `share_bar`: least share of the matmul peak of its dtype."""

    group: str
    variant: str
    dtype: torch.dtype
    dim: int
    peers: tuple[Peer, ...]
    backward: bool = False
    share_bar: float | None = None
    batch: int = BATCH
    heads: int = HEADS
    length: int = LENGTH

    @property
    def name(self) -> str:
        """Unique, and what `--only` matches; the length is named where it is not the usual one."""
        length = f"/s{self.length}" if self.group == "short" else ""
        return f"{self.group}/{DTYPES[self.dtype]}/d{self.dim}{length}/{self.variant}"

    def meaning(self, peer: str = "attnengine") -> Variant:
        """The variant that a contestant computes."""
        if peer == "full":
            return VARIANTS["full"](self.length, self.heads)
        own = VARIANTS[self.variant](self.length, self.heads)
        if peer == "plain":
            return Variant("plain", own.live, mask_mod=own.mask_mod)
        return own

    @property
    def flops(self) -> float:
        """Two matmuls forward (4*pairs*D); five more backward (10*pairs*D)."""
        return matmul_flops(self.meaning(), self.batch * self.heads, self.dim, self.backward)

    @property
    def intensity(self) -> float:
        """FLOPs per byte of q, k, v, out (and their gradients), each moved once."""
        tensors = 8 if self.backward else 4
        elements = self.batch * self.heads * self.length * self.dim
        return self.flops / (tensors * elements * self.dtype.itemsize)

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of [B, H, L, D] in the case's dtype, the same at every run."""
        return make_operands((self.batch, self.heads, self.length, self.dim), self.dtype)


def matmul_flops(variant: Variant, heads: int, dim: int, backward: bool) -> float:
    """FLOPs of the products of `heads` heads in all batches."""
    return (14.0 if backward else 4.0) * heads * variant.live * dim


def make_operands(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k, v of one shape."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    return q, k, v


def forward_cases() -> list[Case]:
    """Forward against SDPA: H=8, S=2048."""
    bars = {torch.bfloat16: 3.5, torch.float16: 3.0, torch.float32: 2.0}
    shares = {(torch.bfloat16, 64): 0.65, (torch.bfloat16, 128): 0.75, (torch.float32, 128): 0.72}
    cases = []
    for dtype, bar in bars.items():
        for dim in (64, 128):
            for name in ("full", "causal"):
                peers: tuple[Peer, ...] = (Peer("sdpa", bar),)
                share = shares.get((dtype, dim)) if name == "full" else None
                if name == "causal":
                    peers += (Peer("full", 0.88 if dtype is torch.bfloat16 else None),)
                cases.append(Case("forward", name, dtype, dim, peers, share_bar=share))
    return cases


def short_cases() -> list[Case]:
    """Short sequences, 64 heads in all."""
    return [
        Case(
            "short", name, torch.bfloat16, 64, (Peer("sdpa", 3.0),), batch=8, heads=8, length=length
        )
        for length in (128, 256, 512)
        for name in ("full", "causal")
    ]


def training_cases() -> list[Case]:
    """Forward and backward against SDPA; the bars are those of causal."""
    cases = []
    for dtype, bar in {torch.bfloat16: 2.5, torch.float32: 1.8}.items():
        for dim in (64, 128):
            for name in ("full", "causal"):
                barred = name == "causal"
                peers = (Peer("sdpa", bar if barred else None),)
                share = 0.55 if barred else None
                cases.append(Case("training", name, dtype, dim, peers, True, share))
    return cases


def variant_cases() -> list[Case]:
    """What SDPA cannot say, or only through a dense mask, against compiled FlexAttention."""
    cases = []
    for dtype, bar in {torch.bfloat16: 8.0, torch.float32: 3.0}.items():
        for name, plain in (
            ("alibi", 1.15),
            ("softcap", 1.35),
            (f"window{WINDOW}", None),
            ("document", None),
        ):
            peers: tuple[Peer, ...] = (Peer("flex", bar),)
            if plain is not None:
                peers += (Peer("plain", plain),)
            if name != "softcap":
                peers += (Peer("sdpa-mask"),)
            cases.append(Case("variants", name, dtype, 64, peers))
    return cases


GROUPS: dict[str, Callable[[], list[Case]]] = {
    "forward": forward_cases,
    "short": short_cases,
    "training": training_cases,
    "variants": variant_cases,
}


def attention_cases(group: str, quick: bool) -> list[Case]:
    """The cases of one of GROUPS; `quick` shrinks them to QUICK_LENGTH and two heads."""
    cases = GROUPS[group]()
    if not quick:
        return cases
    return [replace(c, batch=1, heads=2, length=min(c.length, QUICK_LENGTH)) for c in cases]
