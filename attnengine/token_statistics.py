"""Token statistics attention (TSSA): linear in the number of tokens, without keys and values.

Every token is scaled by how much the tokens like it vary: second moments of the projected tokens,
weighted by a softmax over the heads, take the place of pairwise scores. Formulas:
:mod:`attnengine.statistics_reference`. Source: Token Statistics Transformer (Wu et al., ICLR 2025).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, statistics_ops
from .handle import _has_tangent
from .statistics_ops import kernel_of

_forward = statistics_ops.forward
_backward = statistics_ops.backward
_step = statistics_ops.step
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_functorch = torch._C._are_functorch_transforms_active
_below_autograd = torch._C._AutoDispatchBelowAutograd
_forward_ad = torch.autograd.forward_ad


class TokenStatisticsState(NamedTuple):
    """What the causal form knows of the tokens so far: h (2d + 1) numbers a row of the batch.

    ``c`` [B, h, d]: sums of w^2; ``A`` [B, h, d]: sums of pi w^2; ``D`` [B, h]: sums of pi; in
    float32 (float64 for float64). ``position`` [B], int64: how many tokens there were.
    """

    c: Tensor
    A: Tensor
    D: Tensor
    position: Tensor


def token_statistics_attention(
    w: Tensor,
    temp: Tensor,
    causal: bool = False,
    denom_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The token statistics operator of projected tokens: y, in the shape and dtype of w.

    Args:
        w: [B, h, N, d], float32, float64, bfloat16 or float16; d 1 to 1024. Strides are free: a
            [B, N, h, d] tensor transposed is read as it lies, and y then lies the same way.
            Channels that are not consecutive are copied.
        temp: [h] or [h, 1], any floating type: what the logits of a head are multiplied by.
        causal: a token sees those up to itself, else all of its sequence.
        denom_bias: [h, M] or [h, M, 1], any floating type, causal only: what is added to each of
            the d terms of a token's logit, by its position in its sequence; M >= N, or the
            longest sequence of cu_seqlens.
        cu_seqlens: [sequences + 1], int32 or int64, from 0 to N, not decreasing: B is 1 and tokens
            cu_seqlens[i] <= n < cu_seqlens[i + 1] are a sequence of their own. Sequences may be
            empty.

    Sums are in float32, float64 for float64, in one order: the bits do not depend on the number of
    threads. A causal call with sequences for every thread reads w once; others read it three times,
    from caches where sequences are short enough. Beside y, a call takes scratch of a few percent of
    w; with a gradient it keeps (N / 64 + 1) h (2d + 80) numbers of float32 for a row of the batch
    (not causal: N h + 2 h d). Gradients for w, temp and denom_bias, once.

    Raises:
        ValueError: shapes, or values of cu_seqlens, that do not fit; denom_bias without causal.
        TypeError: a dtype that is not supported.
        NotImplementedError: CUDA tensors; there is :func:`token_statistics_reference`.
    """
    if _is_compiling() or _functorch():
        statistics_ops.check(w, temp, causal, denom_bias, cu_seqlens)
        heads, bias = _wide(w, temp, denom_bias)
        return torch.ops.attnengine.token_statistics.default(w, heads, bias, cu_seqlens, causal)[0]
    statistics_ops.check(w, temp, causal, denom_bias, cu_seqlens)
    if _forward_ad._current_level >= 0 and any(map(_has_tangent, (w, temp, denom_bias))):
        raise NotImplementedError(
            "attnengine: forward-mode gradients of token_statistics_attention are not implemented; "
            "take gradients with torch.autograd, or use attnengine.token_statistics_reference"
        )
    heads, bias = _wide(w, temp, denom_bias)
    kernel = kernel_of("forward", w.dtype, w.shape[3])
    try:
        if _grad_enabled() and (
            w.requires_grad or heads.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return _Attend.apply(w, heads, bias, cu_seqlens, kernel, causal)
        return _forward(w, heads, bias, cu_seqlens, kernel, causal, False)[0]
    except ValueError as error:
        raise ops.translate(error) from None


def token_statistics_attention_step(
    w: Tensor,
    temp: Tensor,
    state: TokenStatisticsState | None = None,
    denom_bias: Tensor | None = None,
) -> tuple[Tensor, TokenStatisticsState]:
    """The next token, or tokens, of a causal run: (y [B, h, n, d], state after them).

    Args:
        w: [B, h, n, d], as for :func:`token_statistics_attention`; n = 1 in decoding, a whole
            prompt to begin with.
        temp: [h] or [h, 1].
        state: what the last step returned; None at the beginning. It is not changed.
        denom_bias: [h, M] or [h, M, 1] of the whole context: the value at ``state.position`` of
            each row is taken, so M must be greater.

    Steps give together what :func:`token_statistics_attention` gives with causal=True, up to the
    order of sums. The state's size does not depend on the number of tokens. No gradient.

    Raises:
        ValueError: shapes that do not fit, or a position beyond denom_bias.
        TypeError, NotImplementedError: as there; RuntimeError: a gradient is asked for.
    """
    if state is not None and not (isinstance(state, tuple) and len(state) == 4):
        raise TypeError(
            f"state must be a TokenStatisticsState, got {type(state).__name__}; pass what the last "
            "step returned, or None"
        )
    statistics_ops.check(w, temp, True)
    if denom_bias is not None:
        statistics_ops.check_place("denom_bias", denom_bias, w)
        statistics_ops.check_bias(w, denom_bias, None)
    if state is not None:
        for name, x in zip(TokenStatisticsState._fields, state, strict=True):
            statistics_ops.check_place(f"state.{name}", x, w)
    heads, bias = _wide(w, temp, denom_bias)
    if state is None:
        b, h, _, d = w.shape
        wide = heads.dtype
        state = TokenStatisticsState(
            w.new_zeros((b, h, d), dtype=wide), w.new_zeros((b, h, d), dtype=wide),
            w.new_zeros((b, h), dtype=wide), w.new_zeros((b,), dtype=torch.int64),
        )  # fmt: skip
    if _is_compiling() or _functorch():
        given = w, heads, bias, *state
        y, *after = torch.ops.attnengine.token_statistics_step.default(*given)
        return y, TokenStatisticsState(*after)
    if _grad_enabled() and any(
        x is not None and x.requires_grad for x in (w, heads, bias, *state[:3])
    ):
        raise RuntimeError(statistics_ops.STEP_GRADIENT)
    kernel = kernel_of("forward", w.dtype, w.shape[3])
    try:
        y, *after = _step(w, heads, bias, *state, kernel)
    except ValueError as error:
        raise ops.translate(error) from None
    return y, TokenStatisticsState(*after)


def _wide(w: Tensor, temp: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """temp [h] and denom_bias [h, M] in the accumulator type; autograd sees how."""
    wide = statistics_ops.accumulator(w)
    if temp.dtype != wide:
        temp = temp.to(wide)
    if temp.dim() != 1:
        temp = temp.squeeze(1)
    if bias is not None:
        if bias.dtype != wide:
            bias = bias.to(wide)
        if bias.dim() != 2:
            bias = bias.squeeze(2)
    return temp, bias


class _Attend(torch.autograd.Function):
    """The autograd of eager calls."""

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        temp: Tensor,
        bias: Tensor | None,
        starts: Tensor | None,
        kernel: int,
        causal: bool,
    ) -> Tensor:
        with _below_autograd():
            y, logits, statistics = _forward(w, temp, bias, starts, kernel, causal, True)
        ctx.save_for_backward(w, temp, bias, starts, logits, statistics)
        ctx.causal = causal
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if _grad_enabled():
            raise RuntimeError(statistics_ops.DOUBLE_BACKWARD)
        w = ctx.saved_tensors[0]
        kernel = kernel_of("backward", w.dtype, w.shape[3])
        with _below_autograd():
            dw, dtemp, dbias = _backward(*ctx.saved_tensors, grads[0], kernel, ctx.causal)
        return dw, dtemp, dbias, None, None, None
