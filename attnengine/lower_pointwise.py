"""Pointwise operators with a meaning of their own: those that are more than a name and a dtype."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx

from .aten import Unsupported, Value
from .fx_values import FxValues
from .ir import FLOATS, INTS, Node


class PointwiseOperators(FxValues):
    """Handlers ``op_NAME(node, values of its arguments, dtype of its result)``."""

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
