"""Gradients of captured tensors: what kernels return for each element of a hook's operand, summed
to the shape of the tensor that was read there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..errors import TraceError
from ..ir import Node
from .trace import HookGrad

Place = str | int  # index "b", "h", "q" (the token) or "k" (the last dimension), or a number
_DIMS = {4: ("b", "h", "q", "k"), 3: ("b", "h", "k")}


def places_of(grad: HookGrad) -> tuple[Place, ...]:
    """Where the hook reads the tensor, in words. Raises TraceError where it is read at computed
    indices, or at one index twice."""
    places = tuple(_place(n) for n in grad.index)
    named = [p for p in places if isinstance(p, str)]
    if "?" in named or len(set(named)) != len(named):
        raise TraceError(
            f"{grad.hook}: captured tensor {grad.capture} requires grad and is read at computed "
            "indices; index it before the call (t = table[index]) and let the hook read t, which "
            "broadcasts against x"
        )
    return places


def _place(n: Node) -> Place:
    if n.op == "input":
        return n.attr[0]
    if n.op == "const":
        return int(n.attr[0])
    return "?"


def unbroadcast(grad: Tensor, places: Sequence[Place], x: Tensor) -> Tensor:
    """``grad``, of the shape of a hook's operand, summed to the shape of the captured tensor ``x``
    that is read at ``places``; a dimension of size 1 is read at 0. What is not read gets 0."""
    dims, sizes = _DIMS[grad.dim()], grad.shape
    read = [dims.index(p) for p, n in zip(places, x.shape, strict=True) if p in dims and n != 1]
    summed = [d for d in range(grad.dim()) if d not in read]
    if summed:
        grad = grad.sum(summed)
    grad = grad.permute([sorted(read).index(d) for d in read])
    part: tuple[int | slice, ...] = tuple(
        slice(None) if n == 1 else slice(sizes[dims.index(p)]) if p in dims else int(p)
        for p, n in zip(places, x.shape, strict=True)
    )
    if grad.numel() == x.numel():
        return grad.reshape(x.shape)
    result = grad.new_zeros(x.shape)
    view = result[part]
    view.copy_(grad.reshape(view.shape))
    return result
