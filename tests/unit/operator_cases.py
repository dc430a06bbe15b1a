"""Every operator that a mod may use, as a function of captured elements."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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
