"""Decoding over KV caches on a GPU, what memory limits: dense, in pages, ragged, and MLA's latent.

Every cache holds a GiB or more, so that nothing but the memory's rate counts: the time is held
against the copy that the machine was measured at. No module here needs attnengine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_BYTES = 1 << 30  # of K and V
DOUBLING = tuple(1024 << i for i in range(8))  # 1k to 128k keys
NOTHING = 1e4  # what pages and rows hold where no key is: read into a result, it shows


class Caches(NamedTuple):
    """q [B, 1, Hq, D]; caches [B, S, Hkv, D], or [pages, page, Hkv, D] with `table` [B, columns];
    lengths int32 [B]. Where V lies in K (MLA), `v` is a view of `k`."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    table: Tensor | None


@dataclass(frozen=True)
class CacheCase:
    """One query for each sequence against its keys; `page` 0: a dense cache."""

    family: str
    model: str
    lengths: tuple[int, ...]
    Hq: int
    Hkv: int
    D: int
    Dv: int
    page: int = 0
    latent: bool = False  # V is the first columns of K
    dtype: torch.dtype = torch.bfloat16
    rank: int = 0
    variant: str = "cache"
    L: int = 1
    decode: bool = True

    @property
    def B(self) -> int:
        return len(self.lengths)

    @property
    def S(self) -> int:
        return max(self.lengths)

    @property
    def ragged(self) -> bool:
        return len(set(self.lengths)) > 1

    @property
    def name(self) -> str:
        """Unique; what `--only` matches from its start."""
        return f"{self.family}/B{self.B}/S{self.S}"

    @property
    def shape(self) -> str:
        """For the table."""
        word = {torch.float16: "fp16", torch.bfloat16: "bf16"}[self.dtype]
        keys = f"{min(self.lengths)}..{self.S}" if self.ragged else f"{self.S}"
        where = f"pages of {self.page}" if self.page else "dense"
        dims = f"D{self.D}/{self.Dv}" + (" latent" if self.latent else "")
        return f"B{self.B} H{self.Hq}/{self.Hkv} 1x{keys} {dims} {word} {where}"

    @property
    def kernel(self) -> tuple:
        """Cases with equal ones run the same kernel."""
        return self.variant, self.D, self.Dv, self.dtype, self.latent

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def cache_bytes(self) -> int:
        """K and V, read once."""
        columns = self.D if self.latent else self.D + self.Dv
        return self.tokens * self.Hkv * columns * self.dtype.itemsize

    @property
    def bytes(self) -> float:
        """The caches, q and the result."""
        rows = self.B * self.Hq * (self.D + self.Dv) * self.dtype.itemsize
        return float(self.cache_bytes + rows)

    @property
    def flops(self) -> float:
        """Of both products."""
        return 2.0 * self.Hq * self.tokens * (self.D + self.Dv)

    @property
    def scale(self) -> float:
        """Of q.k."""
        return 1.0 / math.sqrt(self.D)

    def operands(self, device: str | torch.device, seed: int = 0) -> Caches:
        """Normal q, k, v. Pages lie in random order; beyond a sequence's keys is what nobody may
        take for one."""
        g = torch.Generator(device=device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, device=device, dtype=self.dtype)

        table, places = None, (self.B, self.S)
        if self.page:
            need = [-(-n // self.page) for n in self.lengths]
            order = torch.randperm(sum(need), generator=torch.Generator().manual_seed(seed))
            table = torch.zeros(self.B, max(need), dtype=torch.int32)
            at = 0
            for b, n in enumerate(need):
                table[b, :n] = order[at : at + n]
                at += n
            table, places = table.to(device), (sum(need), self.page)
        k = normal(*places, self.Hkv, self.D)
        v = k[..., : self.Dv] if self.latent else normal(*places, self.Hkv, self.Dv)
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        for b, n in enumerate(self.lengths):
            if table is None:
                k[b, n:] = v[b, n:] = NOTHING
            elif n % self.page:
                last = int(table[b, n // self.page])
                k[last, n % self.page :] = v[last, n % self.page :] = NOTHING
        return Caches(normal(self.B, 1, self.Hq, self.D), k, v, lengths, table)

    def keys_of(self, x: Caches, b: int) -> tuple[Tensor, Tensor]:
        """K and V of a sequence, [Hkv, length, D] and [.., Dv]."""
        if x.table is None:
            k, v = (c[b, : self.lengths[b]] for c in (x.k, x.v))
        else:
            pages = x.table[b, : -(-self.lengths[b] // self.page)].long()
            k, v = (c[pages].flatten(0, 1)[: self.lengths[b]] for c in (x.k, x.v))
        return k.transpose(0, 1), v.transpose(0, 1)

    def expected(self, x: Caches, b: int, h: int) -> Tensor:
        """Output row [1, Dv] of one head of a sequence, in fp64."""
        k, v = (c[h // (self.Hq // self.Hkv)].double() for c in self.keys_of(x, b))
        return torch.softmax(x.q[b, :, h].double() @ k.mT * self.scale, -1) @ v


def _gqa(family: str, lengths: tuple[int, ...], rank: int = 0, page: int = 0) -> CacheCase:
    return CacheCase(family, "LLaMA-3.1-8B", lengths, 32, 8, 128, 128, page, rank=rank)


FAMILIES: tuple[list[CacheCase], ...] = (
    [_gqa("cache", (32768,) * 8), _gqa("cache", (1 << 18,), 1)],
    [_gqa("cache-ragged", DOUBLING + DOUBLING[-1:])],
    [_gqa("cache-paged", (32768,) * 8, page=64), _gqa("cache-paged", (1 << 17,) * 2, 1, 16)],
    [_gqa("cache-ragged-paged", DOUBLING + DOUBLING[-1:], page=64)],
    [
        CacheCase("cache-mla", "DeepSeek-V3, absorbed", (16384,) * 64, 128, 1, 576, 512, 64, True),
    ],
)
