"""A spec bound to a kernel: what a call needs, and nothing that it does not."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from . import dispatch, exported, ops
from .backward import TRANSFORMS, apply
from .build import DeviceModule
from .dispatch import Pipeline, Program
from .explain import CacheCall, describe
from .masks import TileTable, tile_table
from .memory import Memory, memory_of
from .plan import Plan
from .schedule import DeviceSchedule, Schedule
from .spec import AttentionSpec

_is_compiling = torch.compiler.is_compiling
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_exporting = torch.compiler.is_exporting
_grad_enabled = torch.is_grad_enabled
_autocast = torch._C._is_any_autocast_enabled
_forward = ops.forward
_forward_ad = torch.autograd.forward_ad


def autocast_operands(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """As scaled_dot_product_attention: under autocast, operands get its dtype (not float64)."""
    if _autocast() and isinstance(q, torch.Tensor):
        device = q.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            wide = (torch.float32, torch.bfloat16, torch.float16)
            q, k, v = (
                x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in wide else x
                for x in (q, k, v)
            )
    return q, k, v


def _kinds(tensors: Sequence[torch.Tensor]) -> list[tuple]:
    return [(t.dtype, t.dim(), t.requires_grad) for t in tensors]


def _has_tangent(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and _forward_ad.unpack_dual(x).tangent is not None


def _refusal(error: Exception, q: Any, k: Any, v: Any) -> Exception:
    """What is wrong with the operands of a call that failed: the same text at every door."""
    try:
        dispatch.check_operands(q, k, v)
    except (TypeError, ValueError, NotImplementedError) as better:
        return better
    return ops.translate(error) if isinstance(error, ValueError) else error


class Statistics(dict):
    """Saved row statistics by name, [B, Hq, L] each; also readable as attributes (``aux.lse``)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"no statistic {name!r}; this row function saves {sorted(self)}"
            ) from None


