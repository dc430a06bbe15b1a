"""What is timed on a GPU: forward passes of published models, and how their work is counted.

Shapes are those that attention engines are compared on: prefill of DeepSeek-V2-Lite (head dims
192/128), LLaMA-3.1-8B, Diff-Transformer-3B (128/256) and ViT-S/16 (ReLU attention), sigmoid
attention and retention at such sizes, and decoding (one query). No module here needs attnengine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .gpu_caches import FAMILIES as CACHES
from .gpu_caches import CacheCase

WINDOW = 256  # keys, the own one included
SPARSE_BLOCK, SPARSE_KEPT = 32, 0.2  # of sparse decoding: keys in a block, share of blocks kept
SOFTMAX = ("causal", "full", "window", "sparse")  # the others have another row function

Mod = Callable[..., Tensor]


@dataclass(frozen=True)
class TimedCase:
    """One problem. `rank`: 0 is timed in the first round over all families."""

    family: str
    variant: str  # causal, full, window, sparse; relu, sigmoid, retention
    model: str
    B: int
    Hq: int
    Hkv: int
    L: int
    S: int
    D: int
    Dv: int
    dtype: torch.dtype
    rank: int

    @property
    def name(self) -> str:
        """Unique; what `--only` matches from its start."""
        return f"{self.family}/B{self.B}/S{self.S}"

    @property
    def shape(self) -> str:
        """For the table."""
        word = {torch.float16: "fp16", torch.bfloat16: "bf16"}[self.dtype]
        heads = f"{self.Hq}" if self.Hq == self.Hkv else f"{self.Hq}/{self.Hkv}"
        return f"B{self.B} H{heads} {self.L}x{self.S} D{self.D}/{self.Dv} {word} {self.variant}"

    @property
    def kernel(self) -> tuple:
        """Cases with equal ones run the same kernel."""
        return self.variant, self.D, self.Dv, self.dtype

    @property
    def decode(self) -> bool:
        """One query per sequence: memory is the limit, and reads must come from it."""
        return self.L == 1

    @property
    def masked_by_position(self) -> bool:
        """Half of a square counts: the field's convention."""
        return self.variant in ("causal", "sigmoid", "retention")

    @property
    def kept_keys(self) -> int:
        """Live keys of every row of a sparse decode: whole blocks, rounded up."""
        blocks = math.ceil(self.S * SPARSE_KEPT / SPARSE_BLOCK)
        return min(self.S, blocks * SPARSE_BLOCK)

    @property
    def pairs(self) -> float:
        """Live (query, key) pairs in all heads and batches."""
        if self.variant == "window":
            live = float(sum(min(i + 1, WINDOW, self.S) for i in range(self.L)))
        elif self.variant == "sparse":
            live = float(self.L * self.kept_keys)
        else:
            live = float(self.L) * self.S / (2 if self.masked_by_position else 1)
        return self.B * self.Hq * live

    @property
    def flops(self) -> float:
        """Of both products: 2 * pairs * (D + Dv)."""
        return 2.0 * self.pairs * (self.D + self.Dv)

    @property
    def bytes(self) -> float:
        """Each operand and the result moved once; of a sparse cache, what is kept."""
        keys = self.kept_keys if self.variant == "sparse" else self.S
        cache = self.B * self.Hkv * keys * (self.D + self.Dv)
        rows = self.B * self.Hq * self.L * (self.D + self.Dv)
        return float(self.dtype.itemsize * (cache + rows))

    @property
    def scale(self) -> float:
        """Of q.k."""
        return 1.0 / math.sqrt(self.D)

    def operands(self, device: str | torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Normal q, k, v: zeros draw less power and run faster than data does."""
        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(heads: int, length: int, dim: int) -> Tensor:
            shape = (self.B, heads, length, dim)
            return torch.randn(shape, generator=generator, device=device, dtype=self.dtype)

        return (
            normal(self.Hq, self.L, self.D),
            normal(self.Hkv, self.S, self.D),
            normal(self.Hkv, self.S, self.Dv),
        )


@dataclass(frozen=True)
class Meaning:
    """A case's callables, with their captured tensors on a device. `bias`: of the sigmoid."""

    mask_mod: Mod | None = None
    score_mod: Mod | None = None
    bias: Tensor | None = None
    decay: Tensor | None = None


def causal_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Mask of a decoder."""
    return q_idx >= kv_idx


def meaning(case: TimedCase, device: str | torch.device) -> Meaning:
    """What a case computes."""
    if case.variant in ("full", "relu"):
        return Meaning()
    if case.variant == "causal":
        return Meaning(causal_mask)
    if case.variant == "sigmoid":  # the bias is a value, not a constant: one kernel for all S
        bias = torch.tensor(-math.log(case.S), dtype=torch.float32, device=device)
        return Meaning(causal_mask, bias=bias)
    if case.variant == "retention":
        decay = 1.0 - torch.exp2(-5.0 - torch.arange(case.Hq, device=device).float())

        def decayed(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score * torch.exp2((q_idx - kv_idx) * torch.log2(decay[h]))

        return Meaning(causal_mask, decayed, decay=decay)
    if case.variant == "window":
        return Meaning(
            lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < WINDOW),
        )
    kept, group = kept_blocks(case, device), case.Hq // case.Hkv
    return Meaning(lambda b, h, q_idx, kv_idx: kept[b, h // group, kv_idx // SPARSE_BLOCK])


def kept_blocks(case: TimedCase, device: str | torch.device) -> Tensor:
    """Boolean [B, Hkv, blocks]: random blocks of the cache, as many in every row."""
    generator = torch.Generator().manual_seed(1)
    blocks = math.ceil(case.S / SPARSE_BLOCK)
    order = torch.rand(case.B, case.Hkv, blocks, generator=generator).argsort(-1)
    return (order < case.kept_keys // SPARSE_BLOCK).to(device)


def dense_mask(case: TimedCase, device: str | torch.device) -> Tensor:
    """The mask as booleans [B or 1, Hq or 1, L, S], for those who need it so."""
    mask = meaning(case, device).mask_mod
    assert mask is not None
    own = case.variant == "sparse"
    b = torch.arange(case.B if own else 1, device=device)[:, None, None, None]
    h = torch.arange(case.Hq if own else 1, device=device)[:, None, None]
    q, k = (torch.arange(n, device=device) for n in (case.L, case.S))
    return mask(b, h, q[:, None], k).expand(b.shape[0], h.shape[0], case.L, case.S)


def _family(
    family: str,
    variant: str,
    model: str,
    heads: tuple[int, int],
    dims: tuple[int, int],
    sizes: list[tuple[int, int]],
    dtype: torch.dtype = torch.float16,
    decode: bool = False,
) -> list[TimedCase]:
    """`sizes`: (B, S), the most telling first."""
    return [
        TimedCase(family, variant, model, B, *heads, 1 if decode else S, S, *dims, dtype, rank)
        for rank, (B, S) in enumerate(sizes)
    ]


_LONG = [(1, 4096), (8, 2048), (1, 8192), (8, 8192), (1, 2048), (8, 4096)]
_BF16 = torch.bfloat16

Case = TimedCase | CacheCase

FAMILIES: tuple[list[TimedCase] | list[CacheCase], ...] = (
    _family("llama", "causal", "LLaMA-3.1-8B, as MHA", (32, 32), (128, 128), _LONG),
    _family("deepseek", "causal", "DeepSeek-V2-Lite", (16, 16), (192, 128), _LONG),
    _family("diff", "causal", "Diff-Transformer-3B, inner", (12, 12), (128, 256), _LONG),
    _family(
        "relu", "relu", "ViT-S/16", (6, 6), (64, 64),
        [(64, 1024), (32, 2048), (64, 512), (64, 2048), (32, 1024), (32, 512)],
    ),
    _family("sigmoid", "sigmoid", "LLaMA shape", (32, 32), (128, 128), _LONG),
    _family(
        "decode", "full", "DeepSeek-V2-Lite", (16, 16), (192, 128),
        [(8, 8192), (1, 8192), (8, 2048), (8, 4096), (1, 2048), (1, 4096)], decode=True,
    ),
    _family("gqa-decode", "full", "LLaMA-3.1-8B", (32, 8), (128, 128), [(1, 8192)], decode=True),
    _family(
        "sparse-decode", "sparse", "LLaMA, 80 % of blocks left out", (32, 8), (128, 128),
        [(8, 8192), (8, 4096), (8, 2048)], decode=True,
    ),
    _family("window", "window", "window of 256", (32, 32), (128, 128), [(4, 2048)], _BF16),
    _family(
        "retention", "retention", "RetNet, values of 256", (32, 32), (256, 256),
        [(1, 2048), (8, 2048), (1, 4096), (8, 4096)],
    ),
    _family("gqa", "causal", "LLaMA-3.1-8B", (32, 8), (128, 128), [(1, 4096), (8, 4096)], _BF16),
    _family(
        "retnet", "retention", "RetNet-6.7B", (32, 32), (256, 512),
        [(1, 2048), (8, 2048), (1, 4096), (8, 4096)],
    ),
    _family(
        "mla-decode", "full", "DeepSeek-V3, absorbed", (128, 1), (576, 512),
        [(8, 4096), (8, 8192), (8, 2048)], _BF16, decode=True,
    ),
    *CACHES,
)  # fmt: skip


def timed_cases(only: tuple[str, ...] = ()) -> list[Case]:
    """All cases, the first of every family before the second of any; `only`: starts of names."""
    every: list[Case] = [case for family in FAMILIES for case in family]
    found = sorted(every, key=lambda case: case.rank)
    return [c for c in found if not only or any(c.name.startswith(o) for o in only)]


def one_per_kernel(cases: list[Case]) -> Iterator[Case]:
    """The first case of every kernel that ours would need."""
    seen = set()
    for case in cases:
        if case.kernel not in seen:
            seen.add(case.kernel)
            yield case


def by_name(name: str) -> Case:
    """The case of a name. Raises KeyError."""
    return {case.name: case for case in timed_cases()}[name]
