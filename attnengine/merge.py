"""The merge of partial attention: what split-KV, stream-K, ring, cascade and offloaded attention
have in common, as an operator of torch with a gradient.

Attention over keys I1 and attention over other keys I2 give attention over both, from their outputs
and logarithms of sums alone. With w_i = exp(lse_i - lse), for any number of parts::

    lse = log sum_i exp(lse_i)            out = sum_i w_i out_i

and from the gradients dout and dlse of both results (w is the softmax of the lse_i, so
dw_i/dlse_j = w_i (1[i = j] - w_j))::

    dout_i = w_i dout                     dlse_i = w_i (dout . (out_i - out) + dlse)

Source: FlashDecoding and LeanAttention (arXiv 2405.10480), which merge unnormalised sums; this is
the same in terms of (out, lse). Attention's own gradient takes dlse (`dS = P (dP - rowsum(dO O) +
dlse)`), so the gradients of q and of the keys of every part come out right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import ops
from .handle import _has_tangent

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MAX_RANK = 8  # AE_MAX_RANK of templates/common/abi.h
_forward = torch.ops.attnengine.merge_states.default._op
_backward = torch.ops.attnengine.merge_states_backward.default._op
# Eager calls have the operators' autograd done by _Merge, in half the time; without a gradient,
# going past it halves the time of a small merge, to 5 us.
_below_autograd = torch._C._AutoDispatchBelowAutograd
_grad_enabled = torch.is_grad_enabled
_functorch = torch._C._are_functorch_transforms_active
_forward_ad = torch.autograd.forward_ad


def merge_states(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from attention over each.

    Args:
        outs: one [..., Dv] per part, all of one shape and dtype (float32, float64, bfloat16 or
            float16), with any strides; or one tensor with the parts in its first dimension.
        lses: one [...] per part, outs' shape without Dv: natural logarithm of the sum of the
            exponentials of the part's scores; float32, or float64 with float64 outs. From
            ``ae.attention(..., return_aux=True)``: ``aux.lse``. Where outs are [B, L, H, Dv] or
            [total, H, Dv] and the statistics are [B, H, L] or [H, total]: ``lse.transpose(-1,
            -2)``. From a library that uses base 2 (FlashInfer): multiply by ``math.log(2)``.

    Returns:
        (out, lse): out as outs, in the order of dimensions of the first; lse as lses, contiguous.
        Computed in float32, float64 for float64, over the parts in the order given and with
        the same bits whatever the number of threads.

    Rows:
        A part whose lse is -inf has no keys in that row: it is absent, whatever its out holds, and
        its gradients are 0. Where every part is, out is 0 and lse -inf. Attention gives no other
        lse that is not finite, unless a score is +inf or NaN: then the row's out and gradients are
        NaN, as softmax's are, and lse is +inf or NaN. flash-attn 2 reports +inf for rows without
        keys: replace it with -inf.

    Differentiable once: the gradient of the gradient is refused. CUDA tensors go through torch's
    own operators, which mean the same.

    Raises:
        ValueError: no parts; shapes, devices or numbers of tensors that do not agree.
        TypeError: dtypes that do not agree.
    """
    outs, lses = list(outs), list(lses)  # list: iterating over a tensor unbinds it
    if _forward_ad._current_level >= 0 and any(map(_has_tangent, (*outs, *lses))):
        raise NotImplementedError(
            "attnengine: forward-mode gradients of merge_states are not implemented; take "
            "gradients with torch.autograd"
        )
    if torch.compiler.is_compiling() or _functorch():
        return torch.ops.attnengine.merge_states.default(outs, lses)
    if not outs:  # no tensor would tell the dispatcher which implementation to ask
        _check(outs, lses)
    try:
        if _grad_enabled() and any(x.requires_grad for x in (*outs, *lses)):
            return _Merge.apply(len(outs), *outs, *lses)
        with _below_autograd():
            return _forward(outs, lses)
    except ValueError as error:
        raise ops.translate(error) from None


