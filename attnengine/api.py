"""The public calls: attention, flex_attention, compile, explain."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from . import dispatch
from .arch import CUDA, ISAS
from .backward import apply
from .blockmask import as_mask_mod
from .capture import captures_of_spec
from .explain import CacheCall, explained
from .handle import (
    Handle,
    Statistics,
    _autocast,
    _forward,
    _forward_ad,
    _grad_enabled,
    _is_compiling,
    _is_dynamo_compiling,
    _is_exporting,
    autocast_operands,
)
from .rows import Softmax
from .spec import AttentionSpec
from .target import check_isa, check_target, isa_of

_PLAIN = AttentionSpec()


class AuxOutput(NamedTuple):
    """What flex_attention returns beside the output: [B, Hq, L] float32 (float64 for float64)."""

    lse: torch.Tensor | None = None
    max_scores: torch.Tensor | None = None


class AuxRequest(NamedTuple):
    """Which auxiliary outputs flex_attention returns."""

    lse: bool = False
    max_scores: bool = False


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec = _PLAIN,
    *,
    return_aux: Any = None,
) -> Any:
    """Fused attention of a spec, with gradients.

    Args:
        q: [B, Hq, L, D]; float32, bfloat16, float16 or float64; on a CUDA device the 16-bit two,
            D and Dv up to 256, and no gradients.
        k: [B or 1, Hkv, S, D]; Hq must be a multiple of Hkv (grouped-query attention).
        v: [B or 1, Hkv, S, Dv].
        spec: what attention means; compiled once per meaning, dtype and head dims.
        return_aux: true to also return the saved row statistics, [B, Hq, L] each, by name
            (``aux.lse``); they are differentiable.

    Returns:
        out [B, Hq, L, Dv] in q's dtype and dimension order, or (out, aux).

    Raises:
        TypeError, ValueError: an operand does not fit; names it, its value and the limit.
        TraceError: a mod cannot be expressed; names the line and the operator.
        KernelUnavailable, BuildError: the kernel cannot be compiled here.
    """
    handle = spec.__dict__.get("_handle") if type(spec) is AttentionSpec else None
    if (
        handle is not None
        and return_aux is None
        and handle.q_factor == 1.0
        and not _is_compiling()
        and not (handle.frozen and handle.thawed())
    ):
        try:
            if _grad_enabled() and (
                q.requires_grad or k.requires_grad or v.requires_grad or handle.capture_grads
            ):
                if handle.ready and not _autocast():
                    return apply(q, k, v, handle.program, handle.scale, handle.tensors)[0]
            elif not _autocast() and _forward_ad._current_level < 0:
                return _forward(q, k, v, handle.tensors, handle.id, handle.scale, False)[0]
        except (ValueError, AttributeError, TypeError, RuntimeError):
            pass  # another dtype or head dim, or no tensors at all: look again below
    return _attention(q, k, v, spec, return_aux)


def _attention(q: Any, k: Any, v: Any, spec: AttentionSpec, return_aux: Any) -> Any:
    if not isinstance(spec, AttentionSpec):
        raise TypeError(f"spec must be an attnengine.AttentionSpec, got {type(spec).__name__}")
    q, k, v = autocast_operands(q, k, v)
    if _is_compiling():
        return _traced_call(q, k, v, spec, return_aux)
    handle = _handle(q, k, v, spec)
    return handle(q, k, v, return_aux=return_aux or None)


def _traced_call(q: Any, k: Any, v: Any, spec: AttentionSpec, return_aux: Any) -> Any:
    handle = spec.__dict__.get("_handle")
    if _is_exporting() and not _is_dynamo_compiling():
        handle = _exported(q, k, v, spec)
    if handle is None:
        raise RuntimeError(
            "attnengine.attention inside torch.compile needs a prepared kernel: call "
            "attn = attnengine.compile(spec, q, k, v) outside and attn(q, k, v) inside"
        )
    return handle(q, k, v, return_aux=return_aux or None)


def _exported(q: Any, k: Any, v: Any, spec: AttentionSpec) -> Handle:
    """The handle for operands of a non-strict torch.export, which runs this as plain Python.

    Its fake tensors may be captured, so nothing is remembered on the spec.
    """
    dispatch.check_operands(q, k, v)
    d, dv, isa = int(q.shape[3]), int(v.shape[3]), isa_of(q)
    known = spec.__dict__.get("_handles", {}).get((q.dtype, d, dv, isa))
    if known is not None and not known.stale():
        return known
    captures = captures_of_spec(spec)
    program = dispatch.program(spec, captures, q.dtype, d, dv, isa)
    return Handle(spec, program, dispatch.bound_tensors(program, captures), d, dv)


def _handle(
    q: Any,
    k: Any,
    v: Any,
    spec: AttentionSpec,
    isa: str | None = None,
    backward: bool | None = None,
) -> Handle:
    """The handle of ``spec`` for these operands; remembered on the spec. A new one compiles the
    gradient at the same time when ``backward``, or (None) when this call will want it."""
    dispatch.check_operands(q, k, v)
    table = spec.__dict__.setdefault("_handles", {})
    key = (q.dtype, q.shape[3], v.shape[3], isa or isa_of(q))
    handle = table.get(key)
    if handle is not None and handle.stale():  # module.to(dtype), requires_grad_(): bind again
        spec.__dict__.pop("_captures")
        table.clear()
        handle = None
    if handle is None:
        program, tensors = dispatch.resolve(spec, q, k, v, isa)
        if backward is None and _grad_enabled():
            backward = dispatch.tensors_require_grad((q, k, v, *tensors))
        if backward:
            program.both()
        handle = table[key] = Handle(spec, program, tensors, q.shape[3], v.shape[3])
    if isa is None:
        spec.__dict__["_handle"] = handle
    return handle


def compile(
    spec: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    backward: bool | None = None,
    isa: str | None = None,
    target: str | None = None,
    **others: torch.Tensor | None,
) -> Any:
    """Compile ``spec`` for the dtype and head dims of q, k, v and return the callable handle.

    ``backward``: compile the gradient now too; None: when q, k, v or a captured tensor requires
    grad. ``isa``: "avx512_bf16", "avx512", "avx2" or "portable" instead of this CPU's best.
    ``target``: a CUDA architecture ("sm_80", or "sm_86" with less shared memory) instead of that of
    the tensors' device; on CPU tensors it needs a simulator of CUDA kernels.
    With a LinearAttentionSpec also ``decay=`` and ``beta=``, as of ``ae.linear_attention``.
    Raises what :func:`attention` raises.
    """
    if type(spec) in _COMPILED:
        return _COMPILED[type(spec)](
            spec, q, k, v, backward=backward, isa=isa, target=target, **others
        )
    if others:
        names = ", ".join(others)
        raise TypeError(f"compile: {names} given, which {type(spec).__name__} does not have")
    dispatch.check_operands(q, k, v)
    handle = _handle(q, k, v, spec, asked_isa(q, isa, target), backward)
    if backward is None:
        backward = dispatch.tensors_require_grad((q, k, v, *handle.tensors))
    if backward:
        handle.program.both()
    handle.program.forward()
    return handle


_COMPILED: dict[type, Callable[..., Any]] = {}


def compiles(kind: type, prepare: Callable[..., Any]) -> None:
    """Makes :func:`compile` serve another kind of spec, defined later in the pipeline."""
    _COMPILED[kind] = prepare


def asked_isa(q: torch.Tensor, isa: str | None, target: str | None) -> str | None:
    """The instruction set or CUDA architecture that ``isa`` or ``target`` asks for, if one does.
    Raises ValueError for one that is unknown or that q's device cannot run."""
    if target is not None:
        if isa is not None:
            raise ValueError(f"isa={isa!r} and target={target!r}: give one of them")
        check_target(target, q)
        return target
    if isa is not None:
        if isa not in ISAS or q.device.type == "cuda":
            raise ValueError(
                f"isa={isa!r} on {q.device}: expected one of {', '.join(map(repr, ISAS))}, for CPU "
                "tensors; target= chooses a CUDA architecture"
            )
        check_isa(isa)
    return isa


