"""The operators of linear attention as torch sees them, and the autograd of eager calls.

``attnengine::linear_forward`` and ``attnengine::linear_backward`` take a kernel id, are C++
(csrc/ops_linear.cpp) and have no autograd. ``attnengine::linear_attention`` takes a string key and
has autograd, so that ``torch.compile`` and ``torch.export`` can trace it (:mod:`attnengine.ops`).

Kernels return the gradients of decay, beta and captured tensors in the accumulator's dtype and
before broadcasting is undone; :func:`gradients` brings them to their tensor's shape and dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import library
from ..ops import _empty_like_layout, translate
from . import serialize
from .dispatch import LinearProgram, check_place, program_of
from .stages import dtypes
from .unbroadcast import unbroadcast

forward = torch.ops.attnengine.linear_forward.default._op
backward = torch.ops.attnengine.linear_backward.default._op

# Arguments of gradients: q, k, v, decay, beta, state; bit i of `wanted` stands for argument i.
_ARGUMENTS = 6

DOUBLE_BACKWARD = (
    "attnengine: the gradient of a linear attention's gradient (double backward, "
    "create_graph=True) is not implemented; use attnengine.reference, which is plain autograd"
)
TRANSFORMS = (
    "attnengine: transforms of torch.func (vmap, grad, jvp, ...) and forward-mode gradients of "
    "linear attention are not implemented; take gradients with torch.autograd, and fold the "
    "dimension of a vmap into the batch dimension of the operands (reshape to [N*B, H, L, D])"
)

# -- the keys --------------------------------------------------------------------------------------

_programs: dict[str, LinearProgram] = {}


def register(program: LinearProgram) -> None:
    """Makes a program's short and portable keys usable in ``attnengine::linear_attention``."""
    _programs[program.short_key] = _programs[program.portable] = program


def known(key: str) -> LinearProgram:
    """The program of a key. Raises RuntimeError when it is neither registered nor a program's text,
    ValueError when a program is damaged."""
    program = _programs.get(key)
    if program is None:
        if not serialize.is_program(key):
            raise RuntimeError(
                f"attnengine::linear_attention: key {key[:200]!r} is not registered in this "
                "process; call attnengine.linear_attention on such operands here before running "
                "the graph, or take the graph with torch.export, which carries the program"
            )
        program = _programs[key] = program_of(key)
    return program


# -- gradients -------------------------------------------------------------------------------------


def gradients(
    program: LinearProgram,
    operands: Sequence[Tensor | None],
    captures: Sequence[Tensor],
    dout: Tensor | None,
    dstate: Tensor | None,
    scale: float,
    wanted: int,
) -> list[Tensor | None]:
    """Gradients of q, k, v, decay, beta and the initial state, then of each captured tensor, in
    their shapes and dtypes; None where there is none. ``operands`` also has cu_seqlens."""
    try:
        *found, hooks = backward(
            *operands, captures, dout, dstate, program.backward(), scale, wanted
        )
    except ValueError as error:
        raise translate(error) from None
    for i in (3, 4):
        if found[i] is not None:
            found[i] = _like(found[i], operands[i])
    sums: list[Tensor | None] = [None] * len(captures)
    for (_, number, places), grad in zip(program.sources.hook_grads, hooks, strict=True):
        part, before = unbroadcast(grad, places, captures[number]), sums[number]
        sums[number] = part if before is None else before + part
    return found + [
        None if s is None else s.to(x.dtype) for s, x in zip(sums, captures, strict=True)
    ]


def _like(grad: Tensor, x: Any) -> Tensor:
    if x.dim() == 1:  # a decay of one number for each head
        grad = grad.sum((0, 2))
    return grad.to(x.dtype)


class LinearAttention(torch.autograd.Function):
    """(out, final state or None) of one program, with gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        program: LinearProgram,
        scale: float,
        want_state: bool,
        *captures: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        operands = q, k, v, decay, beta, state, cu_seqlens
        result = forward(*operands, captures, program.forward_id, scale, want_state)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, *captures)
        ctx.program, ctx.scale = program, scale
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)
        saved = ctx.saved_tensors
        operands, captures = saved[: _ARGUMENTS + 1], saved[_ARGUMENTS + 1 :]
        wanted = sum(1 << i for i in range(_ARGUMENTS) if ctx.needs_input_grad[i])
        dout, dstate = grads
        found = gradients(ctx.program, operands, captures, dout, dstate, ctx.scale, wanted)
        return (*found[:_ARGUMENTS], None, None, None, None, *found[_ARGUMENTS:])


# Function.apply without its Python half, which only functorch needs.
_direct = super(torch.autograd.Function, LinearAttention).apply
_functorch = torch._C._are_functorch_transforms_active


def apply(
    operands: Sequence[Tensor | None],
    program: LinearProgram,
    scale: float,
    want_state: bool,
    captures: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """(out, final state) with autograd; the program's forward is loaded."""
    if _functorch():
        raise NotImplementedError(TRANSFORMS)
    return _direct(*operands, program, scale, want_state, *captures)


