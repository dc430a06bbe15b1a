"""Runs the user's callables symbolically: from Python to the scalar graph.

``make_fx`` does the tracing; :mod:`attnengine.lower` turns its aten graph into scalars. A captured
tensor becomes a ``gather`` from a numbered capture, wherever and however often it is indexed.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .aten import Array, Lowering, Unsupported, Value
from .errors import TraceError
from .ir import DTYPE_NAMES, FLOATS, TORCH_DTYPES, Graph, Node, is_const, rename_inputs
from .lower import FxLowering

KEYS = 7  # traced length of a row of scores; no graph may depend on it


_READS = (
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__",
    "__array__", "__contains__",
)  # fmt: skip
_SIZES = ("size", "numel", "nelement", "stride", "__len__", "view_as", "reshape_as")
_DATA_DEPENDENT = "a branch or .item() on a tensor is data-dependent"


class _UserLines(TorchFunctionMode):
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
            raise Unsupported(_DATA_DEPENDENT, "use torch.where", stated=True)
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


def _codes(fn: Any) -> set[types.CodeType]:
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
) -> tuple[torch.fx.GraphModule, _UserLines]:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = _UserLines(_codes(fn), guard)
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


def _trace_error(e: Exception, fn: Callable, what: str, mode: _UserLines) -> TraceError:
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
        return TraceError(f"{what} {describe(fn)}{at}: {_DATA_DEPENDENT}; use torch.where")
    return TraceError(f"{what} {describe(fn)}{at}: {type(e).__name__}: {text}")


# -- the callables of a spec --------------------------------------------------------------------


def index_inputs(graph: Graph) -> list[tuple[str, Value, torch.Tensor]]:
    zero = torch.zeros((), dtype=torch.int64)
    return [(n, graph.input(n, "i64", vec=(n == "k")), zero.clone()) for n in ("b", "h", "q", "k")]


def example(dtype: str, keys: int | None = None) -> torch.Tensor:
    shape = () if keys is None else (keys,)
    return torch.full(shape, 0.5, dtype=TORCH_DTYPES[dtype])


def trace_mask(tr: Tracer, fn: Callable) -> Node:
    """mask_mod(b, h, q_idx, kv_idx) -> bool scalar."""
    out = tr.run(fn, index_inputs(tr.graph), "mask_mod")
    node = scalar_result(out, fn, "mask_mod")
    if node.dtype != "bool":
        raise TraceError(
            f"mask_mod {describe(fn)}: returned dtype {node.dtype}, expected bool "
            "(compare, or use .bool())"
        )
    return node


def trace_score(tr: Tracer, fn: Callable) -> Node:
    """score_mod(score, b, h, q_idx, kv_idx) -> score scalar."""
    d = tr.score_dtype
    score = ("score", tr.graph.input("score", d, vec=True), example(d))
    out = tr.run(fn, [score, *index_inputs(tr.graph)], "score_mod")
    return float_result(tr, out, fn, "score_mod")


def trace_operand(tr: Tracer, fn: Callable, what: str) -> Node:
    """q_mod, k_mod, v_mod: x -> x, elementwise."""
    d = tr.score_dtype
    out = tr.run(fn, [("x", tr.graph.input("x", d, vec=True), example(d))], what)
    return float_result(tr, out, fn, what)


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


@dataclass(frozen=True)
class RowGraphs:
    """A traced row function. Inputs: ``scores`` (vec), ``state:NAME``, ``saved:NAME``, ``out``."""

    init: dict[str, Node]
    weights_online: Node
    new_state: dict[str, Node]
    factor: Node
    out_factor: Node
    saved: dict[str, Node]  # in terms of state:NAME
    weights: Node  # in terms of scores and saved:NAME
    merged: dict[str, Node] | None  # in terms of a:NAME and b:NAME
    merge_factors: tuple[Node, Node] | None


def trace_row(tr: Tracer, func: Any) -> RowGraphs:
    g, d = tr.graph, tr.score_dtype
    name = type(func).__name__

    def number(x: Any) -> Any:
        return x if isinstance(x, torch.Tensor) else torch.as_tensor(x, dtype=TORCH_DTYPES[d])

    def cast(x: Any, what: str) -> Node:
        if not isinstance(x, (Node, Array)):
            return g.const(float(x), d)
        return g.cast(scalar_result(x, func.update, f"{name}.{what}"), d)

    if callable(getattr(func, "init", None)):
        indices = index_inputs(g)[:3]
        keys = list(func.init(*[i[2] for i in indices]))
        out = tr.run(
            lambda *a: [number(v) for v in func.init(*a).values()], indices, f"{name}.init"
        )
        init = {k: cast(v, "init") for k, v in zip(keys, out, strict=True)}
    else:
        init = {k: g.const(float(v), d) for k, v in func.state.items()}
    names = tuple(init)
    states = [(f"state:{n}", g.input(f"state:{n}", d), example(d)) for n in names]
    scores = ("scores", g.input("scores", d, vec=True), example(d, KEYS))

    def run_update(x: torch.Tensor, *state: torch.Tensor) -> list:
        w, new, factor = func.update(x, dict(zip(names, state, strict=True)))
        if not isinstance(new, dict) or set(new) != set(names):
            raise TraceError(
                f"{name}.update: the new state has keys {sorted(new)}, expected {sorted(names)}"
            )
        for n in names:
            if isinstance(new[n], torch.Tensor) and new[n].numel() != 1:
                raise TraceError(
                    f"{name}.update: state {n!r} became shape {tuple(new[n].shape)}, expected a "
                    "scalar; reduce it over the keys"
                )
        if not isinstance(w, torch.Tensor) or w.shape != x.shape:
            shape = tuple(w.shape) if isinstance(w, torch.Tensor) else type(w).__name__
            raise TraceError(f"{name}.update: weights have shape {shape}, expected [N] like scores")
        return [w, number(factor), *[number(new[n]) for n in names]]

    out = tr.run(_like(run_update, func.update), [scores, *states], f"{name}.update", keys=KEYS)
    online = as_vec(g, g.cast(out[0], d))
    factor = cast(out[1], "update")
    new_state = {n: cast(v, "update") for n, v in zip(names, out[2:], strict=True)}

    saved_names: list[str] = []

    def run_finalize(x: torch.Tensor, *state: torch.Tensor) -> list:
        y, saved = func.finalize(x, dict(zip(names, state, strict=True)))
        saved_names[:] = list(saved)
        return [y, *[number(v) for v in saved.values()]]

    o = ("out", g.input("out", d), example(d))
    out = tr.run(_like(run_finalize, func.finalize), [o, *states], f"{name}.finalize")
    out_row = cast(out[0], "finalize")
    saved = {n: cast(v, "finalize") for n, v in zip(saved_names, out[1:], strict=True)}
    (out_factor,) = rename_inputs(g, [out_row], {"out": g.const(1.0, d)})
    out_factor = _simplified(g, out_factor)

    stats = [(f"saved:{n}", g.input(f"saved:{n}", d), example(d)) for n in saved]

    def run_weights(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return func.weights(x, dict(zip(saved, values, strict=True)))

    w = tr.run(_like(run_weights, func.weights), [scores, *stats], f"{name}.weights", keys=KEYS)
    weights = as_vec(g, g.cast(w, d))
    merged, factors = None, None
    if has_merge(func):
        a = [(f"a:{n}", g.input(f"a:{n}", d), example(d)) for n in names]
        b = [(f"b:{n}", g.input(f"b:{n}", d), example(d)) for n in names]

        def run_merge(*values: torch.Tensor) -> list:
            left = dict(zip(names, values[: len(names)], strict=True))
            right = dict(zip(names, values[len(names) :], strict=True))
            new, fa, fb = func.merge(left, right)
            return [number(fa), number(fb), *[number(new[n]) for n in names]]

        out = tr.run(_like(run_merge, func.merge), [*a, *b], f"{name}.merge")
        factors = (cast(out[0], "merge"), cast(out[1], "merge"))
        merged = {n: cast(v, "merge") for n, v in zip(names, out[2:], strict=True)}
    return RowGraphs(init, online, new_state, factor, out_factor, saved, weights, merged, factors)


def has_merge(func: Any) -> bool:
    """Whether a row function defines ``merge`` (the base class's declines)."""
    from .spec import OnlineFunc

    return getattr(type(func), "merge", None) not in (None, OnlineFunc.merge)


def _like(wrapper: Callable, user: Callable) -> Callable:
    """``wrapper`` with the user's function findable for line numbers."""
    wrapper.__wrapped_user__ = user  # type: ignore[attr-defined]
    return wrapper


def as_vec(g: Graph, node: Node) -> Node:
    return node if node.vec else g.node("splat", (node,), node.dtype, (), True)


def _simplified(g: Graph, node: Node) -> Node:
    if node.op == "mul" and is_const(node.args[0], 1):
        return node.args[1]
    return node


def positional_count(fn: Callable) -> int:
    """Positional parameters without a default (how score_mod and mask_mod are told apart)."""
    return sum(
        1
        for p in inspect.signature(fn).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    )


@dataclass(frozen=True)
class Traced:
    """A whole spec as graphs over one hash-consed :class:`~attnengine.ir.Graph`.

    ``captures`` are the tensors that the graphs read, in capture-number order; ``positions`` says
    where each stands in the spec's captured tensors (or past their end: found only by tracing).
    """

    graph: Graph
    dtype: str
    mask: Node | None
    score: Node | None  # in terms of the scaled score, input "score"
    row: RowGraphs
    operands: dict[str, Node]  # "q", "k", "v" -> x -> x
    captures: tuple[torch.Tensor, ...]
    positions: tuple[int, ...]


def trace(spec: Any, tensors: Sequence[torch.Tensor], dtype: str) -> Traced:
    """Trace every callable of ``spec``. ``dtype`` is the score's: "f32", or "f64" for fp64 inputs.

    Raises TraceError naming the callable, its line, the operator and what to use instead.
    """
    tr = Tracer(Graph(), tensors, dtype)
    mask = trace_mask(tr, spec.mask_mod) if spec.mask_mod is not None else None
    if mask is not None and is_const(mask, 1):
        mask = None
    score = trace_score(tr, spec.score_mod) if spec.score_mod is not None else None
    if score is not None and score is tr.graph.input("score", dtype, vec=True):
        score = None
    row = trace_row(tr, spec.row_func)
    operands = {}
    for name in ("q", "k", "v"):
        fn = getattr(spec, f"{name}_mod")
        if fn is not None:
            node = trace_operand(tr, fn, f"{name}_mod")
            if node is not tr.graph.input("x", dtype, vec=True):
                operands[name] = node
    return Traced(
        tr.graph, dtype, mask, score, row, operands, tuple(tr.captured_tensors()), tuple(tr.used)
    )
