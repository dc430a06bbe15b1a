"""The scalar graph that a traced spec becomes: hash-consed, typed, printable.

A node is one scalar of the computation for one (query row, key) pair. ``vec`` nodes change with
the key; the others are fixed for a query row. Reductions (``sum``, ``amax``...) run over the live
keys of a row. Everything later in the pipeline (derivatives, kernel key, generated C++) reads this
form.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

FLOATS = ("f32", "f64", "bf16", "f16")
INTS = ("i64", "i32", "i16", "i8", "u8")
REDUCTIONS = ("sum", "amax", "amin", "prod", "any", "all")

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One scalar. ``op`` is a name of the C++ vocabulary, or input, const, gather, cast, splat."""

    op: str
    args: tuple[Node, ...]
    dtype: str
    attr: tuple
    vec: bool
    id: int

    def __repr__(self) -> str:
        return f"%{self.id}:{self.dtype}"


class Graph:
    """Builds nodes; equal nodes are one object, so common subexpressions are shared."""

    def __init__(self) -> None:
        self._table: dict[tuple, Node] = {}

    def node(
        self,
        op: str,
        args: Iterable[Node] = (),
        dtype: str = "f32",
        attr: tuple = (),
        vec: bool | None = None,
    ) -> Node:
        args = tuple(args)
        if vec is None:
            vec = op not in REDUCTIONS and any(a.vec for a in args)
        key = (op, tuple(a.id for a in args), dtype, attr, vec)
        found = self._table.get(key)
        if found is None:
            found = Node(op, args, dtype, attr, vec, len(self._table))
            self._table[key] = found
        return found

    def nodes(self) -> tuple[Node, ...]:
        """Every node, arguments before users: node i has id i."""
        return tuple(self._table.values())

    def input(self, name: str, dtype: str, vec: bool = False) -> Node:
        return self.node("input", (), dtype, (name,), vec)

    def const(self, value: float | int | bool, dtype: str) -> Node:
        if dtype == "bool":
            value = bool(value)
        elif dtype in INTS:
            value = int(value)
        else:
            value = _rounded(float(value), dtype)
        # Bits, not the value: 0.0 and -0.0 differ, NaN equals itself.
        bits = struct.pack("<d", value).hex() if isinstance(value, float) else repr(value)
        return self.node("const", (), dtype, (bits,))

    def cast(self, x: Node, dtype: str) -> Node:
        if x.dtype == dtype:
            return x
        if x.op == "const":
            value = const_value(x)
            if dtype in INTS and not math.isfinite(value):
                value = 0
            return self.const(value, dtype)
        return self.node("cast", (x,), dtype)


def _rounded(value: float, dtype: str) -> float:
    if dtype == "f64" or math.isnan(value) or math.isinf(value):
        return value
    return float(torch.tensor(value, dtype=torch.float64).to(TORCH_DTYPES[dtype]).double().item())


def const_value(node: Node) -> float | int | bool:
    (bits,) = node.attr
    if node.dtype == "bool":
        return bits == "True"
    if node.dtype in INTS:
        return int(bits)
    return struct.unpack("<d", bytes.fromhex(bits))[0]


def is_const(node: Node, value: float) -> bool:
    return node.op == "const" and const_value(node) == value


def walk(roots: Iterable[Node], known: Container[int] = ()) -> Iterator[Node]:
    """Nodes reachable from ``roots``, arguments before users, in a fixed order; ids in ``known``
    are neither visited nor looked through."""
    seen: set[int] = set()
    stack: list[tuple[Node, bool]] = [(r, False) for r in reversed(list(roots))]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
            continue
        if node.id in seen or node.id in known:
            continue
        seen.add(node.id)
        stack.append((node, True))
        stack.extend((a, False) for a in reversed(node.args) if a.id not in seen)


def inputs_of(roots: Iterable[Node]) -> set[str]:
    return {n.attr[0] for n in walk(roots) if n.op == "input"}


def gathers_of(roots: Iterable[Node]) -> list[Node]:
    return [n for n in walk(roots) if n.op == "gather"]


