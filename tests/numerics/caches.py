"""Caches for the tests of attention_with_kvcache: filled, NaN where nothing may be read, with the
dense problem that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from problems import DV, F32, HEADS, D, generator
from torch import Tensor

import attnengine as ae
from attnengine import gate

PAD = -7  # entries of a block table that no length reaches: no page


@dataclass
class Cache:
    """Sequences of ``lengths`` keys at ``leftpad`` in a cache, rows of q and tokens to append.

    ``page``: page size, None for a dense cache. ``rows``: of a dense cache, more than sequences
    when the sequences lie in shuffled rows. ``latent``: values are the first of the keys' elements.
    """

    dtype: torch.dtype = F32
    lengths: Sequence[int] = (0, 1, 17, 60)
    L: int = 1
    new: int = 0
    page: int | None = None
    heads: tuple[int, int] = (HEADS, 2)
    d: int = D
    dv: int = DV
    leftpad: Sequence[int] | None = None
    rows: int | None = None
    latent: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        g = generator(self.seed + 1000 * self.L + 10 * self.new)
        B, (hq, hkv) = len(self.lengths), self.heads
        pads = self.leftpad or [0] * B
        self.total = [n - p + self.new for n, p in zip(self.lengths, pads, strict=True)]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(self.dtype)

        self.q = normal(B, self.L, hq, self.d)
        longest = max(1, *self.total)
        self.keys, self.values = normal(B, longest, hkv, self.d), normal(B, longest, hkv, self.dv)
        if self.latent:
            self.values = self.keys[..., : self.dv]
        self.tables: dict[str, Any] = {"cache_seqlens": torch.tensor(self.lengths).int()}
        if self.leftpad is not None:
            self.tables["cache_leftpad"] = torch.tensor(pads).int()
        capacity = max(self.lengths) + self.new + 3
        if self.page is not None:
            columns = -(-capacity // self.page) + 1
            count = B * columns + 2
            pages = torch.randperm(count, generator=g)[: B * columns].view(B, columns).int()
            shape = (count, self.page)
        else:
            rows = self.rows or B
            self.row = torch.randperm(rows, generator=g)[:B] if self.rows else torch.arange(B)
            if self.rows:
                self.tables["cache_batch_idx"] = self.row.int()
            shape = (rows, capacity)
        nan = float("nan")
        self.k_cache = torch.full((*shape, hkv, self.d), nan, dtype=self.dtype)
        self.v_cache = torch.full((*shape, hkv, self.dv), nan, dtype=self.dtype)
        if self.latent:
            self.v_cache = self.k_cache[..., : self.dv]
        self.place = []  # per sequence: (row or page, position there) of its keys
        for b in range(B):
            at = torch.arange(pads[b], self.lengths[b] + self.new)
            if self.page is None:
                self.place.append((self.row[b].expand(len(at)), at))
            else:
                used = -(-(self.lengths[b] + self.new) // self.page)
                pages[b, used:] = PAD
                pages[b, : pads[b] // self.page] = PAD
                self.place.append((pages[b].long()[at // self.page], at % self.page))
        if self.page is not None:
            self.tables["block_table"] = pages
        self.k = self.v = None
        self.after = self.k_cache.clone(), self.v_cache.clone()
        for b, n in enumerate(self.total):
            for cache, x, old in (
                (self.k_cache, self.keys, False), (self.v_cache, self.values, False),
                (self.after[0], self.keys, True), (self.after[1], self.values, True),
            ):  # fmt: skip
                m = n if old else n - self.new
                cache[self.place[b][0][:m], self.place[b][1][:m]] = x[b, :m]
        if self.new:
            ends = [(b, slice(n - self.new, n)) for b, n in enumerate(self.total)]
            self.k = torch.stack([self.keys[e] for e in ends])
            self.v = torch.stack([self.values[e] for e in ends])

    def call(self, **options: Any) -> Any:
        """The call under test; results as [B, L, H, Dv] and [B, H, L]."""
        arguments = (self.q, self.k_cache, self.v_cache, self.k, self.v)
        return ae.attention_with_kvcache(*arguments, **self.tables, **options)

    def as_appended(self) -> bool:
        """Whether the cache holds, bit for bit, what it should hold after the call."""
        pairs = zip((self.k_cache, self.v_cache), self.after, strict=True)
        return all(
            torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())
            for x, y in pairs
        )

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, length, D]; keys beyond a sequence's length are for the mask to hide."""
        return self.q.transpose(1, 2), self.keys.transpose(1, 2), self.values.transpose(1, 2)

    def dense_spec(self, spec: ae.AttentionSpec) -> ae.AttentionSpec:
        """``spec`` on the dense problem: rows at the end of their sequence, keys to its length."""
        keys = torch.tensor(self.total)
        first = keys - self.L
        score_mod, mask_mod = spec.score_mod, spec.mask_mod

        def moved(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score_mod(s, b, h, q + first[b], k)  # type: ignore[misc]

        def inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            live = k < keys[b]
            return live if mask_mod is None else live & mask_mod(b, h, q + first[b], k)

        return replace(spec, score_mod=moved if score_mod else None, mask_mod=inside)

    def verify(self, spec: ae.AttentionSpec, call: Callable[[], Any]) -> None:
        """Output and lse of ``call`` through the numerics gate, and the cache afterwards."""
        with torch.no_grad():
            out, lse = call()
        assert out.shape == (*self.q.shape[:3], self.dv) and out.is_contiguous()
        assert lse.shape == (self.q.shape[0], self.q.shape[2], self.L)
        result = (out.transpose(1, 2), {"lse": lse})
        gate.compare(lambda q, k, v: result, self.dense_spec(spec), *self.dense(), grads=False)
        assert self.as_appended()
