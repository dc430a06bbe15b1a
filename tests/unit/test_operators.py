"""Every operator that a mod may use, against eager torch on 0-d tensors, and its derivatives.

Many operators share one kernel: head h computes case h. With v the identity matrix and the identity
row function, the output is the score matrix itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from operator_cases import (
    BF,
    BOOL,
    DOUBLE,
    FLOAT,
    GATHER,
    HALF,
    I8,
    I16,
    I32,
    INF,
    INTEGER,
    KEYS,
    NAN,
    PROMOTION,
    ROWS,
    TABLE,
    U8,
    Case,
    I,
    J,
    X,
    Y,
    drawn,
)
from torch import Tensor

import attnengine as ae


class Elements:
    """One element of each dtype."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.f32, self.bf16, self.f16, self.f64 = Y[q, k], BF[q, k], HALF[q, k], DOUBLE[q, k]
        self.i64, self.i32, self.i16, self.i8 = I[q, k], I32[q, k], I16[q, k], I8[q, k]
        self.u8, self.bool = U8[q, k], BOOL[q, k]


GROUPS: dict[str, tuple[torch.dtype, dict[str, Case], Callable]] = {
    "float": (torch.float32, FLOAT, lambda f, q, k: f(X[q, k], Y[q, k])),
    "integer": (torch.float64, INTEGER, lambda f, q, k: f(I[q, k], J[q, k])),
    "promotion": (torch.float64, PROMOTION, lambda f, q, k: f(Elements(q, k), q, k)),
    "gather": (torch.float32, GATHER, lambda f, q, k: f(q, k)),
}


def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a finite score."""
    x = x.to(dtype)
    x = torch.where(torch.isnan(x), NAN, x)
    x = torch.where(x == math.inf, INF, x)
    return torch.where(x == -math.inf, -INF, x)


def scores(spec_mod: Callable, heads: int, dtype: torch.dtype) -> Tensor:
    """[heads, ROWS, KEYS] scores that the kernel of a score_mod computes."""
    q = torch.zeros(1, heads, ROWS, 1, dtype=dtype)
    k = torch.zeros(1, 1, KEYS, 1, dtype=dtype)
    v = torch.eye(KEYS, dtype=dtype)[None, None]
    spec = ae.AttentionSpec(score_mod=spec_mod, row_func=ae.Identity())
    with torch.no_grad():
        return ae.attention(q, k, v, spec)[0]


_done: dict[str, Tensor] = {}


def compiled(group: str) -> Tensor:
    if group not in _done:
        dtype, cases, call = GROUPS[group]
        functions = list(cases.values())

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            out = score
            for i, f in enumerate(functions):
                out = torch.where(h == i, call(f, q, k).to(dtype), out)
            return plain(out, dtype)

        _done[group] = scores(score_mod, len(functions), dtype)
    return _done[group]


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("group", "name"), [(g, n) for g, (_, cases, _) in GROUPS.items() for n in cases]
)
def test_operator_equals_eager_torch(group: str, name: str) -> None:
    dtype, cases, call = GROUPS[group]
    got = compiled(group)[list(cases).index(name)]
    at = [[(torch.tensor(q), torch.tensor(k)) for k in range(KEYS)] for q in range(ROWS)]
    want = torch.stack(
        [torch.stack([plain(call(cases[name], q, k), dtype) for q, k in row]) for row in at]
    )
    torch.testing.assert_close(got, want, rtol=4e-6, atol=2e-6)


# -- derivatives of the operators ------------------------------------------------------------------

SMOOTH = [
    "abs", "neg", "exp", "exp2", "expm1", "tanh", "sigmoid", "sin", "cos", "atan", "asinh", "sinh",
    "cosh", "erf", "erfc", "relu", "square", "F.silu", "F.softplus", "F.elu", "F.leaky_relu",
    "F.hardtanh", "F.hardswish", "F.mish", "F.selu", "F.logsigmoid", "F.softsign", "F.gelu",
    "F.softshrink", "gelu tanh", "maximum", "fmin", "atan2", "hypot", "remainder", "fmod",
    "true_divide", "logaddexp", "sub", "mul", "lerp", "addcmul", "addcdiv", "x % 0.3", "1 / x",
    "x ** 2", "x ** 3", "x ** -2", "where", "masked_fill", "clamp", "clamp tensors", "loop",
    "detach", "temporary", "copysign", "floor", "sign", "nan_to_num", "2.0 ** y",
]  # fmt: skip
POSITIVE = ["log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "x ** 2.5", "x ** 0.5"]
UNIT = ["asin", "acos", "atanh", "tan", "logit"]


def differentiable(name: str, x: Tensor, y: Tensor) -> Tensor:
    """An operator within its domain: another head's NaN times 0 would be NaN."""
    if name not in SMOOTH:
        x = 0.1 + 0.8 * (x * x) / (1 + x * x)
    return FLOAT[name](x, y)


