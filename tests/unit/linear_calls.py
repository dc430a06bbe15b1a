"""Operands and kernels of the tests of linear attention as a call, which share their modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnengine as ae
from attnengine.linear.handle import LinearHandle

D, DV = 40, 24


def operands(
    B: int = 2, Hk: int = 2, H: int = 4, L: int = 9, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(B * 1000 + L)
    q, k = (torch.randn(B, Hk, L, D, generator=g).to(dtype) for _ in range(2))
    v = torch.randn(B, H, L, DV, generator=g).to(dtype)
    return {"q": q, "k": k, "v": v, "decay": F.logsigmoid(torch.randn(B, H, L, generator=g))}


def with_grad(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_() for name, t in x.items()}


def handle_of(spec: ae.LinearAttentionSpec) -> LinearHandle:
    (handle,) = spec.__dict__["_linear"].values()
    return handle


def prepared(spec: ae.LinearAttentionSpec) -> LinearHandle:
    """What the operators need: the kernels of scalar decays."""
    x = with_grad(operands())
    ae.linear_attention(spec=spec, **x).sum().backward()
    return handle_of(spec)


def gated(gate: Tensor) -> ae.LinearAttentionSpec:
    return ae.LinearAttentionSpec(out_mod=lambda x: x * torch.sigmoid(gate))


def near(got: Any, want: Any, tol: float = 2e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


CU = torch.tensor([0, 4, 9])
