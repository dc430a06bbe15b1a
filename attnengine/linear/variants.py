"""The field's linear attention variants, each the arguments of a call in a few lines.

Each function returns a dict: ``ae.linear_attention(**gla(q, k, v, gk))``; a decode step is the
same on one token: ``ae.linear_attention_step(**gla(q1, k1, v1, gk1), state=state)``. All tensors
are in [B, heads, L, width] (flash-linear-attention and mamba_ssm have [B, L, heads, width]:
transpose); log-decays are natural logs, at most 0. Every tensor given gets gradients. TypeError and
ValueError name a gate that is missing or of another variant.
"""

from __future__ import annotations

import reprlib
from typing import Any

import torch
from torch import Tensor

from .spec import LinearAttentionSpec


def retention(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None = None) -> dict[str, Any]:
    """S_t = gamma_h S_{t-1} + k_t v_t^T, o_t = q_t^T S_t / sqrt(D); gamma [H] in (0, 1], by default
    1 - 2^(-5 - h) (RetNet, arXiv:2307.08621, without its group norm and rotation of q and k)."""
    if gamma is None:
        heads = torch.arange(v.shape[1], dtype=torch.float64, device=v.device)
        log = torch.log1p(-torch.exp2(-5.0 - heads))  # 1 - 2^(-30) is 1 in fp32, its log is not
        return _call(q, k, v, decay=log if v.dtype == torch.float64 else log.float())
    return _call(q, k, v, decay=_given("gamma", gamma, "[H]").log())


def simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> dict[str, Any]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = q_t^T S_t / sqrt(D); g [B, H, L], often a
    logsigmoid (gated retention, arXiv:2405.05254; "simple GLA" in flash-linear-attention)."""
    return _call(q, k, v, decay=_given("g", g, "[B, H, L]"))


gated_retention = simple_gla


def gla(q: Tensor, k: Tensor, v: Tensor, gk: Tensor) -> dict[str, Any]:
    """S_t = diag(exp(gk_t)) S_{t-1} + k_t v_t^T, o_t = q_t^T S_t / sqrt(D); gk [B, H, L, D] (gated
    linear attention, arXiv:2312.06635)."""
    return _call(q, k, v, decay=_given("gk", gk, "[B, H, L, D]"))


def mamba2(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> dict[str, Any]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T, y_t = C_t^T h_t, y = (y + D x) silu(z) (Mamba-2's
    SSD, arXiv:2405.21060).

    x, z [b, H, L, P]; dt [b, H, L] >= 0; A [H] < 0; B, C [b, G, L, N], H a multiple of G: head h
    reads group h // (H / G); D [H] or [H, P]; dt_bias [H]. Names and order as of mamba_ssm's
    ``mamba_chunk_scan_combined``, whose layout is [b, L, H, P]; the state is [b, H, N, P]. dt is
    dt + dt_bias, then its softplus, where asked for, in fp32 (fp64), and so is dt A.
    """
    layouts = (("dt", dt, "[b, H, L]"), ("A", A, "[H]"), ("z", z, "[b, H, L, P]"),
               ("dt_bias", dt_bias, "[H]"))  # fmt: skip
    for name, t, layout in layouts:
        if t is not None or name in ("dt", "A"):
            _given(name, t, layout)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dt = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)[:, None]
    dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
    step = dt[..., None]
    skip = None if D is None else D[:, None, None] if D.dim() == 1 else D[:, None, :]

    def out_mod(y: Tensor) -> Tensor:
        y = y if skip is None else y + skip * x.to(y.dtype)
        return y if z is None else y * torch.nn.functional.silu(z.to(y.dtype))

    spec = LinearAttentionSpec(
        scale=1.0,
        v_mod=lambda x: x * step,
        out_mod=None if D is None and z is None else out_mod,
    )
    return _call(C, B, x, spec, decay=dt * A.to(wide)[:, None])


def elu_linear(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """o_t = sum_s f(q_t).f(k_s) v_s / sum_s f(q_t).f(k_s), s <= t, f(x) = elu(x) + 1 (causal linear
    transformer, arXiv:2006.16236)."""
    return _call(q, k, v, _ELU)


def delta_net(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> dict[str, Any]:
    """S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T, o_t = q_t^T S_t / sqrt(D); beta
    [B, H, L] (DeltaNet, arXiv:2406.06484). Give k of unit length, else the state may grow."""
    return _call(q, k, v, beta=_given("beta", beta, "[B, H, L]"))


def gated_delta_net(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> dict[str, Any]:
    """The delta rule on exp(g_t) S_{t-1}; g, beta [B, H, L] (gated DeltaNet, arXiv:2412.06464)."""
    g, beta = _given("g", g, "[B, H, L]"), _given("beta", beta, "[B, H, L]")
    return _call(q, k, v, decay=g, beta=beta)


def kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> dict[str, Any]:
    """The delta rule on diag(exp(g_t)) S_{t-1}; g [B, H, L, D], beta [B, H, L] (Kimi Delta
    Attention, arXiv:2510.26692)."""
    g, beta = _given("g", g, "[B, H, L, D]"), _given("beta", beta, "[B, H, L]")
    return _call(q, k, v, decay=g, beta=beta)


def _given(name: str, x: Any, layout: str) -> Tensor:
    """``x``, of the rank that makes this the variant and no other; the call checks its sizes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}={reprlib.repr(x)}: expected a tensor {layout}")
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"{name}: shape {list(x.shape)}, expected {layout}")
    return x


def _call(
    q: Tensor, k: Tensor, v: Tensor, spec: LinearAttentionSpec | None = None, **others: Any
) -> dict[str, Any]:
    return {"q": q, "k": k, "v": v, "spec": spec or _PLAIN, **others}


def _elu1(x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x) + 1.0


# Of all calls: a spec remembers its kernels, and inside torch.compile only such a spec has any.
_PLAIN = LinearAttentionSpec()
_ELU = LinearAttentionSpec(q_mod=_elu1, k_mod=_elu1, normalizer="sum")
