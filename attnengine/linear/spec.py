"""What a user says about linear attention: a :class:`LinearAttentionSpec` of PyTorch callables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..spec import _check_callable, _finite, said

NORMALIZERS = (None, "sum")
HOOKS = ("q_mod", "k_mod", "v_mod", "decay_mod", "out_mod")


@dataclass(frozen=True)
class LinearAttentionSpec:
    """The meaning of one linear-attention variant, beside its operands.

    Per token: S = exp(g) S; then S = S + k v^T, or with beta S = S + k (beta (v - k^T S))^T; and
    o = scale q^T S.

    q_mod, k_mod, v_mod, decay_mod: ``x -> x``, elementwise on the whole operand, before it is used:
    q and k [B, Hk, L, D], v [B, H, L, Dv], the log-decay [B, H, L] or [B, H, L, D] (one of [H] is
    seen as [B, H, L]). out_mod: ``x -> x`` on the output [B, H, L, Dv], last of all. They see fp32
    (fp64 for fp64 operands). Captured tensors broadcast against x as PyTorch does and get
    gradients; a spec keeps those that its hooks read at the first call, so where a module gets
    other tensors (``load_state_dict(assign=True)``, ``functional_call``) make a new spec. scale:
    factor of q.S; None is 1/sqrt(D). normalizer: None, or "sum", which divides o by scale q.z with
    z = exp(g) z + k, kept 1e-6 away from 0; the state then has z as its last column.

    Raises TypeError for a hook that is not a callable of one argument or a scale that is no number,
    ValueError for a scale that is not finite and for another normalizer.
    """

    q_mod: Callable[[Tensor], Tensor] | None = None
    k_mod: Callable[[Tensor], Tensor] | None = None
    v_mod: Callable[[Tensor], Tensor] | None = None
    decay_mod: Callable[[Tensor], Tensor] | None = None
    out_mod: Callable[[Tensor], Tensor] | None = None
    scale: float | None = None
    normalizer: str | None = None

    def __post_init__(self) -> None:
        for name in HOOKS:
            _check_callable(name, getattr(self, name), f"{name}(x)")
        if self.scale is not None:
            object.__setattr__(self, "scale", _finite("scale", self.scale))
        if self.normalizer not in NORMALIZERS:
            raise ValueError(f'normalizer={self.normalizer!r}: expected None or "sum"')

    def __getstate__(self) -> dict[str, Any]:
        return said(self)
