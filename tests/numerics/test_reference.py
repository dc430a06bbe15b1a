"""The reference against formulas written out here, gradcheck, and what must not reach it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnengine.errors import TraceError
from attnengine.reference import eager, ideal, reference
from attnengine.rows import Identity, ReLU, Retention, Sigmoid, Softmax, SoftmaxSink
from attnengine.spec import AttentionSpec, OnlineFunc

NAN, INF = math.nan, math.inf


def problem(
    shape_q: tuple, shape_k: tuple, dv: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = (shape_q, shape_k, (*shape_k[:3], dv))
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def grads(out: Any, inputs: tuple) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(x.square().sum() for x in out), inputs, allow_unused=True)


def test_softmax_gqa_and_broadcast_batch_against_torch() -> None:
    q, k, v = problem((3, 4, 6, 5), (1, 2, 9, 5), 7)
    got, aux = reference(q, k, v, AttentionSpec(mask_mod=causal, scale=0.3), return_aux=True)
    s = (q @ k.repeat_interleave(2, 1).mT) * 0.3
    s = s.masked_fill(~torch.ones(6, 9, dtype=torch.bool).tril(), -INF)
    want, lse = torch.softmax(s, -1) @ v.repeat_interleave(2, 1), s.logsumexp(-1)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(aux["lse"], lse)
    for a, b in zip(
        grads((got, aux["lse"]), (q, k, v)), grads((want, lse), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(a, b)


SCALE = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
TABLE = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(
    "row",
    [
        Softmax(),
        SoftmaxSink(SCALE),
        Sigmoid(SCALE),
        Sigmoid(TABLE.detach()[1].clone()),
        ReLU(),
        Identity(),
    ],
    ids=lambda r: type(r).__name__,
)
def test_gradcheck_of_mods_rows_and_captured_tensors(row: OnlineFunc) -> None:
    q, k, v = problem((1, 2, 4, 3), (1, 1, 5, 3), 2)
    spec = AttentionSpec(
        score_mod=lambda s, b, h, i, j: torch.tanh(s * SCALE[h]) + TABLE[j] * TABLE[i] - TABLE[2],
        mask_mod=lambda b, h, i, j: (i >= j) & (i > 0),
        row_func=row,
        q_mod=torch.tanh,
        k_mod=lambda x: x * SCALE[0],
        v_mod=lambda x: x / (1 + x * x),
    )

    def f(*args: Tensor) -> tuple[Tensor, ...]:
        out, aux = reference(*args[:3], spec, return_aux=True)
        return (out, *[x[:, :, 1:] for x in aux.values()])

    assert torch.autograd.gradcheck(f, (q, k, v, SCALE, TABLE))


def test_retention_normaliser_is_detached() -> None:
    q, k, v = problem((1, 1, 3, 4), (1, 1, 6, 4), 4)
    spec = AttentionSpec(row_func=Retention())
    out, aux = reference(q, k, v, spec, return_aux=True)
    s = q @ k.mT / 2
    norm = s.abs().sum(-1).clamp(min=1).detach()
    torch.testing.assert_close(aux["norm"], norm)
    want = (s / norm[..., None]) @ v
    for a, b in zip(grads((out,), (q, k, v)), grads((want,), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


def test_user_row_function_sees_only_live_keys() -> None:
    class Mean(OnlineFunc):
        """Weights 1 / number of live keys: any dead key that is let in shows."""

        state = {"n": 0.0}

        def update(self, scores: Tensor, state: dict) -> tuple:
            return torch.ones_like(scores), {"n": state["n"] + scores.shape[0]}, 1.0

        def finalize(self, out: Tensor, state: dict) -> tuple:
            return out / state["n"], {"n": state["n"]}

        def weights(self, scores: Tensor, saved: dict) -> Tensor:
            return torch.ones_like(scores) / saved["n"]

    q, k, v = problem((1, 1, 4, 3), (1, 1, 4, 3), 2)
    spec = AttentionSpec(mask_mod=lambda b, h, i, j: i > j, row_func=Mean())
    out, aux = reference(q, k, v, spec, return_aux=True)
    assert aux["n"].flatten().tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(out[0, 0, 3], v[0, 0, :3].mean(0))
    assert (out[0, 0, 0] == 0).all()


def test_dead_rows() -> None:
    q, k, v = problem((1, 2, 3, 4), (1, 2, 5, 4), 4)
    sink = torch.tensor([0.5, -INF], dtype=torch.float64, requires_grad=True)

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i != 1

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i == 2, -INF, s)  # row 2 is dead by its scores

    out, aux = reference(q, k, v, AttentionSpec(score, mask), return_aux=True)
    assert (out[:, :, 1:] == 0).all() and (aux["lse"][:, :, 1:] == -INF).all()
    dq, dk, dv = grads((out,), (q, k, v))
    assert (dq[:, :, 1:] == 0).all() and dk.isfinite().all() and dv.isfinite().all()

    spec = AttentionSpec(score, mask, row_func=SoftmaxSink(sink))
    out, aux = reference(q, k, v, spec, return_aux=True)
    assert (out[:, :, 1:] == 0).all()
    assert aux["lse"][0, :, 1].tolist() == [0.5, -INF]
    (g,) = torch.autograd.grad(aux["lse"][0, 0, 1:].sum(), sink)
    assert g.tolist() == [2.0, 0.0]


def test_nothing_of_a_dead_key_reaches_anything() -> None:
    q, k, v = problem((1, 2, 6, 4), (1, 2, 12, 4), 3)
    table = torch.randn(8, dtype=torch.float64, requires_grad=True)

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j < 8) & (i > 1)

    def clean(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s * table[j % 8]

    def poisoned(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # out of bounds for j >= 8; 0/0 there; -inf whose derivative is infinite is not used
        return s * table[j] + torch.log((8 - j).clamp(min=0) * 0.0 + 1) / (j < 8)

    want, want_aux = reference(q, k, v, AttentionSpec(clean, mask), return_aux=True)
    expected = grads((want, want_aux["lse"][:, :, 2:]), (q, k, v, table))
    with torch.no_grad():
        q[:, :, :2], k[:, :, 8:10], k[:, :, 10:], v[:, :, 8:] = NAN, NAN, INF, NAN
    out, aux = reference(q, k, v, AttentionSpec(poisoned, mask), return_aux=True)
    torch.testing.assert_close(out, want)
    got = grads((out, aux["lse"][:, :, 2:]), (q, k, v, table))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_minus_inf_score_has_no_gradient() -> None:
    q, k, v = problem((1, 1, 2, 4), (1, 1, 4, 4), 4)
    x = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    out = reference(q, k, v, AttentionSpec(lambda s, b, h, i, j: s + torch.log(x[j])))
    (g,) = grads((out,), (x,))
    assert g.isfinite().all() and (g[1::2] == 0).all() and (g[::2] != 0).all()


def test_nan_is_live_and_shown() -> None:
    q, k, v = problem((1, 1, 3, 4), (1, 1, 4, 4), 4)
    out = reference(q, k, v, AttentionSpec(lambda s, b, h, i, j: torch.where(i == j, NAN, s)))
    assert out.isnan().all()
    with torch.no_grad():
        v[0, 0, 3, 0] = NAN
    out = reference(q, k, v, AttentionSpec(mask_mod=lambda b, h, i, j: j <= i + 1))
    assert out[0, 0, :2].isfinite().all() and out[0, 0, 2, 0].isnan()
    assert out[0, 0, 2, 1:].isfinite().all()


@pytest.mark.parametrize(
    ("shape_q", "shape_k"),
    [
        ((2, 2, 0, 4), (2, 1, 3, 4)),
        ((0, 2, 3, 4), (0, 2, 3, 4)),
        ((2, 2, 3, 4), (2, 2, 0, 4)),
        ((1, 1, 1, 1), (1, 1, 1, 1)),
    ],
)
def test_zero_and_one_lengths(shape_q: tuple, shape_k: tuple) -> None:
    q, k, v = problem(shape_q, shape_k, 5)
    spec = AttentionSpec(lambda s, b, h, i, j: s + i - j, causal, row_func=SoftmaxSink(SCALE))
    out, aux = reference(q, k, v, spec, return_aux=True)
    assert out.shape == (*shape_q[:3], 5) and aux["lse"].shape == shape_q[:3]
    for g, x in zip(grads((out, aux["lse"]), (q, k, v)), (q, k, v), strict=True):
        assert g.shape == x.shape and g.isfinite().all()


def test_gathers_of_every_kind() -> None:
    q, k, v = problem((2, 2, 4, 4), (2, 2, 4, 4), 4)
    big = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    bias, number = big[:, 0], torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = big[b, h]  # a gathered matrix, indexed further
        total = row[i].sum() + row[..., j][i] + big[b, 2, i, j] + big[0][h, -1][j]
        return s * number + total + bias[b][i][j]

    spec = AttentionSpec(score)
    at = [torch.arange(n) for n in (2, 2, 4, 4)]
    b, h, i, j = torch.meshgrid(*at, indexing="ij")
    sums = big.sum(-1)[b, h, i]
    extra = sums + big[b, h, i, j] + big[b, 2, i, j] + big[0][h, -1, j] + bias[b, i, j]
    want = torch.softmax((q @ k.mT / 2) * number + extra, -1) @ v
    got = reference(q, k, v, spec)
    torch.testing.assert_close(got, want)
    for x, y in zip(grads((got,), (big, number)), grads((want,), (big, number)), strict=True):
        torch.testing.assert_close(x, y)


def test_indices_are_int64_and_scores_wide() -> None:
    q, k, v = problem((1, 1, 2, 4), (1, 1, 2, 4), 4, torch.bfloat16)
    seen = []

    def score(s: Tensor, *index: Tensor) -> Tensor:
        seen.append((s.dtype, {x.dtype for x in index}))
        return s + (index[2] / 2) * (index[3] // -3) + index[2] % -2

    out, aux = reference(q, k, v, AttentionSpec(score), return_aux=True)
    assert seen[0] == (torch.float32, {torch.int64})
    assert out.dtype == torch.bfloat16 and aux["lse"].dtype == torch.float32
    golden = reference(q, k, v, AttentionSpec(score), dtype=torch.float64)
    assert golden.dtype == torch.float64


def test_golden_sums_a_captured_gradient_in_fp64() -> None:
    q, k, v = problem((1, 1, 64, 4), (1, 1, 64, 4), 4, torch.float32)
    bias = torch.tensor(0.0, requires_grad=True)
    spec = AttentionSpec(lambda s, b, h, i, j: s * (1 + bias), row_func=Identity())
    out = reference(q, k, v, spec, dtype=torch.float64)
    (g,) = torch.autograd.grad(out.sum(), bias)
    s = (q.double() @ k.double().mT / 2) @ v.double()
    assert g.dtype == torch.float32 and g.item() == s.sum().float().item()


def test_models_round_where_kernels_do() -> None:
    q, k, v = problem((1, 2, 64, 32), (1, 2, 64, 32), 32, torch.bfloat16)
    spec = AttentionSpec(mask_mod=causal)
    errors = []
    golden = grads((reference(q, k, v, spec, dtype=torch.float64),), (q, k, v))
    for fn in (reference, ideal, eager):
        out = fn(q, k, v, spec)
        assert out.dtype == torch.bfloat16
        got = grads((out.double(),), (q, k, v))
        errors.append([(a.double() - b.double()).norm() for a, b in zip(got, golden, strict=True)])
    for exact, best, dense in zip(*errors, strict=True):
        assert exact < best < dense
    full = [x.detach().float() for x in (q, k, v)]
    assert torch.equal(ideal(*full, spec), reference(*full, spec))
    assert not torch.equal(ideal(*full, spec, torch.bfloat16), reference(*full, spec))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (AttentionSpec(lambda s, b, h, i, j: i), "score_mod: returned dtype torch.int64"),
        (
            AttentionSpec(lambda s, b, h, i, j: TABLE),
            r"score_mod: returned a tensor of shape \(5,\)",
        ),
        (AttentionSpec(mask_mod=lambda b, h, i, j: i - j), "mask_mod: returned dtype torch.int64"),
        (AttentionSpec(q_mod=lambda x: x > 0), "q_mod: returned dtype torch.bool"),
    ],
)
def test_what_a_mod_returns_is_checked(spec: AttentionSpec, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        reference(*problem((1, 1, 2, 4), (1, 1, 2, 4), 4), spec)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4), "must be 4-D"),
        ((1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3, 4), "one head_dim"),
        ((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 4, 4), "same heads and length"),
        ((1, 3, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4), "multiple of k's"),
        ((3, 2, 3, 4), (2, 2, 3, 4), (2, 2, 3, 4), "must be q's or 1"),
    ],
)
def test_shapes_are_checked(q: tuple, k: tuple, v: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference(torch.zeros(q), torch.zeros(k), torch.zeros(v), AttentionSpec())
