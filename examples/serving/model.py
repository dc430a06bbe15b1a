"""A toy language model with random weights, and what attends for it over a cache in pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import attnengine as ae

# (layer, q [N, Hq, D], k [N, Hkv, D], v [N, Hkv, D]) -> [N, Hq, D], N new tokens of all requests
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Config(NamedTuple):
    dtype: torch.dtype = torch.float32
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 512
    vocabulary: int = 512


class Model:
    """RMSNorm, RoPE, grouped-query attention, SwiGLU. Tokens of all requests lie in one row."""

    def __init__(self, config: Config) -> None:
        self.config = c = config
        g = torch.Generator().manual_seed(0)

        def weight(rows: int, columns: int, size: float) -> Tensor:
            return (size * torch.randn(rows, columns, generator=g)).to(c.dtype)

        self.embedding = weight(c.vocabulary, c.hidden, 1.0)
        unit, width = c.hidden**-0.5, c.heads * c.head_dim
        shapes = (width + 2 * c.kv_heads * c.head_dim, c.hidden), (c.hidden, width)
        shapes += (4 * c.hidden, c.hidden), (c.hidden, 2 * c.hidden)
        self.layers = [[weight(*shape, unit) for shape in shapes] for _ in range(c.layers)]
        self.head = weight(c.vocabulary, c.hidden, unit)

    def __call__(self, tokens: Tensor, positions: Tensor, last: Tensor, attend: Attend) -> Tensor:
        """Logits [len(last), vocabulary] float32 after the tokens numbered `last`."""
        c = self.config
        half = c.head_dim // 2
        angle = positions[:, None, None] * 10000.0 ** (-torch.arange(half) / half)
        turn = angle.cos(), angle.sin()
        x = self.embedding[tokens]
        for layer, (qkv, out, up, down) in enumerate(self.layers):
            heads = F.linear(norm(x), qkv).unflatten(1, (-1, c.head_dim))
            q, k, v = heads.split((c.heads, c.kv_heads, c.kv_heads), 1)
            x = x + F.linear(attend(layer, rotate(q, *turn), rotate(k, *turn), v).flatten(1), out)
            gate, value = F.linear(norm(x), up).chunk(2, 1)
            x = x + F.linear(F.silu(gate) * value, down)
        return F.linear(norm(x[last]), self.head).float()


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def dense(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one whole request by matrix products: no cache, no kernel."""
    heads, wide = q.shape[1], [x.float().transpose(0, 1) for x in (q, k, v)]
    q32, k32, v32 = (x.repeat_interleave(heads // len(x), 0) for x in wide)
    scores = q32 @ k32.mT / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill_(future, -torch.inf).softmax(-1)
    return (weights @ v32).transpose(0, 1).to(q.dtype)


class Group(NamedTuple):
    """Requests with the same number of new tokens, which are `rows` of the step's tokens."""

    rows: slice
    new: int
    lengths: Tensor  # int32 [B], tokens that are in the cache before these
    pages: Tensor  # int32 [B, columns], the page of each page_size positions


class Paged:
    """The cache of all layers, [pages, page_size, Hkv, D] each, read by attnengine's kernel."""

    name = "attnengine"

    def __init__(self, config: Config, pages: int, page_size: int) -> None:
        size = (config.layers, pages, page_size, config.kv_heads, config.head_dim)
        # What was never written must not matter.
        self.k, self.v = (torch.full(size, torch.nan, dtype=config.dtype) for _ in range(2))
        self.groups: list[Group] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for g in self.groups:
            new = (x[g.rows].unflatten(0, (-1, g.new)) for x in (q, k, v))
            out[g.rows] = self.attend(layer, g, *new).flatten(0, 1)
        return out

    def attend(self, layer: int, g: Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, new, Hq, D]. Prompts and single tokens alike: k and v are appended in place."""
        return ae.attention_with_kvcache(
            q, self.k[layer], self.v[layer], k, v,
            cache_seqlens=g.lengths, block_table=g.pages, causal=True,
        )  # fmt: skip


class PagedSdpa(Paged):
    """The same for scaled_dot_product_attention, which knows no pages: a prompt attends to itself;
    to decode, each request's pages are gathered and its heads of a group become rows. On the CPU
    that was 1.3 times faster than a padded batch under a mask, 2 to 4 times with enable_gqa."""

    name = "SDPA"

    def attend(self, layer: int, g: Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = self.k.shape[2]
        position = g.lengths[:, None] + torch.arange(g.new)
        place = layer, g.pages.gather(1, position // size), position % size
        self.k[place], self.v[place] = k, v
        sdpa, out = F.scaled_dot_product_attention, torch.empty_like(q)
        if g.new > 1:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return sdpa(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        for i, count in enumerate((g.lengths + 1).tolist()):
            pages = g.pages[i, : -(-count // size)]
            keys, values = (x[layer, pages].flatten(0, 1)[None, :count] for x in (self.k, self.v))
            rows = q[i].view(1, keys.shape[2], -1, q.shape[3])
            out[i] = sdpa(rows, keys.transpose(1, 2), values.transpose(1, 2)).view_as(q[i])
        return out
