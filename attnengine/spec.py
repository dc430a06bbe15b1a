"""What a user says: an :class:`AttentionSpec` of PyTorch callables and an :class:`OnlineFunc`.

``Softmax`` lives here because it is the default of a spec; the other row functions are in
:mod:`attnengine.rows`.
"""

from __future__ import annotations

import inspect
import math
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .errors import RowFunctionError

State = dict[str, Any]


class OnlineFunc:
    """How one row of scores becomes weights: written once, forward only, a tile of keys at a time.

    ``state`` (or :meth:`init`) holds the row's running scalars. A subclass defines :meth:`update`,
    :meth:`finalize` and :meth:`weights`; :meth:`merge` is optional and enables split work. Keys
    that are masked, past the end, or scored -inf are absent: no method ever sees them.
    """

    state: dict[str, float] = {}

    def init(self, b: Tensor, h: Tensor, q_idx: Tensor) -> State:
        """Initial state of row (b, h, q_idx), all 0-d int64; values are 0-d tensors or floats.

        May read captured tensors (``self.sink[h]``), which then get gradients.
        """
        return dict(self.state)

    def update(self, scores: Tensor, state: State) -> tuple[Tensor, State, Any]:
        """Scores [N] of a tile's live keys -> (weights [N], new state, factor of old output)."""
        raise NotImplementedError(f"{type(self).__name__} must define update(scores, state)")

    def finalize(self, out: Tensor, state: State) -> tuple[Tensor, State]:
        """Output row times one number -> (output row, saved row statistics, 0-d each)."""
        raise NotImplementedError(f"{type(self).__name__} must define finalize(out, state)")

    def weights(self, scores: Tensor, saved: State) -> Tensor:
        """Final weights [N] from the saved statistics: output row = sum of weights[k] * v[k]."""
        raise NotImplementedError(f"{type(self).__name__} must define weights(scores, saved)")

    def merge(self, a: State, b: State) -> tuple[State, Any, Any]:
        """States of two parts of a row -> (state of both, factor of a's output, factor of b's).

        Both parts start from the initial state, and both have seen a live key.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define merge(a, b)")


class Softmax(OnlineFunc):
    """exp(s - lse), lse = log sum exp(s). Online form: Milakov and Gimelshein, arXiv:1805.02867.

    Saves ``lse`` (natural log) and, if asked, ``max_scores`` (the row's largest score, detached).
    """

    state = {"m": -math.inf, "r": 0.0}

    def __init__(self, max_scores: bool = False) -> None:
        self.max_scores = bool(max_scores)

    def update(self, scores: Tensor, state: State) -> tuple[Tensor, State, Any]:
        m = torch.maximum(state["m"], scores.amax().detach())
        alpha = torch.exp(state["m"] - m)
        p = torch.exp(scores - m)
        return p, {"m": m, "r": state["r"] * alpha + p.sum()}, alpha

    def finalize(self, out: Tensor, state: State) -> tuple[Tensor, State]:
        saved = {"lse": state["m"] + torch.log(state["r"])}
        if self.max_scores:
            saved["max_scores"] = state["m"].detach()
        return out / state["r"], saved

    def weights(self, scores: Tensor, saved: State) -> Tensor:
        return torch.exp(scores - saved["lse"])

    def merge(self, a: State, b: State) -> tuple[State, Any, Any]:
        m = torch.maximum(a["m"], b["m"])
        fa, fb = torch.exp(a["m"] - m), torch.exp(b["m"] - m)
        return {"m": m, "r": a["r"] * fa + b["r"] * fb}, fa, fb


@dataclass(frozen=True)
class AttentionSpec:
    """The meaning of one attention variant.

    score_mod: ``(score, b, h, q_idx, kv_idx) -> score``, after the scale; every argument 0-d.
    mask_mod: ``(b, h, q_idx, kv_idx) -> bool``; False means that the key is absent.
    row_func: an :class:`OnlineFunc` instance. q_mod, k_mod, v_mod: ``x -> x``, elementwise.
    scale: factor of q.k; None is 1/sqrt(D). ``h`` is the query head. A spec keeps the tensors that
    its callables read at the first call: new values in place are seen, but where a module gets
    other tensors (``load_state_dict(assign=True)``, ``functional_call``) make a new spec.

    Raises TypeError or ValueError for a callable of the wrong kind or arity and for a scale that is
    not finite, RowFunctionError for a row function that breaks a rule (see check_row_function).
    """

    score_mod: Callable[..., Tensor] | None = None
    mask_mod: Callable[..., Tensor] | None = None
    row_func: OnlineFunc = Softmax()
    q_mod: Callable[[Tensor], Tensor] | None = None
    k_mod: Callable[[Tensor], Tensor] | None = None
    v_mod: Callable[[Tensor], Tensor] | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        for name, form in _FORMS.items():
            _check_callable(name, getattr(self, name), form)
        if self.scale is not None:
            object.__setattr__(self, "scale", _finite("scale", self.scale))
        if not isinstance(self.row_func, OnlineFunc):
            hint = (
                f"; pass an instance: {self.row_func.__name__}(...)"
                if isinstance(self.row_func, type) and issubclass(self.row_func, OnlineFunc)
                else ""
            )
            raise TypeError(f"row_func={self.row_func!r}: expected an OnlineFunc instance{hint}")
        check_row_function(self.row_func)

    def __getstate__(self) -> dict[str, Any]:
        return said(self)


def said(spec: Any) -> dict[str, Any]:
    """What a copy or a pickle of a spec keeps: not the kernels that calls left on it, which are
    bound to its captured tensors."""
    bound = ("_captures", "_handle", "_handles", "_linear")
    return {n: x for n, x in vars(spec).items() if n not in bound}


_FORMS = {
    "score_mod": "score_mod(score, b, h, q_idx, kv_idx)",
    "mask_mod": "mask_mod(b, h, q_idx, kv_idx)",
    "q_mod": "q_mod(x)",
    "k_mod": "k_mod(x)",
    "v_mod": "v_mod(x)",
}


def _check_callable(name: str, fn: Any, form: str) -> None:
    if fn is None:
        return
    if not callable(fn):
        raise TypeError(f"{name}={fn!r}: expected a callable {form} or None")
    if (
        isinstance(fn, types.FunctionType)
        and fn.__code__.co_argcount == form.count(",") + 1
        and not fn.__defaults__
        and not fn.__code__.co_kwonlyargcount
    ):
        return  # the usual lambda, without the cost of inspect.signature
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # builtins such as torch.tanh carry no signature
        return
    try:
        signature.bind(*[None] * (form.count(",") + 1))
    except TypeError as e:
        raise TypeError(
            f"{name} takes {form.count(',') + 1} positional arguments, {form}; "
            f"got {getattr(fn, '__qualname__', fn)}{signature}: {e}"
        ) from None


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}: expected a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: expected a finite number")
    return float(value)


# -- the rules of row functions --------------------------------------------------------------------

_KEYS = 13  # keys of the trial row: enough for tiles of 1 and tiles of several
_TOLERANCE = 1e-9  # relative to the largest value; two orders of summation in fp64 differ by 1e-14
_checked: weakref.WeakKeyDictionary[type, set] = weakref.WeakKeyDictionary()


def check_row_function(func: OnlineFunc) -> None:
    """Check in fp64, over random tilings of random rows, the rules that kernels rely on.

    1. ``update`` keeps the state's names, returns [N] weights and 0-d numbers.
    2. ``finalize`` multiplies the output row by one number that does not depend on the row.
    3. ``update`` + ``finalize`` give the same weights and statistics for every tiling.
    4. ``weights(scores, saved)`` are those weights, and have the same gradient.
    5. ``merge``, if defined, gives what one pass over both parts gives.

    Raises RowFunctionError, which names the rule and shows the numbers. Passes once per class and
    configuration (attributes; of tensors, their kind), then is remembered.
    """
    key = _configuration(func)
    if key is not None and key in _checked.get(type(func), ()):
        return
    with torch.inference_mode(False), torch.no_grad():
        _RowCheck(func).run()
    if key is not None:
        _checked.setdefault(type(func), set()).add(key)


def _configuration(func: OnlineFunc) -> tuple | None:
    """Hashable description of a row function's attributes; None where there is none."""

    def token(x: Any) -> Any:
        if isinstance(x, Tensor):
            return (Tensor, tuple(x.shape), x.dtype, str(x.device), x.requires_grad)
        return (type(x), x)

    key = tuple((name, token(x)) for name, x in sorted(vars(func).items()))
    try:
        hash(key)
    except TypeError:
        return None
    return key


class _RowCheck:
    def __init__(self, func: OnlineFunc) -> None:
        self.func = func
        tensors = [x for x in vars(func).values() if isinstance(x, Tensor)]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.generator = torch.Generator().manual_seed(0)
        self.differentiable = not any(t.is_inference() for t in tensors)
        self.names: list[str] = []

    def fail(self, rule: str, detail: str) -> None:
        raise RowFunctionError(f"row function {type(self.func).__name__}: {rule}: {detail}")

    def scalars(self, values: Any, where: str, names: list[str] | None = None) -> State:
        if not isinstance(values, dict):
            self.fail("state is a dict of scalars", f"{where} gave {type(values).__name__}")
        if names is not None and sorted(values) != sorted(names):
            self.fail(
                "update keeps the state's names",
                f"{where} gave {sorted(values)}, the initial state has {sorted(names)}",
            )
        return {k: self.scalar(v, f"{k!r} of {where}") for k, v in values.items()}

    def scalar(self, value: Any, where: str) -> Tensor:
        if isinstance(value, Tensor) and value.dim() != 0:
            self.fail(
                "row scalars are 0-d",
                f"{where} has shape {tuple(value.shape)}; reduce it over the keys",
            )
        return torch.as_tensor(value, dtype=torch.float64, device=self.device)

    def start(self) -> State:
        zero = torch.zeros((), dtype=torch.int64, device=self.device)
        state = self.scalars(self.func.init(zero, zero, zero), "init")
        self.names = list(state)
        return state

    def online(self, scores: Tensor, v: Tensor, sizes: list[int]) -> tuple[Tensor, State]:
        """Unfinished output row and state after the tiles of the given sizes."""
        state, out = self.start(), torch.zeros_like(v[0])
        at = 0
        for n in sizes:
            w, new, factor = self.func.update(scores[at : at + n], dict(state))
            if not isinstance(w, Tensor) or w.shape != (n,):
                got = tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__
                self.fail("update returns weights of its tile", f"{n} scores gave weights {got}")
            state = self.scalars(new, "update", self.names)
            out = out * self.scalar(factor, "factor of update") + w @ v[at : at + n]
            at += n
        return out, state

    def finalize(self, out: Tensor, state: State) -> tuple[Tensor, State]:
        row, saved = self.func.finalize(out, dict(state))
        if not isinstance(row, Tensor) or row.shape != out.shape:
            self.fail("finalize keeps the output row's shape", f"[{out.numel()}] became {row!r}")
        return row, self.scalars(saved, "finalize")

    def same(self, rule: str, text: str, got: Tensor, want: Tensor) -> None:
        if got.shape != want.shape:
            self.fail(rule, f"{text}: shape {tuple(got.shape)} against {tuple(want.shape)}")
        finite = want[want.isfinite()]
        size = max(1e-30, finite.abs().max().item()) if finite.numel() else 1.0
        good = torch.isclose(got, want, rtol=0.0, atol=_TOLERANCE * size, equal_nan=True)
        if not bool(good.all()):
            at = int((~good).flatten().nonzero()[0])
            a, b = got.flatten()[at].item(), want.flatten()[at].item()
            self.fail(rule, f"{text}: {a:.12g} against {b:.12g} (element {at})")

    def same_saved(self, rule: str, text: str, got: State, want: State) -> None:
        for name in want:
            self.same(rule, f"{name!r} {text}", got[name], want[name])

    def random(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(self.device)

    def tiling(self) -> list[int]:
        cuts = torch.rand(_KEYS - 1, generator=self.generator) < 0.4
        at = [0, *[i + 1 for i, c in enumerate(cuts.tolist()) if c], _KEYS]
        return [b - a for a, b in zip(at, at[1:], strict=False)]

    def run(self) -> None:
        eye = torch.eye(_KEYS, dtype=torch.float64, device=self.device)  # out row = the weights
        for spread in (0.3, 2.0, 6.0):
            scores = self.random(_KEYS) * spread
            out, state = self.online(scores, eye, [_KEYS])
            whole, saved = self.finalize(out, state)
            self.scaling(out, state, saved)
            for sizes in (self.tiling(), self.tiling(), [1] * _KEYS):
                got, got_saved = self.finalize(*self.online(scores, eye, sizes))
                text = f"tiles of {sizes} keys against one tile of {_KEYS}"
                self.same("update + finalize do not depend on the tiling", text, got, whole)
                rule = "saved statistics do not depend on the tiling"
                self.same_saved(rule, text, got_saved, saved)
            final = self.func.weights(scores, dict(saved))
            text = "weights(scores, saved) against the online weights"
            self.same("weights(saved) equals the online result", text, final, whole)
            if type(self.func).merge is not OnlineFunc.merge:
                self.merging(scores, eye, whole, saved)
        if self.differentiable:
            self.gradient()

    def scaling(self, out: Tensor, state: State, saved: State) -> None:
        rule = "finalize is linear in out, one factor for the whole row"
        x, y = self.random(_KEYS), self.random(_KEYS)
        factor, fx_saved = self.finalize(torch.ones_like(x), state)
        fx, _ = self.finalize(x, state)
        fy, _ = self.finalize(2.5 * x - y, state)
        self.same(rule, "finalize(x) against x * finalize(1)", fx, x * factor[0])
        text = "finalize(2.5 x - y) against (2.5 x - y) * finalize(1)"
        self.same(rule, text, fy, (2.5 * x - y) * factor[0])
        self.same_saved("saved statistics do not depend on out", "", fx_saved, saved)

    def merging(self, scores: Tensor, eye: Tensor, whole: Tensor, saved: State) -> None:
        a, b, c = 4, 7, _KEYS
        rule = "merge equals one pass over both parts"
        out, state = self.online(scores[:a], eye[:a], [a])
        for lo, hi in ((a, b), (b, c)):
            other, other_state = self.online(scores[lo:hi], eye[lo:hi], [hi - lo])
            new, fa, fb = self.func.merge(dict(state), dict(other_state))
            state = self.scalars(new, "merge", self.names)
            out = out * self.scalar(fa, "factor a") + other * self.scalar(fb, "factor b")
        got, got_saved = self.finalize(out, state)
        text = f"parts of {[a, b - a, c - b]} keys merged against one tile of {_KEYS}"
        self.same(rule, text, got, whole)
        self.same_saved(rule, text, got_saved, saved)

    def gradient(self) -> None:
        rule = "weights(saved) has the gradient of the online result"
        eye = torch.eye(_KEYS, dtype=torch.float64, device=self.device)
        cotangent = self.random(_KEYS)
        with torch.enable_grad():
            scores = self.random(_KEYS).requires_grad_()
            row, saved = self.finalize(*self.online(scores, eye, [_KEYS]))
            final = self.func.weights(scores, dict(saved))
            zero = 0.0 * scores.sum()  # keeps a function of no score differentiable
            got, want = (
                torch.autograd.grad((x * cotangent).sum() + zero, scores, retain_graph=True)[0]
                for x in (final, row)
            )
        self.same(rule, "d/dscores by weights(scores, saved) against update + finalize", got, want)