def substitute(graph: Graph, roots: Sequence[Node], table: Mapping[Node, Node]) -> list[Node]:
    """``roots`` with nodes replaced by ``table`` (matched by identity), rebuilt bottom-up."""
    memo: dict[int, Node] = {k.id: v for k, v in table.items()}

    def rebuilt(node: Node) -> Node:
        args = tuple(memo[a.id] for a in node.args)
        if all(a is b for a, b in zip(args, node.args, strict=True)):
            return node
        if node.op in REDUCTIONS or node.op in ("splat", "input"):
            return graph.node(node.op, args, node.dtype, node.attr, node.vec)
        return graph.node(node.op, args, node.dtype, node.attr)

    stop = set(memo)
    order: list[Node] = []
    seen: set[int] = set()
    stack = [(r, False) for r in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node.id not in seen and node.id not in stop:
            seen.add(node.id)
            stack.append((node, True))
            stack.extend((a, False) for a in node.args)
    for node in order:
        if node.id not in memo:
            memo[node.id] = rebuilt(node)
    return [memo[r.id] for r in roots]


def rename_inputs(graph: Graph, roots: Sequence[Node], table: Mapping[str, Node]) -> list[Node]:
    """``roots`` with the inputs called by the keys of ``table`` replaced."""
    swaps = {n: table[n.attr[0]] for n in walk(roots) if n.op == "input" and n.attr[0] in table}
    return substitute(graph, roots, swaps)


def text(roots: Mapping[str, Node]) -> str:
    """Canonical text of named roots: numbering is by first use, so equal meanings print equally."""
    number: dict[int, int] = {}
    lines = []
    for n in walk(roots.values()):
        number[n.id] = len(number)
        args = " ".join(f"%{number[a.id]}" for a in n.args)
        attr = "".join(f" {a}" for a in n.attr)
        kind = "v" if n.vec else "r"
        lines.append(f"%{number[n.id]}:{kind}.{n.dtype} = {n.op}{attr} {args}".rstrip())
    lines += [f"{name} = %{number[r.id]}" for name, r in roots.items()]
    return "\n".join(lines)


def digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()


# -- evaluation in torch: derivatives are traced through this, probes in fp64 run on it ---------


def _floor_div(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.div(a, b, rounding_mode="floor")


def _trunc_div(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.div(a, b, rounding_mode="trunc")


def _round_even(a: torch.Tensor) -> torch.Tensor:
    return torch.round(a)


TORCH_OPS: dict[str, Callable[..., torch.Tensor]] = {
    name: getattr(torch, name)
    for name in (
        "add sub mul div neg abs minimum maximum remainder fmod logical_and logical_or logical_xor "
        "logical_not eq ne lt le gt ge exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal "
        "tanh sigmoid sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc lgamma floor "
        "ceil trunc sign isnan isinf pow atan2 hypot copysign"
    ).split()
} | {
    "detach": torch.detach,
    "floor_div": _floor_div,
    "trunc_div": _trunc_div,
    "round_even": _round_even,
    "bit_and": torch.bitwise_and,
    "bit_or": torch.bitwise_or,
    "bit_xor": torch.bitwise_xor,
    "bit_not": torch.bitwise_not,
    "shl": torch.bitwise_left_shift,
    "shr": torch.bitwise_right_shift,
    "select": torch.where,
    "sum": torch.sum,
    "amax": torch.amax,
    "amin": torch.amin,
    "prod": torch.prod,
    "any": torch.any,
    "all": torch.all,
}


def evaluate(
    roots: Sequence[Node],
    values: Mapping[Node, torch.Tensor],
    keys: int,
    float_dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """Run the graph in torch. ``values`` gives inputs and gathers; vec values have shape [keys].

    ``float_dtype`` recasts every floating constant and cast (fp64 probes of an fp32 graph).
    """
    memo: dict[int, torch.Tensor] = {n.id: v for n, v in values.items()}

    def dtype_of(node: Node) -> torch.dtype:
        if float_dtype is not None and node.dtype in FLOATS:
            return float_dtype
        return TORCH_DTYPES[node.dtype]

    for node in walk(roots, known=frozenset(memo)):
        args = [memo[a.id] for a in node.args]
        if node.op == "const":
            out = torch.full((), const_value(node), dtype=dtype_of(node))
        elif node.op == "cast":
            out = args[0].to(dtype_of(node))
        elif node.op == "splat":
            out = args[0].expand(keys)
        elif node.op in ("input", "gather"):
            raise KeyError(f"no value for {node.op} {node.attr}")
        else:
            out = TORCH_OPS[node.op](*args)
        memo[node.id] = out
    return [memo[r.id] for r in roots]


def leaves(roots: Iterable[Node]) -> list[Node]:
    """Inputs and gathers under ``roots``, stopping at gathers (their indices are not followed)."""
    found: list[Node] = []
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node.id in seen:
            continue
        seen.add(node.id)
        if node.op in ("input", "gather"):
            found.append(node)
        else:
            stack.extend(node.args)
    return sorted(found, key=lambda n: n.id)
