"""The arguments of flash-attn's functions as a spec: causal, window, softcap, ALiBi, scale.

Positions are bottom-right aligned, as flash-attn's: the operators are called with ``align_end``, so
that ``q_idx`` of a sequence's last row is the index of its last key.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from .spec import AttentionSpec
from .variants import causal_mask

PLAIN = AttentionSpec()
NO_WINDOW = (-1, -1)

COLD = (
    "attnengine: inside torch.compile this call needs a prepared kernel; make one call of the same "
    "kind (spec or flash-attn arguments, dtype, head dims, device) outside before"
)
_KEPT = 256  # specs: a model has one per layer where slopes are a layer's own
_specs: OrderedDict[tuple, tuple[AttentionSpec, Any]] = OrderedDict()


def flash_spec(
    spec: AttentionSpec | None = None,
    causal: bool = False,
    window_size: Sequence[int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    softmax_scale: float | None = None,
) -> AttentionSpec:
    """``spec``, or the spec that flash-attn's arguments mean; equal arguments give one object.

    causal: a row meets the keys up to its own position. window_size: (left, right) keys beside a
    row's position that it meets, -1 for all. softcap: above 0, scores become
    softcap * tanh(score / softcap), before ALiBi. alibi_slopes: [H] or [B, H] floating; score -
    slope * abs(q_idx - kv_idx). softmax_scale: None is 1/sqrt(D). Raises TypeError or ValueError
    for an argument of the wrong kind and for any of them beside a spec, RuntimeError for arguments
    that are new inside torch.compile.
    """
    left, right = NO_WINDOW if window_size == NO_WINDOW else _window(window_size)
    if (
        alibi_slopes is None
        and not causal
        and softmax_scale is None
        and softcap == 0
        and left == right == -1
        and (spec is None or isinstance(spec, AttentionSpec))
    ):
        return PLAIN if spec is None else spec
    if spec is not None:
        window = (left, right) != NO_WINDOW
        _refuse_both(spec, causal, window, softcap, alibi_slopes, softmax_scale)
    cap = _number("softcap", softcap)
    if cap < 0:
        raise ValueError(f"softcap={cap}: expected a number above 0, or 0 for none")
    scale = None if softmax_scale is None else _number("softmax_scale", softmax_scale)
    if causal:
        right = 0
    slopes = None if alibi_slopes is None else id(alibi_slopes)
    key = (left, right, cap, slopes, scale)
    found = _specs.get(key)
    if found is None and torch.compiler.is_dynamo_compiling():
        raise RuntimeError(COLD)
    if found is None:  # holds the slopes, so that their id stays theirs
        found = _specs[key] = _made(left, right, cap, alibi_slopes, scale), alibi_slopes
        if len(_specs) > _KEPT:
            _specs.popitem(last=False)
    return found[0]


def _refuse_both(
    spec: Any, causal: Any, window: bool, softcap: Any, slopes: Any, scale: Any
) -> NoReturn:
    if not isinstance(spec, AttentionSpec):
        raise TypeError(f"spec must be an attnengine.AttentionSpec, got {type(spec).__name__}")
    given = {
        "causal": bool(causal), "window_size": window, "softcap": softcap != 0,
        "alibi_slopes": slopes is not None, "softmax_scale": scale is not None,
    }  # fmt: skip
    names = [name for name, is_given in given.items() if is_given]
    raise ValueError(
        f"spec and {', '.join(names)} are both given; write {'them' if names[1:] else 'it'} into "
        "the spec (score_mod, mask_mod, scale), or leave spec=None"
    )


def _window(window: Any) -> tuple[int, int]:
    sides = tuple(window) if isinstance(window, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(x, Integral) for x in sides):
        raise TypeError(f"window_size={window!r}: expected two integers (left, right), -1 for all")
    if min(sides) < -1:
        raise ValueError(f"window_size={window!r}: expected numbers of keys, or -1 for all")
    return int(sides[0]), int(sides[1])


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}: expected a number")
    if not abs(float(value)) <= sys.float_info.max:  # isfinite, which Dynamo cannot trace
        raise ValueError(f"{name}={value!r}: expected a finite number")
    return float(value)


def _made(
    left: int, right: int, cap: float, slopes: Tensor | None, scale: float | None
) -> AttentionSpec:
    spec = AttentionSpec(_score_mod(cap, slopes, right == 0), _mask_mod(left, right))
    return spec if scale is None else replace(spec, scale=scale)


def _score_mod(cap: float, slopes: Tensor | None, earlier: bool) -> Callable[..., Tensor] | None:
    """``earlier``: no row meets a later key, so that the distance needs no abs()."""
    if slopes is None:
        return (lambda s, b, h, q, kv: cap * torch.tanh(s / cap)) if cap > 0 else None
    if not isinstance(slopes, Tensor):
        raise TypeError(f"alibi_slopes={slopes!r}: expected a tensor [H] or [B, H]")
    if slopes.dim() not in (1, 2) or not slopes.is_floating_point():
        raise ValueError(
            f"alibi_slopes has shape {tuple(slopes.shape)} and dtype {slopes.dtype}; expected a "
            "floating tensor [H] or [B, H]"
        )
    each = slopes.dim() == 2

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        capped = cap * torch.tanh(score / cap) if cap > 0 else score
        slope = slopes[b, h] if each else slopes[h]
        if earlier:
            return capped + slope * (kv_idx - q_idx)
        return capped - slope * (q_idx - kv_idx).abs()

    return score_mod


def _mask_mod(left: int, right: int) -> Callable[..., Tensor] | None:
    if right == 0:
        if left < 0:
            return causal_mask
        return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx <= left)
    if left < 0 and right < 0:
        return None
    if left < 0:
        return lambda b, h, q_idx, kv_idx: kv_idx - q_idx <= right
    if right < 0:
        return lambda b, h, q_idx, kv_idx: q_idx - kv_idx <= left
    return lambda b, h, q_idx, kv_idx: (q_idx - kv_idx <= left) & (kv_idx - q_idx <= right)
