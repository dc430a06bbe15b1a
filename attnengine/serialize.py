"""The meaning of one program as text: what a graph exported by torch carries instead of code.

The text is data. It names scalar operations from the closed list of :mod:`attnengine.ir`; nodes,
types and ranks are checked when it is read, and C++ is generated from it here, never taken from it.
It holds no instruction set and no plan, so one file serves every machine and later templates.

Format 1, JSON: ``nodes`` is the scalar graph in order, each ``[op, dtype, [arguments], attribute]``
with arguments by position; ``mask``, ``score``, ``operands`` and ``row`` name nodes by position;
``captures`` is ``[dtype, rank, wants a gradient]`` of each captured tensor; ``element``, ``D`` and
``Dv`` are what the kernel is compiled for. ``isa`` is there when one was asked for explicitly.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import torch

from .ir import DTYPE_NAMES, FLOATS, INTS, REDUCTIONS, TORCH_DTYPES, TORCH_OPS, Graph, Node
from .row_graphs import RowGraphs
from .trace import Traced

FORMAT = 1
_START = '{"attnengine":'
_MAX_BYTES = 4 << 20  # a spec of a few lines takes 1 to 2 KB
_MAX_RANK = 8
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_TRUTH = (*_COMPARISONS, "logical_and", "logical_or", "logical_xor", "logical_not", "isnan",
          "isinf", "any", "all")  # fmt: skip
_BINARY = frozenset(
    "add sub mul div minimum maximum remainder fmod logical_and logical_or logical_xor eq ne lt le "
    "gt ge pow atan2 hypot copysign floor_div trunc_div bit_and bit_or bit_xor shl shr".split()
)
_VECTOR_INPUTS = ("k", "score", "scores", "x")  # one value per key, or per element
_INDEX_INPUTS = ("b", "h", "q", "k")
_ROW_INPUTS = re.compile(r"(state|saved|a|b):.{1,200}", re.DOTALL)
_SIGNED_BITS = {"i64": 64, "i32": 32, "i16": 16, "i8": 8}


@dataclass(frozen=True)
class Meaning:
    """A program as it was read: its graphs, element dtype and head dims, and ``isa`` or None."""

    traced: Traced
    element: torch.dtype
    head_dim: int
    value_dim: int
    isa: str | None


def is_program(key: str) -> bool:
    """Whether an operator's key is a program's text rather than a name in this process."""
    return key.startswith(_START)


def dump(traced: Traced, element: torch.dtype, head_dim: int, value_dim: int) -> str:
    """The text of a traced spec; ``traced`` must not have been derived yet, which adds nodes."""
    row = traced.row

    def ids(nodes: dict[str, Node]) -> dict[str, int]:
        return {name: node.id for name, node in nodes.items()}

    nodes = [[n.op, n.dtype, [a.id for a in n.args], *n.attr] for n in traced.graph.nodes()]
    data = {
        "attnengine": FORMAT,
        "element": DTYPE_NAMES[element],
        "D": head_dim,
        "Dv": value_dim,
        "captures": [[DTYPE_NAMES[t.dtype], t.dim(), t.requires_grad] for t in traced.captures],
        "nodes": nodes,
        "mask": None if traced.mask is None else traced.mask.id,
        "score": None if traced.score is None else traced.score.id,
        "operands": ids(traced.operands),
        "row": {
            "init": ids(row.init),
            "weights_online": row.weights_online.id,
            "new_state": ids(row.new_state),
            "factor": row.factor.id,
            "out_factor": row.out_factor.id,
            "saved": ids(row.saved),
            "weights": row.weights.id,
            "merged": None if row.merged is None else ids(row.merged),
            "merge_factors": None
            if row.merge_factors is None
            else [n.id for n in row.merge_factors],
        },
    }
    return json.dumps(data, separators=(",", ":"))


def with_isa(text: str, isa: str) -> str:
    """The same program for one instruction set, instead of the best of the machine that runs it."""
    return f"{text[:-1]},{json.dumps('isa')}:{json.dumps(isa)}}}"


def frozen(text: str) -> int:
    """Bit i: captured tensor i is floating and no gradient of it was asked for. A valid text."""
    captures = json.loads(text)["captures"]
    return sum(1 << i for i, (d, _, grad) in enumerate(captures) if d in FLOATS and not grad)


def load(text: str) -> Meaning:
    """Reads and checks a program. Raises ValueError that names what is wrong with it."""
    try:
        return _Reader(text).run()
    except _Invalid as error:
        raise ValueError(
            f"attnengine::attention: the exported program cannot be read: {error}"
        ) from None


class _Invalid(Exception):
    pass


def _expect(good: bool, text: str) -> None:
    if not good:
        raise _Invalid(f"{text}; the file is damaged: export the model again")


class _Reader:
    family = "attnengine"

    def __init__(self, text: str) -> None:
        _expect(len(text) <= _MAX_BYTES, f"{len(text)} characters, at most {_MAX_BYTES}")
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _Invalid(f"not JSON ({error}); export the model again") from None
        _expect(isinstance(data, dict), "not an object")
        if data.get(self.family) != FORMAT:
            raise _Invalid(
                f"it has format {data.get(self.family)!r} and this version of attnengine reads "
                f"format {FORMAT}: install the version that exported it, or export it again"
            )
        self.data: dict[str, Any] = data
        self.graph = Graph()
        self.nodes: list[Node] = []
        self.captures: list[tuple[str, int, bool]] = []

    def run(self) -> Meaning:
        element, dims = self.data.get("element"), [self.data.get("D"), self.data.get("Dv")]
        _expect(element in ("f32", "f64", "bf16", "f16"), f"element={element!r}")
        _expect(all(type(x) is int and x > 0 for x in dims), f"D, Dv={dims!r}")
        isa = self.data.get("isa")
        _expect(isa is None or isinstance(isa, str), f"isa={isa!r}")
        self.dtype = "f64" if element == "f64" else "f32"
        self.read_nodes()
        row = self.data.get("row")
        _expect(isinstance(row, dict), "row is missing")
        assert isinstance(row, dict)
        factors = row.get("merge_factors")
        merged = row.get("merged")
        both = (merged is None) == (factors is None)
        _expect(both and (factors is None or len(self.items(factors, "factors")) == 2), "merge")
        graphs = RowGraphs(
            self.named(row.get("init"), "init"),
            self.root(row.get("weights_online"), "weights_online"),
            self.named(row.get("new_state"), "new_state"),
            self.root(row.get("factor"), "factor"),
            self.root(row.get("out_factor"), "out_factor"),
            self.named(row.get("saved"), "saved"),
            self.root(row.get("weights"), "weights"),
            None if merged is None else self.named(merged, "merged"),
            None if factors is None else (
                self.root(factors[0], "merge factor"), self.root(factors[1], "merge factor")
            ),
        )  # fmt: skip
        states = set(graphs.init)
        _expect(set(graphs.new_state) == states, "new_state has other names than init")
        _expect(graphs.merged is None or set(graphs.merged) == states, "merged has other names")
        operands = self.named(self.data.get("operands"), "operands")
        _expect(set(operands) <= {"q", "k", "v"}, f"operands {sorted(operands)}")
        mask, score = self.data.get("mask"), self.data.get("score")
        traced = Traced(
            self.graph, self.dtype,
            None if mask is None else self.root(mask, "mask", "bool"),
            None if score is None else self.root(score, "score"),
            graphs, operands,
            self.kinds_of_captures(), tuple(range(len(self.captures))),
        )  # fmt: skip
        return Meaning(traced, TORCH_DTYPES[str(element)], dims[0], dims[1], isa)  # type: ignore[arg-type]

    # -- parts ----------------------------------------------------------------------------------
    def read_nodes(self) -> None:
        """The captured tensors and the scalar graph."""
        for item in self.items(self.data.get("captures"), "captures"):
            _expect(
                isinstance(item, list)
                and len(item) == 3
                and isinstance(item[0], str)
                and item[0] in TORCH_DTYPES
                and type(item[1]) is int
                and 0 <= item[1] <= _MAX_RANK
                and type(item[2]) is bool
                and (not item[2] or item[0] in FLOATS),
                f"captured tensor {item!r}",
            )
            self.captures.append((item[0], item[1], item[2]))
        for item in self.items(self.data.get("nodes"), "nodes"):
            self.node(item)

    def kinds_of_captures(self) -> tuple[torch.Tensor, ...]:
        """Tensors that have the captured ones' dtype, rank and need of a gradient, and no data."""
        return tuple(
            torch.empty((1,) * rank, dtype=TORCH_DTYPES[d], device="meta", requires_grad=grad)
            for d, rank, grad in self.captures
        )

    def items(self, x: Any, what: str) -> list:
        _expect(isinstance(x, list), f"{what} is not a list")
        return x

    def root(self, at: Any, what: str, dtype: str | None = None) -> Node:
        _expect(type(at) is int and 0 <= at < len(self.nodes), f"{what} is node {at!r}")
        node = self.nodes[at]
        _expect(node.dtype == (dtype or self.dtype), f"{what} has dtype {node.dtype}")
        return node

    def named(self, x: Any, what: str) -> dict[str, Node]:
        _expect(isinstance(x, dict), f"{what} is not an object")
        return {name: self.root(at, f"{what} {name!r}") for name, at in x.items()}

    def node(self, item: Any) -> None:
        here = len(self.nodes)
        _expect(
            isinstance(item, list)
            and len(item) in (3, 4)
            and isinstance(item[0], str)
            and isinstance(item[1], str)
            and item[1] in TORCH_DTYPES
            and isinstance(item[2], list)
            and all(type(a) is int and 0 <= a < here for a in item[2]),
            f"node {here} is {str(item)[:80]!r}",
        )
        op, dtype, attr = item[0], item[1], tuple(item[3:])
        args = [self.nodes[a] for a in item[2]]
        kinds = [a.dtype for a in args]
        why = self.fault(op, dtype, args, kinds, attr)
        _expect(not why, f"node {here} ({op[:40]!r}): {why}")
        vec = None
        if op == "input":
            vec = attr[0] in _VECTOR_INPUTS
        elif op == "splat":
            vec = True
        node = self.graph.node(op, args, dtype, attr, vec)
        _expect(node.id == here, f"node {here} repeats node {node.id}")
        self.nodes.append(node)

    def fault(
        self, op: str, dtype: str, args: list[Node], kinds: list[str], attr: tuple
    ) -> str | None:
        """What is wrong with a node, or None."""
        if op == "input":
            return self.input_fault(dtype, args, attr)
        if op == "const":
            good = not args and len(attr) == 1 and _is_constant(attr[0], dtype)
            return None if good else f"constant {str(attr)[:60]} of dtype {dtype}"
        if op == "gather":
            good = len(attr) == 1 and type(attr[0]) is int and 0 <= attr[0] < len(self.captures)
            if not good:
                return f"captured tensor {attr!r} of {len(self.captures)}"
            element, rank, _ = self.captures[attr[0]]
            if (dtype, len(args)) != (element, rank) or any(k not in INTS for k in kinds):
                return f"{len(args)} indices {kinds} into a {element} tensor of rank {rank}"
            return None
        if op not in TORCH_OPS and op not in ("cast", "splat"):
            return "no such operation"
        count = 3 if op == "select" else 2 if op in _BINARY else 1
        if attr or len(args) != count:
            return f"{len(args)} arguments, expected {count}"
        if op == "cast":
            return None
        if op in REDUCTIONS and not args[0].vec:
            return "reduces what is one value per row"
        values = kinds[1:] if op == "select" else kinds
        if op == "select" and kinds[0] != "bool":
            return f"chooses by {kinds[0]}"
        if len(set(values)) != 1 or (values[0] != dtype and op not in _TRUTH):
            return f"{kinds} to {dtype}"
        return None if dtype == "bool" or op not in _TRUTH else f"gives {dtype}, expected bool"

    def input_fault(self, dtype: str, args: list[Node], attr: tuple) -> str | None:
        name = attr[0] if len(attr) == 1 and not args else None
        if not isinstance(name, str):
            return "an input has one name and no arguments"
        if name in _INDEX_INPUTS:
            return None if dtype == "i64" else f"index {name} of dtype {dtype}"
        if name not in (*_VECTOR_INPUTS, "out") and not _ROW_INPUTS.fullmatch(name):
            return f"no such input {name[:40]!r}"
        return None if dtype == self.dtype else f"input {name[:40]!r} of dtype {dtype}"


def _is_constant(bits: Any, dtype: str) -> bool:
    """As :meth:`attnengine.ir.Graph.const` writes them: floats by their bits."""
    if not isinstance(bits, str):
        return False
    if dtype == "bool":
        return bits in ("True", "False")
    if dtype in INTS:
        if not re.fullmatch(r"-?[0-9]{1,20}", bits):
            return False
        if dtype == "u8":
            return 0 <= int(bits) < 256
        half = 1 << (_SIGNED_BITS[dtype] - 1)
        return -half <= int(bits) < half
    return re.fullmatch(r"[0-9a-f]{16}", bits) is not None
