"""Batches of sequences for the tests of CUDA kernels: caches, pages, packed rows; NaN where nothing
may be read, and what a spec makes of each sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import attnengine as ae
from attnengine import dispatch, gate
from attnengine.key import Form
from attnengine.target import isa_of
from tests.cuda_cases import UserSoftmax
from tests.numerics.problems import generator

INF, NAN = float("inf"), float("nan")
BF16, F16 = torch.bfloat16, torch.float16
HQ, HKV = 4, 2
# Policy, splits, workers: a worker per output; parts of which some are empty; a line cut where
# outputs do not end, and by more workers than there are tiles.
POLICIES = {"tiles": (0, 1, 1), "split": (1, 3, 1), "streamk": (2, 1, 5), "crowd": (2, 1, 999)}
UNCOVERED = 2  # rows of q that belong to no sequence, where they are packed


class MergedSoftmax(UserSoftmax):
    """A user's softmax that says how its parts merge."""

    def merge(self, a: Any, b: Any) -> tuple[Any, Any, Any]:
        m = torch.maximum(a["m"], b["m"])
        fa, fb = torch.exp(a["m"] - m), torch.exp(b["m"] - m)
        squares = a["squares"] * fa * fa + b["squares"] * fb * fb
        return {"m": m, "r": a["r"] * fa + b["r"] * fb, "squares": squares}, fa, fb


# -- what a batch of sequences means, and where it lies --------------------------------------------


def shifted(spec: ae.AttentionSpec, b: int, offset: int) -> ae.AttentionSpec:
    """The spec as sequence ``b`` sees it alone, its row 0 with index ``offset``."""

    def mod(f: Callable) -> Callable:
        return lambda *x: f(*x[:-4], x[-4] * 0 + b, x[-3], x[-2] + offset, x[-1])

    return replace(
        spec,
        score_mod=mod(spec.score_mod) if spec.score_mod else None,
        mask_mod=mod(spec.mask_mod) if spec.mask_mod else None,
    )


