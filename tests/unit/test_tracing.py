"""What a mod may say: every operator against eager torch on 0-d tensors, and clear refusals.

Many operators share one kernel: head h computes case h. With v the identity matrix and the identity
row function, the output is the score matrix itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnengine as ae

ROWS, KEYS = 2, 37  # more than two vectors of every width, and a tail
NAN, INF = 12345.0, 54321.0  # stand for NaN and infinities, which would spread over a row


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_specials(x: Tensor) -> Tensor:
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 0.5, -2.5, 88.0, 1e-6, 3e7]
    x[0, : len(special)] = torch.tensor(special)
    return x


X = with_specials(torch.randn(ROWS, KEYS, generator=drawn(1)) * 2)
Y = torch.randn(ROWS, KEYS, generator=drawn(2)) * 2
I = torch.randint(-9, 10, (ROWS, KEYS), generator=drawn(3))  # noqa: E741
J = torch.randint(1, 9, (ROWS, KEYS), generator=drawn(4)) * (1 - 2 * (torch.arange(KEYS) % 2))
I32 = torch.randint(-(2**31), 2**31 - 1, (ROWS, KEYS), generator=drawn(5)).int()
I16, I8 = I32.to(torch.int16), I32.to(torch.int8)
U8, BOOL = I32.to(torch.uint8), (I32 & 4) != 0
BF, HALF, DOUBLE = Y.bfloat16(), Y.half(), Y.double() / 3
TABLE = torch.randn(3, 4, 5, generator=drawn(6))
SHORT = torch.tensor([3, -1, 2], dtype=torch.int32)
ZERO_D = torch.tensor(0.37)
FLAT = torch.randn(4, generator=drawn(7))

Case = Callable[..., Tensor]


def binary(names: str, where: object) -> dict[str, Case]:
    return {n: getattr(where, n) for n in names.split()}


UNARY: dict[str, Case] = binary(
    "abs neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal tanh sigmoid sin cos tan "
    "asin acos atan sinh cosh asinh acosh atanh erf erfc lgamma floor ceil trunc round sign sgn "
    "relu square frac deg2rad rad2deg signbit isfinite isnan isinf isposinf isneginf nan_to_num "
    "logit sinc positive",
    torch,
) | {
    f"F.{n}": f
    for n, f in binary(
        "silu softplus elu leaky_relu hardtanh hardswish hardsigmoid mish selu celu logsigmoid "
        "softsign relu6 tanhshrink softshrink hardshrink gelu",
        F,
    ).items()
}


def of_first(f: Case) -> Case:
    return lambda x, y: f(x)


FLOAT: dict[str, Case] = {n: of_first(f) for n, f in UNARY.items()} | binary(
    "maximum minimum fmax fmin atan2 hypot copysign fmod remainder floor_divide true_divide pow "
    "float_power logaddexp xlogy heaviside add sub mul eq ne lt le gt ge logical_and logical_or "
    "logical_xor max min ldexp isclose",
    torch,
) | {
    "gelu tanh": lambda x, y: F.gelu(x, approximate="tanh"),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "addcmul": lambda x, y: torch.addcmul(x, y, y, value=2),
    "addcdiv": lambda x, y: torch.addcdiv(x, y, y * y + 1, value=2),
    "div floor": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "div trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "x // 0.1": lambda x, y: x // 0.1,
    "x % 0.3": lambda x, y: x % 0.3,
    "1 / x": lambda x, y: 1 / x,
    "2 - x": lambda x, y: 2 - x,
    "2.0 ** y": lambda x, y: 2.0**y,
    "x ** 2": lambda x, y: x**2,
    "x ** 3": lambda x, y: x**3,
    "x ** -2": lambda x, y: x**-2,
    "x ** 2.5": lambda x, y: x**2.5,
    "x ** 0": lambda x, y: x**0,
    "x ** 0.5": lambda x, y: x**0.5,
    "where": lambda x, y: torch.where(x > y, x, -1.0),
    "masked_fill": lambda x, y: x.masked_fill(x > y, 4.0),
    "clamp": lambda x, y: x.clamp(-0.5, 0.75),
    "clamp min": lambda x, y: x.clamp(min=0.1),
    "clamp max": lambda x, y: x.clamp(max=0.1),
    "clamp crossed": lambda x, y: x.clamp(1.0, 0.5),
    "clamp tensors": lambda x, y: x.clamp(y, y + 1),
    "full_like": lambda x, y: torch.full_like(x, 3.0) * y,
    "zeros": lambda x, y: torch.zeros(()) + y,
    "ones_like": lambda x, y: torch.ones_like(x) - y,
    "tensor": lambda x, y: torch.tensor(2.5) * y,
    "new_full": lambda x, y: x.new_full((), 2.0) + y,
    "temporary": lambda x, y: in_place(y),
    "sum of list": lambda x, y: sum([y, y, 1]),
    "loop": lambda x, y: horner(y),
    "detach": lambda x, y: x.detach() * y,
    "constants": lambda x, y: y * math.log(2) + (math.pi if ROWS == 2 else math.e),
    "bfloat16": lambda x, y: y.bfloat16(),
    "half": lambda x, y: x.half(),
    "to int": lambda x, y: (y * 10).to(torch.int32),
    "bool": lambda x, y: x.bool(),
}  # fmt: skip


def in_place(y: Tensor) -> Tensor:
    t = y * 2
    t += 1
    t.mul_(y).clamp_(max=5)
    return t


def horner(y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    for c in (0.25, -1.5, 2.0):
        if c > 0:
            out = out * y + c
        else:
            out = out * y - c
    return out


INTEGER: dict[str, Case] = binary(
    "add sub mul floor_divide remainder fmod maximum minimum max min true_divide bitwise_and "
    "bitwise_or bitwise_xor eq lt ge logical_and logical_or",
    torch,
) | {
    n: of_first(f)
    for n, f in binary(
        "abs neg sign square bitwise_not floor ceil trunc round exp sigmoid logical_not sgn", torch
    ).items()
} | {
    "i / 4": lambda i, j: i / 4,
    "i // 4": lambda i, j: i // 4,
    "i // -4": lambda i, j: i // -4,
    "i % 5": lambda i, j: i % 5,
    "i % -5": lambda i, j: i % -5,
    "7 // j": lambda i, j: 7 // j,
    "-7 % j": lambda i, j: -7 % j,
    "i // 2.5": lambda i, j: i // 2.5,
    "i * 0.1": lambda i, j: i * 0.1,
    "i << 3": lambda i, j: i << 3,
    "i >> 1": lambda i, j: i >> 1,
    "1 << |j|": lambda i, j: 1 << j.abs(),
    "i ** 3": lambda i, j: i**3,
    "j ** -1.0": lambda i, j: j**-1.0,
    "div trunc": lambda i, j: torch.div(i, j, rounding_mode="trunc"),
    "div floor": lambda i, j: torch.div(i, j, rounding_mode="floor"),
    "clamp": lambda i, j: i.clamp(-2, 5),
    "clamp float": lambda i, j: i.clamp(-2.5, 5),
    "bools": lambda i, j: (i > j) + (i > 0),
    "bool * bool": lambda i, j: (i > j) * (i > 0),
    "bool + int": lambda i, j: (i > j) + i,
    "bool / int": lambda i, j: (i > j) / j,
    "bool | ^ ~": lambda i, j: ~((i > j) ^ (i > 0)) | (i == 3),
    "bool sum": lambda i, j: (i > j).int() + (i > 0).long() + (i < 5).float(),
    "where": lambda i, j: torch.where(i > j, i, 0),
    "int32 wraps": lambda i, j: I32[0, 3] * i.int() * 65537,
    "int8 wraps": lambda i, j: (i * 40).to(torch.int8) * j.to(torch.int8),
    "uint8 wraps": lambda i, j: (i * 7).to(torch.uint8) - 200,
    "bool of int": lambda i, j: i.bool(),
    "isnan": lambda i, j: torch.isnan(i),
}  # fmt: skip

# Arguments: captured elements of each dtype at (q, k), and the indices themselves.
PROMOTION: dict[str, Case] = {
    "int8 * int8": lambda e, q, k: e.i8 * e.i8,
    "uint8 + int8": lambda e, q, k: e.u8 + e.i8,
    "uint8 * uint8": lambda e, q, k: e.u8 * e.u8,
    "int16 * 3": lambda e, q, k: e.i16 * 3,
    "int16 * int16": lambda e, q, k: e.i16 * e.i16,
    "int32 * int32": lambda e, q, k: e.i32 * e.i32,
    "int32 + int64": lambda e, q, k: e.i32 + e.i64,
    "int32 * int64": lambda e, q, k: e.i32 * (e.i64 * 3),
    "int32 - 1": lambda e, q, k: e.i32 - 1,
    "int32 // 7": lambda e, q, k: e.i32 // 7,
    "int32 % -7": lambda e, q, k: e.i32 % -7,
    "int32 >> 3": lambda e, q, k: e.i32 >> 3,
    "int32 << 5": lambda e, q, k: e.i32 << 5,
    "-int32": lambda e, q, k: -e.i32,
    "|int8|": lambda e, q, k: e.i8.abs(),
    "~uint8": lambda e, q, k: ~e.u8,
    "int32 / int32": lambda e, q, k: e.i32 / (e.i32.abs() + 1),
    "int64 * float": lambda e, q, k: e.i64 * e.f32,
    "int64 * 0.1": lambda e, q, k: e.i64 * 0.1,
    "uint8 * 1.5": lambda e, q, k: e.u8 * 1.5,
    "bf16 * bf16": lambda e, q, k: e.bf16 * e.bf16,
    "bf16 + 0.1": lambda e, q, k: e.bf16 + 0.1,
    "bf16 * int": lambda e, q, k: e.bf16 * e.i64,
    "bf16 * f32": lambda e, q, k: e.bf16 * e.f32,
    "bf16 / 3": lambda e, q, k: e.bf16 / 3,
    "tanh bf16": lambda e, q, k: torch.tanh(e.bf16),
    "f16 * f16": lambda e, q, k: e.f16 * e.f16,
    "f16 * bf16": lambda e, q, k: e.f16 * e.bf16,
    "f16 exp": lambda e, q, k: torch.exp(e.f16),
    "f64 * f32": lambda e, q, k: e.f64 * e.f32,
    "f64 * int": lambda e, q, k: e.f64 * e.i64,
    "f64 exp": lambda e, q, k: torch.exp(e.f64),
    "f64 to f32": lambda e, q, k: e.f64.float(),
    "bool + bool": lambda e, q, k: e.bool + e.bool,
    "bool * float": lambda e, q, k: e.bool * e.f32,
    "bool * int8": lambda e, q, k: e.bool * e.i8,
    "bool & bool": lambda e, q, k: e.bool & (e.i64 > 0),
    "bool < float": lambda e, q, k: e.bool < e.f32,
    "int8 < uint8": lambda e, q, k: e.i8 < e.u8,
    "int64 == float": lambda e, q, k: e.i64 == e.f32.round(),
    "q / k": lambda e, q, k: q / (k + 1),
    "q - k": lambda e, q, k: (q - k) // 3,
    "(q - k) % 4": lambda e, q, k: (q - k) % 4,
    "fmod": lambda e, q, k: torch.fmod(q - k, 4),
    "beyond 32 bits": lambda e, q, k: (q + 1) * k * 65537 * 2003,
    "beyond 32 bits, remainder": lambda e, q, k: ((q + 7) * (k + 3) * 65537 * 104729) % 1013,
    "beyond 32 bits, shift": lambda e, q, k: ((k + 1) << 40) >> 33,
    "hash": lambda e, q, k: ((q * 73856093) ^ (k * 19349663)) & 0xFFFF,
    "q > 0.5": lambda e, q, k: q > 0.5,
    "sqrt(k)": lambda e, q, k: torch.sqrt(k),
    "float(k) * 0.1": lambda e, q, k: k.float() * 0.1,
    "k.double() * 0.1": lambda e, q, k: k.double() * 0.1,
    "where mixes": lambda e, q, k: torch.where(k > 3, k, e.f32),
    "0-d capture": lambda e, q, k: ZERO_D * k,
    "0-d capture in where": lambda e, q, k: torch.where(k % 2 == 0, ZERO_D, e.i64),
}  # fmt: skip

GATHER: dict[str, Case] = {
    "T[a,b,c]": lambda q, k: TABLE[q, k % 4, k % 5],
    "T[a][b][c]": lambda q, k: TABLE[q][k % 4][k % 5],
    "T[a][b,c]": lambda q, k: TABLE[q][k % 4, k % 5],
    "T[a,b][c]": lambda q, k: TABLE[q, k % 4][k % 5],
    "T[k]": lambda q, k: TABLE[k % 3][q, q + 1],
    "negative": lambda q, k: TABLE[-1, -1 - k % 4, q - 2],
    "negative in a slice": lambda q, k: TABLE[q, 1:][-1 - k % 3, -1 - k % 5],
    "negative in a reshape": lambda q, k: TABLE.reshape(6, 10)[-1 - k % 6, -1 - k % 10],
    "negative in a cat": lambda q, k: torch.cat([TABLE[0], TABLE[1]])[-1 - k % 8, q],
    "negative in a flip": lambda q, k: FLAT.flip(0)[-1 - k % 4],
    "negative in an arange": lambda q, k: torch.arange(3, 9, 2)[-1 - k % 3],
    "negative in an inline table": lambda q, k: torch.tensor([0.5, -1.0, 2.0])[-1 - k % 3],
    "ints and tensors": lambda q, k: TABLE[1, k % 4, -2],
    "T[..., k]": lambda q, k: TABLE[..., k % 5][q, 1],
    "T[:, k]": lambda q, k: TABLE[:, k % 4][q, 3],
    "T[k, :, q]": lambda q, k: TABLE[k % 3, :, q][k % 4],
    "T[q, 1:, k]": lambda q, k: TABLE[q, 1:, k % 5][k % 3],
    "T[q, ::2][.., k]": lambda q, k: TABLE[q, ::2][k % 2, k % 5],
    "T[q, :2, k].sum": lambda q, k: TABLE[q, :2, k % 5].sum(),
    "T[None]": lambda q, k: TABLE[None, q, k % 4][0, 2],
    "row sum": lambda q, k: TABLE[q, k % 4].sum(),
    "row mean": lambda q, k: TABLE[k % 3, q].mean(),
    "row amax": lambda q, k: TABLE[q, k % 4].amax(),
    "row min": lambda q, k: TABLE[q, k % 4].min(),
    "row prod": lambda q, k: TABLE[q, k % 4].prod(),
    "row any": lambda q, k: (TABLE[q, k % 4] > 1).any(),
    "row all": lambda q, k: (TABLE[q, k % 4] > -1.5).all(),
    "row count": lambda q, k: (TABLE[q, k % 4] > 0).sum(),
    "matrix sum(dim)": lambda q, k: TABLE[q].sum(0)[k % 5],
    "matrix amax(keepdim)": lambda q, k: TABLE[q].amax(1, keepdim=True)[k % 4, 0],
    "dot": lambda q, k: torch.dot(TABLE[q, 0], TABLE[k % 3, 1]),
    "row @ row": lambda q, k: TABLE[q, 0] @ TABLE[0, k % 4],
    "logsumexp": lambda q, k: torch.logsumexp(TABLE[q, k % 4], 0),
    "softmax": lambda q, k: torch.softmax(TABLE[q, k % 4], 0)[k % 5],
    "norm": lambda q, k: TABLE[q, k % 4].norm(),
    "transposed": lambda q, k: TABLE.transpose(0, 2)[k % 5, k % 4, q],
    "permuted": lambda q, k: TABLE.permute(1, 2, 0)[k % 4, k % 5, q],
    "mT": lambda q, k: TABLE.mT[q, k % 5, k % 4],
    "reshaped": lambda q, k: TABLE.reshape(6, 10)[k % 6, k % 10],
    "flattened": lambda q, k: TABLE.flatten()[k],
    "unsqueezed": lambda q, k: TABLE.unsqueeze(1)[q, 0, k % 4, 1],
    "expanded": lambda q, k: FLAT.expand(7, 4)[k % 7, k % 4],
    "viewed": lambda q, k: TABLE.view(-1)[k - 30],
    "unbound": lambda q, k: TABLE.unbind(1)[2][q, k % 5],
    "chunked": lambda q, k: TABLE.chunk(2, 1)[1][q, k % 2, k % 5],
    "split": lambda q, k: FLAT.split([1, 3])[1][k % 3],
    "concatenated": lambda q, k: torch.cat([TABLE[0], TABLE[1]])[k % 8, q],
    "stacked": lambda q, k: torch.stack([FLAT, FLAT * 2])[k % 2, k % 4],
    "flipped": lambda q, k: FLAT.flip(0)[k % 4],
    "row arithmetic": lambda q, k: (TABLE[q, 1] * FLAT[k % 4] + 1)[k % 5],
    "index of a gather": lambda q, k: FLAT[SHORT[k % 3]],
    "int32 index": lambda q, k: FLAT[(k % 4).int()],
    "index_select": lambda q, k: torch.index_select(FLAT, 0, (k % 4).reshape(1))[0],
    "embedding": lambda q, k: F.embedding(q, TABLE[0])[k % 5],
    "arange": lambda q, k: torch.arange(4)[k % 4] * 2,
    "isin": lambda q, k: torch.isin(k, torch.tensor([1, 2, 5])),
    "inline table": lambda q, k: torch.tensor([0.5, -1.0, 2.0])[k % 3],
    "outer index": lambda q, k: TABLE[torch.tensor([0, 2])[:, None], SHORT[None, :]][q, k % 3, 1],
    "0-d": lambda q, k: ZERO_D * (k + 1),
}  # fmt: skip


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


# -- refusals --------------------------------------------------------------------------------------


def tracing(mod: Callable, kind: str = "score_mod") -> None:
    from attnengine import trace
    from attnengine.capture import captures_of_spec

    spec = ae.AttentionSpec(**{kind: mod})
    trace.trace(spec, captures_of_spec(spec).tensors, "f32")


def line_of(f: Callable, offset: int = 1) -> str:
    return f"{__file__}:{f.__code__.co_firstlineno + offset}"


def refused(mod: Callable, *parts: str, kind: str = "score_mod", offset: int = 1) -> None:
    with pytest.raises(ae.TraceError) as error:
        tracing(mod, kind)
    text = str(error.value)
    assert kind in text
    for part in (*parts, line_of(mod, offset)):
        assert part in text, text


def test_unsupported_operator_is_named_with_its_line() -> None:
    def mod(score, b, h, q, k):
        shifted = score + 1
        return torch.special.bessel_j0(shifted)

    refused(mod, "aten.special_bessel_j0", "not supported", "pointwise", offset=2)


def test_matrix_product_says_what_to_use() -> None:
    def mod(score, b, h, q, k):
        return score + (TABLE[0] @ TABLE[0].mT)[q, k]

    refused(mod, "aten.mm", "capture the result")


def test_sorted_row_says_what_to_use() -> None:
    def mod(score, b, h, q, k):
        return score + TABLE[q, 0].sort()[0][k % 5]

    refused(mod, "aten.sort", "capture the result")


def test_long_reduction() -> None:
    long = torch.randn(4, 1000)

    def mod(score, b, h, q, k):
        return score + long[h].sum()

    refused(mod, "1000 captured elements", "reduce before the call")


@pytest.mark.parametrize("random", ["rand_like", "bernoulli", "dropout"])
def test_random_numbers(random: str) -> None:
    functions = {
        "rand_like": torch.rand_like,
        "bernoulli": lambda x: torch.bernoulli(torch.sigmoid(x)),
        "dropout": lambda x: F.dropout(x, 0.5),
    }
    draw = functions[random]

    def mod(score, b, h, q, k):
        return score + draw(score)

    with pytest.raises(ae.TraceError, match="random numbers are not replayed.*capture them"):
        tracing(mod)


def test_branch_on_a_traced_value() -> None:
    def mod(score, b, h, q, k):
        if q > k:
            return score
        return -score

    refused(mod, "data-dependent", "torch.where")


@pytest.mark.parametrize("read", [lambda x: x.item(), int, float, bool, lambda x: x.tolist()])
def test_reading_a_traced_value(read: Callable) -> None:
    def mod(score, b, h, q, k):
        return score * read(q)

    with pytest.raises(ae.TraceError, match="data-dependent.*torch.where"):
        tracing(mod)


def test_reading_a_captured_number_says_what_it_costs() -> None:
    """A captured tensor is an input of the kernel: its value is not there while tracing."""

    def mod(score, b, h, q, k):
        return score * ZERO_D.item()

    with pytest.raises(ae.TraceError, match="data-dependent"):
        tracing(mod)


def test_slice_bounded_by_a_tensor() -> None:
    n = torch.tensor(3)

    def mod(score, b, h, q, k):
        return score + FLAT[:n].sum()

    refused(mod, "slice bounded by a tensor", "Python ints")


def test_statically_out_of_range() -> None:
    def mod(score, b, h, q, k):
        return score + TABLE[3, q, k]

    refused(mod, "out of", "3")


def test_out_of_range_constant_in_tensor_form() -> None:
    def mod(score, b, h, q, k):
        return score + FLAT[torch.tensor(4)]

    refused(mod, "index 4", "out of", "size 4")


@pytest.mark.parametrize("what", ["score", "index", "capture", "view", "viewed", "setitem", "out"])
def test_changing_an_input(what: str) -> None:
    """Refused before it happens: tracing must not change the user's tensors either."""
    table = torch.zeros(8)

    def add(score, b, h, q, k):
        if what == "score":
            return score.add_(1)
        if what == "index":
            return score + q.mul_(2)
        if what == "capture":
            table.add_(1)
        if what == "view":
            score.view(1).add_(1)
        if what == "viewed":
            table.view(2, 4)[0].add_(1)
        if what == "setitem":
            table[q] = score
        if what == "out":
            torch.add(score, 1, out=table[0])
        return score

    with pytest.raises(ae.TraceError, match="out-of-place|read-only"):
        tracing(add)
    assert not table.any()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (lambda s, q: q > 1, "dtype bool"),
        (lambda s, q: q, "dtype i64"),
        (lambda s, q: TABLE[q], r"shape \(4, 5\)"),
        (lambda s, q: s.unsqueeze(0).expand(3), r"shape \(3,\)"),
        (lambda s, q: None, "NoneType"),
        (lambda s, q: 1.0, "float"),
        (lambda s, q: (s, s), "tuple"),
    ],
)
def test_wrong_result_of_score_mod(value: Callable, text: str) -> None:
    def mod(score, b, h, q, k):
        return value(score, q)

    with pytest.raises(ae.TraceError, match=f"score_mod.*{text}.*expected"):
        tracing(mod)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (lambda q, k: q - k, "dtype i64.*expected bool"),
        (lambda q, k: TABLE[q] > 0, "shape"),
        (lambda q, k: True, "bool"),
    ],
)
def test_wrong_result_of_mask_mod(value: Callable, text: str) -> None:
    def mod(b, h, q, k):
        return value(q, k)

    with pytest.raises(ae.TraceError, match=f"mask_mod.*{text}"):
        tracing(mod, "mask_mod")


