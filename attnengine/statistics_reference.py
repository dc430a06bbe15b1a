"""What token statistics attention means: the operator in plain PyTorch, with plain autograd.

The token statistics operator replaces the N x N matrix by second moments of the tokens: cost is
linear in N. From one projection w [B, h, N, d], with u = w^2, for every sequence and head::

    c_k  = sum_n u_nk                         c_nk = max(sum_{m<=n} u_mk, 1e-12)       (causal)
    r_n  = sum_k u_nk / max(c_k, 1e-24)       r_n  = sum_k (u_nk / c_nk + b_hn)        (causal)
    pi_n = softmax over the heads of temp_h r_hn
    D    = sum_n pi_n + 1e-8                  D_n  = sum_{m<=n} pi_m + 1e-8            (causal)
    a_k  = sum_n pi_n u_nk / D                a_nk = sum_{m<=n} pi_m u_mk / D_n        (causal)
    y    = -w pi / (1 + a)

Source: Token Statistics Transformer (Wu et al., ICLR 2025), its vision and language models as
published: there w is divided by max(||w||_2, 1e-12) over the tokens, which is the 1e-24 above, and
the bias is added before the sum over channels, so that it counts d times.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORM_FLOOR = 1e-12  # of a channel's norm over the tokens
SUM_FLOOR = 1e-12  # of the causal sums of squares
EPSILON = 1e-8  # beside the sum of the weights


def token_statistics_reference(
    w: Tensor,
    temp: Tensor,
    causal: bool = False,
    denom_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What :func:`attnengine.token_statistics_attention` means, in plain PyTorch and autograd.

    Arguments as there, on any device. ``dtype``: of the arithmetic and the result; None computes in
    float32 (float64 for float64) and returns w's dtype. Memory is several times w's.
    """
    wide = dtype or (torch.float64 if w.dtype == torch.float64 else torch.float32)
    x, t = w.to(wide), temp.to(wide).reshape(-1)
    bias = None if denom_bias is None else denom_bias.to(wide).reshape(*denom_bias.shape[:2])
    if cu_seqlens is None:
        y = _sequence(x, t, causal, bias)
    else:
        bounds = cu_seqlens.tolist()
        parts = [
            _sequence(x[:, :, a:b], t, causal, bias)
            for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        y = torch.cat(parts, 2) if parts else torch.zeros_like(x)
    return y if dtype is not None else y.to(w.dtype)


def _sequence(w: Tensor, temp: Tensor, causal: bool, bias: Tensor | None) -> Tensor:
    """Of whole sequences [B, h, N, d]; the bias is by position, [h, >= N]."""
    u = w.square()
    n, d = w.shape[2], w.shape[3]
    if causal:
        shares = u / u.cumsum(2).clamp_min(SUM_FLOOR)
        r = shares.sum(3)
        if bias is not None:
            r = r + d * bias[:, :n]
    else:
        shares = u / u.sum(2, keepdim=True).clamp_min(NORM_FLOOR**2)
        r = shares.sum(3)
    pi = torch.softmax(temp[:, None] * r, 1)[..., None]
    if causal:
        a = (pi * u).cumsum(2) / (pi.cumsum(2) + EPSILON)
    else:
        a = (pi * u).sum(2, keepdim=True) / (pi.sum(2, keepdim=True) + EPSILON)
    return -w * pi / (1 + a)
