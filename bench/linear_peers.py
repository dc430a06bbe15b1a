"""The chunk form of linear attention in plain PyTorch, as a peer: every chunk of every head in one
batched product, states of chunks carried by one product with the decays between them (the minimal
form of Mamba2's SSD). Scalar decay; matmuls in the operands' dtype, decays and states in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _decays(g: Tensor) -> Tensor:
    """[..., n] log-decays -> [..., n, n]: row t, column s <= t is exp of the sum over (s, t]."""
    total = g.cumsum(-1)
    apart = total[..., :, None] - total[..., None, :]
    lower = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril()
    return apart.masked_fill(~lower, float("-inf")).exp()


def chunk_form(q: Tensor, k: Tensor, v: Tensor, g: Tensor, chunk: int = 64) -> Tensor:
    """q, k [B, Hk, L, D], v [B, H, L, Dv], g [B, H, L] -> [B, H, L, Dv], scale 1/sqrt(D); L is a
    multiple of `chunk`."""
    batch, heads, length, dv = v.shape
    groups, count = heads // q.shape[1], length // chunk

    def cut(x: Tensor) -> Tensor:
        return x.unflatten(2, (count, chunk))

    def widen(x: Tensor) -> Tensor:  # a key head for each value head
        return x if groups == 1 else x.repeat_interleave(groups, 1)

    qc, kc, vc, gc = cut(q), cut(k), cut(v), cut(g.float())
    inside = gc.cumsum(-1)
    scores = widen(qc @ kc.mT)
    out = (scores * _decays(gc)).to(v.dtype) @ vc
    # What a chunk adds to the state, decayed to its end.
    weight = (inside[..., -1:] - inside).exp()[..., None]
    added = widen(kc.mT) @ (vc * weight).to(v.dtype)  # [B, H, chunks, D, Dv]
    # The state before chunk c is the sum of what chunks before it added, decayed in between.
    between = _decays(F.pad(inside[..., -1], (1, 0)))[..., :-1, 1:]
    states = (between @ added.float().flatten(-2)).unflatten(-1, added.shape[-2:])
    carried = widen(qc) @ states.to(v.dtype)
    out = out + carried * inside.exp()[..., None].to(v.dtype)
    return (out * q.shape[-1] ** -0.5).flatten(2, 3)