def merge_state(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`merge_states` of two parts: (o_a, lse_a) and (o_b, lse_b), [..., Dv] and [...]."""
    return merge_states((o_a, o_b), (lse_a, lse_b))


# ------------------------------------------------------------------------------- checks and fakes


def _shape(x: Sequence[Any]) -> str:
    return "[" + ", ".join(str(s) for s in x) + "]"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """The checks of csrc/merge_state.cpp, in its words: for fakes and CUDA tensors."""
    if len(outs) != len(lses):
        raise ValueError(
            f"outs has {len(outs)} tensors but lses has {len(lses)}; each part has one of both"
        )
    if not outs:
        raise ValueError("outs is empty; pass at least one part")
    first = outs[0]
    if first.dtype not in _DTYPES:
        raise TypeError(
            f"outs[0] has {_dtype(first)}; supported are float32, float64, bfloat16 and float16: "
            "cast with .to()"
        )
    if first.dim() < 1:
        raise ValueError("outs[0] has shape []; it must be [..., Dv]")
    if first.dim() > _MAX_RANK:
        raise ValueError(
            f"outs[0] has {first.dim()} dimensions (shape {_shape(first.shape)}), the limit is "
            f"{_MAX_RANK}; flatten some of them"
        )
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _check_part(f"outs[{i}]", f"lses[{i}]", out, lse, first)


def _check_part(out_name: str, lse_name: str, out: Tensor, lse: Tensor, first: Tensor) -> None:
    for name, x in ((out_name, out), (lse_name, lse)):
        if x.device != first.device:
            raise ValueError(
                f"{name} is on {x.device} but outs[0] is on {first.device}; move them to one "
                "device with .to()"
            )
    if out.dtype != first.dtype:
        raise TypeError(
            f"{out_name} has {_dtype(out)} but outs[0] has {_dtype(first)}; cast with .to()"
        )
    wanted = _sum_dtype(first)
    if lse.dtype != wanted:
        raise TypeError(
            f"{lse_name} has {_dtype(lse)}, expected {str(wanted).removeprefix('torch.')} (the "
            f"accumulator type of outs' {_dtype(first)}); cast with .to()"
        )
    if out.shape != first.shape:
        raise ValueError(
            f"{out_name} has shape {_shape(out.shape)} but outs[0] has {_shape(first.shape)}; the "
            "parts must have one shape"
        )
    if lse.shape != first.shape[:-1]:
        raise ValueError(
            f"{lse_name} has shape {_shape(lse.shape)}, expected {_shape(first.shape[:-1])}: "
            "outs[0]'s without its last dimension; for outs [B, L, H, Dv] or [total, H, Dv] pass "
            "lse.transpose(-1, -2)"
        )


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty_like(x: Tensor) -> Tensor:
    """As dense_strides_of_rank in csrc/merge_state.h: the order of x's dimensions."""
    sizes, strides = x.shape, x.stride()
    order = sorted(range(x.dim() - 1), key=lambda d: (strides[d] != 0, -strides[d]))
    result: list[Any] = [1] * x.dim()
    step = sizes[-1] if sizes[-1] > 0 else 1
    for d in reversed(order):
        result[d] = step
        step = step * (sizes[d] if sizes[d] > 0 else 1)
    return x.new_empty_strided(tuple(sizes), tuple(result))


_library = torch.library.Library("attnengine", "FRAGMENT")


@torch.library.register_fake("attnengine::merge_states", lib=_library)
def _merge_states_fake(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    _check(outs, lses)
    return _empty_like(outs[0]), lses[0].new_empty(lses[0].shape)


@torch.library.register_fake("attnengine::merge_states_backward", lib=_library)
def _merge_states_backward_fake(
    outs: Sequence[Tensor], lses: Sequence[Tensor], dout: Tensor, dlse: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    _check(outs, lses)
    return [_empty_like(x) for x in outs], [x.new_empty(x.shape) for x in lses]


# ------------------------------------------------------------------------------------------- CUDA


def _weights(lses: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(lse, weight of each part, where each is live), the last two [..., 1]."""
    table = torch.stack(list(lses))
    live = table != -torch.inf
    lse = torch.logsumexp(table, 0)
    weights = torch.where(live, torch.softmax(table, 0), 0.0)
    return lse, list(weights[..., None]), list(live[..., None])


def _composite(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """merge_states by torch's operators: the meaning, and what runs on CUDA tensors."""
    _check(outs, lses)
    lse, weights, live = _weights(lses)
    total = torch.zeros_like(outs[0], dtype=lse.dtype)
    for out, weight, alive in zip(outs, weights, live, strict=True):
        total += torch.where(alive, out.to(lse.dtype), 0.0) * weight
    return _empty_like(outs[0]).copy_(total), lse


def _composite_backward(
    outs: Sequence[Tensor], lses: Sequence[Tensor], dout: Tensor, dlse: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    _check(outs, lses)
    _, weights, live = _weights(lses)
    wide = dout.to(dlse.dtype)
    products = [
        (torch.where(alive, out.to(dlse.dtype), 0.0) * wide).sum(-1)
        for out, alive in zip(outs, live, strict=True)
    ]
    mean = torch.zeros_like(dlse)
    for product, weight in zip(products, weights, strict=True):
        mean = mean + product * weight[..., 0]
    douts, dlses = [], []
    for out, product, weight, alive in zip(outs, products, weights, live, strict=True):
        douts.append(_empty_like(out).copy_(torch.where(alive, wide * weight, 0.0)))
        gradient = weight[..., 0] * (product - mean + dlse)
        dlses.append(torch.where(alive[..., 0], gradient, 0.0).contiguous())
    return douts, dlses


_library.impl("merge_states", _composite, "CUDA")
_library.impl("merge_states_backward", _composite_backward, "CUDA")

# --------------------------------------------------------------------------------------- autograd


_DOUBLE_BACKWARD = (
    "attnengine: the gradient of merge_states' gradient (double backward, create_graph=True) is "
    "not implemented; merge with torch.logsumexp and torch.exp, as the documentation of "
    "attnengine.merge says"
)


class _Merge(torch.autograd.Function):
    """The autograd of eager calls."""

    @staticmethod
    def forward(ctx: Any, count: int, *parts: Tensor) -> tuple[Tensor, Tensor]:
        with _below_autograd():
            result = _forward(list(parts[:count]), list(parts[count:]))
        ctx.count = count
        ctx.save_for_backward(*parts)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if _grad_enabled():
            raise RuntimeError(_DOUBLE_BACKWARD)
        parts = ctx.saved_tensors
        with _below_autograd():
            douts, dlses = _backward(list(parts[: ctx.count]), list(parts[ctx.count :]), *grads)
        return None, *douts, *dlses


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    outs, lses = inputs
    ctx.count = len(outs)
    ctx.save_for_backward(*outs, *lses)


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    outs, lses = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    return torch.ops.attnengine.merge_states_backward.default(list(outs), list(lses), dout, dlse)


def _no_double_backward(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError(_DOUBLE_BACKWARD)


torch.library.register_autograd(
    "attnengine::merge_states", _differentiate, setup_context=_save, lib=_library
)
torch.library.register_autograd(
    "attnengine::merge_states_backward", _no_double_backward, lib=_library
)


def _batched(info: Any, in_dims: Any, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> Any:
    """vmap: the mapped dimension is one more leading dimension."""

    def front(x: Tensor, dim: int | None) -> Tensor:
        return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

    outs = [front(x, d) for x, d in zip(outs, in_dims[0], strict=True)]
    lses = [front(x, d) for x, d in zip(lses, in_dims[1], strict=True)]
    return torch.ops.attnengine.merge_states.default(outs, lses), (0, 0)


torch.library.register_vmap("attnengine::merge_states", _batched, lib=_library)
