"""A linear-attention spec bound to a kernel: what a call needs, and nothing that it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import exported
from ..ir import DTYPE_NAMES
from ..reference import Mods
from . import dispatch, ops
from .arguments import check_arguments
from .dispatch import LinearProgram
from .explain import describe
from .reference import check_decay, hooked
from .spec import LinearAttentionSpec
from .stages import LinearPipeline, Sizes, dtypes, pipeline

_grad_enabled = torch.is_grad_enabled
_forward_ad = torch.autograd.forward_ad
_forward = ops.forward


def _kinds(tensors: Sequence[Tensor]) -> list[tuple]:
    return [(t.dtype, t.shape, t.requires_grad) for t in tensors]


class LinearHandle:
    """One spec, one kind of operands (dtypes, head dims, kind of decay): any B, H, L, strides.

    Made by :func:`attnengine.compile`, and kept on the spec for
    :func:`attnengine.linear_attention`.
    """

    def __init__(
        self,
        spec: LinearAttentionSpec,
        program: LinearProgram,
        tensors: Sequence[Tensor],
        sizes: Sizes,
    ) -> None:
        self.spec, self.program = spec, program
        self.sizes = sizes  # of the call that it was made for
        self._pipeline: LinearPipeline | None = None
        self.tensors = list(tensors)
        request = program.request
        self.element = dtypes(request)[0]
        self.scale = request.d**-0.5 if spec.scale is None else spec.scale
        self.columns = request.dv + (1 if request.normalizer else 0)
        self.id = program.forward()
        self.ready = program.backward_id >= 0  # the gradient's kernel is loaded
        self.capture_grads = any(self.tensors[i].requires_grad for i in program.differentiable)
        # Floating captures without gradient: one that is later told to require grad needs another
        # kernel, so calls look at them.
        self.frozen = tuple(
            t for t in self.tensors if t.is_floating_point() and not t.requires_grad
        )
        self.kinds = _kinds(self.tensors)
        self.pinned = bool(program.sources.pins)  # the hooks depend on sizes
        self.key, self.portable = program.short_key, program.portable
        ops.register(program)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        decay: Tensor | None = None,
        beta: Tensor | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        """As :func:`attnengine.linear_attention` with its spec. Raises ValueError for operands of
        another kind than those that it was made for."""
        operands = q, k, v, decay, beta, initial_state, cu_seqlens
        try:
            fits = self.fits(q, v, decay, beta) and not self.thawed()
        except (AttributeError, IndexError, RuntimeError) as error:  # no tensors of such a rank
            raise self._refusal(error, *operands) from None
        if not fits:
            raise ValueError(
                f"q {list(q.shape)} {q.dtype}, v {list(v.shape)}, decay, beta or a captured tensor "
                f"is not of the kind that this handle was made for ({self.program.name}); call "
                "attnengine.compile again, or attnengine.linear_attention"
            )
        call = self.trace if torch.compiler.is_compiling() else self.run
        out, state = call(*operands, output_final_state)
        return (out, state) if output_final_state else out

    def stale(self) -> bool:
        """Whether a captured tensor is no longer of the kind that the kernel was made for."""
        return _kinds(self.tensors) != self.kinds

    def thawed(self) -> bool:
        """Whether a captured tensor has come to require grad."""
        return any(t.requires_grad for t in self.frozen)

    def fits(self, q: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> bool:
        """Whether its kernel serves such operands."""
        r = self.program.request
        return (
            self.element == q.dtype
            and self.program.is_cuda == (q.device.type == "cuda")
            and r.d == q.shape[3]
            and r.dv == v.shape[3]
            and r.decay_kind == _decay_kind(decay)
            and (decay is None or r.decay_dtype == DTYPE_NAMES.get(decay.dtype))
            and r.beta_dtype == (None if beta is None else DTYPE_NAMES.get(beta.dtype, ""))
            and (not self.pinned or self.program.fits(ops._sizes(q, v)))
        )

    def serves(self, q: Tensor, v: Tensor) -> bool:
        """Whether the kernel still is the one for operands of its kind, of these sizes."""
        return not (
            (self.frozen and self.thawed())
            or (self.tensors and self.stale())
            or (self.pinned and not self.program.fits(ops._sizes(q, v)))
        )

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        want_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """An eager call: (out, final state or None)."""
        try:
            if state is not None and state.shape[3] != self.columns:
                state = self.prepared(state)
            if _grad_enabled() and (
                q.requires_grad
                or k.requires_grad
                or v.requires_grad
                or self.capture_grads
                or (decay is not None and decay.requires_grad)
                or (beta is not None and beta.requires_grad)
                or (state is not None and state.requires_grad)
            ):
                if not self.ready:
                    self.program.backward()
                    self.ready = True
                operands = q, k, v, decay, beta, state, cu_seqlens
                return ops.apply(operands, self.program, self.scale, want_state, self.tensors)
            if _forward_ad._current_level >= 0:
                _refuse_tangents(q, k, v, decay, beta, state, *self.tensors)
            return _forward(
                q, k, v, decay, beta, state, cu_seqlens, self.tensors, self.id, self.scale,
                want_state,
            )  # fmt: skip
        except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
            raise self._refusal(error, q, k, v, decay, beta, state, cu_seqlens) from None

    def trace(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        want_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """A call in a graph: the operator with a string key."""
        key, tensors = self.key, self.tensors
        if torch.compiler.is_exporting():
            key = self.portable
            if not torch.compiler.is_dynamo_compiling():  # Dynamo finds parameters by itself
                tensors = exported.module_tensors(tensors)
        if state is not None:
            state = self.prepared(state)
        out, final = torch.ops.attnengine.linear_attention(
            q, k, v, decay, beta, state, cu_seqlens, tensors, key, self.scale, want_state
        )
        return out, final if want_state else None

    def prepared(self, state: Tensor) -> Tensor:
        """An initial state with a column for z, which starts at 0."""
        if self.program.request.normalizer and state.shape[3] == self.columns - 1:
            state = torch.nn.functional.pad(state, (0, 1))
        return state

    def _refusal(
        self, error: Exception, q: Any, k: Any, v: Any, decay: Any, beta: Any, state: Any, cu: Any
    ) -> Exception:
        """What is wrong with the operands of a call that failed: the same text at every door."""
        try:
            found = check_arguments(
                q, k, v, self.spec, decay=decay, beta=beta, initial_state=state, cu_seqlens=cu
            )
            dispatch.check_place(q)
            if isinstance(error, ValueError) and found.decay is not None:
                with torch.no_grad():  # a kernel does not say which value it stopped at
                    mod, mods = self.spec.decay_mod, Mods(None)
                    given = found.decay.to(found.acc)
                    check_decay(hooked("decay_mod", mod, given, mods, found.acc))
        except (TypeError, ValueError, NotImplementedError) as better:
            return better
        return ops.translate(error) if isinstance(error, ValueError) else error

    # -- what runs ------------------------------------------------------------------------------
    @property
    def pipeline(self) -> LinearPipeline:
        if self._pipeline is None:
            captures, request = dispatch.captures_for(self.spec), self.program.request
            self._pipeline = pipeline(self.spec, captures, request, self.sizes, self.program.isa)
        return self._pipeline

    @property
    def source(self) -> str:
        return self.program.sources.forward

    @property
    def backward_source(self) -> str | None:
        return self.program.sources.backward

    def explain(self) -> str:
        """Every stage of this kernel as text."""
        return describe(self.program, self.pipeline)

    def __repr__(self) -> str:
        return f"<attnengine.LinearHandle {self.program.name}>"


def _decay_kind(decay: Tensor | None) -> str:
    if decay is None:
        return "none"
    return "channel" if decay.dim() == 4 else "scalar"


def _refuse_tangents(*tensors: Any) -> None:
    for x in tensors:
        if isinstance(x, Tensor) and _forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(ops.TRANSFORMS)