def explain(
    spec: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    lengths: Sequence[int] | None = None,
    target: str | None = None,
    **others: torch.Tensor | None,
) -> str:
    """Every stage of the call as text: traced functions, candidates with cost, plan, source.

    Args:
        spec, q, k, v: as :func:`attention`. With a LinearAttentionSpec also ``decay=`` and
            ``beta=``, as of ``ae.linear_attention``, and none of the following.
        lengths: keys of each of q's sequences: the text is then about
            :func:`attnengine.attention_with_kvcache` and its kin on caches as k and v are (q
            [B, Hq, rows, D], k [any, Hkv, capacity, D]; v may be a view of k), and says how their
            work is shared, by which policy and why.
        target: a CUDA architecture, "sm_80" or "sm_86", instead of the tensors' device: its kernel
            is compiled and described, and nothing runs, so no GPU is needed.

    Raises ValueError for lengths or a target that do not fit, and what :func:`attention` raises.
    """
    if type(spec) in _EXPLAINED:
        given = {"lengths": lengths, "target": target}
        others |= {name: x for name, x in given.items() if x is not None}  # type: ignore[misc]
        return _EXPLAINED[type(spec)](spec, q, k, v, **others)
    if others:
        names = ", ".join(others)
        raise TypeError(f"explain: {names} given, which {type(spec).__name__} does not have")
    if lengths is None and target is None:
        return compile(spec, q, k, v, backward=False).explain()
    dispatch.check_operands(q, k, v)
    if target is not None and target not in CUDA:
        raise ValueError(f"target={target!r}: CUDA targets are {', '.join(map(repr, CUDA))}")
    call = None if lengths is None else CacheCall.of(q, k, v, lengths)
    return explained(spec, q.dtype, q.shape[3], v.shape[3], target or isa_of(q), call)


