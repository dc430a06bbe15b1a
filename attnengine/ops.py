"""The operators as torch sees them: fakes, error types, and the operator that compilers trace.

Two families, because they serve different callers:

``attnengine::forward`` / ``attnengine::backward`` take a kernel id. They are implemented in C++,
have no autograd, and cost the least; eager calls wrap them in an ``autograd.Function``.

``attnengine::attention`` takes a string key and has autograd: ``torch.compile`` and
``torch.export`` can trace it. The key is either a name that this process knows by
:func:`register_key`, or the whole program as text (:mod:`attnengine.serialize`), which every
process can read and make a kernel of: that is what exported graphs hold.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from attnengine import dispatch, exported, library, serialize

# The C++ entry of each overload: calling the overload itself only forwards to it, for 0.4 us more.
# forward returns None in place of the statistics when they were not asked for.
forward = torch.ops.attnengine.forward.default._op
backward = torch.ops.attnengine.backward.default._op

_DEVICE_CODES = {"cpu": 0, "cuda": 1, "meta": 2}
_ERROR_TYPES = {"TypeError: ": TypeError, "NotImplementedError: ": NotImplementedError}


def translate(error: ValueError) -> Exception:
    """The error that an operator's ValueError stands for.

    C++ can only raise ValueError and IndexError through torch's stable ABI; a prefix of the text
    names any other type. For the failure path: ``except ValueError as e: raise translate(e)``.
    """
    text = str(error)
    for prefix, kind in _ERROR_TYPES.items():
        if text.startswith(prefix):
            return kind(text[len(prefix) :])
    return error


# ---------------------------------------------------------------------------------------- the keys


@dataclass(frozen=True)
class KeyInfo:
    """What tracing must know of a key: the shapes that its kernels produce.

    ``stats`` row statistics are saved, the first ``user_stats`` of them differentiable; bit i of
    ``grad_mask`` says that captured tensor i gets a gradient, bit i of ``frozen`` that it did not
    require one when the program was made, so that asking for it now is an error.
    """

    stats: int
    user_stats: int
    grad_mask: int
    frozen: int = 0
    cuda: bool = False  # its kernels are for CUDA tensors


Resolver = Callable[[str], int]
_resolvers: dict[str, Resolver] = {}
_key_infos: dict[str, KeyInfo] = {}


def register_key(key: str, resolver: Resolver, info: KeyInfo | None = None) -> None:
    """Make ``key`` usable in ``attnengine::attention``; registering it again replaces it.

    ``resolver("forward" | "backward")`` returns the kernel id, building the kernel when needed.
    Without ``info``, tracing asks the kernels themselves and so compiles them.
    """
    _resolvers[key] = resolver
    if info is not None:
        _key_infos[key] = info
    else:
        _key_infos.pop(key, None)


def resolve(key: str, kind: str) -> int:
    """The kernel id of ``key``. Raises RuntimeError when it is neither registered nor a program,
    ValueError when a program is damaged, KernelUnavailable or BuildError when it cannot be built.
    """
    resolver = _resolvers.get(key)
    if resolver is None:
        if not serialize.is_program(key):
            raise RuntimeError(
                f"attnengine::attention: key {key[:200]!r} is not registered in this process; "
                "prepare the spec here with attnengine.compile(spec, q, k, v) before running the "
                "graph, or take the graph with torch.export, which carries the program"
            )
        register_program(key, exported.program_of(key))
        resolver = _resolvers[key]
    return resolver(kind)


def register_program(text: str, program: dispatch.Program) -> None:
    """Makes a program's own text usable as a key. Tracing then knows its shapes, uncompiled."""
    if text not in _resolvers:
        register_key(text, program.load, info_of(program, serialize.frozen(text)))


def info_of(program: dispatch.Program, frozen: int = 0) -> KeyInfo:
    """What tracing must know of a program: none of its kernels is built for it."""
    x, mask = program.sources, sum(1 << i for i in program.sources.grads)
    return KeyInfo(x.stored, len(x.stats), mask, frozen, program.is_cuda)


def _saved_stats(key: str) -> tuple[int, int]:
    """(all, user's) row statistics that the forward kernel of ``key`` saves."""
    known = _known(key) or library.kernel_info(resolve(key, "forward"))
    return known.stats, known.user_stats


