"""What a Python callable captures: its fingerprint and its tensors, without calling it.

Two lambdas from the same line of source with the same constants and tensors of the same kind have
equal signatures, so a fresh lambda at every step finds its kernel without being traced again; only
the captured tensors are rebound.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_SCALARS = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device)
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_LIBRARIES = ("torch", "math", "builtins", "operator", "functools", "numpy", "attnengine")


@dataclass(frozen=True)
class Captures:
    """``signature`` is hashable; ``tensors`` are in the order in which the signature names them.

    ``opaque`` is true when something was captured whose contents cannot be compared (an object with
    attributes): such a callable is traced anew for every spec.
    """

    signature: tuple
    tensors: tuple[torch.Tensor, ...]
    opaque: bool


class _Walk:
    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.positions: dict[int, int] = {}
        self.functions: dict[int, int] = {}  # and modules of torch.nn
        self.spaces: dict[int, int] = {}  # modules of Python and classes
        self.opaque = False

    def tensor(self, t: torch.Tensor) -> tuple:
        at = self.positions.get(id(t))
        if at is None:
            at = self.positions[id(t)] = len(self.tensors)
            self.tensors.append(t)
        return ("t", at, t.dtype, tuple(t.shape), t.requires_grad, t.device.type)

    def value(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return self.tensor(x)
        if isinstance(x, float):
            return ("f", x.hex())
        if isinstance(x, _SCALARS):
            return (type(x).__name__, x)
        if isinstance(x, types.FunctionType):
            return self.function(x)
        if isinstance(x, functools.partial):
            return (
                "partial",
                self.value(x.func),
                tuple(self.value(a) for a in x.args),
                tuple((k, self.value(v)) for k, v in sorted(x.keywords.items())),
            )
        if isinstance(x, (tuple, list)):
            return (type(x).__name__, tuple(self.value(v) for v in x))
        if isinstance(x, dict):
            return ("dict", tuple((self.value(k), self.value(v)) for k, v in x.items()))
        if isinstance(x, types.ModuleType):
            return ("module", x.__name__)
        if isinstance(x, types.BuiltinFunctionType):
            owner = x.__self__
            if owner is None or isinstance(owner, (type, types.ModuleType)):
                return ("name", x.__module__, x.__qualname__)
            return ("method", x.__qualname__, self.value(owner))  # tensor.mul
        if isinstance(x, (type, *_OPERATORS)):
            return ("name", x.__module__, x.__qualname__)
        if isinstance(x, torch.nn.Module) and _is_torch(type(x)):
            return self.module(x)
        if isinstance(x, types.MethodType):
            self.opaque = True
            return ("method", self.value(x.__func__), id(x.__self__))
        self.opaque = True
        return ("object", type(x).__qualname__, id(x))

    def module(self, m: torch.nn.Module) -> tuple:
        """A module of torch's own: class and attributes say all. Of other classes they would not:
        what their methods read is not known."""
        seen = self.functions.get(id(m))
        if seen is not None:
            return ("again", seen)
        self.functions[id(m)] = len(self.functions)
        fields = {n: v for n, v in vars(m).items() if n != "_non_persistent_buffers_set"}
        return ("module of", type(m).__module__, type(m).__qualname__, self.value(fields))

    def function(self, f: types.FunctionType) -> tuple:
        seen = self.functions.get(id(f))
        if seen is not None:
            return ("again", seen)
        if _is_torch(f):
            return ("name", f.__module__, f.__qualname__)
        self.functions[id(f)] = len(self.functions)
        code = f.__code__
        names = _names(code)
        out: list[Any] = [code]
        if f.__closure__:
            for cell in f.__closure__:
                try:
                    out.append(self.named(cell.cell_contents, names))
                except ValueError:  # an empty cell: a name that is not bound yet
                    out.append(None)
        if f.__defaults__:
            out.append(tuple(self.value(d) for d in f.__defaults__))
        if f.__kwdefaults__:
            out.append(tuple((k, self.value(d)) for k, d in sorted(f.__kwdefaults__.items())))
        scope = f.__globals__
        for name in names:
            if name in scope:
                out.append((name, self.named(scope[name], names)))
        return tuple(out)

    def named(self, x: Any, names: tuple[str, ...]) -> Any:
        """What the code reaches by a name: of a module or class, the attributes it may read."""
        if not isinstance(x, (types.ModuleType, type)):
            return self.value(x)
        home = x.__name__ if isinstance(x, types.ModuleType) else x.__module__
        if home.split(".")[0] in _LIBRARIES:
            return self.value(x)
        if id(x) in self.spaces:
            return ("again", home, self.spaces[id(x)])
        self.spaces[id(x)] = len(self.spaces)
        found = [(n, inspect.getattr_static(x, n, None)) for n in names]
        read = tuple(
            (n, self.named(v.__func__ if isinstance(v, staticmethod) else v, names))
            for n, v in found
            if v is not None
        )
        return ("space", home, getattr(x, "__qualname__", ""), read)


def _is_torch(x: Any) -> bool:
    """Whether a function or class is torch's own, so that its name says what it does."""
    return x.__module__ is not None and x.__module__.split(".")[0] == "torch"


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Global names that the code, or a function nested in it, may read."""
    names = list(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names += _names(const)
    return tuple(dict.fromkeys(names))


def captures_of(*callables: Callable | None) -> Captures:
    """Fingerprint of several callables together (tensors shared between them are shared)."""
    walk = _Walk()
    signature = tuple(walk.value(c) for c in callables)
    return Captures(signature, tuple(walk.tensors), walk.opaque)


def captures_of_spec(spec: Any) -> Captures:
    """Fingerprint of an AttentionSpec: its mods and its row function's methods and attributes."""
    walk = _Walk()
    row = spec.row_func
    methods = tuple(
        walk.value(cls.__dict__[name])
        for cls in type(row).__mro__
        for name in ("init", "update", "finalize", "weights", "merge")
        if name in cls.__dict__
    )
    fields = tuple((k, walk.value(v)) for k, v in sorted(vars(row).items()))
    state = walk.value(getattr(row, "state", None))
    mods = tuple(
        walk.value(m) for m in (spec.score_mod, spec.mask_mod, spec.q_mod, spec.k_mod, spec.v_mod)
    )
    return Captures((mods, methods, fields, state), tuple(walk.tensors), walk.opaque)


def stable_text(x: Any) -> str:
    """A fingerprint as text that another process reproduces (code by content, not by address)."""
    if isinstance(x, tuple):
        return "(" + ",".join(stable_text(v) for v in x) + ")"
    if isinstance(x, types.CodeType):
        facts = (
            x.co_code, x.co_names, x.co_varnames, x.co_freevars, x.co_cellvars, x.co_flags,
            x.co_argcount, x.co_kwonlyargcount, x.co_posonlyargcount,
        )  # fmt: skip
        constants = stable_text(tuple(x.co_consts))
        return hashlib.sha256(f"{facts!r}{constants}".encode()).hexdigest()
    if isinstance(x, frozenset):
        return "{" + ",".join(sorted(stable_text(v) for v in x)) + "}"
    return f"{type(x).__name__}:{x!r}"
