"""From the hooks of a :class:`LinearAttentionSpec` to scalar graphs and their derivatives.

A hook is traced on its whole operand, without data. Its result is lowered to the scalar at one
place of the operand, so it must be elementwise: it may read ``x`` at that place only, and captured
tensors at indices made of that place. Inputs of the graphs: ``x``; ``b``, ``h``; ``q``, the token;
and ``k``, which changes from lane to lane: the channel, or the token of a scalar decay, which has
no channels. In derivatives: ``g``, the gradient of the hook's result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import TraceError
from ..ir import Graph, Node, text, walk
from ..pullback import Pullback
from ..tracer import Tracer
from . import elementwise
from .request import LinearRequest
from .spec import HOOKS, LinearAttentionSpec

Shapes = tuple[int, int, int, int]  # B, Hk, H, L


@dataclass(frozen=True)
class HookGrad:
    """One gradient that backward returns before its sums: of ``capture`` as ``hook`` reads it at
    ``index``, one value for each element of the hook's operand."""

    hook: str
    capture: int
    index: tuple[Node, ...]
    value: Node


@dataclass(frozen=True)
class HookPullback:
    """The adjoint of one hook: the gradient of ``x``, and those of captured tensors."""

    dx: Node
    grads: tuple[HookGrad, ...]


@dataclass(frozen=True)
class TracedLinear:
    """Every hook of a spec as a graph over one :class:`~attnengine.ir.Graph`.

    ``hooks`` lacks the hooks that are absent or the identity. ``captures`` are the tensors that the
    graphs read, in capture-number order; ``positions`` says where each stands in the spec's
    captured tensors (or past their end: found only by tracing). ``pins`` are the sizes of the call
    that the graphs depend on (names of SIZES): a call with others must be traced anew.
    """

    request: LinearRequest
    graph: Graph
    hooks: dict[str, Node]
    captures: tuple[torch.Tensor, ...]
    positions: tuple[int, ...]
    pins: dict[str, int]
    _derived: dict[str, HookPullback | str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Numbers the inputs of functors now: a variable in a source is named by its node, whether
        derivatives or a source add to the graph first."""
        elementwise.indices(self.graph, 4)
        for name in ("x", "g"):
            self.graph.input(name, self.dtype, vec=True)

    @property
    def dtype(self) -> str:
        """Of every hook's x and result."""
        return self.request.accumulator

    def gradients(self) -> dict[str, HookPullback]:
        """The adjoint of each hook in ``hooks``; gradients of the captures that require one.

        Raises TraceError where a hook has none (once derived, :attr:`no_backward` says why).
        """
        if len(self._derived) < len(self.hooks):
            wanted = frozenset(
                i for i, t in enumerate(self.captures) if t.requires_grad and t.is_floating_point()
            )
            pullback = Pullback(self.graph, self.dtype, wanted)
            for name, node in self.hooks.items():
                self._derived[name] = _derived(pullback, name, node)
        for name, found in self._derived.items():
            if isinstance(found, str):
                raise TraceError(f"{name}: {found}")
        return {n: d for n, d in self._derived.items() if isinstance(d, HookPullback)}

    @property
    def no_backward(self) -> str:
        """Why there is no backward kernel; empty where there is one."""
        try:
            self.gradients()
        except TraceError as error:
            return str(error)
        return ""

    @property
    def hook_grads(self) -> list[HookGrad]:
        """The order of ``ae_linear_params.hook_grads``."""
        return [grad for pullback in self.gradients().values() for grad in pullback.grads]

    def fits(self, shapes: Shapes) -> bool:
        """Whether the graphs mean the same for a call of these sizes (B, Hk, H, L)."""
        sizes = dict(zip(elementwise.SIZES, shapes, strict=True))
        return all(sizes[name] == size for name, size in self.pins.items())


def operand_shape(hook: str, request: LinearRequest, shapes: Shapes) -> tuple[int, ...]:
    """Shape of what ``hook`` is applied to."""
    B, Hk, H, L = shapes
    if hook in ("q_mod", "k_mod"):
        return (B, Hk, L, request.d)
    if hook == "decay_mod":
        return (B, H, L, request.d) if request.decay_kind == "channel" else (B, H, L)
    return (B, H, L, request.dv)


def trace_linear(
    spec: LinearAttentionSpec,
    request: LinearRequest,
    shapes: Shapes,
    captures: Sequence[torch.Tensor] = (),
) -> TracedLinear:
    """Trace every hook of ``spec`` for operands of the sizes (B, Hk, H, L).

    ``captures``: the tensors that the spec's fingerprint found, in its order; what it missed is
    found here and comes last. Tensors of any size along a dimension mean the same graph, as long as
    the same dimensions are 1.

    Raises TraceError naming the hook, its line, what is wrong and what to use instead; ValueError
    for a decay_mod without a decay.
    """
    if spec.decay_mod is not None and request.decay_kind == "none":
        raise ValueError(
            "decay_mod: there is no decay to apply it to; pass decay=, or leave it out"
        )
    tr = Tracer(Graph(), captures, request.accumulator)
    hooks: dict[str, Node] = {}
    pins: dict[str, int] = {}
    for name in HOOKS:
        fn: Callable | None = getattr(spec, name)
        if fn is None:
            continue
        shape = operand_shape(name, request, shapes)
        node, read = elementwise.trace_hook(tr, fn, name, shape)
        if node is tr.graph.input("x", request.accumulator, vec=True):
            continue
        hooks[name] = node
        for i in read:
            pins["Hk" if i == 1 and name in ("q_mod", "k_mod") else _AXES[i]] = shape[i]
    tensors = tuple(tr.captured_tensors())
    # Calls of other sizes are often traced anew, and mean the same: they are derived once.
    meaning = text(hooks), request, tuple((t.dtype, t.requires_grad) for t in tensors)
    if meaning not in _known:
        while len(_known) >= _MOST_KNOWN:
            del _known[next(iter(_known))]
        _known[meaning] = (*canonical(hooks), {})
    graph, known, derived = _known[meaning]
    return TracedLinear(request, graph, known, tensors, tuple(tr.used), pins, derived)


_MOST_KNOWN = 256
_known: dict[tuple, tuple[Graph, dict[str, Node], dict[str, HookPullback | str]]] = {}


def canonical(hooks: Mapping[str, Node]) -> tuple[Graph, dict[str, Node]]:
    """The same graphs in one of their own that holds nothing else, numbered by first use: what is
    generated depends on the meaning alone."""
    graph = Graph()
    made: dict[int, Node] = {}
    for n in walk(hooks.values()):
        made[n.id] = graph.node(n.op, [made[a.id] for a in n.args], n.dtype, n.attr, n.vec)
    return graph, {name: made[node.id] for name, node in hooks.items()}


_AXES = ("B", "H", "L")


def _derived(pullback: Pullback, name: str, node: Node) -> HookPullback | str:
    try:
        dx, scatters = pullback.operand(node)
    except TraceError as error:
        return str(error)
    grads: dict[tuple, HookGrad] = {}
    for s in scatters:
        place = (s.capture, tuple(n.id for n in s.index))
        value = s.value
        if place in grads:  # one buffer for every read of the same elements
            value = pullback.low.emit("add", [grads[place].value, value], pullback.d)
        grads[place] = HookGrad(name, s.capture, s.index, value)
    return HookPullback(dx, tuple(grads[place] for place in sorted(grads)))
