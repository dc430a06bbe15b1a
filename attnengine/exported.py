"""What torch.export needs: the programs that its graphs carry, and the tensors of its modules."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

from . import cache, dispatch, serialize
from .dispatch import Program, Sources
from .ir import DTYPE_NAMES
from .target import check_isa, default_isa

_read: dict[str, Program] = {}
_reading = threading.Lock()


def program_of(text: str) -> Program:
    """The program that a graph exported elsewhere carries, generated for this machine.

    Raises ValueError when the text is damaged or of another format, or asks for instructions that
    this CPU lacks. Nothing is compiled yet.
    """
    found = _read.get(text)
    if found is not None:
        return found
    with _reading:
        found = _read.get(text)
        if found is None:
            found = _read[text] = _generated(text)
        return found


def _generated(text: str) -> Program:
    meaning = serialize.load(text)
    isa = meaning.isa or default_isa()
    if meaning.isa is not None:
        check_isa(isa)
    element = meaning.element
    label = f"exported {DTYPE_NAMES[element]} D{meaning.head_dim}x{meaning.value_dim} {isa}"
    memo = hashlib.sha256(f"{dispatch.generator()}{isa} {text}".encode()).hexdigest()
    known = cache.text_get("export", memo)
    if known is not None:
        dispatch.statistics.from_disk += 1
        sources = Sources.from_json(known)
        return Program(label, element, isa, sources, (), memo=("export", memo), exported=True)
    try:
        sources = dispatch.regenerated(meaning, isa).sources
    except (KeyError, IndexError, AssertionError, AttributeError) as error:
        raise ValueError(
            f"attnengine::attention: the exported program makes no kernel ({error}); the file is "
            "damaged: export the model again"
        ) from error
    cache.text_put("export", memo, sources.to_json())
    return Program(label, element, isa, sources, (), memo=("export", memo), exported=True)


def module_tensors(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Captured tensors as a non-strict torch.export sees them.

    It replaces the parameters and buffers of the exported module by fake tensors, but not what a
    closure holds: a Parameter that a spec captured would become a constant of the graph, and
    training or loading a state would not reach it. Export's fakes are unique per real tensor, so
    asking for the fake again finds the module's own; any other tensor stays as it is, a constant.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    fakes, proxies = torch._guards.detect_fake_mode(), get_proxy_mode()
    if fakes is None or proxies is None:
        return list(tensors)
    known = proxies.tracer.tensor_tracker
    found = []
    for t in tensors:
        fake = t if isinstance(t, FakeTensor) else fakes.from_tensor(t, static_shapes=True)
        found.append(fake if fake in known else t)
    return found
