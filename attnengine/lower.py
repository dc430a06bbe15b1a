"""Lowers an fx graph of aten operators to the scalar graph (:mod:`attnengine.ir`)."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

from . import arrays
from .aten import Array, Index, Unsupported, Value, promoted
from .fx_values import live, mutates
from .ir import DTYPE_NAMES, INTS, Node, const_value
from .lower_pointwise import PointwiseOperators
from .lower_shapes import ShapeOperators

# aten name -> vocabulary name, computed in the promoted dtype
_PLAIN = {
    "mul": "mul", "minimum": "minimum", "maximum": "maximum", "remainder": "remainder",
    "fmod": "fmod", "neg": "neg", "abs": "abs", "floor": "floor", "ceil": "ceil",
    "trunc": "trunc", "relu": "relu",
}  # fmt: skip
# computed in float: an integer argument is promoted to the default dtype
_FLOAT = {
    n: n
    for n in (
        "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal tanh sigmoid sin cos tan asin "
        "acos atan sinh cosh asinh acosh atanh erf erfc lgamma atan2 copysign hypot"
    ).split()
}
_COMPARE = {n: n for n in ("eq", "ne", "lt", "le", "gt", "ge")}
_LOGICAL = ("logical_and", "logical_or", "logical_xor")
_BITWISE = {
    "bitwise_and": ("bit_and", "logical_and"),
    "bitwise_or": ("bit_or", "logical_or"),
    "bitwise_xor": ("bit_xor", "logical_xor"),
    "bitwise_left_shift": ("shl", None),
    "bitwise_right_shift": ("shr", None),
    "__and__": ("bit_and", "logical_and"),
    "__or__": ("bit_or", "logical_or"),
    "__xor__": ("bit_xor", "logical_xor"),
    "__lshift__": ("shl", None),
    "__rshift__": ("shr", None),
}
_REDUCE = {
    "sum": "sum", "amax": "amax", "amin": "amin", "prod": "prod", "any": "any", "all": "all",
    "max": "amax", "min": "amin", "mean": "mean",
}  # fmt: skip
_ALIASES = (
    "clone", "alias", "lift_fresh_copy", "lift_fresh", "contiguous", "positive",
    "view_of",
)  # fmt: skip


class FxLowering(PointwiseOperators, ShapeOperators):
    """Walks one fx graph. ``captured`` maps a get_attr tensor to its value, or None: a constant."""

    def run(self) -> Any:
        arguments = iter(self.arguments)
        needed = live(self.module)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = next(arguments)
            elif node.op == "output":
                return torch.fx.node.map_arg(node.args[0], lambda n: self.env[n])
            elif node not in needed:
                self.check_effects(node)
            elif node.op == "get_attr":
                self.env[node] = self.constant(getattr(self.module, str(node.target)))
            else:
                self.env[node] = self.call(node)
        raise AssertionError("an fx graph ends with an output")

    # -- pieces ---------------------------------------------------------------------------------
    def constant(self, tensor: torch.Tensor) -> Value:
        value = self.captured(tensor)
        if value is not None:
            return value
        dtype = DTYPE_NAMES.get(tensor.dtype)
        if dtype is None:
            raise Unsupported(f"a constant of dtype {tensor.dtype}")
        if tensor.numel() > arrays.UNROLL_LIMIT:
            raise Unsupported(
                f"a tensor of {tensor.numel()} elements created inside the mod",
                "create it outside and let the mod capture it",
            )
        flat = [self.g.const(v, dtype) for v in tensor.detach().reshape(-1).tolist()]
        if tensor.dim() == 0:
            return flat[0]
        shape = tuple(tensor.shape)

        def element(index: Index) -> Node:
            out: Node | None = None
            flat_index: Node = self.g.const(0, "i64")
            for i, s in zip(index, shape, strict=True):
                i = arrays.position(self.low, i, s)
                flat_index = self.low.emit("mul", [flat_index, self.g.const(s, "i64")], "i64")
                flat_index = self.low.emit("add", [flat_index, i], "i64")
            if flat_index.op == "const":
                return flat[int(const_value(flat_index))]
            for k, item in reversed(list(enumerate(flat))):
                here = self.low.emit("eq", [flat_index, self.g.const(k, "i64")], "bool")
                out = item if out is None else self.low.emit("select", [here, item, out], dtype)
            assert out is not None
            return out

        return Array(shape, dtype, element)

    def call(self, node: torch.fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.value(node.args[0])[node.args[1]]
        if not isinstance(node.target, torch._ops.OpOverload):
            raise Unsupported(f"{node.target}")
        self.check_effects(node)
        name = node.target._schema.name.split("::")[1]
        if mutates(node) and name != "copy_":
            return self.low.scalar(self.apply(node, name.removesuffix("_")), self.dtype(node))
        return self.apply(node, name)

    def apply(self, node: torch.fx.Node, name: str) -> Any:
        args = list(node.args)
        v = [torch.fx.node.map_arg(a, lambda n: self.env[n]) for a in args]
        out = self.dtype(node)
        handler = getattr(self, f"op_{name}", None)
        if handler is not None:
            return handler(node, v, out)
        if name in _PLAIN:
            if name == "relu":
                return self.bounded("maximum", "le", v[0], 0, out)
            if out in INTS and name in ("floor", "ceil", "trunc"):
                return self.low.scalar(v[0], out)
            return self.wrap(self.low.pointwise(_PLAIN[name], v, out, out))
        if name in _FLOAT:
            return self.low.pointwise(_FLOAT[name], v, out, out)
        if name in _COMPARE:
            return self.low.pointwise(name, v, promoted([self.meta(a) for a in args]), "bool")
        if name in _LOGICAL:
            return self.low.pointwise(name, [self.truth(x) for x in v], "bool", "bool")
        if name in _BITWISE:
            op, logical = _BITWISE[name]
            if out == "bool":
                assert logical is not None
                return self.low.pointwise(logical, v, "bool", "bool")
            return self.wrap(self.low.pointwise(op, v, out, out))
        if name in _REDUCE:
            return self.reduction(name, node, v, out)
        if name in _ALIASES or name in ("_to_copy", "to"):
            if name == "lift_fresh_copy":
                return v[0]
            return self.low.scalar(v[0], out)
        raise Unsupported(str(node.target), _hint(name))

    def reduction(self, name: str, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        x = v[0]
        op = _REDUCE[name]
        arguments: dict[str, int] = {a.name: i for i, a in enumerate(node.target._schema.arguments)}  # type: ignore[union-attr]

        def argument(key: str, default: Any) -> Any:
            i = arguments.get(key)
            if key in node.kwargs:
                return node.kwargs[key]
            return v[i] if i is not None and i < len(v) else default

        dims = argument("dim", None)
        keepdim = bool(argument("keepdim", False))
        if name in ("max", "min") and (dims is not None or len(v) > 1):
            hint = f"use {op}"
            raise Unsupported(f"aten.{name} with a dimension returns indices", hint, stated=True)
        if op in ("any", "all"):
            x, out = self.truth(x), "bool"
        if isinstance(dims, int):
            dims = [dims]
        count: Value | None = None
        if isinstance(x, Array):
            if op == "mean":
                n = 1
                for d in dims if dims else range(len(x.shape)):
                    n *= x.shape[d]
                total = arrays.reduce(self.low, x, "sum", dims, keepdim, out)
                return self.low.pointwise("div", [total, n], out, out)
            return arrays.reduce(self.low, x, op, dims, keepdim, out)
        if self.low.keys is None:
            return self.low.scalar(x, out)  # a 0-d tensor reduces to itself
        if not x.vec:
            shape = self.meta(node.args[0]).shape
            if tuple(shape) != (self.low.keys,):
                return self.low.scalar(x, out)
            x = self.g.node("splat", (x,), x.dtype, (), True)
        if op == "mean":
            ones = self.g.node("splat", (self.g.const(1, out),), out, (), True)
            count = self.g.node("sum", (ones,), out)
            total = self.g.node("sum", (self.g.cast(x, out),), out)
            return self.low.pointwise("div", [total, count], out, out)
        return self.g.node(op, (self.g.cast(x, out),), out)


def _hint(name: str) -> str:
    if "rand" in name or "dropout" in name or "bernoulli" in name:
        return "random numbers are not replayed in the backward pass; precompute and capture them"
    if name in ("sort", "topk", "cumsum", "argmax", "argmin", "nonzero", "matmul", "mm", "bmm"):
        return "compute it before the call and capture the result as a tensor"
    return "use pointwise torch operators, or compute it before the call and capture the result"
