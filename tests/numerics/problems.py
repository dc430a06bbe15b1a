"""Operands and specs that several test files share, so that they share compiled modules too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import attnengine as ae
from attnengine import gate

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
D, DV = 40, 24  # the head dims of most modules: neither is a multiple of a vector of 16
HEADS = 4

Captures = dict[str, Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaf(*shape: int, seed: int = 0, size: float = 1.0, dtype: torch.dtype = F32) -> Tensor:
    """A learnable captured tensor."""
    x = torch.randn(shape, generator=generator(seed), dtype=F64) * size
    return x.to(dtype).requires_grad_()


def operands(
    dtype: torch.dtype,
    B: int = 1,
    H: int = HEADS,
    Hkv: int = 2,
    L: int = 60,
    S: int = 150,
    d: int = D,
    dv: int = DV,
    kv_batch: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, L, d], k [kv_batch or B, Hkv, S, d], v [.., dv], normal."""
    g, bkv = generator(seed), B if kv_batch is None else kv_batch
    shapes = (B, H, L, d), (bkv, Hkv, S, d), (bkv, Hkv, S, dv)
    q, k, v = (torch.randn(s, generator=g).to(dtype) for s in shapes)
    return q, k, v


def verify(
    spec: ae.AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Mapping[str, Tensor] | None = None,
    *,
    grads: bool = True,
    isa: str | None = None,
) -> list[gate.Report]:
    """Output, statistics and (with ``grads``) every gradient through the numerics gate."""
    handle = ae.compile(spec, q, k, v, backward=grads, isa=isa)  # both modules at the same time

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if isa is None:
            return ae.attention(q, k, v, spec, return_aux=True)
        return handle(q, k, v, return_aux=True)

    return gate.compare(run, spec, q, k, v, captures=captures, grads=grads)


def results(
    spec: ae.AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Mapping[str, Tensor] | None = None,
    seed: int = 1,
) -> dict[str, Tensor]:
    """Output, statistics and gradients of one call, by name."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, aux = ae.attention(q, k, v, spec, return_aux=True)
    inputs = {"dq": q, "dk": k, "dv": v, **{f"d{n}": x for n, x in (captures or {}).items()}}
    outputs = [out, *[x for x in aux.values() if x.requires_grad]]
    g = generator(seed)
    cotangents = [torch.randn(x.shape, generator=g).to(x.dtype) for x in outputs]
    found = torch.autograd.grad(outputs, list(inputs.values()), cotangents, allow_unused=True)
    named = {n: x for n, x in zip(inputs, found, strict=True) if x is not None}
    return {"out": out.detach(), **{n: x.detach() for n, x in aux.items()}, **named}


# -- specs -----------------------------------------------------------------------------------------


def gathers(
    L: int, S: int, dtype: torch.dtype = F32, stored: torch.dtype = BF16
) -> tuple[ae.AttentionSpec, Captures]:
    """Every kind of gather: a row that is then indexed, one tensor three times, negative indices,
    an index from another tensor, 16-bit, integer, bool and 0-d captures, learnable and not."""
    rows, cols = (L + 3) // 4, S
    table = leaf(rows, cols, seed=10, dtype=dtype)
    pair = leaf(HEADS, 8, seed=11, size=0.5, dtype=stored)
    gain, bend = leaf(seed=12, dtype=dtype), leaf(seed=13, dtype=dtype)
    order = torch.randperm(S, generator=generator(14)).to(torch.int32)
    steps = torch.randint(-3, 4, (S,), generator=generator(15)).to(torch.int16)
    on = torch.rand(L, S, generator=generator(16)) < 0.7
    shift = torch.tensor(3)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = table[q // 4]
        near = row[k] - 0.5 * table[(q * 7 + k) % rows, order[k]] + table[-1 - q % rows, -1 - k]
        near = near * torch.where(on[q, k], 1.0, 0.25) + pair[h, (k - q + shift) % 8]
        return score * gain + near + bend * torch.sin(score) + 0.125 * steps[k]

    spec = ae.AttentionSpec(score_mod=score_mod)
    return spec, {"table": table, "pair": pair, "gain": gain, "bend": bend}


def operand_mods(dtype: torch.dtype = F32) -> tuple[ae.AttentionSpec, Captures]:
    """q, k and v mods that share learnable 0-d captures."""
    t, u = leaf(seed=20, dtype=dtype), leaf(seed=21, dtype=dtype)
    spec = ae.AttentionSpec(
        q_mod=lambda x: x * torch.sigmoid(t),
        k_mod=lambda x: torch.tanh(x * u) + t,
        v_mod=lambda x: torch.nn.functional.gelu(x) - u * x,
    )
    return spec, {"t": t, "u": u}


def alibi(seed: int = 30) -> tuple[ae.AttentionSpec, Captures]:
    slopes = torch.rand(HEADS, generator=generator(seed)).requires_grad_()
    return ae.variants.alibi(slopes), {"slopes": slopes}


def sink(seed: int = 31) -> tuple[ae.AttentionSpec, Captures]:
    s = leaf(HEADS, seed=seed)
    return ae.variants.sink(s), {"sink": s}
