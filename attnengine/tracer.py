"""Runs callables symbolically: from Python to the scalar graph.

``make_fx`` does the tracing; :mod:`attnengine.lower` turns its aten graph into scalars. A captured
tensor becomes a ``gather`` from a numbered capture, wherever and however often it is indexed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .aten import Array, Lowering, Unsupported, Value
from .errors import TraceError
from .ir import DTYPE_NAMES, FLOATS, TORCH_DTYPES, Graph, Node
from .lower import FxLowering
from .user_code import DATA_DEPENDENT, UserLines, codes_of, describe


@dataclass
class Tracer:
    """Traces callables into one graph. ``tensors`` are the captures; ``used`` those met so far."""

    graph: Graph
    tensors: Sequence[torch.Tensor]
    score_dtype: str
    used: dict[int, int] = field(default_factory=dict)  # position in tensors -> capture number
    extra: list[torch.Tensor] = field(default_factory=list)  # captured, but not found by the walk
    read_sizes: bool = False  # a callable asked a tensor for its sizes

    def __post_init__(self) -> None:
        self.positions = {id(t): i for i, t in enumerate(self.tensors)}

    def capture(self, tensor: torch.Tensor) -> int:
        at = self.positions.get(id(tensor))
        if at is None:
            at = self.positions[id(tensor)] = len(self.tensors) + len(self.extra)
            self.extra.append(tensor)
        return self.used.setdefault(at, len(self.used))

    def captured_tensors(self) -> list[torch.Tensor]:
        every = [*self.tensors, *self.extra]
        return [every[at] for at in self.used]

    def run(
        self,
        fn: Callable,
        arguments: Sequence[tuple[str, Value, torch.Tensor]],
        what: str,
        constants: Callable[[torch.Tensor], Value | None] | None = None,
        keys: int | None = None,
        low: Lowering | None = None,
    ) -> Any:
        """Trace ``fn`` on arguments (name, graph value, example); returns its lowered result."""
        module, lines = trace_fx(fn, [a[2] for a in arguments], what, guard=True)
        self.read_sizes |= lines.read_sizes
        low = low or Lowering(self.graph, keys)
        fresh = _inline_constants(module)

        def captured(tensor: torch.Tensor) -> Value | None:
            if not isinstance(tensor, torch.Tensor):
                raise Unsupported(f"{type(tensor).__name__}", "capture tensors and numbers")
            if id(tensor) in fresh:
                return None
            if tensor.device.type != "cpu":
                raise Unsupported(
                    f"a captured tensor on device {tensor.device}",
                    "capture tensors on the device of q, k and v (this backend: cpu)",
                )
            if tensor.dtype not in DTYPE_NAMES:
                raise Unsupported(f"a captured tensor of dtype {tensor.dtype}")
            if tensor.dim() > 8:
                raise Unsupported(f"a captured tensor of {tensor.dim()} dimensions (limit 8)")
            number = self.capture(tensor)
            return low.gather(number, tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])

        try:
            values = [a[1] for a in arguments]
            lowering = FxLowering(low, module, values, constants or captured, keep_detach=True)
            return lowering.run()
        except Unsupported as e:
            name = str(e).split(" ")[0].removeprefix("aten.").split(".")[0]
            where = lines.where(name) if lines else ""
            at = f" at {where}" if where else ""
            raise TraceError(f"{what} {describe(fn)}{at}: {e.explained()}") from None


def _inline_constants(module: torch.fx.GraphModule) -> set[int]:
    """ids of tensors that the function itself created (they enter through lift_fresh_copy)."""
    return {
        id(getattr(module, str(n.target)))
        for n in module.graph.nodes
        if n.op == "get_attr" and n.users and all("lift_fresh" in str(u.target) for u in n.users)
    }


_aten = torch.ops.aten
_ALSO_DECOMPOSED = (
    _aten._log_softmax.default, _aten._softmax.default, _aten.embedding.default,
    _aten.index_select.default, _aten.ldexp.Tensor,
    _aten.leaky_relu.default, _aten.linalg_vector_norm.default,
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def _decompositions() -> Mapping:
    from torch._decomp import core_aten_decompositions, decomposition_table

    table = dict(core_aten_decompositions())
    for op in _ALSO_DECOMPOSED:
        table[op] = decomposition_table[op]
    for name in ("gelu", "elu", "hardtanh", "softplus", "addmm", "index", "lift_fresh", "detach"):
        for op in [k for k in table if k.__name__.startswith(f"{name}.")]:
            del table[op]
    return table


def trace_fx(
    fn: Callable, examples: Sequence[torch.Tensor], what: str, guard: bool = False
) -> tuple[torch.fx.GraphModule, UserLines]:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = UserLines(codes_of(fn), guard)
    fake = any(isinstance(e, FakeTensor) for e in examples)  # only sizes: no data is computed

    def call(*args: torch.Tensor) -> Any:
        with mode:
            return fn(*args)

    try:
        with torch.enable_grad():
            tracer = make_fx(
                call, dict(_decompositions()), "fake" if fake else "real",
                _allow_non_fake_inputs=fake,
            )  # fmt: skip
            module = tracer(*(examples if fake else [e.clone() for e in examples]))
    except TraceError:
        raise
    except Exception as e:
        raise _trace_error(e, fn, what, mode) from e
    return module, mode


def _trace_error(e: Exception, fn: Callable, what: str, mode: UserLines) -> TraceError:
    line, tb = "", e.__traceback__
    while tb is not None:
        if tb.tb_frame.f_code in mode.codes:
            line = f"{tb.tb_frame.f_code.co_filename}:{tb.tb_lineno}"
        tb = tb.tb_next
    at = f" at {line or mode.where('')}"
    if isinstance(e, Unsupported):
        return TraceError(f"{what} {describe(fn)}{at}: {e.explained()}")
    text = str(e).split("\n")[0]
    if "_local_scalar_dense" in text or "data-dependent" in text:
        return TraceError(f"{what} {describe(fn)}{at}: {DATA_DEPENDENT}; use torch.where")
    return TraceError(f"{what} {describe(fn)}{at}: {type(e).__name__}: {text}")


# -- arguments and results of callables --------------------------------------------------------


def index_inputs(graph: Graph) -> list[tuple[str, Value, torch.Tensor]]:
    zero = torch.zeros((), dtype=torch.int64)
    return [(n, graph.input(n, "i64", vec=(n == "k")), zero.clone()) for n in ("b", "h", "q", "k")]


def example(dtype: str, keys: int | None = None) -> torch.Tensor:
    shape = () if keys is None else (keys,)
    return torch.full(shape, 0.5, dtype=TORCH_DTYPES[dtype])


def scalar_result(out: Any, fn: Any, what: str) -> Node:
    if isinstance(out, Array):
        raise TraceError(
            f"{what} {describe(fn)}: returned a tensor of shape {out.shape}, expected a 0-d "
            "tensor; index every dimension of a captured tensor"
        )
    if not isinstance(out, Node):
        raise TraceError(
            f"{what} {describe(fn)}: returned {type(out).__name__}, expected one 0-d tensor"
        )
    return out


def float_result(tr: Tracer, out: Any, fn: Any, what: str) -> Node:
    node = scalar_result(out, fn, what)
    if node.dtype not in FLOATS:
        raise TraceError(
            f"{what} {describe(fn)}: returned dtype {node.dtype}, expected a floating dtype"
        )
    return tr.graph.cast(node, tr.score_dtype)
