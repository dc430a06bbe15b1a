"""Variants against dense formulas written out here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnengine import variants
from attnengine.reference import reference
from attnengine.spec import AttentionSpec

B, H, N, D = 2, 4, 12, 8
Q, K, V = torch.randn(3, B, H, N, D, generator=torch.Generator().manual_seed(3)).unbind(0)
ROW, COL = torch.arange(N)[:, None], torch.arange(N)


def dense(score: Callable[[Tensor], Tensor], live: Tensor | None = None) -> Tensor:
    s = score(Q @ K.mT / math.sqrt(D))
    if live is not None:
        s = s.masked_fill(~live, -math.inf)
    return torch.softmax(s, -1) @ V


def same(spec: AttentionSpec, want: Tensor) -> None:
    torch.testing.assert_close(reference(Q, K, V, spec), want)


IDS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3]])
PREFIX = torch.tensor([3, 7])


@pytest.mark.parametrize(
    ("spec", "live"),
    [
        (variants.causal(), ROW >= COL),
        (variants.sliding_window(3), (ROW >= COL) & (ROW - COL <= 3)),
        (variants.sliding_window(0), ROW == COL),
        (variants.sliding_window(2, causal=False), (ROW - COL).abs() <= 2),
        (variants.dilated(2, 3), (ROW >= COL) & (ROW - COL <= 6) & ((ROW - COL) % 3 == 0)),
        (variants.dilated(1, 4, causal=False), ((ROW - COL).abs() <= 4) & ((ROW - COL) % 4 == 0)),
        (variants.prefix_lm(5), (COL < 5) | (ROW >= COL)),
        (variants.prefix_lm(torch.tensor(5)), (COL < 5) | (ROW >= COL)),
        (variants.prefix_lm(PREFIX), (COL < PREFIX[:, None, None, None]) | (ROW >= COL)),
        (variants.document(IDS[0]), (ROW >= COL) & (IDS[0][:, None] == IDS[0])),
        (variants.document(IDS, causal=False), (IDS[:, :, None] == IDS[:, None])[:, None]),
    ],
)
def test_masks(spec: AttentionSpec, live: Tensor) -> None:
    same(spec, dense(lambda s: s, live))


def test_neighborhood_shifts_its_window_at_the_borders() -> None:
    live = torch.zeros(N, N, dtype=torch.bool)
    for y in range(3):
        for x in range(4):
            for yy in range(3):  # the window's rows are all three
                x0 = min(max(x - 1, 0), 1)
                live[y * 4 + x, [yy * 4 + xx for xx in range(x0, x0 + 3)]] = True
    same(variants.neighborhood_2d(3, 4, 3), dense(lambda s: s, live))
    assert (live.sum(1) == 9).all()


def test_masks_combine() -> None:
    a, b = variants.sliding_window(3).mask_mod, variants.document(IDS).mask_mod
    window, document = (
        (ROW >= COL) & (ROW - COL <= 3),
        (ROW >= COL) & (IDS[:, None, :, None] == IDS[:, None, None]),
    )
    same(AttentionSpec(mask_mod=variants.and_masks(a, b)), dense(lambda s: s, window & document))
    same(AttentionSpec(mask_mod=variants.or_masks(a, b)), dense(lambda s: s, window | document))


def test_alibi() -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    bias = slopes[:, None, None] * (COL - ROW)
    same(variants.alibi(slopes), dense(lambda s: s + bias, ROW >= COL))
    same(variants.alibi(slopes, causal=False), dense(lambda s: s - bias.abs()))
    same(
        variants.alibi(4),
        dense(lambda s: s + variants.alibi_slopes(4)[:, None, None] * (COL - ROW), ROW >= COL),
    )
    torch.testing.assert_close(variants.alibi_slopes(3), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]))


def test_softcap() -> None:
    same(variants.softcap(0.5), dense(lambda s: 0.5 * torch.tanh(s / 0.5), ROW >= COL))


def t5_published(distance: int, buckets: int, bidirectional: bool, far: int) -> int:
    """relative_position_bucket of the published T5 code, in Python numbers."""
    out = 0
    if bidirectional:
        buckets //= 2
        out = buckets if distance > 0 else 0
        n = abs(distance)
    else:
        n = max(-distance, 0)
    exact = buckets // 2
    if n < exact:
        return out + n
    large = exact + int(math.log(n / exact) / math.log(far / exact) * (buckets - exact))
    return out + min(large, buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_bias_and_its_gradient(bidirectional: bool) -> None:
    table = torch.randn(8, H, requires_grad=True)
    bucket = torch.tensor(
        [[t5_published(j - i, 8, bidirectional, 9) for j in range(N)] for i in range(N)]
    )
    spec = variants.t5_bias(table, bidirectional, max_distance=9)
    got, want = reference(Q, K, V, spec), dense(lambda s: s + table[bucket].permute(2, 0, 1))
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x.square().sum(), table)[0] for x in (got, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [(N,), (N, N), (H, N, N), (H, 1, N), (B, 1, N, 1), (1, H, 1, 1)])
def test_learned_bias_broadcasts(shape: tuple) -> None:
    bias = torch.randn(shape, requires_grad=True)
    got = reference(Q, K, V, variants.learned_bias(bias))
    want = dense(lambda s: s + bias)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x.square().sum(), bias)[0] for x in (got, want)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_row_functions() -> None:
    s = Q @ K.mT / math.sqrt(D)
    sink = torch.randn(H)
    full = torch.cat([sink[:, None, None].expand(B, H, N, 1), s], -1)
    same(variants.sink(sink, causal=False), torch.softmax(full, -1)[..., 1:] @ V)
    same(variants.sigmoid(-2.0), torch.sigmoid(s - 2.0) @ V)
    same(variants.sigmoid(sink), torch.sigmoid(s + sink[:, None, None]) @ V)
    same(variants.relu(causal=True), (torch.relu(s) * (ROW >= COL)) @ V)


def test_retention() -> None:
    gamma = torch.tensor([0.9, 0.95, 0.99, 1.0])
    s = Q @ K.mT / math.sqrt(D)
    w = torch.where(ROW >= COL, s * gamma[:, None, None] ** (ROW - COL).clamp(min=0), 0)
    w = w / w.abs().sum(-1, keepdim=True).clamp(min=1)
    same(variants.retention(gamma), w @ V)
    published = 1 - 2.0 ** (-5.0 - torch.arange(H))
    torch.testing.assert_close(
        reference(Q, K, V, variants.retention(H)), reference(Q, K, V, variants.retention(published))
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: variants.sliding_window(-1), ValueError, "window=-1: expected at least 0"),
        (lambda: variants.sliding_window(1.5), TypeError, "window=1.5: expected an integer"),
        (lambda: variants.sliding_window(True), TypeError, "window=True"),
        (lambda: variants.dilated(2, 0), ValueError, "dilation=0"),
        (lambda: variants.softcap(0.0), ValueError, "cap=0.0: expected a finite number above 0"),
        (lambda: variants.softcap(math.nan), ValueError, "cap=nan"),
        (lambda: variants.softcap("5"), TypeError, "cap='5'"),
        (lambda: variants.prefix_lm(-3), ValueError, "prefix_len=-3"),
        (lambda: variants.prefix_lm(torch.ones(2)), TypeError, "expected an integer tensor"),
        (lambda: variants.document([0, 1]), TypeError, "doc_ids="),
        (lambda: variants.document(torch.zeros(1, 1, 1, dtype=torch.int64)), ValueError, "shape"),
        (lambda: variants.alibi(0), ValueError, "n_heads=0"),
        (lambda: variants.alibi(torch.zeros(2, 2)), ValueError, r"slopes has shape \(2, 2\)"),
        (lambda: variants.neighborhood_2d(4, 4, 2), ValueError, "kernel=2: expected an odd"),
        (lambda: variants.neighborhood_2d(4, 4, 5), ValueError, "kernel=5"),
        (lambda: variants.t5_bias(torch.zeros(3, 2)), ValueError, "table has 3 buckets"),
        (lambda: variants.t5_bias(torch.zeros(8, 2), max_distance=2), ValueError, "max_distance=2"),
        (lambda: variants.learned_bias(torch.zeros(1, 1, 1, 1, 1)), ValueError, "bias has shape"),
        (lambda: variants.retention(0), ValueError, "decay=0"),
        (lambda: variants.and_masks(), ValueError, "at least one"),
        (lambda: variants.or_masks(3), TypeError, "expected a mask_mod"),
    ],
)
def test_bad_parameters(make: Callable[[], Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
