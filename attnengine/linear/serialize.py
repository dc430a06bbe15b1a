"""The meaning of a linear-attention program as text, as :mod:`attnengine.serialize` has it for
attention: what a graph exported by torch carries instead of code.

Format 1, JSON: ``nodes`` is the scalar graph in order, ``hooks`` names nodes by position,
``captures`` is ``[dtype, rank, wants a gradient]`` of each captured tensor, ``pins`` are the sizes
of a call that the hooks depend on; the rest are the fields of :class:`LinearRequest`. ``isa`` is
there when one was asked for explicitly.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..ir import DTYPE_NAMES, REDUCTIONS, Node, walk
from ..serialize import FORMAT, _expect, _Invalid, _Reader, with_isa
from .elementwise import SIZES
from .request import LinearRequest
from .spec import HOOKS
from .trace import TracedLinear, canonical

__all__ = ["Meaning", "dump", "is_program", "load", "with_isa"]
_START = '{"attnengine_linear":'


@dataclass(frozen=True)
class Meaning:
    """A program as it was read, and ``isa`` or None. Its captures are meta tensors."""

    traced: TracedLinear
    isa: str | None


class _LinearReader(_Reader):
    family = "attnengine_linear"


def _foreign_input(n: Node) -> bool:
    return n.op == "input" and n.attr[0] not in ("x", "b", "h", "q", "k")


def is_program(key: str) -> bool:
    """Whether an operator's key is a program's text rather than a name in this process."""
    return key.startswith(_START)


def dump(traced: TracedLinear) -> str:
    """The text of a traced spec."""
    graph, hooks = canonical(traced.hooks)
    nodes = [[n.op, n.dtype, [a.id for a in n.args], *n.attr] for n in graph.nodes()]
    data = {
        _LinearReader.family: FORMAT,
        **asdict(traced.request),
        "captures": [[DTYPE_NAMES[t.dtype], t.dim(), t.requires_grad] for t in traced.captures],
        "pins": traced.pins,
        "nodes": nodes,
        "hooks": {name: node.id for name, node in hooks.items()},
    }
    return json.dumps(data, separators=(",", ":"))


def load(text: str) -> Meaning:
    """Reads and checks a program. Raises ValueError that names what is wrong with it."""
    try:
        return _read(text)
    except _Invalid as error:
        raise ValueError(
            f"attnengine::linear_attention: the exported program cannot be read: {error}"
        ) from None


def _read(text: str) -> Meaning:
    reader = _LinearReader(text)
    data = reader.data
    try:
        given: dict[str, Any] = {f.name: data.get(f.name) for f in fields(LinearRequest)}
        request = LinearRequest(**given)
        kinds = type(request.d), type(request.dv), type(request.normalizer)
        _expect(kinds == (int, int, bool), f"d, dv, normalizer={kinds!r}")
    except (TypeError, ValueError) as error:
        raise _Invalid(f"{error}; the file is damaged: export the model again") from None
    isa = data.get("isa")
    _expect(isa is None or isinstance(isa, str), f"isa={isa!r}")
    reader.dtype = request.accumulator
    reader.read_nodes()
    hooks = reader.named(data.get("hooks"), "hooks")
    _expect(list(hooks) == [h for h in HOOKS if h in hooks], f"hooks {list(hooks)}")
    foreign = [n for n in walk(hooks.values()) if n.op in REDUCTIONS or _foreign_input(n)]
    _expect(not foreign, f"hooks that read {[(n.op, *n.attr) for n in foreign]}")
    pins = data.get("pins")
    _expect(
        isinstance(pins, dict)
        and set(pins) <= set(SIZES)
        and all(type(n) is int and n >= 0 for n in pins.values()),
        f"pins={pins!r}",
    )
    captures = reader.kinds_of_captures()
    traced = TracedLinear(
        request, reader.graph, hooks, captures, tuple(range(len(captures))), pins or {}
    )
    return Meaning(traced, isa)
