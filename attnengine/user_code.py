"""The user's functions while they run: which line called what, and calls that leave the graph."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .aten import Unsupported

_READS = (
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__",
    "__array__", "__contains__",
)  # fmt: skip
_SIZES = ("size", "numel", "nelement", "stride", "__len__", "view_as", "reshape_as")
DATA_DEPENDENT = "a branch or .item() on a tensor is data-dependent"


class UserLines(TorchFunctionMode):
    """Makes ``t[0-d tensor]`` an ``aten.index``, remembers which user line called what, and stops
    calls that would leave the graph: reading a value, changing a tensor that the mod did not make.
    """

    def __init__(self, codes: set[types.CodeType], guard: bool) -> None:
        super().__init__()
        self.codes = codes
        self.guard = guard  # torch.func's own calls are trusted
        self.calls: list[tuple[str, str]] = []
        self.made: dict[int, torch.Tensor] = {}  # by storage; held, so that none is used again
        self.read_sizes = False

    def __torch_function__(
        self, func: Any, types_: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        self.calls.append((name, self.line()))
        self.read_sizes |= name in _SIZES or getattr(func, "__self__", None) is torch.Tensor.shape
        if self.guard:
            self.check(name, args, kwargs or {})
        if func is torch.Tensor.__getitem__:
            out = _index(*args)
        else:
            out = func(*args, **(kwargs or {}))
        if self.guard and isinstance(out, torch.Tensor):
            given = [_storage(a) for a in args if isinstance(a, torch.Tensor)]
            if _storage(out) not in given:
                self.made[_storage(out)] = out
        return out

    def check(self, name: str, args: tuple, kwargs: dict) -> None:
        if name in _READS:
            raise Unsupported(DATA_DEPENDENT, "use torch.where", stated=True)
        target = kwargs.get("out", args[0] if args and _in_place(name) else None)
        if isinstance(target, torch.Tensor) and _storage(target) not in self.made:
            raise Unsupported(
                f"{name} on an input or a captured tensor",
                "use the out-of-place operator; inputs and captured tensors are read-only",
            )

    def line(self) -> str:
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code in self.codes:
                return f"{frame.f_code.co_filename}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        return ""

    def where(self, op: str) -> str:
        for name, line in reversed(self.calls):
            if line and op.strip("_") and (name.strip("_") in op or op in name):
                return line
        return next((line for _, line in reversed(self.calls) if line), "")


def _in_place(name: str) -> bool:
    if name.startswith("__i"):
        return name not in ("__invert__", "__index__", "__int__", "__init__")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


def _index(tensor: torch.Tensor, item: Any) -> torch.Tensor:
    items = item if isinstance(item, tuple) else (item,)
    for i in items:
        if isinstance(i, slice) and any(
            isinstance(x, torch.Tensor) for x in (i.start, i.stop, i.step)
        ):
            hint = "slice by Python ints, or index and compare with torch.where"
            raise Unsupported("a slice bounded by a tensor is data-dependent", hint, stated=True)
    if not any(isinstance(i, torch.Tensor) for i in items):
        return torch.Tensor.__getitem__(tensor, item)
    if Ellipsis in [i for i in items if not isinstance(i, torch.Tensor)]:
        at = [i is Ellipsis for i in items].index(True)
        used = sum(1 for i in items if i is not None) - 1
        items = items[:at] + (slice(None),) * (tensor.dim() - used) + items[at + 1 :]
    plain = tuple(slice(None) if isinstance(i, torch.Tensor) else i for i in items)
    basic = tensor if all(p == slice(None) for p in plain) else tensor[plain]
    indices: list[torch.Tensor | None] = []
    for i in items:
        if isinstance(i, torch.Tensor):
            indices.append(i)
        elif not isinstance(i, int) or isinstance(i, bool):
            indices.append(None)
    return torch.ops.aten.index(basic, indices)


def codes_of(fn: Any) -> set[types.CodeType]:
    """Code objects of a callable, of what it nests and of the functions it closes over."""
    found: set[types.CodeType] = set()

    def add(code: types.CodeType) -> None:
        if code in found:
            return
        found.add(code)
        for c in code.co_consts:
            if isinstance(c, types.CodeType):
                add(c)

    stack, seen = [fn], set()
    while stack:
        f = stack.pop()
        if id(f) in seen:
            continue
        seen.add(id(f))
        if hasattr(f, "__wrapped_user__"):
            stack.append(f.__wrapped_user__)
        if isinstance(f, functools.partial):
            stack.append(f.func)
        elif isinstance(f, types.MethodType):
            stack.append(f.__func__)
        elif isinstance(f, types.FunctionType):
            if (f.__module__ or "").split(".")[0] == "torch":
                continue
            add(f.__code__)
            stack += [c.cell_contents for c in f.__closure__ or () if _filled(c)]
            stack += [f.__globals__[n] for n in f.__code__.co_names if n in f.__globals__]
    return found


def _filled(cell: Any) -> bool:
    try:
        return callable(cell.cell_contents)
    except ValueError:
        return False


def describe(fn: Any) -> str:
    """Name and place of a user's function, for messages."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    code = getattr(fn, "__code__", None)
    name = getattr(fn, "__qualname__", type(fn).__qualname__)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else name