def _known(key: str) -> KeyInfo | None:
    if key not in _resolvers and serialize.is_program(key):
        register_program(key, exported.program_of(key))
    return _key_infos.get(key)


def _on_cuda(key: str) -> bool:
    known = _known(key)
    return known.cuda if known else library.kernel_info(resolve(key, "forward")).cuda is not None


def _grad_mask(key: str) -> int:
    known = _known(key)
    if known is None or known.cuda:  # of a CUDA program it raises: there is no gradient
        return library.kernel_info(resolve(key, "backward")).grad_mask
    return known.grad_mask


# --------------------------------------------------------------------------------------- the fakes


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty_like_layout(like: Tensor, size: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """As dense_strides_like in csrc/layout.h: the dimension order of ``like``, last stride 1."""
    strides = like.stride()
    order = sorted(range(3), key=lambda d: -strides[d] if strides[d] != 0 else -sys.maxsize)
    result: list[Any] = [0, 0, 0, 1]
    step = size[3] if size[3] > 0 else 1
    for d in reversed(order):
        result[d] = step
        step = step * (size[d] if size[d] > 0 else 1)
    return like.new_empty_strided(tuple(size), tuple(result), dtype=dtype)


def _operands_agree(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if not q.dim() == k.dim() == v.dim() == 4 or not q.dtype == k.dtype == v.dtype:
        return False
    if not q.device == k.device == v.device or q.device.type not in ("cpu", "cuda", "meta"):
        return False
    batches = all(x.shape[0] == q.shape[0] or x.shape[0] == 1 for x in (k, v))
    lengths = k.shape[1] == v.shape[1] and k.shape[2] == v.shape[2] and q.shape[3] == k.shape[3]
    if not (batches and lengths):
        return False
    if k.shape[1] == 0:
        return q.shape[1] == 0
    return q.shape[1] % k.shape[1] == 0


def _describe(x: Tensor) -> tuple[list[int], int, int, int]:
    device = _DEVICE_CODES.get(x.device.type, 3)
    index = x.device.index or 0 if x.device.type == "cuda" else 0
    return [int(s) for s in x.shape], library.DTYPE_CODES.get(x.dtype, -1), device, index


def _refuse(kernel: int, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor]) -> NoReturn:
    try:
        library.host.check_forward(
            kernel, _describe(q), _describe(k), _describe(v), [_describe(x) for x in captures]
        )
    except ValueError as error:
        raise translate(error) from None
    raise ValueError(
        f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit this kernel"
    )


def _has_place(info: library.KernelInfo, q: Tensor) -> bool:
    """Whether the kernel runs where q is: a CUDA kernel runs on CPU tensors in a simulator."""
    if q.device.type == "meta" or (q.device.type == "cuda") == (info.cuda is not None):
        return True
    return q.device.type == "cpu" and library.driver_name() == "simulator"


def _check(kernel: int, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor]) -> None:
    """The operator's own checks. Sizes may be symbolic: only a failure asks for their values."""
    info = library.kernel_info(kernel)
    fits = (
        _operands_agree(q, k, v)
        and _has_place(info, q)
        and q.dtype == info.dtype
        and q.shape[3] == info.D
        and v.shape[3] == info.Dv
        and len(captures) == info.capture_count
        and all(x.device == q.device for x in captures)
        and (not info.captures or tuple((x.dim(), x.dtype) for x in captures) == info.captures)
    )
    if not fits:
        _refuse(kernel, q, k, v, captures)


def _fake_results(q: Tensor, v: Tensor, stats: int) -> tuple[Tensor, Tensor]:
    out = _empty_like_layout(q, (*q.shape[:3], v.shape[3]), q.dtype)
    return out, q.new_empty((stats, *q.shape[:3]), dtype=_accumulator(q.dtype))


def _fake_gradients(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], grad_mask: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dq, dk, dv = (_empty_like_layout(x, x.shape, x.dtype) for x in (q, k, v))
    wanted = [x for i, x in enumerate(captures) if grad_mask >> i & 1]
    return dq, dk, dv, [x.new_empty(x.shape) for x in wanted]


@torch.library.register_fake("attnengine::forward")
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    kernel: int,
    scale: float,
    stats: bool,
) -> tuple[Tensor, Tensor | None]:
    _check(kernel, q, k, v, captures)
    out, saved = _fake_results(q, v, library.kernel_info(kernel).stats)
    return out, saved if stats else None


