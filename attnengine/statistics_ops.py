"""The operators of token statistics attention as torch sees them: checks, fakes and autograd.

``attnengine::statistics_forward``, ``_step`` and ``_backward`` take a kernel id, are implemented in
C++ and have no autograd: eager calls wrap them in an ``autograd.Function``.
``attnengine::token_statistics``, ``_step`` and ``_backward`` find their kernel by w's dtype and
head dim: torch.compile and torch.export trace them, in any process.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from . import build, builtin, library, ops
from .errors import KernelUnavailable, require_dense
from .statistics_source import StatisticsPlan, statistics_source
from .target import default_isa

SUPPORTED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BLOCK, PAD = 64, 16  # AE_STATISTICS_BLOCK and AE_STATISTICS_PAD of common/statistics_abi.h
MAX_HEAD_DIM = 1024

forward = torch.ops.attnengine.statistics_forward.default._op
step = torch.ops.attnengine.statistics_step.default._op
backward = torch.ops.attnengine.statistics_backward.default._op

_kernels: dict[tuple[str, torch.dtype, int, str], int] = {}


def kernel_of(kind: str, element: torch.dtype, head_dim: int) -> int:
    """The id of the kernel, compiled if no cache has it. Raises KernelUnavailable, BuildError."""
    isa = default_isa()
    found = _kernels.get((kind, element, head_dim, isa))
    if found is None:
        plan = StatisticsPlan(kind, element, head_dim)
        try:
            path = build.module(statistics_source(plan), isa, f"{plan.label} {isa}")
        except KernelUnavailable as error:
            command = builtin.statistics_command(element, head_dim, isa)
            raise KernelUnavailable(error.problem, command) from None
        found = _kernels[kind, element, head_dim, isa] = library.load_kernel(path)
    return found


# ------------------------------------------------------------------------------------------ checks


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _shape(x: Tensor) -> str:
    return "[" + ", ".join(str(s) for s in x.shape) + "]"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(
    w: Any, temp: Any, causal: bool = False, denom_bias: Any = None, cu_seqlens: Any = None
) -> None:
    """What every door asks of the arguments. Raises TypeError, ValueError, NotImplementedError."""
    named = {"w": w, "temp": temp, "denom_bias": denom_bias, "cu_seqlens": cu_seqlens}
    for name, x in named.items():
        if x is None and name in ("denom_bias", "cu_seqlens"):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.device.type not in ("cpu", "meta"):
            raise NotImplementedError(
                f"{name} is on {x.device}; token statistics attention has kernels for CPU tensors "
                "in this version: use .cpu(), or attnengine.token_statistics_reference, which runs "
                "anywhere"
            )
        check_place(name, x, w)
    if w.dim() != 4:
        raise ValueError(
            f"w must be 4-D [B, h, N, d], got shape {_shape(w)}; from [B, N, h * d]: "
            "w.unflatten(-1, (h, d)).transpose(1, 2)"
        )
    if w.dtype not in SUPPORTED:
        raise TypeError(
            f"w has {_name(w.dtype)}; supported are float32, float64, bfloat16 and float16: cast "
            "with .to()"
        )
    h, n, d = w.shape[1:]
    if not 1 <= d <= MAX_HEAD_DIM:
        raise ValueError(f"w {_shape(w)}: head dim {d} must be 1 to {MAX_HEAD_DIM}; split heads")
    _check_temp(w, temp)
    if cu_seqlens is not None:
        _check_starts(w, cu_seqlens)
    if denom_bias is not None:
        if not causal:
            raise ValueError(
                "denom_bias is given with causal=False: only the causal form has a bias; pass "
                "causal=True, or no denom_bias"
            )
        check_bias(w, denom_bias, None if cu_seqlens is not None else n)


def check_place(name: str, x: Any, w: Tensor) -> None:
    """Raises TypeError, ValueError unless ``x`` is a dense tensor where w is. (Where a meta tensor
    is among others torch takes a fake, and its results are memory that nothing was written to.)"""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.device != w.device:
        raise ValueError(f"{name} is on {x.device}, w on {w.device}: move it there")
    require_dense(name, x, "N")


def _check_temp(w: Tensor, temp: Tensor) -> None:
    if not temp.is_floating_point():
        raise TypeError(f"temp has {_name(temp.dtype)}, expected a floating type; cast with .to()")
    h = w.shape[1]
    if not (temp.dim() == 1 or (temp.dim() == 2 and temp.shape[1] == 1)) or temp.shape[0] != h:
        raise ValueError(
            f"temp has shape {_shape(temp)}, expected [{h}] or [{h}, 1]: a number for each head of "
            f"w {_shape(w)}"
        )


def _check_starts(w: Tensor, cu_seqlens: Tensor) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cu_seqlens has {_name(cu_seqlens.dtype)}, expected int32 or int64; cast with .int()"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"cu_seqlens must have shape [sequences + 1], got {_shape(cu_seqlens)}; it holds the "
            "running sum of the lengths, from 0"
        )
    if w.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens needs packed tokens of batch 1, got w {_shape(w)}; lay the sequences one "
            "after the other along N: [1, h, total, d]"
        )


def check_bias(w: Tensor, bias: Tensor, tokens: int | None) -> None:
    """tokens: how many positions it must have, or None where only values tell."""
    if not bias.is_floating_point():
        raise TypeError(
            f"denom_bias has {_name(bias.dtype)}, expected a floating type; cast with .to()"
        )
    h = w.shape[1]
    fits = bias.dim() == 2 or (bias.dim() == 3 and bias.shape[2] == 1)
    if not fits or bias.shape[0] != h or (tokens is not None and bias.shape[1] < tokens):
        least = "positions" if tokens is None else str(tokens)
        raise ValueError(
            f"denom_bias has shape {_shape(bias)}, expected [{h}, {least}] or more positions: a "
            f"number for each head of w {_shape(w)} and position in its sequence"
        )


# ------------------------------------------------------------------------------------------- fakes


def _saved(w: Tensor, cu_seqlens: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """Empty logits and statistics: the shapes of common/statistics_abi.h."""
    b, h, n, d = w.shape
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = b * n // BLOCK + sequences
    width = 2 * ((d + PAD - 1) // PAD * PAD) + PAD
    wide = accumulator(w)
    logits = w.new_empty((rows, h, BLOCK), dtype=wide)
    return logits, w.new_empty((rows if causal else sequences, h, width), dtype=wide)


def _like(w: Tensor) -> Tensor:
    return ops._empty_like_layout(w, w.shape, w.dtype)


@torch.library.register_fake("attnengine::statistics_forward")
def _forward_fake(
    w: Tensor,
    temp: Tensor,
    denom_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    kernel: int,
    causal: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    check(w, temp, causal, denom_bias, cu_seqlens)
    return _like(w), *(_saved(w, cu_seqlens, causal) if save else (None, None))


@torch.library.register_fake("attnengine::statistics_backward")
def _backward_fake(
    w: Tensor,
    temp: Tensor,
    denom_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    logits: Tensor,
    statistics: Tensor,
    dy: Tensor,
    kernel: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    bias = None if denom_bias is None else denom_bias.new_empty(denom_bias.shape)
    return _like(w), temp.new_empty(temp.shape), bias


@torch.library.register_fake("attnengine::statistics_step")
def _step_fake(
    w: Tensor,
    temp: Tensor,
    denom_bias: Tensor | None,
    c: Tensor,
    a: Tensor,
    d: Tensor,
    position: Tensor,
    kernel: int,
) -> tuple[Tensor, ...]:
    check(w, temp, True)
    return _like(w), *(x.new_empty(x.shape) for x in (c, a, d, position))


# ------------------------------------------------------------------------- the traceable operators

_library = torch.library.Library("attnengine", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    "token_statistics(Tensor w, Tensor temp, Tensor? denom_bias, Tensor? cu_seqlens, bool causal) "
    "-> (Tensor y, Tensor logits, Tensor statistics)",
    tags=_TAGS,
)
_library.define(
    "token_statistics_backward(Tensor w, Tensor temp, Tensor? denom_bias, Tensor? cu_seqlens, "
    "Tensor logits, Tensor statistics, Tensor dy, bool causal) "
    "-> (Tensor dw, Tensor dtemp, Tensor dbias)",
    tags=_TAGS,
)
_library.define(
    "token_statistics_step(Tensor w, Tensor temp, Tensor? denom_bias, Tensor c, Tensor a, "
    "Tensor d, Tensor position) -> (Tensor y, Tensor c, Tensor a, Tensor d, Tensor position)",
    tags=_TAGS,
)


def _attend(
    w: Tensor, temp: Tensor, denom_bias: Tensor | None, cu_seqlens: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check(w, temp, causal, denom_bias, cu_seqlens)
    kernel = kernel_of("forward", w.dtype, w.shape[3])
    try:
        return forward(w, temp, denom_bias, cu_seqlens, kernel, causal, True)
    except ValueError as error:
        raise ops.translate(error) from None


def _attend_backward(
    w: Tensor,
    temp: Tensor,
    denom_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    logits: Tensor,
    statistics: Tensor,
    dy: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = kernel_of("backward", w.dtype, w.shape[3])
    given = w, temp, denom_bias, cu_seqlens, logits, statistics, dy
    try:
        dw, dtemp, dbias = backward(*given, kernel, causal)
    except ValueError as error:
        raise ops.translate(error) from None
    return dw, dtemp, temp.new_empty(0) if dbias is None else dbias


def _attend_step(
    w: Tensor,
    temp: Tensor,
    denom_bias: Tensor | None,
    c: Tensor,
    a: Tensor,
    d: Tensor,
    position: Tensor,
) -> tuple[Tensor, ...]:
    check(w, temp, True)
    kernel = kernel_of("forward", w.dtype, w.shape[3])
    try:
        return step(w, temp, denom_bias, c, a, d, position, kernel)
    except ValueError as error:
        raise ops.translate(error) from None


_NAMES = ("token_statistics", "token_statistics_backward", "token_statistics_step")
for _device in ("CPU", "CUDA"):  # on CUDA tensors the checks refuse
    for _operator, _function in zip(_NAMES, (_attend, _attend_backward, _attend_step), strict=True):
        _library.impl(_operator, _function, _device)


@torch.library.register_fake("attnengine::token_statistics", lib=_library)
def _attend_fake(
    w: Tensor, temp: Tensor, denom_bias: Tensor | None, cu_seqlens: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check(w, temp, causal, denom_bias, cu_seqlens)
    return _like(w), *_saved(w, cu_seqlens, causal)


@torch.library.register_fake("attnengine::token_statistics_backward", lib=_library)
def _attend_backward_fake(
    w: Tensor,
    temp: Tensor,
    denom_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    logits: Tensor,
    statistics: Tensor,
    dy: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    bias = (0,) if denom_bias is None else denom_bias.shape
    return _like(w), temp.new_empty(temp.shape), temp.new_empty(bias)


@torch.library.register_fake("attnengine::token_statistics_step", lib=_library)
def _attend_step_fake(
    w: Tensor,
    temp: Tensor,
    denom_bias: Tensor | None,
    c: Tensor,
    a: Tensor,
    d: Tensor,
    position: Tensor,
) -> tuple[Tensor, ...]:
    return _step_fake(w, temp, denom_bias, c, a, d, position, -1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, causal = inputs
    _, logits, statistics = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, logits, statistics)
    ctx.causal = causal


def _differentiate(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    w, temp, bias, starts, logits, statistics = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(w)
    dw, dtemp, dbias = torch.ops.attnengine.token_statistics_backward.default(
        w, temp, bias, starts, logits, statistics, dy, ctx.causal
    )
    return dw, dtemp, None if bias is None else dbias, None, None


torch.library.register_autograd(
    "attnengine::token_statistics", _differentiate, setup_context=_save, lib=_library
)

DOUBLE_BACKWARD = (
    "attnengine: the gradient of a token statistics gradient (double backward, create_graph=True) "
    "is not implemented; use attnengine.token_statistics_reference, which is plain autograd"
)
STEP_GRADIENT = (
    "attnengine: token_statistics_attention_step has no gradient; call it under torch.no_grad(), "
    "or train with token_statistics_attention(..., causal=True)"
)


def _no_double_backward(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError(DOUBLE_BACKWARD)


def _no_step_gradient(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError(STEP_GRADIENT)


torch.library.register_autograd(
    "attnengine::token_statistics_backward", _no_double_backward, lib=_library
)
torch.library.register_autograd(
    "attnengine::token_statistics_step", _no_step_gradient, lib=_library
)


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
    raise NotImplementedError(
        "attnengine: vmap over token statistics attention is not implemented; fold the mapped "
        "dimension into w's batch (reshape to [M * B, h, N, d])"
    )


for _operator in (*_NAMES, "statistics_forward", "statistics_backward", "statistics_step"):
    torch.library.register_vmap(f"attnengine::{_operator}", _no_vmap, lib=_library)