# -- fakes of the C++ operators --------------------------------------------------------------------


_NAMES = ("q", "k", "v", "decay", "beta", "initial_state", "cu_seqlens")


def _check_places(operands: Sequence[Tensor | None], captures: Sequence[Tensor]) -> None:
    """Raises ValueError unless all tensors are where q is: where a meta tensor is among others, a
    fake is called for real, and its results would be memory that nothing was written to."""
    (q, *_), names = operands, (*_NAMES, *(f"captures[{i}]" for i in range(len(captures))))
    assert q is not None
    for name, x in zip(names, (*operands, *captures), strict=True):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: move it there")


def _check(
    kernel: int, kind: str, operands: Sequence[Tensor | None], captures: Sequence[Tensor]
) -> None:
    """What must hold of shapes and dtypes, which may be symbolic; the operator itself says more."""
    q, k, v, *_ = operands
    assert q is not None and k is not None and v is not None
    info = library.kernel_info(kernel)
    if info.kind != kind:
        raise ValueError(f"kernel={kernel} is a {info.kind} kernel, this operator needs a {kind}")
    check_place(q)
    _check_places(operands, captures)
    for name, x, width in (("q", q, info.D), ("k", k, info.D), ("v", v, info.Dv)):
        if x.dim() != 4 or x.dtype != info.dtype or x.shape[3] != width:
            raise ValueError(
                f"{name} {tuple(x.shape)} {x.dtype}: this kernel was compiled for {info.dtype} "
                f"and head dims {info.D} and {info.Dv}"
            )


def _state_like(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, columns: int, dtype: torch.dtype
) -> Tensor:
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty((count, v.shape[1], q.shape[3], columns), dtype=dtype)


def _normalizer(kernel: int) -> int:
    """Columns of the state beside those of v; in the operands that a module declares."""
    return library.kernel_info(kernel).user_stats >> 13 & 1


@torch.library.register_fake("attnengine::linear_forward")
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    captures: Sequence[Tensor],
    kernel: int,
    scale: float,
    want_state: bool,
) -> tuple[Tensor, Tensor | None]:
    _check(kernel, "linear forward", (q, k, v, decay, beta, state, cu_seqlens), captures)
    out = _empty_like_layout(v, v.shape, q.dtype)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    columns = v.shape[3] + _normalizer(kernel)
    return out, _state_like(q, v, cu_seqlens, columns, acc) if want_state else None


@torch.library.register_fake("attnengine::linear_backward")
def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    captures: Sequence[Tensor],
    dout: Tensor | None,
    dstate: Tensor | None,
    kernel: int,
    scale: float,
    wanted: int,
) -> tuple[Any, ...]:
    _check(kernel, "linear backward", (q, k, v, decay, beta, state, cu_seqlens), captures)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    tokens = v.shape[:3]
    decays = (*tokens, q.shape[3]) if decay is not None and decay.dim() == 4 else tokens
    shapes: list[Any] = [q.shape, k.shape, v.shape, decays, tokens, getattr(state, "shape", ())]
    found = [
        q.new_empty(shape, dtype=q.dtype if i < 3 else acc)
        if x is not None and wanted >> i & 1
        else None
        for i, (x, shape) in enumerate(zip((q, k, v, decay, beta, state), shapes, strict=True))
    ]
    counts = library.kernel_info(kernel).grad_mask
    hooks = []
    for hook, shape in enumerate((q.shape, k.shape, v.shape, decays, v.shape)):
        hooks += [q.new_empty(shape, dtype=acc) for _ in range(counts >> 8 * hook & 255)]
    return (*found, hooks)


# -- the traceable operator ------------------------------------------------------------------------