class Batch:
    """Sequences of ``keys`` keys with ``rows`` query rows each, and what a spec makes of them."""

    def __init__(
        self,
        spec: ae.AttentionSpec,
        keys: Sequence[int],
        rows: int | Sequence[int] = 1,
        dtype: torch.dtype = BF16,
        d: int = 64,
        dv: int = 64,
        align_end: bool = True,
        values: Callable[[Tensor], Tensor] = lambda v: v,
        heads: tuple[int, int] = (HQ, HKV),
        latent: bool = False,
    ) -> None:
        g = generator(sum(keys))
        hq, hkv = heads
        each = [rows] * len(keys) if isinstance(rows, int) else list(rows)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(dtype)

        self.spec, self.align_end, self.heads = spec, align_end, heads
        self.q = [normal(1, hq, n, d) for n in each]
        self.k = [normal(1, hkv, n, d) for n in keys]
        if latent:  # values are the first columns of the keys
            self.k = [values(k) for k in self.k]
            self.v = [k[..., :dv] for k in self.k]
        else:
            self.v = [values(normal(1, hkv, n, dv)) for n in keys]
        self.want = [
            gate.Expectation(shifted(spec, b, k.shape[2] - q.shape[2] if align_end else 0),
                             q, k, v, grads=False)
            for b, (q, k, v) in enumerate(zip(self.q, self.k, self.v, strict=True))
        ]  # fmt: skip

    @property
    def form(self) -> Form:
        most = max(q.shape[2] for q in self.q)
        return Form.of_sequences(most * self.heads[0] // self.heads[1])

    def check(self, call: Call, form: Form | None = None) -> list[Tensor]:
        """One call, each sequence through the gate; returns the outputs of the sequences."""
        program, out, stats = run(self.spec, call, form or self.form, self.align_end)
        outs = []
        for b, want in enumerate(self.want):
            n = self.q[b].shape[2]
            row, first = (0, call.starts[b]) if call.starts is not None else (b, 0)
            own = out[row : row + 1, :, first : first + n]
            saved = {
                name: stats[i, row : row + 1, :, first : first + n]
                for i, name in enumerate(program.sources.stats)
            }
            want.judge(own, saved, want.inputs)
            outs.append(own)
        if call.starts is not None:
            assert (out[:, :, call.starts[-1] :] == 0).all()
        return outs


@dataclass
class Call:
    """Operands and tables of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    tables: dict[str, Tensor]
    key_more: int = 0
    starts: list[int] | None = None  # of packed rows
    max_rows: int = 0

    def to(self, device: str) -> Call:
        tables = {name: table.to(device) for name, table in self.tables.items()}
        q, k, v = (x.to(device) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, tables=tables)


def _int32(x: Any) -> Tensor:
    return torch.as_tensor(x, dtype=torch.int32)


def _filled(xs: Sequence[Tensor], rows: int, capacity: int, at: Callable) -> Tensor:
    """Keys of sequence b, position j in row and position at(b, j); NaN elsewhere."""
    out = torch.full((rows, xs[0].shape[1], capacity, xs[0].shape[3]), NAN, dtype=xs[0].dtype)
    for b, x in enumerate(xs):
        for j in range(x.shape[2]):
            row, position = at(b, j)
            out[row, :, position] = x[0, :, j]
    return out


def cache(x: Batch, more: int = 0) -> Call:
    """A dense cache in shuffled rows with padding on the left; ``more`` keys were appended."""
    count, longest = len(x.k), max(k.shape[2] for k in x.k)
    row = [(b + 1) % (count + 1) for b in range(count)]
    pad = [3 * b % 7 for b in range(count)]
    ends = [k.shape[2] + p - more for k, p in zip(x.k, pad, strict=True)]
    k, v = (
        _filled(xs, count + 1, longest + 9, lambda b, j: (row[b], pad[b] + j)) for xs in (x.k, x.v)
    )
    tables = {"key_start": _int32(pad), "key_end": _int32(ends), "kv_row": _int32(row)}
    return Call(torch.cat(x.q), k, v, tables, more)


def pages(x: Batch, size: int) -> Call:
    """Pages in random order; those that no sequence has hold NaN."""
    need = [-(-k.shape[2] // size) for k in x.k]
    order = torch.randperm(sum(need) + 2, generator=generator(size)).tolist()
    table = torch.full((len(x.k), max(need) + 1), -1, dtype=torch.int32)
    for b, n in enumerate(need):
        for i in range(n):
            table[b, i] = order.pop()
    total = sum(need) + 2
    k, v = (
        _filled(xs, total, size, lambda b, j: (int(table[b, j // size]), j % size))
        for xs in (x.k, x.v)
    )
    ends = _int32([k.shape[2] for k in x.k])
    return Call(torch.cat(x.q), k, v, {"key_end": ends, "pages": table})


def packed(x: Batch) -> Call:
    """Rows and keys of all sequences one after the other."""
    hq, d = x.q[0].shape[1], x.q[0].shape[3]
    spare = torch.full((1, hq, UNCOVERED, d), NAN, dtype=x.q[0].dtype)
    starts = [torch.tensor([t.shape[2] for t in xs]).cumsum(0) for xs in (x.q, x.k)]
    q_at, k_at = (_int32([0, *s.tolist()]) for s in starts)
    tables = {
        "q_start": q_at[:-1], "q_end": q_at[1:], "key_start": k_at[:-1], "key_end": k_at[1:],
    }  # fmt: skip
    most = max(q.shape[2] for q in x.q)
    return Call(
        torch.cat([*x.q, spare], 2), torch.cat(x.k, 2), torch.cat(x.v, 2), tables,
        starts=q_at.tolist(), max_rows=most,
    )  # fmt: skip


LAYOUTS: dict[str, Callable[[Batch], Call]] = {
    "cache": cache,
    "appended": lambda x: cache(x, 1),
    "pages16": lambda x: pages(x, 16),
    "pages64": lambda x: pages(x, 64),
    "packed": packed,
}


def run(
    spec: ae.AttentionSpec, call: Call, form: Form, align_end: bool
) -> tuple[Any, Tensor, Tensor]:
    captures = dispatch.captures_for(spec)
    d, dv = call.q.shape[3], call.v.shape[3]
    isa = "sm_80" if call.q.device.type == "cpu" else isa_of(call.q)
    program = dispatch.program(spec, captures, call.q.dtype, d, dv, isa, form)
    tensors = dispatch.bound_tensors(program, captures)
    names = ("q_start", "q_end", "key_start", "key_end", "kv_row", "pages")
    tables = [call.tables.get(n) for n in names]
    out, stats = torch.ops.attnengine.forward_sequences(
        call.q, call.k, call.v, tensors, program.forward(), d**-0.5, True, *tables,
        call.max_rows or call.q.shape[2], 1 << 20, call.key_more, align_end,
    )  # fmt: skip
    return program, out.cpu(), stats.cpu()
