"""What every operator of an fx graph is lowered with: the values of nodes, and which of them change
a tensor in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx

from . import aten as A
from .aten import Array, Lowering, Unsupported, Value
from .ir import Graph, Node


class FxValues:
    """The values of one fx graph's nodes, as far as it has been walked. ``captured`` maps a
    get_attr tensor to its value, or None: a constant."""

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

    def value(self, x: Any) -> Any:
        return self.env[x] if isinstance(x, torch.fx.Node) else x

    def meta(self, x: Any) -> Any:
        return x.meta["val"] if isinstance(x, torch.fx.Node) else x

    def dtype(self, node: torch.fx.Node) -> str:
        meta = node.meta.get("val")
        return A.dtype_of(meta) if isinstance(meta, torch.Tensor) else "f32"

    def check_effects(self, node: torch.fx.Node) -> None:
        if not self.keep_detach and "copy_" in str(node.target):
            return  # autograd fills its own temporaries in place; op_copy_ follows them
        if mutates(node) and not temporary(node.args[0]):
            raise Unsupported(
                f"{node.target} on an input, a captured tensor or a view",
                "use the out-of-place operator; inputs and captured tensors are read-only",
            )

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


def mutates(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def temporary(x: Any) -> bool:
    """Whether a change of ``x`` in place is seen through ``x`` alone: made here, without views."""
    while isinstance(x, torch.fx.Node) and x.op == "call_function":
        for user in x.users:
            if aliases(user) and not mutates(user):
                return False
        if not aliases(x):
            return True
        if not mutates(x):
            return False
        x = x.args[0]
    return False


def aliases(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def live(module: torch.fx.GraphModule) -> set[torch.fx.Node]:
    """Nodes whose value the output needs (what the tracer recorded and then dropped is skipped)."""
    found: set[torch.fx.Node] = set()
    stack = [n for n in module.graph.nodes if n.op == "output"]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