_EXPLAINED: dict[type, Callable[..., str]] = {}


def explains(kind: type, describe: Callable[..., str]) -> None:
    """Makes :func:`explain` serve another kind of spec, defined later in the pipeline."""
    _EXPLAINED[kind] = describe


# -- torch's FlexAttention contract -------------------------------------------------------------


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: Any = None,
) -> Any:
    """Drop-in for ``torch.nn.attention.flex_attention.flex_attention``, with CPU backward.

    query [B, Hq, L, E], key [B, Hkv, S, E], value [B, Hkv, S, Ev]; Hq > Hkv needs
    ``enable_gqa=True``. ``block_mask`` is torch's BlockMask: its block lists are obeyed as torch's
    compiled kernels obey them. ``return_aux=AuxRequest(lse=, max_scores=)`` returns
    (out, AuxOutput); ``return_lse=True`` returns (out, lse). ``kernel_options`` are hints for other
    back ends: accepted and not used.

    Raises ValueError for lengths, heads or options that do not fit, TraceError for a mod that
    cannot be expressed.
    """
    dispatch.check_operands(query, key, value)
    if return_lse and return_aux is not None:
        raise ValueError("return_lse and return_aux cannot both be given; use return_aux only")
    if kernel_options is not None and not isinstance(kernel_options, dict):
        raise TypeError(f"kernel_options must be a dict, got {type(kernel_options).__name__}")
    if key.shape[0] != query.shape[0] and (block_mask is None or key.shape[0] != 1):
        raise ValueError(
            f"query has batch {query.shape[0]} and key has {key.shape[0]}; they must be equal "
            "(or 1 for key and value, with a block_mask)"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads != kv_heads:
        if not enable_gqa:
            raise ValueError(
                f"query has {heads} heads and key has {kv_heads}; pass enable_gqa=True for "
                "grouped-query attention"
            )
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(
                f"query has {heads} heads, which is not a multiple of the {kv_heads} of key"
            )
    lse = bool(return_lse or (return_aux is not None and return_aux.lse))
    top = bool(return_aux is not None and getattr(return_aux, "max_scores", False))
    spec = AttentionSpec(
        score_mod=score_mod,
        mask_mod=as_mask_mod(block_mask, query, key) if block_mask is not None else None,
        row_func=_MAX if top else _PLAIN.row_func,
        scale=scale,
    )
    if return_lse:
        warnings.warn(
            "return_lse is deprecated; use return_aux=AuxRequest(lse=True)",
            FutureWarning,
            stacklevel=2,
        )
    if not (lse or top):
        out = attention(query, key, value, spec)
        return out if return_aux is None else (out, AuxOutput())
    out, aux = attention(query, key, value, spec, return_aux=True)
    if return_lse:
        return out, aux["lse"]
    return out, AuxOutput(aux["lse"] if lse else None, aux["max_scores"].detach() if top else None)


_MAX = Softmax(max_scores=True)

__all__ = [
    "AuxOutput", "AuxRequest", "Handle", "Statistics", "attention", "compile", "explain",
    "flex_attention",
]  # fmt: skip
