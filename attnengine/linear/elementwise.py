"""One hook, ``x -> x`` on a whole operand, as the scalar graph of one of its elements."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..aten import Array, Index, Lowering, Unsupported
from ..errors import TraceError
from ..ir import FLOATS, TORCH_DTYPES, Graph, Node, gathers_of, inputs_of, is_const, substitute
from ..tracer import Tracer
from ..user_code import describe

SIZES = ("B", "Hk", "H", "L")  # of a call, in the order in which functions take them
_INDICES = ("b", "h", "q", "k")
_BEFORE = "apply what mixes elements (sum, softmax, norm, matmul) to the operand before the call"


def indices(graph: Graph, rank: int) -> list[Node]:
    """The indices of an element of an operand; the last one changes from lane to lane."""
    names = _INDICES if rank == 4 else ("b", "h", "k")
    return [graph.input(n, "i64", vec=(n == "k")) for n in names]


def is_place(n: Node) -> bool:
    """Whether ``n`` is the batch row, head or token of an element, and the same in all lanes."""
    return n.op == "input" and n.attr[0] in _INDICES and not n.vec


def trace_hook(
    tr: Tracer, fn: Callable, what: str, shape: tuple[int, ...]
) -> tuple[Node, tuple[int, ...]]:
    """The result of ``fn`` at one place of an operand of ``shape``, in the tracer's dtype, and the
    dimensions whose sizes it depends on. Raises TraceError."""
    g, d = tr.graph, tr.score_dtype
    place = indices(g, len(shape))
    x = g.input("x", d, vec=True)

    def element(index: Index) -> Node:
        for i, own, size in zip(index, place, shape, strict=True):
            if i is not own and not (size == 1 and is_const(i, 0)):
                raise Unsupported("the result reads x at another place", _BEFORE, stated=True)
        return x

    with FakeTensorMode(allow_non_fake_inputs=True):
        example = torch.empty(shape, dtype=TORCH_DTYPES[d])
    low = Lowering(g, None, {n.id: s for n, s in zip(place, shape, strict=True)}, sided=True)
    tr.read_sizes = False
    try:
        with _quiet():
            out = tr.run(fn, [("x", Array(shape, d, element), example)], what, low=low)
    except TraceError as error:
        raise TraceError(f"{error} ({what} must be elementwise: x -> x)") from None
    if isinstance(out, Node):
        scalar = out
        out = Array((), out.dtype, lambda index: scalar)
    if not isinstance(out, Array):
        raise TraceError(
            f"{what} {describe(fn)}: returned {type(out).__name__}, expected one tensor of x's "
            f"shape {list(shape)}; {what} must be elementwise: x -> x"
        )
    if out.shape != shape:
        raise TraceError(
            f"{what} {describe(fn)}: returned shape {list(out.shape)} for x of {list(shape)}; "
            f"{what} must be elementwise: x -> x of the same shape. Captured tensors must "
            f"broadcast to it; {_BEFORE}"
        )
    if out.dtype not in FLOATS:
        raise TraceError(
            f"{what} {describe(fn)}: returned dtype {out.dtype}, expected a floating dtype"
        )
    try:
        node = g.cast(out.element(tuple(place)), d)
    except Unsupported as error:
        raise TraceError(
            f"{what} {describe(fn)}: {error.explained()} ({what} must be elementwise: x -> x)"
        ) from None
    names = inputs_of([node])
    read = [i for i, n in enumerate(place) if tr.read_sizes or n.attr[0] in names]
    if len(shape) == 4:
        read = [i for i in read if i < 3]  # the width is the kernel's
    return _aligned(tr, node, place), tuple(read)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Shapes that do not broadcast raise; torch would print a traceback as well."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    silence = logging.Filter("attnengine")
    log.addFilter(silence)
    try:
        yield
    finally:
        log.removeFilter(silence)


def _aligned(tr: Tracer, root: Node, place: Sequence[Node]) -> Node:
    """Captured tensors that are broadcast along batch, heads or tokens are read at the operand's
    own index there, not at 0: one graph, whichever of these sizes are 1. (A kernel's read takes
    index 0 of a dimension of size 1.)"""
    tensors = tr.captured_tensors()
    table: dict[Node, Node] = {}
    for n in gathers_of([root]):
        sizes = tensors[n.attr[0]].shape
        if len(sizes) > len(place):
            continue
        own = place[len(place) - len(sizes) :]
        if any(
            i is not o and not (s == 1 and is_const(i, 0))
            for i, o, s in zip(n.args, own, sizes, strict=True)
        ):
            continue
        index = [i if o.vec else o for i, o in zip(n.args, own, strict=True)]
        table[n] = tr.graph.node("gather", index, n.dtype, n.attr)
    return substitute(tr.graph, [root], table)[0]
