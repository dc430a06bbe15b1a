"""The arguments of linear attention, checked once for the reference and for the kernels."""

from __future__ import annotations

import math
import reprlib
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import require_dense
from .spec import LinearAttentionSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NAMES = ", ".join(str(x).removeprefix("torch.") for x in DTYPES)
KINDS = ("none", "scalar", "channel")
_READABLE = (Tensor, torch.nn.Parameter)  # not a fake tensor, which has no values


class LinearArguments(NamedTuple):
    """One call. ``decay`` and ``beta`` are views in the shapes that kernels use."""

    B: int
    Hk: int  # heads of q and k
    H: int  # heads of v; query and key head of head h is h // (H // Hk)
    L: int
    D: int
    Dv: int
    N: int  # sequences: B, or what cu_seqlens packs
    decay_kind: str  # one of KINDS
    decay: Tensor | None  # [B, H, L] or [B, H, L, D]; of an [H] an expanded view
    beta: Tensor | None  # [B, H, L]
    initial_state: Tensor | None  # [N, H, D, Dv], or [.., Dv + 1] under a normalizer
    cu_seqlens: Tensor | None  # [N + 1]
    scale: float
    acc: torch.dtype  # of states and sums
    columns: int  # of a final state: Dv, or Dv + 1 under a normalizer


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: LinearAttentionSpec | None = None,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> LinearArguments:
    """Shapes, dtypes and devices of a call, put in order. Reads no data but cu_seqlens on the CPU.

    Raises TypeError for what is no tensor or no LinearAttentionSpec, and ValueError, naming the
    argument, for what does not fit: see ``ae.linear_attention``.
    """
    spec = LinearAttentionSpec() if spec is None else spec
    if not isinstance(spec, LinearAttentionSpec):
        raise TypeError(f"spec={spec!r}: expected an attnengine.LinearAttentionSpec or None")
    named = (("q", q), ("k", k), ("v", v), ("decay", decay), ("beta", beta))
    device = None
    for name, x in (*named, ("initial_state", initial_state), ("cu_seqlens", cu_seqlens)):
        if x is None and name not in ("q", "k", "v"):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}={reprlib.repr(x)}: expected a tensor")
        require_dense(name, x, "L")
        device = device or x.device
        if x.device != device:
            raise ValueError(f"{name}: on {x.device}, but q is on {device}; move it there")
    dtype, shape, values = q.dtype, q.shape, v.shape
    _check_operands(q, k, v)
    (B, Hk, L, D), H, Dv = shape, values[1], values[3]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    kind, decay = _decay(decay, (B, H, L, D))
    if beta is not None:
        _check_float("beta", beta)
        if beta.shape != (B, H, L):
            raise ValueError(f"beta: shape {_shape(beta)}, expected [B, H, L] = {[B, H, L]}")
    N = B if cu_seqlens is None else _sequences(cu_seqlens, B, L)
    columns = Dv + 1 if spec.normalizer == "sum" else Dv
    if initial_state is not None:
        _check_state(initial_state, (N, H, D, Dv), columns, acc, packed=cu_seqlens is not None)
    scale = 1.0 / math.sqrt(D) if spec.scale is None else spec.scale
    return LinearArguments(
        B, Hk, H, L, D, Dv, N, kind, decay, beta, initial_state, cu_seqlens, scale, acc, columns
    )  # fmt: skip


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    a, b, c, dtype = q.shape, k.shape, v.shape, q.dtype
    if (
        len(a) == len(c) == 4
        and a == b
        and a[0] == c[0]
        and a[2] == c[2]
        and a[1] > 0
        and c[1] % a[1] == 0
        and a[3] > 0
        and c[3] > 0
        and dtype in DTYPES
        and k.dtype == dtype
        and v.dtype == dtype
    ):
        return
    shapes = f"q {[*a]}, k {[*b]}, v {[*c]}"
    if not len(a) == len(b) == len(c) == 4:
        raise ValueError(f"q, k [B, Hk, L, D] and v [B, H, L, Dv] must be 4-D; got {shapes}")
    if dtype not in DTYPES:
        raise ValueError(f"q: dtype {dtype}, expected one of {_NAMES}; convert it")
    if not dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {dtype}, {k.dtype}, {v.dtype}")
    if a != b:
        raise ValueError(f"q and k must have one shape [B, Hk, L, D]; got {shapes}")
    if (a[0], a[2]) != (c[0], c[2]):
        raise ValueError(f"v must have q's batch and length; got {shapes}")
    if a[1] == 0 or c[1] % a[1] != 0:
        raise ValueError(
            f"v's heads ({c[1]}) must be a multiple of q's and k's ({a[1]}); "
            f"repeat the heads of v, or those of q and k; got {shapes}"
        )
    raise ValueError(f"head dims D and Dv must be at least 1; got {shapes}")