@pytest.fixture(scope="module")
def gradients() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the captured x and y through the kernel, and by autograd: [case, row, key]."""
    names = [*SMOOTH, *POSITIVE, *UNIT]
    n, g = len(names), drawn(11)
    x = torch.randn(n, ROWS, KEYS, generator=g, dtype=torch.float64).requires_grad_()
    y = torch.randn(n, ROWS, KEYS, generator=g, dtype=torch.float64).requires_grad_()

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        out, ex, ey = score, x[h, q, k], y[h, q, k]
        for i, name in enumerate(names):
            out = torch.where(h == i, differentiable(name, ex, ey), out)
        return out

    spec = ae.AttentionSpec(score_mod=score_mod, row_func=ae.Identity())
    q = torch.zeros(1, n, ROWS, 1, dtype=torch.float64)
    k, v = torch.zeros(1, 1, KEYS, 1).double(), torch.eye(KEYS).double()[None, None]
    out = ae.attention(q, k, v, spec)[0]
    want = torch.stack([differentiable(name, x[i], y[i]) for i, name in enumerate(names)])
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(out.shape, generator=g, dtype=torch.float64)
    got_x, got_y = torch.autograd.grad(out, (x, y), cotangent)
    want_x, want_y = torch.autograd.grad(want, (x, y), cotangent)
    return got_x, got_y, want_x, want_y


@pytest.mark.compiles
@pytest.mark.parametrize("name", [*SMOOTH, *POSITIVE, *UNIT])
def test_derivative_equals_autograd(name: str, gradients: tuple[Tensor, ...]) -> None:
    i = [*SMOOTH, *POSITIVE, *UNIT].index(name)
    got_x, got_y, want_x, want_y = (g[i] for g in gradients)
    torch.testing.assert_close(got_x, want_x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got_y, want_y, rtol=1e-11, atol=1e-11)


# -- an index out of range in a live key is an error, never another element ------------------------


@pytest.mark.compiles
def test_out_of_range_through_views() -> None:
    bound = torch.tensor(0)
    q, k, v = torch.zeros(1, 3, 1, 1), torch.zeros(1, 1, 9, 1), torch.ones(1, 1, 9, 1)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        cut, flat = TABLE[0, 1:3], TABLE.reshape(6, 10)
        out = torch.where(h == 0, cut[torch.where(h == 0, bound, 0), 0], score)
        out = torch.where(h == 1, flat[1, torch.where(h == 1, bound, 0)], out)
        both = torch.cat([TABLE[0], TABLE[1]])
        return torch.where(h == 2, both[torch.where(h == 2, bound, 0), 0], out)

    spec = ae.AttentionSpec(score_mod=score_mod, row_func=ae.Identity())
    for head, size in enumerate((2, 10, 8)):
        one = q.clone()[:, : head + 1]
        for good in (0, size - 1, -size) if head == 0 else (0,):
            bound.fill_(good)
            ae.attention(one, k, v, spec)
        for bad in (size, -size - 1):
            bound.fill_(bad)
            if head == 0:
                with pytest.raises(IndexError, match="out of range for a key that is not masked"):
                    ae.attention(one, k, v, spec)
    bound.fill_(9)  # in range of the reshape alone
    with pytest.raises(IndexError, match=r"captures\[\d\] of shape \[3, 4, 5\]"):
        ae.attention(q, k, v, spec)
