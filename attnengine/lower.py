"""Lowers an fx graph of aten operators to the scalar graph (:mod:`attnengine.ir`)."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx

from . import aten as A
from .aten import Array, Lowering, Unsupported, Value
from .ir import DTYPE_NAMES, FLOATS, INTS, Graph, Node

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


class FxLowering:
    """Walks one fx graph. ``captured`` maps a get_attr tensor to its value, or None: a constant."""

    def __init__(
        self,
        low: Lowering,
        module: torch.fx.GraphModule,
        arguments: Sequence[Value],
        captured: Callable[[torch.Tensor], Value | None],
        keep_detach: bool = False,
    ) -> None:
        self.low = low
        self.g: Graph = low.graph
        self.module = module
        self.arguments = list(arguments)
        self.captured = captured
        self.keep_detach = keep_detach
        self.env: dict[torch.fx.Node, Any] = {}

    def run(self) -> Any:
        arguments = iter(self.arguments)
        live = _live(self.module)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = next(arguments)
            elif node.op == "output":
                return torch.fx.node.map_arg(node.args[0], lambda n: self.env[n])
            elif node not in live:
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
        if tensor.numel() > A.UNROLL_LIMIT:
            raise Unsupported(
                f"a tensor of {tensor.numel()} elements created inside the mod",
                "create it outside and let the mod capture it",
            )
        flat = [self.g.const(v, dtype) for v in tensor.detach().reshape(-1).tolist()]
        if tensor.dim() == 0:
            return flat[0]
        shape = tuple(tensor.shape)

        def element(index: A.Index) -> Node:
            out: Node | None = None
            flat_index: Node = self.g.const(0, "i64")
            for i, s in zip(index, shape, strict=True):
                i = A.position(self.low, i, s)
                flat_index = self.low.emit("mul", [flat_index, self.g.const(s, "i64")], "i64")
                flat_index = self.low.emit("add", [flat_index, i], "i64")
            if flat_index.op == "const":
                return flat[int(A.const_value(flat_index))]
            for k, item in reversed(list(enumerate(flat))):
                here = self.low.emit("eq", [flat_index, self.g.const(k, "i64")], "bool")
                out = item if out is None else self.low.emit("select", [here, item, out], dtype)
            assert out is not None
            return out

        return Array(shape, dtype, element)

    def check_effects(self, node: torch.fx.Node) -> None:
        if not self.keep_detach and "copy_" in str(node.target):
            return  # autograd fills its own temporaries in place; op_copy_ follows them
        if _mutates(node) and not _temporary(node.args[0]):
            raise Unsupported(
                f"{node.target} on an input, a captured tensor or a view",
                "use the out-of-place operator; inputs and captured tensors are read-only",
            )

    def value(self, x: Any) -> Any:
        return self.env[x] if isinstance(x, torch.fx.Node) else x

    def meta(self, x: Any) -> Any:
        return x.meta["val"] if isinstance(x, torch.fx.Node) else x

    def call(self, node: torch.fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.value(node.args[0])[node.args[1]]
        if not isinstance(node.target, torch._ops.OpOverload):
            raise Unsupported(f"{node.target}")
        self.check_effects(node)
        name = node.target._schema.name.split("::")[1]
        if _mutates(node) and name != "copy_":
            return self.low.scalar(self.apply(node, name.removesuffix("_")), self.dtype(node))
        return self.apply(node, name)

    def dtype(self, node: torch.fx.Node) -> str:
        meta = node.meta.get("val")
        return A.dtype_of(meta) if isinstance(meta, torch.Tensor) else "f32"

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
            return self.low.pointwise(name, v, A.promoted([self.meta(a) for a in args]), "bool")
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

    def truth(self, x: Any) -> Any:
        if isinstance(x, (Node, Array)) and x.dtype != "bool":
            return self.low.pointwise("ne", [x, 0], x.dtype, "bool")
        return x

    def wrap(self, x: Value) -> Value:
        """Narrow integers wrap as in torch: the kernels compute them in 32 bits."""
        if x.dtype not in ("i8", "u8", "i16"):
            return x
        g, emit, dtype = self.g, self.low.emit, x.dtype

        def narrow(nodes: list[Node]) -> Node:
            bits = 8 if dtype in ("i8", "u8") else 16
            wide = g.cast(nodes[0], "i32")
            low = emit("bit_and", [wide, g.const((1 << bits) - 1, "i32")], "i32")
            if dtype != "u8":
                sign = g.const(1 << (bits - 1), "i32")
                low = emit("sub", [emit("bit_xor", [low, sign], "i32"), sign], "i32")
            return g.cast(low, dtype)

        return self.low.broadcast([x], narrow, dtype)

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
                total = A.reduce(self.low, x, "sum", dims, keepdim, out)
                return self.low.pointwise("div", [total, n], out, out)
            return A.reduce(self.low, x, op, dims, keepdim, out)
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

    # -- operators with a meaning of their own --------------------------------------------------
    def op_add(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.scaled("add", node, v, out)

    def op_sub(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.scaled("sub", node, v, out)

    def op_rsub(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.scaled("sub", node, [v[1], v[0]], out)

    def scaled(self, op: str, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        alpha = node.kwargs.get("alpha", v[2] if len(v) > 2 else 1)
        if out == "bool":
            return self.low.pointwise("logical_or", v[:2], "bool", "bool")
        b = v[1] if alpha == 1 else self.low.pointwise("mul", [v[1], alpha], out, out)
        return self.wrap(self.low.pointwise(op, [v[0], b], out, out))

    def op_div(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        mode: Any = node.kwargs.get("rounding_mode")
        if mode is None and len(v) > 2:
            mode = v[2]
        op = {None: "div", "floor": "floor_div", "trunc": "trunc_div"}[mode]
        return self.wrap(self.low.pointwise(op, v[:2], out, out))

    def op_floor_divide(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.wrap(self.low.pointwise("floor_div", v, out, out))

    def op_mul(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        if out == "bool":
            return self.low.pointwise("logical_and", v, "bool", "bool")
        return self.wrap(self.low.pointwise("mul", v, out, out))

    def op_logical_not(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.low.pointwise("logical_not", [self.truth(v[0])], "bool", "bool")

    def op_bitwise_not(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        op = "logical_not" if out == "bool" else "bit_not"
        return self.wrap(self.low.pointwise(op, v, out, out))

    def op_isnan(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.probe("isnan", v[0])

    def op_isinf(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.probe("isinf", v[0])

    def probe(self, op: str, x: Value) -> Value:
        if x.dtype not in FLOATS:
            return self.g.const(False, "bool")
        return self.low.pointwise(op, [x], x.dtype, "bool")

    def op_signbit(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        x = v[0]
        if x.dtype in FLOATS:  # -0.0 and negative NaN count
            x = self.low.pointwise("copysign", [self.g.const(1, x.dtype), x], x.dtype, x.dtype)
        return self.low.pointwise("lt", [x, self.g.const(0, x.dtype)], x.dtype, "bool")

    def op_fmax(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.ignoring_nan("maximum", v, out)

    def op_fmin(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.ignoring_nan("minimum", v, out)

    def ignoring_nan(self, op: str, v: list[Any], out: str) -> Value:
        a, b = self.low.scalar(v[0], out), self.low.scalar(v[1], out)

        def make(n: list[Node]) -> Node:
            x, emit = self.low.emit(op, n, out), self.low.emit
            if out not in FLOATS:
                return x
            x = emit("select", [emit("isnan", [n[0]], "bool"), n[1], x], out)
            return emit("select", [emit("isnan", [n[1]], "bool"), n[0], x], out)

        return self.low.broadcast([a, b], make, out)

    def op_round(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        if out in INTS:
            return v[0]
        if node.kwargs.get("decimals"):
            raise Unsupported("round(decimals=...)", "scale, round, and scale back")
        return self.low.pointwise("round_even", v[:1], out, out)

    def op_pow(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        exponent = v[1]
        if exponent == 2 and not isinstance(exponent, bool):
            return self.wrap(self.low.pointwise("mul", [v[0], v[0]], out, out))
        if exponent == 1:
            return self.low.scalar(v[0], out)
        if exponent == 0.5 and out in FLOATS:
            return self.low.pointwise("sqrt", v[:1], out, out)
        if exponent == -1 and out in FLOATS:
            return self.low.pointwise("reciprocal", v[:1], out, out)
        if out in INTS:
            if isinstance(exponent, int) and 0 <= exponent <= 16:
                total: Value = self.g.const(1, out)
                for _ in range(exponent):
                    total = self.low.pointwise("mul", [total, v[0]], out, out)
                return self.wrap(total)
            raise Unsupported("an integer power with a varying exponent", "convert to float first")
        if isinstance(exponent, int) and 3 <= exponent <= 4:
            square = self.low.pointwise("mul", [v[0], v[0]], out, out)
            other = v[0] if exponent == 3 else square
            return self.low.pointwise("mul", [square, other], out, out)
        return self.low.pointwise("pow", v, out, out)

    def op_where(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.either(self.truth(v[0]), v[1], v[2], out)

    def op_masked_fill(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.op_where(node, [v[1], v[2], v[0]], out)

    def op_clamp(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        lo = v[1] if len(v) > 1 else node.kwargs.get("min")
        hi = v[2] if len(v) > 2 else node.kwargs.get("max")
        x = self.low.scalar(v[0], out)
        if lo is not None:
            x = self.at_least(x, lo, out)
        return x if hi is None else self.at_most(x, hi, out)

    def op_clamp_min(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.at_least(v[0], v[1], out)

    def op_clamp_max(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.at_most(v[0], v[1], out)

    def at_least(self, x: Any, bound: Any, out: str) -> Value:
        return self.bounded("maximum", "lt", x, bound, out)

    def at_most(self, x: Any, bound: Any, out: str) -> Value:
        return self.bounded("minimum", "gt", x, bound, out)

    def bounded(self, op: str, beyond: str, x: Any, bound: Any, out: str) -> Value:
        number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
        if not (self.low.sided and out in FLOATS and number) or math.isnan(bound):
            return self.low.pointwise(op, [x, bound], out, out)
        outside = self.low.pointwise(beyond, [x, bound], out, "bool")
        return self.either(outside, bound, x, out)

    def op_hardtanh(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        low, high = v[1:3] if len(v) > 2 else (-1, 1)
        x = self.bounded("maximum", "le", v[0], low, out)
        return self.bounded("minimum", "ge", x, high, out)

    def op_elu(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        alpha, scale, inner = (list(v[1:]) + [1, 1, 1])[:3]
        p = self.low.pointwise
        up = p("gt", [v[0], 0], out, "bool")
        # expm1 of what is not above 0: its derivative must not overflow where it is not used.
        low = p("expm1", [p("mul", [self.either(up, 0, v[0], out), inner], out, out)], out, out)
        right = p("mul", [v[0], scale], out, out)
        return self.either(up, right, p("mul", [low, alpha * scale], out, out), out)

    def op_softplus(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        beta, threshold = list(v[1:]) + [1, 20][len(v) - 1 :]
        p = self.low.pointwise
        scaled = p("mul", [v[0], beta], out, out)
        linear = p("gt", [scaled, threshold], out, "bool")
        inner = p("exp", [self.either(linear, threshold, scaled, out)], out, out)  # as in op_elu
        curve = p("div", [p("log1p", [inner], out, out), beta], out, out)
        return self.either(linear, v[0], curve, out)

    def either(self, condition: Value, a: Any, b: Any, out: str) -> Value:
        values = [condition, self.low.scalar(a, out), self.low.scalar(b, out)]
        return self.low.broadcast(values, lambda n: self.low.emit("select", n, out), out)

    def op_gelu(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        p = self.low.pointwise
        x = v[0]
        if node.kwargs.get("approximate", "none") == "tanh":
            cube = p("mul", [p("mul", [x, x], out, out), x], out, out)
            inner = p("add", [x, p("mul", [cube, 0.044715], out, out)], out, out)
            gate = p("tanh", [p("mul", [inner, 0.7978845608028654], out, out)], out, out)
        else:
            gate = p("erf", [p("mul", [x, 0.7071067811865476], out, out)], out, out)
        half = p("mul", [x, 0.5], out, out)
        return p("mul", [half, p("add", [gate, 1.0], out, out)], out, out)

    def op_detach(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        """Kept in a user's graph, where it cuts a derivative; noise in a traced derivative."""
        x = self.low.scalar(v[0], out)
        if not self.keep_detach:
            return x
        return self.low.broadcast([x], lambda n: self.low.emit("detach", n, out), out)

    def op_sign(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        if out in FLOATS:
            return self.low.pointwise("sign", v, out, out)
        zero = self.g.const(0, out)
        up = self.low.pointwise("gt", [v[0], zero], out, "bool")
        down = self.low.pointwise("lt", [v[0], zero], out, "bool")
        up, down = self.low.scalar(up, out), self.low.scalar(down, out)
        return self.low.pointwise("sub", [up, down], out, out)

    op_sgn = op_sign

    def op_copy_(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        value = self.low.scalar(v[1], out)
        self.env[node.args[0]] = value  # type: ignore[index]
        return value

    def op_copy(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.low.scalar(v[1], out)

    # factories
    def filled(self, node: torch.fx.Node, value: Any, out: str) -> Value:
        if isinstance(value, (Node, Array)):
            return A.expand(self.low, self.low.scalar(value, out), self.meta(node).shape)
        shape = tuple(self.meta(node).shape)
        scalar = self.g.const(value, out)
        if self.low.keys is not None and shape == (self.low.keys,):
            return scalar
        return Array(shape, out, lambda i: scalar) if shape else scalar

    def op_scalar_tensor(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.filled(node, v[0], out)

    def op_full(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.filled(node, v[1], out)

    def op_full_like(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.filled(node, v[1], out)

    def op_new_full(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.filled(node, v[2], out)

    def op_fill(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.filled(node, v[1], out)

    def op_zeros(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.filled(node, 0, out)

    op_zeros_like = op_new_zeros = op_zero = op_zeros
    op_empty = op_empty_permuted = op_empty_strided = op_new_empty_strided = op_zeros

    def op_ones(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return self.filled(node, 1, out)

    op_ones_like = op_new_ones = op_ones

    def op_arange(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        size = self.meta(node).shape[0]
        start = v[0] if len(v) > 1 else 0
        step: Any = v[2] if len(v) > 2 else node.kwargs.get("step", 1)

        def element(i: A.Index) -> Node:
            at = self.g.cast(A.position(self.low, i[0], size), out)
            scaled = self.low.emit("mul", [at, self.g.const(step, out)], out)
            return self.low.emit("add", [scaled, self.g.const(start, out)], out)

        return Array((size,), out, element)

    # shapes
    def array(self, x: Any, what: str) -> Array:
        if isinstance(x, Array):
            return x
        raise Unsupported(f"{what} of a score or an index")

    def op_index(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return A.index(self.low, self.array(v[0], "indexing"), v[1])

    def op_select(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        if isinstance(v[0], Node):
            return v[0]
        return A.select(self.low, v[0], v[1], v[2])

    def op_slice(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        dim, start, end, step = (list(v[1:]) + [None] * 4)[:4]
        if isinstance(v[0], Node):
            return v[0]
        return A.slice_(self.low, v[0], dim or 0, start, end, step or 1)

    def same(self, node: torch.fx.Node, x: Value) -> bool:
        """A scalar or a row of scores that only gains or loses dimensions of size one."""
        shape = [s for s in self.meta(node).shape if s != 1]
        return isinstance(x, Node) and (not shape or shape == [self.low.keys])

    def op_unsqueeze(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return v[0] if self.same(node, v[0]) else A.unsqueeze(v[0], v[1])

    def op_squeeze(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        if isinstance(v[0], Node):
            return v[0]
        dims = v[1] if len(v) > 1 else list(range(len(v[0].shape)))
        return A.squeeze(self.low, v[0], [dims] if isinstance(dims, int) else dims)

    def op_expand(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return v[0] if self.same(node, v[0]) else A.expand(self.low, v[0], v[1])

    def op_view(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        if self.same(node, v[0]):
            return v[0]
        return A.reshape(self.low, self.array(v[0], "a view"), v[1])

    op_reshape = op__unsafe_view = op_view

    def op_permute(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        return A.permute(self.array(v[0], "permute"), v[1])

    def op_t(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        if isinstance(v[0], Node) or len(v[0].shape) < 2:
            return v[0]
        return A.permute(v[0], (1, 0))

    def op_transpose(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        x = self.array(v[0], "transpose")
        dims = list(range(len(x.shape)))
        dims[v[1]], dims[v[2]] = dims[v[2]], dims[v[1]]
        return A.permute(x, dims)

    def op_flip(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        x = self.array(v[0], "flip")
        dims = [d % len(x.shape) for d in v[1]]

        def element(index: A.Index) -> Node:
            out = list(index)
            for d in dims:
                i = A.position(self.low, index[d], x.shape[d])
                at = self.low.emit("sub", [self.low.index_const(x.shape[d] - 1), i], "i64")
                out[d] = A.checked(self.low, i, x.shape[d], at)
            return x.element(tuple(out))

        return Array(x.shape, out, element)

    def op_split_with_sizes(self, node: torch.fx.Node, v: list[Any], out: str) -> list[Value]:
        x, dim, ends = self.array(v[0], "split"), v[2] if len(v) > 2 else 0, [0]
        for size in v[1]:
            ends.append(ends[-1] + size)
        return [A.slice_(self.low, x, dim, a, b, 1) for a, b in zip(ends, ends[1:], strict=False)]

    def op_cat(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        parts = [self.array(self.low.scalar(p, out), "cat") for p in v[0]]
        return A.concatenate(self.low, parts, v[1] if len(v) > 1 else 0)

    def op_stack(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        parts = [A.unsqueeze(self.low.scalar(p, out), 0) for p in v[0]]
        if len(v) > 1 and v[1] not in (0,):
            raise Unsupported("stack along a dimension other than 0", "stack along dimension 0")
        return A.concatenate(self.low, [self.array(p, "stack") for p in parts], 0)

    def op_dot(self, node: torch.fx.Node, v: list[Any], out: str) -> Value:
        product = self.low.pointwise("mul", v[:2], out, out)
        return A.reduce(self.low, self.array(product, "dot"), "sum", None, False, out)


def _mutates(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _temporary(x: Any) -> bool:
    """Whether a change of ``x`` in place is seen through ``x`` alone: made here, without views."""
    while isinstance(x, torch.fx.Node) and x.op == "call_function":
        for user in x.users:
            if _aliases(user) and not _mutates(user):
                return False
        if not _aliases(x):
            return True
        if not _mutates(x):
            return False
        x = x.args[0]
    return False


def _aliases(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def _live(module: torch.fx.GraphModule) -> set[torch.fx.Node]:
    """Nodes whose value the output needs (what the tracer recorded and then dropped is skipped)."""
    live: set[torch.fx.Node] = set()
    stack = [n for n in module.graph.nodes if n.op == "output"]
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack.extend(node.all_input_nodes)
    return live


def _hint(name: str) -> str:
    if "rand" in name or "dropout" in name or "bernoulli" in name:
        return "random numbers are not replayed in the backward pass; precompute and capture them"
    if name in ("sort", "topk", "cumsum", "argmax", "argmin", "nonzero", "matmul", "mm", "bmm"):
        return "compute it before the call and capture the result as a tensor"
    return "use pointwise torch operators, or compute it before the call and capture the result"
