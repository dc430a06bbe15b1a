"""The public calls: linear_attention, linear_attention_step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..api import asked_isa, compiles, explains
from ..capture import Captures
from ..target import isa_of
from . import dispatch
from .arguments import check_arguments
from .handle import LinearHandle
from .request import LinearRequest
from .spec import LinearAttentionSpec
from .stages import Sizes, request_of

_PLAIN = LinearAttentionSpec()
_is_compiling = torch.compiler.is_compiling
_autocast = torch._C._is_any_autocast_enabled
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COLD = (
    "attnengine.linear_attention inside torch.compile needs a prepared kernel: call it once, or "
    "attnengine.compile(spec, q, k, v, decay=, beta=), with the same spec and operands of the same "
    "dtypes, head dims and kind of decay outside"
)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: LinearAttentionSpec | None = None,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """Linear attention as a recurrence over tokens, in fused chunks, with gradients.

    Per token t of head h, with the state S [D, Dv]: S = exp(decay_t) S; then S = S + k_t v_t^T, or
    with beta the delta rule S = S + k_t (beta_t (v_t - k_t^T S))^T; and out_t = scale q_t^T S.
    Head h reads the query and key head h // (H / Hk). With ``normalizer="sum"`` out_t is divided
    by scale q_t^T z_t, where z = exp(decay_t) z + k_t, kept 1e-6 away from 0. Results do not
    depend on the number of threads.

    Args:
        q, k: [B, Hk, L, D]; float32, bfloat16, float16 or float64; any strides; L may be 0; D up to
            1024.
        v: [B, H, L, Dv], H a multiple of Hk; q's dtype; Dv up to 1024.
        spec: hooks, scale and normalizer; None for none of them and 1/sqrt(D).
        decay: the log of the factor on the state, at most 0 after ``decay_mod`` (-inf forgets all):
            [H], [B, H, L], or [B, H, L, D] with a factor for each channel of k; any float dtype.
        beta: [B, H, L], any float dtype: switches the delta rule on.
        initial_state: [B, H, D, Dv], or [N, H, D, Dv] with cu_seqlens, float32 (float64 for
            float64 operands), not a narrower copy. None: zeros. Under a normalizer
            [.., Dv + 1] with z in the last column; without that column z starts at 0.
        output_final_state: also return the state after the last token of each sequence.
        cu_seqlens: [N + 1] int32 or int64: the tokens of sequence n are
            ``cu_seqlens[n]:cu_seqlens[n + 1]`` of batch row 0 (B = 1), from 0 to L; the state
            starts anew in each. Lengths may be 0.

    Returns:
        out [B, H, L, Dv] in q's dtype, or (out, final state [N, H, D, Dv], or [.., Dv + 1] under a
        normalizer, float32 or float64). Gradients reach q, k, v, decay, beta, initial_state and
        the captured tensors of the hooks, from out and from the final state.

    Raises:
        TypeError, ValueError: an argument does not fit, or a log-decay is positive or NaN; names
            it, its value and the limit.
        TraceError: a hook cannot be expressed, or is not elementwise.
        NotImplementedError: tensors on another device than a CPU or CUDA; D or Dv above 1024; on
            CUDA D or Dv above 256, other operands than float16 and bfloat16, and gradients; a
            transform of torch.func.
        KernelUnavailable, BuildError: as :func:`attnengine.attention`.

    The recurrences are those of the retention, gated linear attention, Mamba2 and gated DeltaNet
    papers; the chunk form and its gradients are exact rearrangements of them.
    """
    out, state = _call(q, k, v, spec, decay, beta, initial_state, cu_seqlens, output_final_state)
    return (out, state) if output_final_state else out


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: LinearAttentionSpec | None,
    state: Tensor | None,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of each sequence: :func:`linear_attention` with L = 1, for decoding.

    Args:
        q, k: [B, Hk, 1, D]; v: [B, H, 1, Dv]; decay: [H], [B, H, 1] or [B, H, 1, D];
            beta: [B, H, 1].
        state: what the last call returned, [B, H, D, Dv] ([.., Dv + 1] under a normalizer); None:
            zeros. It is not changed: the new state is a tensor of its own.

    Returns:
        (out [B, H, 1, Dv], the new state).

    Raises:
        ValueError: L is not 1. Otherwise as :func:`linear_attention`.
    """
    if isinstance(q, Tensor) and q.dim() == 4 and q.shape[2] != 1:
        raise ValueError(
            f"q: shape {list(q.shape)}: a step is one token, L = 1; use linear_attention with "
            "initial_state= and output_final_state=True for more"
        )
    return _call(q, k, v, spec, decay, beta, state, None, True)


