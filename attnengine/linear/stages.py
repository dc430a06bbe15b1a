"""The stages of one linear-attention program in a row: trace, key, plan, source."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import clean_thread
from ..arch import CUDA
from ..aten import Unsupported
from ..capture import Captures
from ..errors import TraceError
from ..ir import DTYPE_NAMES, TORCH_DTYPES
from . import serialize
from .arguments import LinearArguments
from .key import LinearKey, linear_key
from .plan import LinearPlan, linear_candidates
from .plan_cuda import NO_GRADIENT, linear_cuda_candidates
from .request import LinearRequest
from .source import linear_source
from .source_cuda import linear_cuda_source
from .spec import LinearAttentionSpec
from .trace import TracedLinear, trace_linear
from .unbroadcast import Place, places_of

Sizes = tuple[int, int, int, int]  # B, Hk, H, L: as elementwise.SIZES


@dataclass(frozen=True)
class LinearSources:
    """What generation produced for one program: all that a later process needs."""

    forward: str
    backward: str | None
    no_backward: str  # why there is no backward, for the error
    positions: tuple[int, ...]  # capture number -> position in the spec's captured tensors
    captures: tuple[tuple[str, int], ...]  # dtype and rank of each
    # (hook, capture, where it is read) of each hook gradient, in their order
    hook_grads: tuple[tuple[str, int, tuple[Place, ...]], ...]
    frozen: tuple[int, ...]  # floating captured tensors of which no gradient was asked for
    pins: tuple[tuple[str, int], ...]  # sizes of a call that the graphs depend on
    key: str
    meaning: str  # the program as text: what an exported graph carries

    def to_json(self) -> str:
        return json.dumps(self.__dict__)

    @staticmethod
    def from_json(text: str) -> LinearSources:
        data = json.loads(text)
        for name in ("positions", "frozen"):
            data[name] = tuple(data[name])
        for name in ("captures", "pins"):
            data[name] = tuple((a, b) for a, b in data[name])
        data["hook_grads"] = tuple((hook, n, tuple(at)) for hook, n, at in data["hook_grads"])
        return LinearSources(**data)


@dataclass(frozen=True)
class LinearPipeline:
    """Every stage of one program, for ``explain``."""

    traced: TracedLinear
    forward_key: LinearKey
    backward_key: LinearKey | None
    forward_plans: list[LinearPlan]
    backward_plans: list[LinearPlan]
    sources: LinearSources


def dtypes(request: LinearRequest) -> tuple[torch.dtype, torch.dtype]:
    """(of q, k, v and out; of states and sums)"""
    return TORCH_DTYPES[request.element], TORCH_DTYPES[request.accumulator]


def request_of(a: LinearArguments, q: Tensor, normalizer: bool) -> LinearRequest:
    """Which kernel serves a call, beside its hooks."""
    return LinearRequest(
        DTYPE_NAMES[q.dtype],
        a.D,
        a.Dv,
        a.decay_kind,
        None if a.decay is None else DTYPE_NAMES[a.decay.dtype],
        None if a.beta is None else DTYPE_NAMES[a.beta.dtype],
        normalizer,
    )


def pipeline(
    spec: LinearAttentionSpec, captures: Captures, request: LinearRequest, sizes: Sizes, isa: str
) -> LinearPipeline:
    """Run trace, key, plan and source. Raises TraceError, NotImplementedError."""

    def stages() -> LinearPipeline:
        traced = trace_linear(spec, request, sizes, captures.tensors)
        return _after_trace(traced, isa)

    return clean_thread.run(stages)


def regenerated(traced: TracedLinear, isa: str) -> LinearPipeline:
    """Key, plan and source of a program that was read. Raises NotImplementedError."""
    return clean_thread.run(lambda: _after_trace(traced, isa))


def _after_trace(traced: TracedLinear, isa: str) -> LinearPipeline:
    meaning = serialize.dump(traced)
    forward_key = linear_key("forward", traced)
    if isa in CUDA:
        return _cuda_pipeline(traced, forward_key, meaning, isa)
    forward_plans = linear_candidates(forward_key, traced, isa)
    forward = linear_source(traced, forward_plans[0], forward_key)
    backward_key, backward, why = None, None, ""
    backward_plans: list[LinearPlan] = []
    grads: tuple[tuple[str, int, tuple[Place, ...]], ...] = ()
    try:
        backward_key = linear_key("backward", traced)
        backward_plans = linear_candidates(backward_key, traced, isa)
        backward = linear_source(traced, backward_plans[0], backward_key)
        grads = tuple((g.hook, g.capture, places_of(g)) for g in traced.hook_grads)
    except (TraceError, Unsupported) as error:
        backward, why = None, str(error)
    sources = LinearSources(
        forward, backward, why, traced.positions, forward_key.captures,
        grads, _frozen(traced), tuple(traced.pins.items()), forward_key.digest(), meaning,
    )  # fmt: skip
    return LinearPipeline(traced, forward_key, backward_key, forward_plans, backward_plans, sources)


def _frozen(traced: TracedLinear) -> tuple[int, ...]:
    every = enumerate(traced.captures)
    return tuple(i for i, t in every if t.is_floating_point() and not t.requires_grad)


def _cuda_pipeline(traced: TracedLinear, key: LinearKey, meaning: str, isa: str) -> LinearPipeline:
    plans = linear_cuda_candidates(key, traced, isa)
    sources = LinearSources(
        linear_cuda_source(traced, plans[0], key), None, NO_GRADIENT, traced.positions,
        key.captures, (), _frozen(traced), tuple(traced.pins.items()), key.digest(), meaning,
    )  # fmt: skip
    return LinearPipeline(traced, key, None, list(plans), [], sources)
