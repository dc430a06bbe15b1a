"""The meaning of a spec: dense, slow, plain PyTorch. Every kernel is checked against it.

A dead key is absent, literally: score_mod is evaluated, and the row function applied, on live keys
only, so nothing that a dead key could compute exists. Rows with equally many live keys share one
vmapped call of ``update``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .errors import TraceError
from .products import Aggregate, Precision, Round, Scores, rounded
from .spec import AttentionSpec, State


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Any,
    *,
    return_aux: bool = False,
    dtype: torch.dtype | None = None,
    **others: Any,
) -> Any:
    """Attention as the spec means it, with autograd through inputs and captured tensors.

    q [B, Hq, L, D], k [B or 1, Hkv, S, D], v [B or 1, Hkv, S, Dv], Hq a multiple of Hkv.
    Computes in fp64 for fp64 inputs, else in fp32, and returns out [B, Hq, L, Dv] in q's dtype.
    ``dtype`` overrides: everything, captured fp32 tensors included, is computed and returned in it
    (torch.float64: the golden result on the rounded inputs). With return_aux also returns the saved
    row statistics, name -> [B, Hq, L]. Raises ValueError for shapes that do not fit together and
    TraceError for a mod that does not return one number.

    With a LinearAttentionSpec: the token-by-token recurrence; arguments as of
    ``ae.linear_attention``, and ``dtype``.
    """
    if type(spec) in _MEANINGS:
        aux = {"return_aux": return_aux} if return_aux else {}
        return _MEANINGS[type(spec)](q, k, v, spec, dtype=dtype, **aux, **others)
    if others:
        names = ", ".join(others)
        raise TypeError(f"reference: {names} given, which {type(spec).__name__} does not have")
    wide = dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)
    out, saved = evaluate(q, k, v, spec, Precision(wide, upcast=dtype is not None))
    out = out if dtype is not None else out.to(q.dtype)
    return (out, saved) if return_aux else out


_MEANINGS: dict[type, Callable[..., Any]] = {}


def means(kind: type, evaluate: Callable[..., Any]) -> None:
    """Makes :func:`reference` serve another kind of spec, defined later in the pipeline."""
    _MEANINGS[kind] = evaluate


def ideal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    mma_dtype: torch.dtype | None = None,
    *,
    return_aux: bool = False,
) -> Any:
    """What the best possible flash kernel computes: fp32 scores, weights rounded to ``mma_dtype``
    (default: q's dtype), fp32 sums, output rounded; backward with rounded weights in dV, rounded
    score gradients in dQ and dK, and row statistics' gradients from the rounded output."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    mma = mma_dtype or q.dtype
    out, saved = evaluate(
        q, k, v, spec, Precision(acc, mma=None if mma == acc else mma, store=q.dtype)
    )
    return (out.to(q.dtype), saved) if return_aux else out.to(q.dtype)


def eager(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, *, return_aux: bool = False) -> Any:
    """What dense PyTorch in q's dtype computes: the scores and their gradients are rounded too."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    mma = None if q.dtype == acc else q.dtype
    out, saved = evaluate(q, k, v, spec, Precision(acc, mma=mma, store=q.dtype, dense=True))
    return (out.to(q.dtype), saved) if return_aux else out.to(q.dtype)


def evaluate(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, precision: Precision
) -> tuple[Tensor, State]:
    """The steps of :func:`reference`: the output and the saved statistics, in ``precision.acc``."""
    _check_shapes(q, k, v)
    mods = Mods(precision.acc if precision.upcast else None)
    acc, (b, hq, length, d), (hkv, keys) = precision.acc, q.shape, k.shape[1:3]
    scale = 1.0 / math.sqrt(d) if spec.scale is None else spec.scale
    live = _mask(mods, spec.mask_mod, (b, hq, length, keys), q.device)

    def operand(name: str, x: Tensor, used: Tensor) -> Tensor:
        fn, x = getattr(spec, name), x.to(acc)
        if fn is None:
            return x
        wrapped = _number(fn, name)
        with mods:
            y = torch.vmap(wrapped)(x[used].flatten()) if used.any() else x[used]
        y = torch.zeros_like(x).index_put((used,), y.view(-1, x.shape[-1]).to(acc))
        return Round.apply(y, precision, False)

    def key_operand(name: str, x: Tensor, live: Tensor) -> Tensor:
        used = live.view(b, hkv, hq // hkv, length, keys).any(3).any(2)
        used = used if x.shape[0] == b else used.any(0, keepdim=True)
        x = operand(name, x, used).expand(b, -1, -1, -1)
        return x.repeat_interleave(hq // hkv, 1)

    def scored(live: Tensor) -> tuple[_Pairs, Tensor]:
        pairs = _Pairs(live)
        qk = (operand("q_mod", q, live.any(-1)), key_operand("k_mod", k, live))
        s = Scores.apply(*qk, live, precision)
        if precision.dense:
            s = Round.apply(s, precision, True)
        raw = s.flatten()[pairs.at] * scale
        x = raw if spec.score_mod is None else pairs.map(mods, spec.score_mod, raw).to(acc)
        return pairs, Round.apply(x, precision, True) if precision.dense or precision.loud else x

    pairs, x = scored(live)
    alive = x.detach() != -math.inf
    if not alive.all():  # dead as well: evaluate again without them, so that no gradient meets them
        live = live.flatten().index_put((pairs.at,), alive).view_as(live)
        pairs, x = scored(live)
    values = key_operand("v_mod", v, live)

    start = pairs.init(mods, spec.row_func.init, acc)
    weights, state = pairs.update(mods, spec.row_func.update, x, start)
    finalize = _finalize(mods, spec.row_func.finalize, acc)

    dense = torch.zeros_like(live, dtype=acc).flatten().index_copy(0, pairs.at, weights)
    rows = Aggregate.apply(dense.view_as(live), values, live, precision)
    rows = rows.flatten(0, 2)[pairs.order]
    if precision.mma is not None:
        rows = _stored(rows, finalize, state, precision.store or precision.mma)
    rows = rows + precision.error(rows.detach()) if precision.unit else rows

    out, saved = finalize(rows, state)
    dead = {name: x[pairs.dead] for name, x in start.items()}
    empty = finalize(rows.new_zeros(pairs.dead.numel(), v.shape[-1]), dead)[1]
    where = torch.cat([pairs.order, pairs.dead]).argsort()
    saved = {n: torch.cat([saved[n], empty[n]])[where].view(b, hq, length) for n in saved}
    full = out.new_zeros(b * hq * length, v.shape[-1]).index_copy(0, pairs.order, out)
    if x.numel() == 0:  # nothing is live: still a function of the inputs, with gradients of zero
        full = full + sum(t.flatten()[:0].sum(dtype=acc) for t in (q, k, v))
    return full.view(b, hq, length, v.shape[-1]), saved


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"q, k and v must be 4-D [B, H, length, head_dim]; got {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one head_dim; got {shapes}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(f"k and v must have the same heads and length; got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"q's heads must be a multiple of k's; got {shapes}")
    if not {k.shape[0], v.shape[0]} <= {1, q.shape[0]}:
        raise ValueError(f"k's and v's batch must be q's or 1; got {shapes}")


# -- the user's callables --------------------------------------------------------------------------


class Mods(TorchFunctionMode):
    """Lets 0-d tensors index under vmap (``t[i]`` is an ``aten.index``), and reads fp32 tensors
    in a wider dtype where asked, so that golden gradients are also summed in it."""

    def __init__(self, wide: torch.dtype | None) -> None:
        super().__init__()
        self.wide = wide
        self.widened: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if self.wide is not None:
            args = tuple(self.widen(a) for a in args)
            kwargs = {name: self.widen(a) for name, a in (kwargs or {}).items()}
        if func is Tensor.__getitem__:
            return gather(*args)
        return func(*args, **(kwargs or {}))

    def widen(self, x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(self.widen(i) for i in x)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == self.wide:
            return x
        key = (id(x), torch.is_grad_enabled())
        if key not in self.widened:
            self.widened[key] = (x, x.to(self.wide))
        return self.widened[key][1]


def gather(tensor: Tensor, item: Any) -> Tensor:
    """``tensor[item]`` as ``aten.index`` where the item has 0-d tensors (vmap cannot do ``[]``)."""
    items = item if isinstance(item, tuple) else (item,)
    if not any(isinstance(i, Tensor) for i in items):
        return Tensor.__getitem__(tensor, item)
    at = next((n for n, i in enumerate(items) if i is Ellipsis), None)
    if at is not None:
        full = tensor.dim() - sum(1 for i in items if i is not None) + 1
        items = items[:at] + (slice(None),) * full + items[at + 1 :]
    plain = tuple(slice(None) if isinstance(i, Tensor) else i for i in items)
    basic = tensor if all(p == slice(None) for p in plain) else tensor[plain]
    rest = [i for i in items if not isinstance(i, int) or isinstance(i, bool)]
    return torch.ops.aten.index(basic, [i if isinstance(i, Tensor) else None for i in rest])


def _number(fn: Callable[..., Any], name: str, dtype: torch.dtype | None = None) -> Callable:
    """``fn``, checked to return one number: boolean for a mask, else floating."""

    def call(*args: Tensor) -> Tensor:
        out = fn(*args)
        if not isinstance(out, Tensor):
            out = torch.as_tensor(out, device=args[0].device)
        if out.dim() != 0:
            shape = tuple(out.shape)
            raise TraceError(f"{name}: returned a tensor of shape {shape}, expected a 0-d tensor")
        if not (out.dtype == torch.bool if name == "mask_mod" else out.is_floating_point()):
            kind = "bool" if name == "mask_mod" else "a floating dtype"
            raise TraceError(f"{name}: returned dtype {out.dtype}, expected {kind}")
        return out

    return call


def _mask(mods: Mods, fn: Callable | None, shape: tuple, device: torch.device) -> Tensor:
    """The mask [B, H, L, S], True where a pair meets."""
    if fn is None or 0 in shape:
        return torch.ones(shape, dtype=torch.bool, device=device)
    call = _number(fn, "mask_mod")
    for axis in (3, 2, 1, 0):
        call = torch.vmap(call, in_dims=tuple(0 if n == axis else None for n in range(4)))
    with torch.no_grad(), mods:
        return call(*[torch.arange(n, device=device) for n in shape]).clone()


def _finalize(mods: Mods, fn: Callable, acc: torch.dtype) -> Callable:
    """``finalize`` over rows [R, Dv] with states [R]."""

    def call(out: Tensor, state: State) -> tuple[Tensor, State]:
        out, saved = fn(out, state)
        return out, _scalars(saved, acc, out.device)

    def rows(out: Tensor, state: State) -> tuple[Tensor, State]:
        return _vmap(mods, call, out, state)

    return rows


def _vmap(mods: Mods, fn: Callable, *columns: Any) -> Any:
    """vmap over rows, also over none (which torch.vmap cannot do: a row of zeros stands in)."""
    first = columns[0]
    with mods:
        if first.shape[0] != 0:
            return torch.vmap(fn)(*columns)
        one = [_each(c, lambda x: x.new_zeros(1, *x.shape[1:])) for c in columns]
        return _each(torch.vmap(fn)(*one), lambda x: x[:0])


def _each(x: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(x, dict):
        return {name: fn(t) for name, t in x.items()}
    return tuple(_each(t, fn) for t in x) if isinstance(x, tuple) else fn(x)


def _scalars(values: State, acc: torch.dtype, device: torch.device) -> State:
    return {n: torch.as_tensor(x, device=device).to(acc) for n, x in values.items()}


class _Pairs:
    """The live (row, key) pairs, rows with few live keys first. Rows are (b, h, q) flattened."""

    def __init__(self, live: Tensor) -> None:
        self.heads, self.length, self.keys = live.shape[1:]
        row, key = live.flatten(0, 2).nonzero(as_tuple=True)
        counts = live.flatten(0, 2).sum(-1)
        self.dead = (counts == 0).nonzero()[:, 0]
        alive = counts.nonzero()[:, 0]
        self.order = alive[counts[alive].argsort(stable=True)]
        self.counts = counts[self.order]
        self.starts = self.counts.cumsum(0) - self.counts
        moved = (counts.cumsum(0) - counts)[self.order] - self.starts
        by_count = moved.repeat_interleave(self.counts) + torch.arange(
            row.numel(), device=live.device
        )
        self.row, self.key = row[by_count], key[by_count]
        self.at = self.row * self.keys + self.key

    def indices(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """b, h, q_idx of rows."""
        h, length = self.heads, self.length
        return row // max(1, h * length), row // max(1, length) % h, row % max(1, length)

    def map(self, mods: Mods, fn: Callable, scores: Tensor) -> Tensor:
        """score_mod on scores [pairs]. The rows are padded to one length with their own last live
        key: a live value computed twice, never a dead one."""
        if scores.numel() == 0:
            return scores
        j = torch.arange(int(self.counts[-1]), device=scores.device)
        at = self.starts[:, None] + torch.minimum(j, self.counts[:, None] - 1)
        inner = torch.vmap(_number(fn, "score_mod"), in_dims=(0, None, None, None, 0))
        with mods:
            out = torch.vmap(inner)(scores[at], *self.indices(self.order), self.key[at])
        return out[j < self.counts[:, None]]

    def init(self, mods: Mods, fn: Callable, acc: torch.dtype) -> State:
        """Initial states of all rows."""
        row = torch.cat([self.order, self.dead]).sort()[0]

        def call(*index: Tensor) -> State:
            return _scalars(fn(*index), acc, row.device)

        return _vmap(mods, call, *self.indices(row))

    def update(
        self, mods: Mods, fn: Callable, scores: Tensor, start: State
    ) -> tuple[Tensor, State]:
        """Weights [pairs] and states of the live rows, each row's live keys in one tile."""

        def call(x: Tensor, state: State) -> tuple[Tensor, State]:
            w, new, _ = fn(x, state)
            return w.to(x.dtype), _scalars(new, x.dtype, x.device)

        state = {name: x[self.order] for name, x in start.items()}
        if scores.numel() == 0:
            return scores, state
        sizes, rows = self.counts.unique_consecutive(return_counts=True)
        groups = list(zip(sizes.tolist(), rows.tolist(), strict=True))
        tiles = scores.split([n * r for n, r in groups])
        states = {name: x.split([r for _, r in groups]) for name, x in state.items()}
        weights, after = [], []
        for g, (n, r) in enumerate(groups):
            with mods:
                tile_state = {name: x[g] for name, x in states.items()}
                w, new = torch.vmap(call)(tiles[g].view(r, n), tile_state)
            weights.append(w.flatten())
            after.append(new)
        return torch.cat(weights), {name: torch.cat([a[name] for a in after]) for name in state}


def _stored(rows: Tensor, finalize: Callable, state: State, store: torch.dtype) -> Tensor:
    """Rows that finalize to the output as stored. A backward kernel takes rowsum(dO * O) from the
    stored output, so the gradients of the row statistics must see its rounding too."""
    with torch.no_grad():
        factor = finalize(torch.ones_like(rows[:, :1]), state)[0]
        value = rounded(rows * factor, store) / factor
        shift = torch.where(value.isfinite(), value - rows, 0.0)
    return rows + shift