def _call(
    q: Any,
    k: Any,
    v: Any,
    spec: LinearAttentionSpec | None,
    decay: Any,
    beta: Any,
    state: Any,
    cu_seqlens: Any,
    want_state: bool,
) -> tuple[Tensor, Any]:
    if spec is None:
        spec = _PLAIN
    if not _is_compiling():
        if _autocast():
            q, k, v = _cast(q, k, v)
        try:
            handle = spec.__dict__["_linear"][_kind(q, v, decay, beta)]
            if not handle.serves(q, v):
                handle = None
        except (KeyError, AttributeError, IndexError, RuntimeError):
            handle = None  # of other dtypes or head dims, or no tensors (with sizes) at all
        if handle is None:
            handle = _handle(q, k, v, spec, decay, beta, state, cu_seqlens)
        return handle.run(q, k, v, decay, beta, state, cu_seqlens, want_state)
    if _autocast():
        q, k, v = _cast(q, k, v)
    handle = _traced_handle(q, k, v, spec, decay, beta, state, cu_seqlens)
    return handle.trace(q, k, v, decay, beta, state, cu_seqlens, want_state)


def _cast(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """Under autocast, q, k and v get its dtype (not float64); decay, beta and states do not."""
    if isinstance(q, Tensor) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (
            x.to(dtype) if isinstance(x, Tensor) and x.dtype in _FLOATS else x for x in (q, k, v)
        )
    return q, k, v


def _kind(q: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> tuple:
    """What, of operands, decides the kernel."""
    return (
        q.dtype,
        q.get_device(),  # -1: the CPU
        q.shape[3],
        v.shape[3],
        None if decay is None else decay.dtype,
        decay is not None and decay.dim() == 4,
        None if beta is None else beta.dtype,
    )


def _handle(
    q: Any, k: Any, v: Any, spec: Any, decay: Any, beta: Any, state: Any, cu_seqlens: Any
) -> LinearHandle:
    """The handle of ``spec`` for these operands, made and remembered on the spec. It compiles the
    gradient at the same time when this call will want it."""
    checked = _checked(q, k, v, spec, decay, beta, state, cu_seqlens)
    table = spec.__dict__.setdefault("_linear", {})
    if any(h.stale() for h in table.values()):  # module.to(dtype), requires_grad_(): bind again
        spec.__dict__.pop("_captures", None)
        table.clear()
    captures = dispatch.captures_for(spec)
    program, tensors = _bound(spec, captures, checked, isa_of(q))
    inputs = (q, k, v, decay, beta, state, *tensors)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        program.both()
    handle = table[_kind(q, v, decay, beta)] = LinearHandle(spec, program, tensors, checked[1])
    return handle


def _checked(
    q: Any, k: Any, v: Any, spec: Any, decay: Any, beta: Any, state: Any, cu_seqlens: Any
) -> tuple[LinearRequest, Sizes]:
    """Which kernel a call needs, and the sizes that its hooks are traced with."""
    a = check_arguments(
        q, k, v, spec, decay=decay, beta=beta, initial_state=state, cu_seqlens=cu_seqlens
    )
    dispatch.check_place(q)
    request = request_of(a, q, spec.normalizer == "sum")
    return request, (a.B, a.Hk, a.H, a.L)


def _bound(
    spec: LinearAttentionSpec,
    captures: Captures,
    checked: tuple[LinearRequest, Sizes],
    isa: str,
) -> tuple[dispatch.LinearProgram, list[Tensor]]:
    request, sizes = checked
    program = dispatch.program(spec, captures, request, sizes, isa)
    return program, dispatch.bound_tensors(program, captures)


def _traced_handle(
    q: Any, k: Any, v: Any, spec: Any, decay: Any, beta: Any, state: Any, cu_seqlens: Any
) -> LinearHandle:
    """The handle for a graph: one that an eager call made; a non-strict torch.export, which runs
    this as plain Python with fake tensors, may make one, which is not remembered."""
    for handle in spec.__dict__.get("_linear", {}).values():
        if handle.fits(q, v, decay, beta):
            return handle
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        checked = _checked(q, k, v, spec, decay, beta, state, cu_seqlens)
        captures = dispatch.captures_of_spec(spec)
        return LinearHandle(spec, *_bound(spec, captures, checked, isa_of(q)), checked[1])
    raise RuntimeError(COLD)


def prepare(
    spec: LinearAttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    backward: bool | None = None,
    isa: str | None = None,
    target: str | None = None,
) -> LinearHandle:
    """:func:`attnengine.compile` of a LinearAttentionSpec: its kernels for such operands, made now.

    The handle of another ``isa`` or ``target`` than the operands' own is not kept on the spec.
    """
    operands = q, k, v, spec, decay, beta, None, None
    with torch.set_grad_enabled(backward is not False and torch.is_grad_enabled()):
        if isa is None and target is None:
            handle = _handle(*operands)
        else:
            checked, captures = _checked(*operands), dispatch.captures_for(spec)
            asked = asked_isa(q, isa, target) or isa_of(q)
            handle = LinearHandle(spec, *_bound(spec, captures, checked, asked), checked[1])
    if backward:
        handle.program.both()
    handle.ready = handle.program.backward_id >= 0
    return handle


def explain(
    spec: LinearAttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
) -> str:
    """Every stage of the call as text: hooks, candidates with cost, plan, source."""
    return prepare(spec, q, k, v, decay=decay, beta=beta, backward=False).explain()


explains(LinearAttentionSpec, explain)
compiles(LinearAttentionSpec, prepare)

__all__ = ["explain", "linear_attention", "linear_attention_step"]