@torch.library.register_fake("attnengine::backward")
def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    out: Tensor,
    stats: Tensor,
    dout: Tensor,
    dstats: Tensor | None,
    kernel: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    _check(kernel, q, k, v, captures)
    return _fake_gradients(q, k, v, captures, library.kernel_info(kernel).grad_mask)


# ------------------------------------------------------------------------- the traceable operator

_library = torch.library.Library("attnengine", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] captures, str key, float scale) "
    "-> (Tensor out, Tensor stats)",
    tags=_TAGS,
)
_library.define(
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor[] captures, Tensor out, "
    "Tensor stats, Tensor dout, Tensor? dstats, str key, float scale) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor[] dcaptures)",
    tags=_TAGS,
)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], key: str, scale: float
) -> tuple[Tensor, Tensor]:
    try:
        return forward(q, k, v, captures, resolve(key, "forward"), scale, True)
    except ValueError as error:
        raise translate(error) from None


def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    out: Tensor,
    stats: Tensor,
    dout: Tensor,
    dstats: Tensor | None,
    key: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    kernel = resolve(key, "backward")
    try:
        return backward(q, k, v, captures, out, stats, dout, dstats, kernel, scale)
    except ValueError as error:
        raise translate(error) from None


for _device in ("CPU", "CUDA"):
    _library.impl("attention", _attention, _device)
    _library.impl("attention_backward", _attention_backward, _device)


@torch.library.register_fake("attnengine::attention", lib=_library)
def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], key: str, scale: float
) -> tuple[Tensor, Tensor]:
    if not _operands_agree(q, k, v):
        _refuse(resolve(key, "forward"), q, k, v, captures)
    if q.device.type == "cuda":  # a kernel for the CPU must not pass for one
        kernel = resolve(key, "forward")
        if not _has_place(library.kernel_info(kernel), q):
            _refuse(kernel, q, k, v, captures)
    return _fake_results(q, v, _saved_stats(key)[0])


@torch.library.register_fake("attnengine::attention_backward", lib=_library)
def _attention_backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    out: Tensor,
    stats: Tensor,
    dout: Tensor,
    dstats: Tensor | None,
    key: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    return _fake_gradients(q, k, v, captures, _grad_mask(key))


def check_frozen(key: str, captures: Sequence[Tensor]) -> None:
    """Refuses a gradient that the program of ``key`` does not produce. Raises ValueError."""
    info = _known(key)
    if info is not None and info.frozen:
        for i, x in enumerate(captures):
            if info.frozen >> i & 1 and x.requires_grad:
                raise ValueError(
                    f"attnengine::attention: captured tensor {i} {tuple(x.shape)} requires grad "
                    "and did not when the program was exported; let it require grad, and export "
                    "again"
                )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, captures, key, scale = inputs
    out, stats = output
    check_frozen(key, captures)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, stats, *captures)
    ctx.key, ctx.scale = key, scale


def _differentiate(ctx: Any, dout: Tensor | None, dstats: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, stats, *captures = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    if dstats is not None:
        _, user_stats = _saved_stats(ctx.key)
        dstats = dstats[:user_stats] if user_stats > 0 else None
    dq, dk, dv, produced = torch.ops.attnengine.attention_backward.default(
        q, k, v, captures, out, stats, dout, dstats, ctx.key, ctx.scale
    )
    remaining, mask = iter(produced), _grad_mask(ctx.key)
    grads = [next(remaining) if mask >> i & 1 else None for i, _ in enumerate(captures)]
    return dq, dk, dv, grads, None, None


torch.library.register_autograd(
    "attnengine::attention", _differentiate, setup_context=_save, lib=_library
)

DOUBLE_BACKWARD = (
    "attnengine: the gradient of an attention gradient (double backward, create_graph=True) is not "
    "implemented; use attnengine.reference(q, k, v, spec), which is plain autograd"
)


def _no_double_backward(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError(DOUBLE_BACKWARD)


torch.library.register_autograd("attnengine::attention_backward", _no_double_backward, lib=_library)


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
    raise NotImplementedError(
        "attnengine: vmap over attention is not implemented; fold the mapped dimension into the "
        "batch dimension of q, k and v (reshape to [N*B, H, L, D])"
    )


for _name in ("forward", "backward", "attention", "attention_backward"):
    torch.library.register_vmap(f"attnengine::{_name}", _no_vmap, lib=_library)