def _check_float(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{name}: dtype {x.dtype}, expected a floating dtype, {_NAMES}; convert it"
        )


def _decay(decay: Tensor | None, sizes: tuple[int, int, int, int]) -> tuple[str, Tensor | None]:
    """Kind of a decay, and its view [B, H, L] or [B, H, L, D]."""
    if decay is None:
        return "none", None
    (B, H, L, D), shape = sizes, decay.shape
    _check_float("decay", decay)
    if shape == (H,):
        return "scalar", decay[:, None].expand(B, H, L)
    if shape == (B, H, L):
        return "scalar", decay
    if shape == sizes:
        return "channel", decay
    raise ValueError(
        f"decay: shape {_shape(decay)}, expected the log-decay [H] = {[H]}, [B, H, L] = {[B, H, L]}"
        f" or [B, H, L, D] = {[B, H, L, D]}; H counts v's heads: expand or repeat it to that"
    )


def _sequences(cu: Tensor, B: int, L: int) -> int:
    """How many sequences cu_seqlens packs."""
    if cu.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: dtype {cu.dtype}, expected int32 or int64")
    if cu.dim() != 1 or cu.shape[0] < 1:
        raise ValueError(f"cu_seqlens: shape {_shape(cu)}, expected [N + 1], N >= 0")
    if B != 1:
        raise ValueError(
            f"cu_seqlens: packed sequences lie along L in one batch row, but q has {B}; "
            "reshape q, k and v to B = 1"
        )
    if cu.device.type == "cpu" and type(cu) in _READABLE and not torch.compiler.is_compiling():
        check_ends(cu.tolist(), L)
    return cu.shape[0] - 1


def check_ends(ends: list[int], length: int) -> None:
    """Raises ValueError unless the values of cu_seqlens rise from 0 to ``length``."""
    if ends[0] != 0 or ends[-1] != length:
        raise ValueError(
            f"cu_seqlens: from {ends[0]} to {ends[-1]}, expected from 0 to L = {length}, "
            "the tokens that q holds"
        )
    for i in range(1, len(ends)):
        if ends[i] < ends[i - 1]:
            raise ValueError(
                f"cu_seqlens: falls from {ends[i - 1]} to {ends[i]} at [{i}], expected starts "
                "that never fall; pass the cumulative sum of the lengths, with a leading 0"
            )


def _check_state(
    state: Tensor, sizes: tuple[int, int, int, int], columns: int, acc: torch.dtype, packed: bool
) -> None:
    (N, H, D, Dv), shape = sizes, state.shape
    if shape != sizes and shape != (N, H, D, columns):
        wanted = f"[N, H, D, Dv] = {[*sizes]}"
        if columns != Dv:
            wanted = f"[N, H, D, Dv + 1] = {[N, H, D, columns]} (last column z) or {wanted}"
        counted = "cu_seqlens' sequences" if packed else "the batch"
        raise ValueError(f"initial_state: shape {_shape(state)}, expected {wanted}; N is {counted}")
    if state.dtype != acc:
        raise ValueError(
            f"initial_state: dtype {state.dtype}, expected {acc}, which states are kept in; "
            f"pass initial_state.to({acc})"
        )
