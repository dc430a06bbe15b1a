"""Tests of the tests: the gate passes a correct flash kernel and catches each injected bug."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from attnengine import gate
from attnengine.rows import Retention, Sigmoid, SoftmaxSink
from attnengine.spec import AttentionSpec

TILE = 64
LENGTH, KEYS, HEADS, DIM = 64, 256, 16, 32  # 1024 rows of about 220 live keys
REACH = KEYS - LENGTH


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).float()


class Flash(torch.autograd.Function):
    """A flash kernel in fp32 torch ops with its roundings: online softmax over key tiles forward,
    recomputed weights backward. score = q.k / sqrt(D) + table[h, (kv - q) % 16]; key <= q + REACH.
    ``bug`` injects one of the faults of BUGS."""

    @staticmethod
    def scores(q: Tensor, k: Tensor, table: Tensor, bug: str) -> tuple[Tensor, Tensor]:
        scale = (1.01 if bug == "scale x1.01" else 1.0) / math.sqrt(DIM)
        distance = torch.arange(KEYS) - torch.arange(LENGTH)[:, None]
        s = q.float() @ k.float().mT * scale + table[:, distance % 16]
        live = distance <= REACH - (bug == "mask off by one")
        if bug == "lost key":  # a typical key of 16 rows
            live = live.expand(s.shape).clone()
            live[0, 0, 5:21, 150] = False
        return s.masked_fill(~live, -math.inf), distance % 16

    @staticmethod
    def forward(ctx, q, k, v, table, bug):  # type: ignore[no-untyped-def]
        s, bucket = Flash.scores(q, k, table, bug)
        mma = torch.float8_e4m3fn if bug == "weights in fp8" else q.dtype
        m = torch.full((*s.shape[:3], 1), -math.inf)
        r, out = torch.zeros_like(m), torch.zeros(*s.shape[:3], DIM)
        for at in range(0, KEYS, TILE):
            tile = s[..., at : at + TILE]
            new = torch.maximum(m, tile.amax(-1, keepdim=True))
            p, alpha = torch.exp(tile - new), torch.exp(m - new)
            if bug == "stale maximum" and at == 2 * TILE:
                alpha = torch.ones_like(alpha)
            m, term = new, p.sum(-1, keepdim=True)
            if bug == "term missing in row sum" and at == 0:
                term = term - p[..., :1]
            r = r * alpha + term
            out = out * alpha + rounded(p, mma) @ v[..., at : at + TILE, :].float()
        out, lse = (out / r).to(q.dtype), (m + torch.log(r)).squeeze(-1)
        if bug == "lse in log2":
            lse = lse / math.log(2)
        if bug == "one NaN":
            out[0, 0, 0, 0] = math.nan
        ctx.save_for_backward(q, k, v, table, out, lse)
        ctx.bug = bug
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):  # type: ignore[no-untyped-def]
        (q, k, v, table, out, lse), bug = ctx.saved_tensors, ctx.bug
        s, bucket = Flash.scores(q, k, table, bug)
        do, mma = dout.float(), q.dtype
        p = torch.exp(s - lse[..., None])
        delta = (do * out.float()).sum(-1) - (0 if bug == "dlse ignored" else dlse)
        ds = p * (do @ v.float().mT - delta[..., None])
        if bug == "score gradients in fp8":
            mma = torch.float8_e4m3fn
        scale = (1.01 if bug == "dq x1.01" else 1.0) / math.sqrt(DIM)
        dr = rounded(ds * scale, mma)
        dq = dr @ k.float()
        dk = dr.mT @ q.float()
        if bug == "dk misses a query tile":
            dk = dr[..., 16:, :].mT @ q[..., 16:, :].float()
        dv = rounded(p, q.dtype).mT @ do
        if bug == "dv misses a query":
            dv = dv - rounded(p, q.dtype)[..., :1, :].mT @ do[..., :1, :]
        if bug == "captured gradient misses a tile":
            ds = ds.clone()
            ds[..., -TILE:] = 0
        index = bucket.expand(HEADS, -1, -1).flatten(1)
        dtable = torch.zeros_like(table).scatter_add(1, index, ds[0].flatten(1))
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dtable, None


FORWARD_BUGS = [
    "scale x1.01",
    "lost key",
    "mask off by one",
    "weights in fp8",
    "term missing in row sum",
    "stale maximum",
    "lse in log2",
    "one NaN",
]
BACKWARD_BUGS = {  # and the gradient that must be named
    "dlse ignored": "dq",
    "score gradients in fp8": "dq",
    "dq x1.01": "dq",
    "dk misses a query tile": "dk",
    "dv misses a query": "dv",
    "captured gradient misses a tile": "dtable",
}


@functools.cache
def problem(dtype: torch.dtype, size: float) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(7)
    shapes = [(1, HEADS, n, DIM) for n in (LENGTH, KEYS, KEYS)]
    q, k, v = (torch.randn(s, generator=g) for s in shapes)
    table = torch.randn(HEADS, 16, generator=g).requires_grad_()
    return (q * size).to(dtype), k.to(dtype), v.to(dtype), table


@functools.cache
def expectation(dtype: torch.dtype, size: float) -> gate.Expectation:
    q, k, v, table = problem(dtype, size)
    spec = AttentionSpec(
        score_mod=lambda s, b, h, q_idx, kv_idx: s + table[h, (kv_idx - q_idx) % 16],
        mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + REACH,
    )
    return gate.Expectation(spec, q, k, v, captures={"table": table}, stats=["lse"])


def run(dtype: torch.dtype, size: float, bug: str) -> list[gate.Report]:
    table = problem(dtype, size)[3]

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out, lse = Flash.apply(q, k, v, table, bug)
        return out, {"lse": lse}

    return expectation(dtype, size).check(kernel)


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@pytest.mark.parametrize("size", [1.0, 15.0], ids=["randn", "big"])
@DTYPES
def test_correct_flash_passes(dtype: torch.dtype, size: float) -> None:
    reports = run(dtype, size, "")
    assert [r.name for r in reports] == ["out", "dq", "dk", "dv", "dtable", "lse"]


@pytest.mark.parametrize("bug", FORWARD_BUGS)
@DTYPES
def test_forward_bug_is_caught(dtype: torch.dtype, bug: str) -> None:
    with pytest.raises(gate.GateError, match=r"(?m)^(out|lse): .*(limit|NaN)"):
        run(dtype, 1.0, bug)


@pytest.mark.parametrize("bug", BACKWARD_BUGS)
@DTYPES
def test_backward_bug_is_caught(dtype: torch.dtype, bug: str) -> None:
    with pytest.raises(gate.GateError, match=rf"(?m)^{BACKWARD_BUGS[bug]}: .*limit") as caught:
        run(dtype, 1.0, bug)
    assert "\nout: " not in str(caught.value)


@DTYPES
def test_scale_bug_is_caught_with_big_logits(dtype: torch.dtype) -> None:
    with pytest.raises(gate.GateError):
        run(dtype, 15.0, "scale x1.01")


def small(kind: str, dtype: torch.dtype, length: int, keys: int, d: int) -> None:
    """A dense kernel of its own rounding pattern on a small shape must pass: no gate by luck."""
    g = torch.Generator().manual_seed(length * 100 + keys * 10 + d)
    q, k, v = (torch.randn(1, 2, n, d, generator=g).to(dtype) for n in (length, keys, keys))
    sink = torch.randn(2, generator=g).requires_grad_()
    row = {"sink": SoftmaxSink(sink), "sigmoid": Sigmoid(sink), "retention": Retention()}[kind]
    spec = AttentionSpec(row_func=row)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # fp32 with the keys reversed: another order of every sum, rounded where a kernel rounds
        s = q.float() @ k.flip(2).float().mT / math.sqrt(d)
        if kind == "sink":
            lse = torch.logaddexp(s.logsumexp(-1), sink[:, None])
            w, stats = torch.exp(s - lse[..., None]), {"lse": lse}
        elif kind == "sigmoid":
            w = torch.sigmoid(s + sink[:, None, None])
            stats = {"bias": sink[:, None].expand(1, 2, length)}
        else:
            norm = s.abs().sum(-1).clamp(min=1).detach()
            w, stats = s / norm[..., None], {"norm": norm}
        w = w + (w.detach().to(dtype).float() - w.detach())
        return (w @ v.flip(2).float()).to(dtype), stats

    gate.compare(kernel, spec, q, k, v, captures={} if kind == "retention" else {"sink": sink})


@pytest.mark.parametrize("kind", ["sink", "sigmoid", "retention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_small_shapes_pass(kind: str, dtype: torch.dtype) -> None:
    for length, keys, d in [(1, 1, 1), (1, 2, 3), (3, 1, 8), (1, 5, 64), (7, 3, 16), (5, 9, 1)]:
        small(kind, dtype, length, keys, d)


def test_rows_of_zeros_lend_no_tolerance() -> None:
    """What nobody attends to rounds nothing; a wrong row beside it is still found."""
    golden = torch.randn(64, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    golden[32:] = 0
    good = golden.bfloat16()
    assert gate.check(good, golden, good, good).ok
    bad = good.clone()
    bad[3] *= 1.05
    assert "(b) worst row's error" in str(gate.check(bad, golden, good, good))


def test_what_is_too_large_to_store_is_infinite() -> None:
    """Beyond the largest float16, 65504; a few roundings around the limit may go either way."""
    golden = torch.tensor([1e3, 7e4, -1e6, 65504, 65525, -65530], dtype=torch.float64)
    best = golden.half()
    assert gate.check(best, golden, best, best).ok
    for at, value, ok in ((0, math.inf, False), (1, 65504, False), (2, math.inf, False),
                          (3, math.inf, True), (4, 65504, True), (5, -65504, True)):  # fmt: skip
        actual = best.clone()
        actual[at] = value
        report = gate.check(actual, golden, best, best)
        assert report.ok == ok and (ok or "(d)" in str(report)), value


def test_fp64_is_held_to_1e_12() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    spec = AttentionSpec()

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / 2, -1) @ v

    gate.compare(kernel, spec, q, k, v)
    with pytest.raises(gate.GateError, match="dv: L2 error"):
        gate.compare(lambda q, k, v: kernel(q, k, v) * (1 + 1e-10), spec, q, k, v)


def test_wrong_shape_dtype_and_statistic_are_named() -> None:
    q = k = v = torch.randn(1, 1, 3, 4)
    spec = AttentionSpec()
    with pytest.raises(gate.GateError, match=r"out is \(1, 1, 4, 3\)"):
        gate.compare(lambda q, k, v: v.mT, spec, q, k, v)
    with pytest.raises(gate.GateError, match="torch.bfloat16, expected"):
        gate.compare(lambda q, k, v: v.bfloat16(), spec, q, k, v)

    def extra(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.softmax(q @ k.mT / 2, -1) @ v, {"norm": q[..., 0].detach()}

    with pytest.raises(gate.GateError, match=r"norm: no such statistic; the spec saves \['lse'\]"):
        gate.compare(extra, spec, q, k, v)


def test_report_shows_index_value_and_golden() -> None:
    golden = torch.zeros(2, 3, dtype=torch.float64)
    actual = golden.float()
    actual[1, 2] = 0.5
    report = gate.check(actual, golden, name="dq")
    assert not report.ok
    assert "worst [1, 2]: got 0.5, golden 0" in str(report)