class Handle:
    """``attn(q, k, v)``: one spec, one dtype, one pair of head dims, any B, H, lengths, strides.

    Made by :func:`attnengine.compile`. Works under ``torch.compile(fullgraph=True)`` and
    ``torch.export``. ``plan``, ``backward_plan``, ``source``, ``backward_source`` and
    ``explain()`` show what runs.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        program: Program,
        tensors: Sequence[torch.Tensor],
        head_dim: int,
        value_dim: int,
    ) -> None:
        self.spec = spec
        self.program = program
        self.tensors = list(tensors)
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.scale = spec.scale if spec.scale is not None else 1.0 / math.sqrt(head_dim)
        # Kernels take a positive scale; its sign, or zero, goes into q.
        self.q_factor = 1.0 if self.scale > 0 else (-1.0 if self.scale < 0 else 0.0)
        self.scale = abs(self.scale) or 1.0
        if not program.is_cuda:
            self.id = program.forward()
        self.trainable = [i for i in program.sources.grads if tensors[i].requires_grad]
        # A CUDA kernel has no gradients: a captured tensor that wants one is refused when called.
        self.capture_grads = bool(self.trainable) or (
            program.is_cuda and any(t.requires_grad for t in self.tensors)
        )
        grads = ".".join(map(str, program.sources.grads))
        self.key = f"{program.sources.key}/{program.isa}/{grads}"
        # Floating captures without gradient: one that is later told to require grad needs another
        # kernel, so calls look at them (there are rarely any).
        self.frozen = tuple(
            t for t in self.tensors if t.is_floating_point() and not t.requires_grad
        )
        self.kinds = _kinds(self.tensors)
        self.ready = self.program.backward_id >= 0  # the gradient's kernel is loaded
        self._pipeline: Pipeline | None = None
        # torch.compile's graphs stay in this process and hold a short key; torch.export's leave it
        # and hold the program.
        self.portable = program.portable
        ops.register_key(self.key, program.load, ops.info_of(program) if program.is_cuda else None)
        ops.register_program(self.portable, program)

    @functools.cached_property
    def id(self) -> int:
        """The kernel of dense calls; a CUDA kernel is built when one comes, for calls on caches and
        packed sequences have kernels of their own."""
        return self.program.forward()

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_aux: Any = None
    ) -> Any:
        """Attention of q [B, Hq, L, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] -> [B, Hq, L, Dv].

        ``return_aux`` as in :func:`attnengine.attention`. Raises TypeError or ValueError when the
        operands do not fit this kernel, naming the argument.
        """
        if self.frozen and self.thawed():
            raise ValueError(
                "a captured tensor came to require grad after this handle was made; call "
                "attnengine.compile(spec, q, k, v) again with a new spec"
            )
        if return_aux is None and self.q_factor == 1.0 and not _is_compiling():
            try:
                if _grad_enabled() and (
                    q.requires_grad or k.requires_grad or v.requires_grad or self.capture_grads
                ):
                    if self.ready and not _autocast():
                        return apply(q, k, v, self.program, self.scale, self.tensors)[0]
                elif not _autocast() and _forward_ad._current_level < 0:
                    return _forward(q, k, v, self.tensors, self.id, self.scale, False)[0]
            except (ValueError, TypeError, AttributeError, RuntimeError) as error:
                raise _refusal(error, q, k, v) from None
        q, k, v = autocast_operands(q, k, v)
        out, stats = self.run(q, k, v, bool(return_aux))
        return (out, self.aux(stats)) if return_aux else out

    def thawed(self) -> bool:
        """Whether a captured tensor has come to require grad."""
        for t in self.frozen:
            if t.requires_grad:
                return True
        return False

    def stale(self) -> bool:
        """Whether a captured tensor is no longer of the kind that the kernel was made for."""
        return _kinds(self.tensors) != self.kinds

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, want_stats: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.q_factor != 1.0:
            q = q * self.q_factor
        if _is_compiling():
            key, tensors = self.key, self.tensors
            if _is_exporting():
                key = self.portable
                if not _is_dynamo_compiling():  # Dynamo finds a module's parameters by itself
                    tensors = exported.module_tensors(tensors)
            return torch.ops.attnengine.attention(q, k, v, tensors, key, self.scale)
        if _forward_ad._current_level >= 0 and any(map(_has_tangent, (q, k, v, *self.tensors))):
            raise NotImplementedError(TRANSFORMS)
        try:
            if _grad_enabled() and (
                q.requires_grad or k.requires_grad or v.requires_grad or self.capture_grads
            ):
                if not self.ready:
                    self.program.backward()
                    self.ready = True
                return apply(q, k, v, self.program, self.scale, self.tensors)
            return ops.forward(q, k, v, self.tensors, self.id, self.scale, want_stats)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise _refusal(error, q, k, v) from None

    def sequences_id(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Any) -> int:
        """The kernel of a call on sequences of at most ``rows`` rows; operands [.., H, .., D]."""
        if not self.program.is_cuda:
            return self.id
        group = q.shape[1] // max(k.shape[1], 1)
        return self.program.of_sequences(rows * group, dispatch.shares_keys(k, v))

    def aux(self, stats: torch.Tensor) -> Statistics:
        return Statistics({n: stats[i] for i, n in enumerate(self.program.sources.stats)})

    # -- what runs ------------------------------------------------------------------------------
    @property
    def pipeline(self) -> Pipeline:
        if self._pipeline is None:
            self._pipeline = dispatch.pipeline(
                self.spec, dispatch.captures_for(self.spec), self.program.element,
                self.head_dim, self.value_dim, self.program.isa,
            )  # fmt: skip
        return self._pipeline

    @property
    def plan(self) -> Plan:
        return self.pipeline.forward_plans[self.program.sources.candidate]

    @property
    def backward_plan(self) -> Plan | None:
        plans = self.pipeline.backward_plans
        return plans[0] if plans else None

    @property
    def module(self) -> DeviceModule | None:
        """The PTX and cubin of a CUDA kernel, its registers and spills; None for a CPU kernel."""
        return self.program.loaded

    @property
    def source(self) -> str:
        return self.program.sources.forward

    @property
    def backward_source(self) -> str | None:
        return self.program.sources.backward

    def explain(self) -> str:
        """Every stage of this kernel as text."""
        return describe(self.program, self.pipeline)

    def tiles(
        self,
        L: int,
        S: int,
        *,
        B: int = 1,
        heads: tuple[int, int] = (1, 1),
        b: int = 0,
        h: int = 0,
    ) -> TileTable:
        """The tiles that the mask leaves of L queries x S keys, for query head h of batch b.

        ``heads`` is (Hq, Hkv). What the kernel walks, found by interval analysis; nothing of size
        L x S is made.
        """
        return tile_table(
            self.program.forward(), self.tensors, self.plan.block_m, self.plan.block_n,
            self.plan.pack_group, (B, *heads, L, S), b, h,
        )  # fmt: skip

    def schedule(
        self,
        lengths: Sequence[int],
        *,
        heads: tuple[int, int] = (1, 1),
        rows: int = 1,
        layout: str = "BSHD",
        capacity: int | None = None,
    ) -> Schedule | DeviceSchedule:
        """How the work of a call on a cache is shared, and why; printable. A CUDA launch decides
        from bounds, and what it would decide is said without one.

        Args:
            lengths: keys of each sequence.
            heads: (Hq, Hkv).
            rows: query rows of each sequence, at the end of its keys.
            layout: of the cache: "BSHD" as in :func:`attnengine.attention_with_kvcache`, or "BHSD".
            capacity: keys that the cache has room for, the bound of a CUDA launch; None: the
                longest.
        """
        most = max(lengths, default=0) if capacity is None else capacity
        call = CacheCall(tuple(lengths), most, heads, rows, layout)
        plan, isa = self.plan, self.program.isa
        if self.program.is_cuda:
            form = call.form(isa)
            of = self.program.element, self.head_dim, self.value_dim, isa, form
            candidate = self.program.in_form(form).sources.candidate
            captures = dispatch.captures_for(self.spec)
            plan = dispatch.pipeline(self.spec, captures, *of).forward_plans[candidate]
        return call.schedule(self.program, plan, self.tensors)

    def memory(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        backward: bool = True,
        threads: int | None = None,
    ) -> Memory:
        """Bytes that a call on tensors of these sizes takes, by what they hold.

        Nothing is allocated: q [B, Hq, L, D], k [B or 1, Hkv, S, D] and v [B or 1, Hkv, S, Dv] may
        be on the meta device. ``threads``: None for torch.get_num_threads(). Raises RuntimeError
        when ``backward`` is asked of a spec that has no gradient.
        """
        return memory_of(
            self.program.forward(), self.program.backward() if backward else None,
            q, k, v, self.tensors, threads or torch.get_num_threads(),
        )  # fmt: skip

    def __repr__(self) -> str:
        p = self.program
        return f"<attnengine.Handle {p.name}, statistics {list(p.sources.stats)}>"
