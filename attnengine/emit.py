"""Scalar-graph nodes to C++ statements in the vocabulary of ``templates/cpu/math.h``.

No user text reaches the source: identifiers are made here and floats are written from their bits.
Index arithmetic is 64-bit in meaning; where intervals prove that it fits, it is done in 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from .ir import FLOATS, INTS, Node, const_value, walk

# Lengths, heads and batch stay below this, so q - k and q + small constants fit 32 bits.
INDEX_LIMIT = 2**30
I32 = (-(2**31), 2**31 - 1)
I64 = (-(2**63), 2**63 - 1)
_RANGES = {"i64": I64, "i32": I32, "i16": (-(2**15), 2**15 - 1), "i8": (-128, 127), "u8": (0, 255)}
ELEMENT = {
    "f32": "float", "f64": "double", "bf16": "ae::bf16", "f16": "ae::f16", "i64": "int64_t",
    "i32": "int32_t", "i16": "int16_t", "i8": "int8_t", "u8": "uint8_t", "bool": "bool",
}  # fmt: skip
SCALAR = {"f32": "float", "f64": "double", "i32": "int32_t", "i64": "int64_t", "bool": "bool"}
VECTOR = {"f32": "L::F32", "f64": "L::F64", "i32": "L::I32", "i64": "L::I64", "bool": "L::Mask"}
COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")
LOGICAL = ("logical_and", "logical_or", "logical_xor", "logical_not")


class Ranges:
    """Bounds of integer nodes: what decides between 32 and 64 bits.

    ``before``: rows can come before the first key (a sequence with fewer keys than rows), so that
    their query index is negative.
    """

    def __init__(self, before: bool = False) -> None:
        self._memo: dict[int, tuple[int, int]] = {}
        self._first_query = -INDEX_LIMIT if before else 0

    def of(self, node: Node) -> tuple[int, int]:
        for n in walk([node]):
            if n.id not in self._memo:
                self._memo[n.id] = self._bounds(n)
        return self._memo[node.id]

    def _bounds(self, n: Node) -> tuple[int, int]:
        if n.dtype == "bool":
            return 0, 1
        if n.dtype not in INTS:
            return I64
        full = _RANGES[n.dtype]
        if n.op == "const":
            v = int(const_value(n))
            return v, v
        if n.op == "input" and n.attr[0] in ("b", "h", "q", "k"):
            return self._first_query if n.attr[0] == "q" else 0, INDEX_LIMIT
        if not n.args or any(a.dtype in FLOATS for a in n.args):
            return full
        r = [self._memo[a.id] for a in n.args]
        out = self._arithmetic(n.op, r)
        if out is None or out[0] < full[0] or out[1] > full[1]:
            return full
        return out

    @staticmethod
    def _arithmetic(op: str, r: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        if op in ("cast", "splat", "detach", "amax", "amin"):
            return r[0]
        if op == "neg":
            return -r[0][1], -r[0][0]
        if op == "abs":
            return 0, max(abs(r[0][0]), abs(r[0][1]))
        if len(r) < 2:
            return None
        (a, b), (c, d) = r[-2], r[-1]
        if op == "add":
            return a + c, b + d
        if op == "sub":
            return a - d, b - c
        if op == "mul":
            corners = (a * c, a * d, b * c, b * d)
            return min(corners), max(corners)
        if op in ("minimum", "maximum", "select"):
            return min(a, c), max(b, d)
        if op == "remainder":
            m = max(abs(c), abs(d))
            return (0 if c >= 0 else -m), (m if d > 0 else 0)
        if op in ("floor_div", "trunc_div", "fmod"):
            m = max(abs(a), abs(b)) + 1
            return -m, m
        if op in ("bit_and", "bit_or", "bit_xor") and min(a, c) >= 0:
            return 0, (1 << max(b, d).bit_length()) - 1
        if op == "shr" and a >= 0:
            return 0, b
        return None


def literal(node: Node, rep: str) -> str:
    v = const_value(node)
    if rep == "bool":
        return "true" if v else "false"
    if rep == "i32":
        return f"int32_t({int(v)})" if v != I32[0] else "INT32_MIN"
    if rep == "i64":
        return f"INT64_C({int(v)})" if v != I64[0] else "INT64_MIN"
    return float_literal(float(v), rep)


def float_literal(v: float, rep: str) -> str:
    suffix = "f" if rep == "f32" else ""
    if math.isnan(v):
        return f'__builtin_nan{suffix}("")'
    if math.isinf(v):
        return ("-" if v < 0 else "") + f"__builtin_inf{suffix}()"
    text = v.hex()
    return f"({text}{suffix})" if v < 0 or math.copysign(1, v) < 0 else f"{text}{suffix}"


class Emitter:
    """Emits statements for nodes into ``lines``; ``names`` maps node ids to C++ expressions.

    ``live`` is the mask expression that predicates gathers of vec nodes. ``run_start`` is the index
    of the first lane's key, a C++ int64 expression, for contiguous gathers.
    """

    def __init__(
        self,
        ranges: Ranges,
        names: Mapping[int, str] | None = None,
        *,
        env: str = "env",
        live: str = "true",
        run_start: str | None = None,
        indent: int = 2,
        prefix: str = "v",
    ) -> None:
        self.ranges = ranges
        self.names = dict(names or {})
        # Inputs by node id as expressions that become a variable at their first use.
        self.lazy: dict[int, str] = {}
        # exp(scores - row scalar) straight from raw dot products, by the id of the scores node.
        self.raw_scores: int | None = None
        self.env = env
        self.live = live
        self.run_start = run_start
        self.pad = " " * indent
        self.prefix = prefix
        self.lines: list[str] = []

    def child(
        self, live: str | None = None, run_start: str | None = None, more: int = 2
    ) -> Emitter:
        out = type(self)(
            self.ranges, self.names, env=self.env, live=live or self.live,
            run_start=run_start or self.run_start, indent=len(self.pad) + more, prefix=self.prefix,
        )  # fmt: skip
        out.lazy = dict(self.lazy)
        out.raw_scores = self.raw_scores
        return out

    def line(self, text: str) -> None:
        self.lines.append(self.pad + text)

    def rep(self, node: Node) -> str:
        """How the value is held: f32, f64, i32, i64 or bool."""
        if node.dtype in ("bf16", "f16"):
            return "f32"
        if node.dtype in INTS:
            lo, hi = self.ranges.of(node)
            return "i32" if I32[0] <= lo and hi <= I32[1] else "i64"
        return node.dtype

    def expr(self, node: Node) -> str:
        found = self.names.get(node.id)
        if found is not None:
            return found
        for n in walk([node], known=frozenset(self.names)):
            if n.id not in self.names and self._only_raw(n, node):
                continue
            text = self._compute(n)
            if n.op in ("const", "detach", "splat") or text in self.names.values():
                self.names[n.id] = text
            else:
                name = f"{self.prefix}{n.id}"
                self.line(f"const auto {name} = {text};")
                self.names[n.id] = name
        return self.names[node.id]

    def _from_raw(self, x: Node) -> bool:
        """``x`` is scores - or + (row scalar), and scores are raw dot products times the scale."""
        return self._raw_shift(x) is not None

    def _raw_shift(self, x: Node) -> tuple[Node, bool] | None:
        """The row scalar of _from_raw, and whether it is added."""
        if self.raw_scores is None or x.op not in ("add", "sub"):
            return None
        a, b = x.args
        if a.id == self.raw_scores and not b.vec:
            return b, x.op == "add"
        if x.op == "add" and b.id == self.raw_scores and not a.vec:
            return a, True
        return None

    def _only_raw(self, n: Node, root: Node) -> bool:
        """``n`` is part of an exp that is computed from raw dot products: not needed itself, unless
        something asks for it later."""
        return n is not root and (n.id == self.raw_scores or self._from_raw(n))

    def as_rep(self, node: Node, rep: str) -> str:
        text, own = self.expr(node), self.rep(node)
        if own == rep:
            return text
        if node.op == "const":
            return literal(node, rep)
        if rep == "bool":
            return f"ae::to_bool({text})"
        if own == "bool":
            return f"ae::mask_to_{rep}({text})"
        return f"ae::to_{rep}({text})"

    # -- one node -------------------------------------------------------------------------------
    def _compute(self, n: Node) -> str:
        if n.op == "const":
            return literal(n, self.rep(n))
        if n.op in ("detach", "splat"):
            return self.expr(n.args[0])
        if n.op == "cast":
            return self._cast(n)
        if n.op == "gather":
            return self._gather(n)
        if n.op in COMPARE:
            rep = self._common(n.args)
            return f"ae::{n.op}({self._list(n.args, rep)})"
        if n.op in LOGICAL:
            return f"ae::{n.op}({self._list(n.args, 'bool')})"
        if n.op in ("isnan", "isinf"):
            return f"ae::{n.op}({self.expr(n.args[0])})"
        if n.id in self.lazy:
            return self.lazy[n.id]
        if n.op in ("exp", "sigmoid") and (shift := self._raw_shift(n.args[0])) is not None:
            row = self.as_rep(shift[0], self.rep(n))
            return f"ae::{n.op}_scaled_minus(sm, scale, {'-' if shift[1] else ''}({row}))"
        if n.op in ("input", "sum", "amax", "amin", "prod", "any", "all"):
            raise KeyError(f"{n.op} {n.attr} is not available in this scope")
        if n.op == "tanh" and (scaled := self._scaled(n.args[0])) is not None:
            return f"ae::tanh({scaled})"
        rep = self.rep(n)
        if n.op == "select":
            inner = rep if rep != "i32" else self._common(n.args[1:])
            arms = self._list(n.args[1:], inner)
            text = f"ae::select({self.expr(n.args[0])}, {arms})"
            return self._narrowed(text, inner, rep, n)
        inner = self._common([*n.args, n]) if rep in ("i32", "i64") else rep
        text = f"ae::{n.op}({self._list(n.args, inner)})"
        return self._narrowed(text, inner, rep, n)

    def _scaled(self, x: Node) -> str | None:
        """A quotient by a constant as a product, for a smooth function of it (softcap): a division
        costs as much as the function, and elsewhere its exact rounding may matter."""
        if x.op != "div" or x.dtype != "f32" or not x.vec or x.args[1].op != "const":
            return None
        c = float(const_value(x.args[1]))
        if not 1e-30 < abs(c) < 1e30:
            return None
        return f"ae::mul({self.as_rep(x.args[0], 'f32')}, {self._reciprocal(c)})"

    def _reciprocal(self, c: float) -> str:
        return float_literal(1 / c, "f32")

    def _narrowed(self, text: str, inner: str, rep: str, n: Node) -> str:
        if inner != rep:
            text = f"ae::to_{rep}({text})"
        return f"ae::round_{n.dtype}({text})" if n.dtype in ("bf16", "f16") else text

    def _common(self, nodes: Sequence[Node]) -> str:
        reps = {self.rep(a) for a in nodes}
        for rep in ("f64", "f32", "i64", "i32"):
            if rep in reps:
                return rep
        return "bool" if reps == {"bool"} else "i32"

    def _list(self, nodes: Iterable[Node], rep: str) -> str:
        return ", ".join(self.as_rep(a, rep) for a in nodes)

    def _cast(self, n: Node) -> str:
        rep = self.rep(n)
        text = self.as_rep(n.args[0], rep)
        if n.dtype in ("bf16", "f16"):
            return f"ae::round_{n.dtype}({text})"
        return text

    def _gather(self, n: Node) -> str:
        args = [str(n.attr[0])]
        live = self.live if n.vec else "true"
        function = "gather"
        indices = self.indices(n)
        if n.vec and self.run_start is not None and not any(a.vec for a in n.args[:-1]):
            start = self.run(n.args[-1])
            if start is not None:
                function, indices[-1] = "gather_run", start
        args = [self.env, str(n.attr[0]), live, *indices]
        template = ELEMENT[n.dtype]
        if function == "gather_run" and by_query(n.args):
            template += f", void, {len(n.args)}, true"
        return f"ae::{function}<{template}>({', '.join(args)})"

    def indices(self, n: Node) -> list[str]:
        """Of a gather, one for each dimension."""
        return [self.index(a) for a in n.args]

    def index(self, n: Node) -> str:
        return self.as_rep(n, "i64" if self.rep(n) == "i64" else "i32")

    def run(self, index: Node) -> str | None:
        """If ``index`` is kv_idx + (row expression): the C++ index of lane 0."""
        while index.op in ("cast", "detach"):
            index = index.args[0]
        assert self.run_start is not None
        if is_key(index):
            return self.run_start
        if index.op in ("add", "sub"):
            a, b = index.args
            if is_key(strip(a)) and not b.vec:
                sign = "+" if index.op == "add" else "-"
                return f"{self.run_start} {sign} {self.as_rep(b, 'i64')}"
            if index.op == "add" and is_key(strip(b)) and not a.vec:
                return f"{self.run_start} + {self.as_rep(a, 'i64')}"
        return None


def strip(n: Node) -> Node:
    while n.op in ("cast", "detach"):
        n = n.args[0]
    return n


def by_query(index: Sequence[Node]) -> bool:
    """Whether the index before the last is q_idx: the tensor has an element for every score."""
    if len(index) < 2:
        return False
    n = strip(index[-2])
    return n.op == "input" and n.attr[0] == "q"


def is_key(n: Node) -> bool:
    return n.op == "input" and n.attr[0] == "k"


class IntervalEmitter(Emitter):
    """The same graph over intervals (``templates/common/interval.h``)."""

    def rep(self, node: Node) -> str:
        if node.dtype in FLOATS:
            return "f64" if node.dtype == "f64" else "f32"
        return "bool" if node.dtype == "bool" else "i64"

    def _compute(self, n: Node) -> str:
        if n.op == "const":
            return _interval_constant(n)
        if n.op in ("detach", "splat"):
            return self.expr(n.args[0])
        if n.op == "cast":
            return self._convert(n)
        if n.op == "gather":
            args = [self.env, str(n.attr[0]), *(self.expr(a) for a in n.args)]
            return f"ae::iv::gather<{ELEMENT[n.dtype]}>({', '.join(args)})"
        if n.op == "input":
            raise KeyError(f"input {n.attr} is not available in this scope")
        floats = any(a.dtype in FLOATS for a in n.args)
        op = n.op
        if floats and op in (
            "add", "sub", "mul", "div", "neg", "abs", "floor_div", "trunc_div", "remainder", "fmod",
        ):  # fmt: skip
            op = "f" + op
        text = f"ae::iv::{op}({', '.join(self.expr(a) for a in n.args)})"
        return f"ae::iv::round_{n.dtype}({text})" if n.dtype in ("bf16", "f16") else text

    def _convert(self, n: Node) -> str:
        (a,) = n.args
        text = self.expr(a)
        if n.dtype == "bool":
            return f"ae::iv::to_bool({text})"
        if n.dtype in ("i8", "u8", "i16"):
            return "ae::iv::top()"  # wraps
        rep = {"f64": "f64", "i64": "i64"}.get(n.dtype, "f32" if n.dtype in FLOATS else "i32")
        if a.dtype == "bool":
            return f"ae::iv::mask_to_{rep}({text})"
        text = f"ae::iv::to_{rep}({text})"
        return f"ae::iv::round_{n.dtype}({text})" if n.dtype in ("bf16", "f16") else text


def _interval_constant(n: Node) -> str:
    v = const_value(n)
    if n.dtype == "bool":
        return f"ae::iv::constant({1.0 if v else 0.0})"
    if n.dtype in INTS and abs(int(v)) > 2**53:
        return "ae::iv::top()"
    return f"ae::iv::constant({float_literal(float(v), 'f64')})"
