"""The stages of one program in a row: trace, derive, key, plan, source; each result is frozen."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch

from . import clean_thread, plan_cuda, serialize
from .arch import CUDA
from .aten import Unsupported
from .capture import Captures, captures_of_spec
from .derive import Derived, derive, derive_quiet
from .errors import TraceError
from .ir import DTYPE_NAMES
from .key import Form, KernelKey, backward_key, forward_key
from .plan import Plan, candidates
from .source import forward_source
from .source_backward import backward_source
from .spec import AttentionSpec
from .trace import Traced, trace

NO_CUDA_GRADIENT = "CUDA kernels have no gradient in this version"
DENSE = Form()


@dataclass(frozen=True)
class Sources:
    """What generation produced for one program: all that a later process needs."""

    forward: str
    backward: str | None
    no_backward: str  # why there is no backward, for the error
    stats: tuple[str, ...]  # saved statistics that the caller sees
    positions: tuple[int, ...]  # capture number -> position in the spec's captured tensors
    captures: tuple[tuple[str, int], ...]  # dtype and rank of each capture
    grads: tuple[int, ...]
    passes: int
    key: str
    stored: int  # saved statistics in all, those for backward included
    meaning: str  # the program as text (serialize): what an exported graph carries
    candidate: int = 0  # which forward plan: not the first where that one's kernel spills registers

    def to_json(self) -> str:
        return json.dumps(self.__dict__)

    @staticmethod
    def from_json(text: str) -> Sources:
        data = json.loads(text)
        for name in ("stats", "positions", "grads"):
            data[name] = tuple(data[name])
        data["captures"] = tuple((d, r) for d, r in data["captures"])
        return Sources(**data)


@dataclass(frozen=True)
class Pipeline:
    """Every stage of one program, for ``explain`` and for handles."""

    traced: Traced
    derived: Derived | None
    quiet: Derived | None  # the same without gradients of the statistics, if it has fewer passes
    no_backward: str
    forward_key: KernelKey
    backward_key: KernelKey | None
    forward_plans: list[Plan]
    backward_plans: list[Plan]
    sources: Sources


def captures_for(spec: AttentionSpec) -> Captures:
    """The captures of a spec, read once: a spec is frozen, so is what its callables close over."""
    found = spec.__dict__.get("_captures")
    if found is None:
        found = captures_of_spec(spec)
        spec.__dict__["_captures"] = found
    return found


def pipeline(
    spec: AttentionSpec,
    captures: Captures,
    element: torch.dtype,
    d: int,
    dv: int,
    isa: str,
    form: Form = DENSE,
) -> Pipeline:
    """Run trace, derive, key, plan and source. Raises TraceError, NotImplementedError."""
    dtype = "f64" if element == torch.float64 else "f32"

    def stages() -> Pipeline:
        return _after_trace(trace(spec, captures.tensors, dtype), element, d, dv, isa, form)

    return clean_thread.run(stages)


def regenerated(meaning: serialize.Meaning, isa: str, form: Form = DENSE) -> Pipeline:
    """Derive, key, plan and source of a program that was read. Raises NotImplementedError."""
    m = meaning
    return clean_thread.run(
        lambda: _after_trace(m.traced, m.element, m.head_dim, m.value_dim, isa, form)
    )


def _after_trace(
    traced: Traced, element: torch.dtype, d: int, dv: int, isa: str, form: Form = DENSE
) -> Pipeline:
    name = DTYPE_NAMES[element]
    meaning = serialize.dump(traced, element, d, dv)
    wanted = [i for i, t in enumerate(traced.captures) if t.requires_grad and t.is_floating_point()]
    if isa in CUDA:
        return _cuda_pipeline(traced, name, d, dv, isa, meaning, form)
    derived, quiet, why = None, None, ""
    try:
        derived = derive(traced, wanted)
        quiet = derive_quiet(traced, wanted, derived)
    except (TraceError, Unsupported) as e:
        why = str(e)
    saved = derived.final_states if derived is not None else ()
    fkey = forward_key(traced, name, d, dv, saved)
    fplans = candidates(fkey, traced, None, isa)
    forward = forward_source(traced, fplans[0], fkey, saved)
    bkey, bplans, backward = None, [], None
    if derived is not None:
        bkey = backward_key(traced, derived, name, d, dv)
        bplans = candidates(bkey, traced, derived, isa)
        backward = backward_source(traced, derived, bplans[0], bkey, quiet)
    sources = Sources(
        forward, backward, why, tuple(traced.row.saved), traced.positions, fkey.captures,
        derived.grads if derived is not None else (),
        len(derived.passes) if derived is not None else 0,
        fkey.digest(), len(traced.row.saved) + len(saved), meaning,
    )  # fmt: skip
    return Pipeline(traced, derived, quiet, why, fkey, bkey, fplans, bplans, sources)


def _cuda_pipeline(
    traced: Traced, element: str, d: int, dv: int, isa: str, meaning: str, form: Form
) -> Pipeline:
    key = replace(forward_key(traced, element, d, dv, ()), form=form)
    plans = plan_cuda.candidates(key, traced, isa)
    stats = tuple(traced.row.saved)
    sources = Sources(
        forward_source(traced, plans[0], key, ()), None, NO_CUDA_GRADIENT, stats,
        traced.positions, key.captures, (), 0, key.digest(), len(stats), meaning,
    )  # fmt: skip
    return Pipeline(traced, None, None, NO_CUDA_GRADIENT, key, None, plans, [], sources)
