"""Rotary position embedding (Su et al., arXiv:2104.09864) of queries and new keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotate(
    q: Tensor,
    k: Tensor,
    cos: Any,
    sin: Any,
    lengths: Any,
    capacity: int,
    interleaved: bool,
    each: bool,
) -> tuple[Tensor, Tensor]:
    """q [B, L, Hq, D] and new keys k [B, Lnew, Hkv, D], rotated at positions lengths[b] + row.

    ``each``: q's rows have a position each, else all have lengths[b]. ``capacity``: of the cache.
    Raises TypeError or ValueError unless cos and sin [positions, R/2] fit.
    """
    _check(cos, sin, q, k, lengths, capacity, each)
    return rotated(q, cos, sin, lengths, interleaved, each), rotated(
        k, cos, sin, lengths, interleaved
    )


def _check(
    cos: Any, sin: Any, q: Tensor, k: Tensor, lengths: Tensor, capacity: int, each: bool
) -> None:
    """A table as long as the cache (and q's rows beyond the new keys) serves any ``lengths``; a
    shorter one is held against these, which must lie on the CPU for that."""
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor [positions, R/2]; give both or none")
        if x.dim() != 2 or 2 * x.shape[1] > q.shape[-1]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected [positions, R/2] with R up to the "
                f"head_dim {q.shape[-1]}"
            )
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}; move it with .to()")
    if cos.shape != sin.shape:
        raise ValueError(
            f"rotary_cos has shape {tuple(cos.shape)} and rotary_sin {tuple(sin.shape)}; they must "
            "be equal"
        )
    new, rows = k.shape[1], q.shape[1] if each else 1
    needed = capacity if rows <= new else capacity + rows - new
    if cos.shape[0] >= needed:
        return
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        needed = int(lengths.max()) + max(new, rows) if lengths.numel() else 0
        if cos.shape[0] >= needed:
            return
    raise ValueError(
        f"rotary_cos has {cos.shape[0]} positions and {needed} are needed (cache_seqlens and the "
        "new rows, or where those are not known the whole cache); pass a longer table"
    )


def rotated(
    x: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, interleaved: bool, each: bool = True
) -> Tensor:
    """x [B, L, H, D], its first R elements rotated by row lengths[b] + i of cos, sin [.., R/2]; in
    fp32 (fp64 for fp64).

    ``each``: i is the row's number, else 0. interleaved: elements 0 and 1, 2 and 3, ... are pairs;
    else 0 and R/2, 1 and R/2 + 1, ... are (GPT-NeoX).
    """
    positions = lengths[:, None].long().clamp(min=0)  # a negative length is refused by the append
    if each:
        positions = positions + torch.arange(x.shape[1], device=x.device)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    c, s = (t[positions].to(wide).unsqueeze(2) for t in (cos, sin))
    count = 2 * cos.shape[1]
    turned, rest = x[..., :count].to(wide), x[..., count:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        both = torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        both = torch.cat((a * c - b * s, a * s + b * c), -1)
    return torch.cat((both.to(x.dtype), rest), -1) if rest.shape[-1] else both.to(x.dtype)
