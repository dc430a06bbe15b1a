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
    """q [B, L, Hq, D] and new keys k [B, Lnew, Hkv, D], rotated at positions lengths[b] + row, in
    fp32 (fp64 for fp64).

    ``each``: q's rows have a position each, else all have lengths[b]. ``capacity``: of the cache.
    Raises TypeError or ValueError unless cos and sin [positions, R/2] fit.
    """
    _check(cos, sin, q, k, lengths, capacity, each)
    new, rows = k.shape[1], q.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    longest = max(new, rows) if each else new
    positions = lengths[:, None].clamp(min=0)  # a negative length is refused by the append
    if longest > 1:
        positions = positions + torch.arange(longest, device=q.device)
    cos, sin = (t[positions].to(wide).unsqueeze(2) for t in (cos, sin))
    if each and new == rows:
        both = _rotated(torch.cat((q, k), 2), cos, sin, interleaved)
        return both[:, :, : q.shape[2]], both[:, :, q.shape[2] :]
    at = slice(None, rows if each else 1)
    return (
        _rotated(q, cos[:, at], sin[:, at], interleaved),
        _rotated(k, cos[:, :new], sin[:, :new], interleaved),
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


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, L, H, D] with its first R elements rotated; cos, sin [B, L or 1, 1, R/2] in the type of
    the arithmetic.

    interleaved: elements 0 and 1, 2 and 3, ... are pairs; else 0 and R/2, 1 and R/2 + 1, ... are
    (GPT-NeoX).
    """
    half = cos.shape[-1]
    count = 2 * half
    if interleaved:
        a, b = x[..., 0:count:2], x[..., 1:count:2]
    else:
        a, b = x[..., :half], x[..., half:count]
    pair = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(a * sin, b, cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    turned = turned.to(x.dtype)
    return turned if count == x.shape[-1] else torch.cat((turned, x[..., count:]), -1)