_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor? state, "
    "Tensor? cu_seqlens, Tensor[] captures"
)
_library = torch.library.Library("attnengine", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    f"linear_attention({_OPERANDS}, str key, float scale, bool want_state) -> "
    "(Tensor out, Tensor state)",
    tags=_TAGS,
)
# The gradients that `wanted` names and that exist, in the order of the arguments, then those of
# captured tensors.
_library.define(
    f"linear_attention_backward({_OPERANDS}, Tensor? dout, Tensor? dstate, str key, float scale, "
    "int wanted) -> Tensor[]",
    tags=_TAGS,
)


def _sizes(q: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    return q.shape[0], q.shape[1], v.shape[1], q.shape[2]


def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    *operands, captures, key, scale, want_state = arguments
    program = known(key)
    program.check_sizes(_sizes(operands[0], operands[2]))
    try:
        out, state = forward(*operands, captures, program.forward(), scale, want_state)
    except ValueError as error:
        raise translate(error) from None
    return out, out.new_empty(0) if state is None else state


def _attention_backward(*arguments: Any) -> list[Tensor]:
    *operands, captures, dout, dstate, key, scale, wanted = arguments
    found = gradients(known(key), operands, captures, dout, dstate, scale, wanted)
    return [x for x in found if x is not None]


for _device in ("CPU", "CUDA"):
    _library.impl("linear_attention", _attention, _device)
    _library.impl("linear_attention_backward", _attention_backward, _device)


@torch.library.register_fake("attnengine::linear_attention", lib=_library)
def _attention_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    *operands, captures, key, scale, want_state = arguments
    q, _, v, *_, cu_seqlens = operands
    program = known(key)
    check_place(q)
    _check_places(operands, captures)
    element, acc = dtypes(program.request)
    if q.dtype != element or (q.shape[3], v.shape[3]) != (program.request.d, program.request.dv):
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype} and v {tuple(v.shape)}: this graph's program is for "
            f"{element} and head dims {program.request.d} and {program.request.dv}"
        )
    out = _empty_like_layout(v, v.shape, q.dtype)
    if not want_state:
        return out, out.new_empty(0)
    columns = v.shape[3] + (1 if program.request.normalizer else 0)
    return out, _state_like(q, v, cu_seqlens, columns, acc)


@torch.library.register_fake("attnengine::linear_attention_backward", lib=_library)
def _attention_backward_fake(*arguments: Any) -> list[Tensor]:
    *operands, captures, dout, dstate, key, scale, wanted = arguments
    found = [
        x.new_empty(x.shape)
        for i, x in enumerate(operands[:_ARGUMENTS])
        if x is not None and wanted >> i & 1
    ]
    return found + [captures[i].new_empty(captures[i].shape) for i in known(key).trainable]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, captures, key, scale, want_state = inputs
    program = known(key)
    for i in program.sources.frozen:
        if captures[i].requires_grad:
            raise ValueError(
                f"attnengine::linear_attention: captured tensor {i} {tuple(captures[i].shape)} "
                "requires grad and did not when the program was made; let it require grad, and "
                "prepare or export again"
            )
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, *captures)
    ctx.key, ctx.scale, ctx.want_state = key, scale, want_state
    ctx.wanted = sum(
        1 << i for i, x in enumerate(operands[:_ARGUMENTS]) if x is not None and x.requires_grad
    )


def _differentiate(ctx: Any, dout: Tensor | None, dstate: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    operands, captures = saved[: _ARGUMENTS + 1], list(saved[_ARGUMENTS + 1 :])
    if not ctx.want_state:
        dstate = None
    produced = iter(
        torch.ops.attnengine.linear_attention_backward.default(
            *operands, captures, dout, dstate, ctx.key, ctx.scale, ctx.wanted
        )
    )
    found = [
        next(produced) if x is not None and ctx.wanted >> i & 1 else None
        for i, x in enumerate(operands[:_ARGUMENTS])
    ]
    numbers = known(ctx.key).trainable
    grads = [next(produced) if i in numbers else None for i in range(len(captures))]
    return (*found, None, grads, None, None, None)


def _no_double_backward(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError(DOUBLE_BACKWARD)


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
    raise NotImplementedError(TRANSFORMS)


torch.library.register_autograd(
    "attnengine::linear_attention", _differentiate, setup_context=_save, lib=_library
)
torch.library.register_autograd(
    "attnengine::linear_attention_backward", _no_double_backward, lib=_library
)
for _name in (
    "linear_forward", "linear_backward", "linear_attention", "linear_attention_backward",
):  # fmt: skip
    torch.library.register_vmap(f"attnengine::{_name}", _no_vmap, lib=_library)