def test_wrong_result_of_operand_mod() -> None:
    with pytest.raises(ae.TraceError, match="k_mod.*dtype bool.*floating"):
        tracing(lambda x: x > 0, "k_mod")


def test_capture_on_another_device() -> None:
    elsewhere = torch.zeros(8, device="meta")

    def mod(score, b, h, q, k):
        return score + elsewhere[h]

    with pytest.raises(ae.TraceError, match="captured tensor on device meta.*cpu"):
        tracing(mod)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint16])
def test_capture_of_unsupported_dtype(dtype: torch.dtype) -> None:
    table = torch.zeros(8, dtype=dtype)

    def mod(score, b, h, q, k):
        return score + table[h].float()

    with pytest.raises(ae.TraceError, match=f"dtype {dtype}"):
        tracing(mod)


def test_error_inside_the_mod_keeps_its_line() -> None:
    def mod(score, b, h, q, k):
        scaled = score * 2
        return scaled + undefined_name  # noqa: F821

    refused(mod, "NameError", "undefined_name", offset=2)


def test_messages_read_as_sentences() -> None:
    def mod(score, b, h, q, k):
        return score + TABLE.sum() * FLAT[torch.tensor(9)]

    with pytest.raises(ae.TraceError) as error:
        tracing(mod)
    assert "is not supported is not supported" not in str(error.value)
    assert "out of range for dimension 0 of size 4 is not supported" not in str(error.value)


def test_branches_and_loops_over_constants() -> None:
    windows = (4, 0, 8)

    def mod(score, b, h, q, k):
        for i, w in enumerate(windows):
            if w:
                score = torch.where((h == i) & (q - k > w), -math.inf, score)
        return score

    tracing(mod)


def test_same_graph_whether_written_by_loop_or_by_hand() -> None:
    from attnengine import ir, trace
    from attnengine.capture import captures_of_spec

    def text(mod: Callable) -> str:
        spec = ae.AttentionSpec(score_mod=mod)
        traced = trace.trace(spec, captures_of_spec(spec).tensors, "f32")
        assert traced.score is not None
        return ir.text({"score": traced.score})

    def loop(score, b, h, q, k):
        for c in (2, 3):
            score = score + c * q
        return score

    assert text(loop) == text(lambda s, b, h, q, k: s + 2 * q + 3 * q)
    assert text(lambda s, b, h, q, k: s + (q - k)) == text(lambda s, b, h, q, k: s + q.sub(k))
