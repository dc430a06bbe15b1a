"""A dead key is absent: nothing that is computed or stored there reaches anything."""

from __future__ import annotations

import math

import pytest
import torch
from problems import (
    BF16,
    F32,
    HEADS,
    Captures,
    generator,
    leaf,
    operands,
    results,
    sink,
    verify,
)
from torch import Tensor

import attnengine as ae

NAN, INF = math.nan, math.inf
LENGTH, KEYS = 70, 300  # three tiles of keys and more
WIDE = pytest.mark.parametrize("dtype", [F32], ids=["f32"])
HALF = pytest.mark.parametrize("dtype", [BF16], ids=["bf16"])
BOTH = pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])


def masked(row_func: ae.OnlineFunc | None = None) -> tuple[ae.AttentionSpec, Tensor]:
    """Live where a captured table [L, S] says so: one module serves every pattern below."""
    alive = torch.ones(LENGTH, KEYS, dtype=torch.bool)
    spec = ae.AttentionSpec(
        mask_mod=lambda b, h, q, k: alive[q, k], row_func=row_func or ae.Softmax()
    )
    return spec, alive


def pattern(name: str) -> Tensor:
    row, key = torch.arange(LENGTH)[:, None], torch.arange(KEYS)[None, :]
    some = torch.rand(LENGTH, KEYS, generator=generator(1))
    return {
        "all dead": torch.zeros(LENGTH, KEYS, dtype=torch.bool),
        "all live": torch.ones(LENGTH, KEYS, dtype=torch.bool),
        "dead rows": (row % 3 == 1).expand(LENGTH, KEYS) & (some < 0.9),
        "one row": (row == 17) & (some < 0.5),
        "dead first tiles": (key >= 257) & (key + row < 340),
        "dead last tiles": (key < 3).expand(LENGTH, KEYS),
        "dead middle tiles": ((key < 20) | (key >= 290)).expand(LENGTH, KEYS),
        "tiles dead for some rows": (key // 64 + row // 7) % 3 == 0,
        "one key": key == (row * 37) % KEYS,
        "one key for all": (key == 299).expand(LENGTH, KEYS),
        "few": some < 0.02,
        "most": some < 0.97,
    }[name]


PATTERNS = [
    "all dead", "all live", "dead rows", "one row", "dead first tiles", "dead last tiles",
    "dead middle tiles", "tiles dead for some rows", "one key", "one key for all", "few", "most",
]  # fmt: skip


@BOTH
@pytest.mark.parametrize("pattern_name", PATTERNS)
def test_patterns(pattern_name: str, dtype: torch.dtype) -> None:
    spec, alive = masked()
    alive.copy_(pattern(pattern_name))
    q, k, v = operands(dtype, L=LENGTH, S=KEYS)
    verify(spec, q, k, v)
    got = results(spec, q, k, v)
    dead_rows, dead_keys = ~alive.any(1), ~alive.any(0)
    assert (got["lse"][..., dead_rows] == -INF).all()
    for tensor, dead in (
        ("out", dead_rows),
        ("dq", dead_rows),
        ("dk", dead_keys),
        ("dv", dead_keys),
    ):
        assert (got[tensor][..., dead, :] == 0).all(), tensor
    assert all(x.isfinite().all() for n, x in got.items() if n != "lse")


@WIDE
def test_sink_of_dead_rows(dtype: torch.dtype) -> None:
    """lse is the sink's own logit, whose gradient is then dlse. The score captures the same tensor:
    one gradient, the sum of both."""
    spec, captures = sink()
    shared = captures["sink"]
    spec = ae.AttentionSpec(
        score_mod=lambda s, b, h, q, k: s * shared[h],
        mask_mod=later_rows,
        row_func=spec.row_func,
    )
    q, k, v = operands(dtype, B=2, L=LENGTH, S=KEYS)
    verify(spec, q, k, v, captures)
    got = results(spec, q, k, v, captures)
    want = captures["sink"].detach()[None, :, None].expand(2, HEADS, 10)
    assert torch.equal(got["lse"][..., :10], want)
    assert (got["out"][..., :10, :] == 0).all() and (got["dq"][..., :10, :] == 0).all()


def later_rows(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= 10) & (k <= 3 * q)


@BOTH
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("operand", ["q", "k", "v"])
def test_values_of_dead_pairs(operand: str, value: float, dtype: torch.dtype) -> None:
    """Stored in rows that no live pair touches."""
    spec, alive = masked()
    alive.copy_(pattern("most"))
    dead_rows, dead_keys = [0, 1, 20, 69], [0, 63, 64, 130, 299]
    alive[dead_rows] = False
    alive[:, dead_keys] = False
    q, k, v = operands(dtype, L=LENGTH, S=KEYS)
    clean = ae.attention(q, k, v, spec)
    x, dead = {"q": (q, dead_rows), "k": (k, dead_keys), "v": (v, dead_keys)}[operand]
    x[:, :, dead] = value
    assert torch.equal(ae.attention(q, k, v, spec), clean)
    verify(spec, q, k, v)


@BOTH
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("operand", ["q", "k", "v"])
def test_values_live_for_some_rows_only(operand: str, value: float, dtype: torch.dtype) -> None:
    """A NaN reaches the rows (and keys) of its live pairs and no others, in the same tile."""
    spec, alive = masked()
    alive.copy_(pattern("most"))
    alive[: LENGTH // 2, 130] = False
    alive[33, : KEYS // 2] = False
    q, k, v = operands(dtype, L=LENGTH, S=KEYS)
    x, at = {"q": (q, 33), "k": (k, 130), "v": (v, 130)}[operand]
    x[:, 1, at, 5] = value
    verify(spec, q, k, v)


@BOTH
def test_nan_of_output_gradient_stays_in_its_row(dtype: torch.dtype) -> None:
    spec, alive = masked()
    alive.copy_(pattern("most"))
    alive[33] = False
    q, k, v = (x.requires_grad_() for x in operands(dtype, L=LENGTH, S=KEYS))
    out = ae.attention(q, k, v, spec)
    g = torch.randn(out.shape, generator=generator(2)).to(dtype)
    clean = torch.autograd.grad(out, (q, k, v), g, retain_graph=True)
    g[:, :, 33] = NAN  # a dead row: its output does not depend on anything
    for got, want in zip(torch.autograd.grad(out, (q, k, v), g), clean, strict=True):
        assert torch.equal(got, want)


# -- what score_mod computes at dead keys ----------------------------------------------------------


def poisonous() -> tuple[ae.AttentionSpec, Captures]:
    """Every dead key meets NaN, infinities and indices out of bounds; every fifth live one scores
    -inf, by a branch and by a logarithm of 0, whose derivative is infinite."""
    table, near = leaf(HEADS, LENGTH, seed=3), leaf(LENGTH, KEYS, seed=4)
    floor = (torch.arange(KEYS) % 5 != 2).float().requires_grad_()

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        far = torch.where(k <= q, q - k, (k - q) * 1_000_003 * 65_537)
        bias = table[h, far] + near[q, (k - q).abs() * torch.where(k <= q, 1, 7)]
        bias = bias + torch.log(floor[k]) + torch.log(q - k + 1.0) + 1.0 / (q - k + 1)
        blown = torch.where(k <= q, score, torch.exp(1000.0 * (k - q)) - torch.exp(1000.0 * k))
        return torch.where((q + k) % 7 == 3, -INF, blown + bias)

    spec = ae.AttentionSpec(score_mod=score_mod, mask_mod=lambda b, h, q, k: (k <= q) & (q != 5))
    return spec, {"table": table, "near": near, "floor": floor}


@HALF
def test_poison_in_score_mod_of_dead_keys(dtype: torch.dtype) -> None:
    spec, captures = poisonous()
    q, k, v = operands(dtype, B=2, L=LENGTH, S=KEYS)
    verify(spec, q, k, v, captures)
    got = results(spec, q, k, v, captures)
    assert all(x.isfinite().all() for n, x in got.items() if n != "lse")
    assert (got["dfloor"][2::5] == 0).all() and (got["out"][:, :, 5] == 0).all()


@WIDE
@pytest.mark.parametrize("where", ["some keys", "a tile", "first tiles", "some rows", "everything"])
def test_score_mod_returning_minus_infinity(where: str, dtype: torch.dtype) -> None:
    """A captured bias of -inf: dead as by a mask, and its own gradient is 0."""
    bias = torch.randn(LENGTH, KEYS, generator=generator(5))
    rows, keys = {
        "some keys": (slice(None), [0, 5, 64, 299]),
        "a tile": (slice(None), slice(64, 256)),
        "first tiles": (slice(0, 48), slice(0, 257)),
        "some rows": ([0, 3, 50, 69], slice(None)),
        "everything": (slice(None), slice(None)),
    }[where]
    bias[rows, keys] = -INF
    dead = bias == -INF
    bias.requires_grad_()
    spec = ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s + bias[q, k])
    q, k, v = operands(dtype, L=LENGTH, S=KEYS)
    verify(spec, q, k, v, {"bias": bias})
    got = results(spec, q, k, v, {"bias": bias})
    assert (got["dbias"][dead] == 0).all()
    assert (got["lse"][..., dead.all(1)] == -INF).all()


@WIDE
@pytest.mark.parametrize("value", [NAN, INF], ids=str)
def test_special_scores_of_live_keys_propagate(value: float, dtype: torch.dtype) -> None:
    """In their own rows, in every gradient where the meaning says so."""
    bias = torch.randn(LENGTH, KEYS, generator=generator(6))
    bias[3, 7], bias[40, 290] = value, value
    bias.requires_grad_()
    spec = ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s + bias[q, k])
    q, k, v = operands(dtype, L=LENGTH, S=KEYS)
    verify(spec, q, k, v, {"bias": bias})
    out = ae.attention(q, k, v, spec)
    assert out[:, :, [3, 40]].isnan().all() and out[:, :, [2, 4, 39, 41]].isfinite().all()


@pytest.mark.parametrize("row_func", ["Sigmoid", "Retention"])
@pytest.mark.parametrize("name", ["all dead", "dead rows", "dead first tiles", "few"])
def test_other_row_functions(row_func: str, name: str) -> None:
    """Where the weight of a score of 0, or of exp(-inf), would not be 0 by itself."""
    spec, alive = masked(getattr(ae, row_func)())
    alive.copy_(pattern(name))
    verify(spec, *operands(F32, L=LENGTH, S=KEYS), grads=row_func == "Retention")


# -- large scores ----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("size", [30.0, 1e4, 1e30], ids=str)
def test_huge_scores(size: float, dtype: torch.dtype) -> None:
    """One key wins each row; exp of anything else must underflow, never overflow. 1e30 squared is
    infinite in fp32: those rows are NaN in every implementation, and in the same places."""
    spec, alive = masked()
    alive.copy_(pattern("most"))
    q, k, v = operands(dtype, L=LENGTH, S=KEYS)
    q = q * size
    if size == 1e30:
        k = k * size
        out = ae.attention(q, k, v, spec)
        want = ae.reference(q, k, v, spec)
        assert torch.equal(out.isnan(), want.isnan())
        return
    verify(spec, q, k, v)


@pytest.mark.parametrize("shift", [-1e4, 1e4, -80.0, 100.0])
def test_scores_far_from_zero(shift: float) -> None:
    """Softmax does not care; lse moves with them."""
    bias = torch.full((LENGTH, KEYS), shift)
    spec = ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s + bias[q, k])
    q, k, v = operands(F32, L=LENGTH, S=KEYS)
    out, aux = ae.attention(q, k, v, spec, return_aux=True)
    plain, lse = ae.attention(q, k, v, ae.AttentionSpec(), return_aux=True)
    torch.testing.assert_close(out, plain, rtol=0, atol=3e-3 if abs(shift) > 1e3 else 1e-4)
    torch.testing.assert_close(aux.lse, lse.lse + shift, rtol=1e-5, atol=1e-5)
