"""Which values of a pair depend on kv_idx - q_idx alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnengine as ae
from attnengine import diagonal
from attnengine.capture import captures_of_spec
from attnengine.derive import derive
from attnengine.trace import trace

TABLE = torch.zeros(4, 9, requires_grad=True)
KEYS = torch.zeros(50)


def traced(score_mod: Callable) -> Any:
    spec = ae.AttentionSpec(score_mod=score_mod)
    return trace(spec, captures_of_spec(spec).tensors, "f32")


def tables(score_mod: Callable) -> list[str]:
    return [n.op for n in diagonal.find(traced(score_mod), None, 16).tables]


@pytest.mark.parametrize(
    "bias",
    [
        lambda h, q, k: TABLE[h, (k - q).clamp(-4, 4) + 4],
        lambda h, q, k: TABLE[h, (2 * q - (k + 3) * 2).abs() % 9],
        lambda h, q, k: TABLE[h, -(q.to(torch.int32) - k.to(torch.int32)) // 3],
        lambda h, q, k: torch.exp(-(q - k).float().abs() * 0.1),
        lambda h, q, k: torch.where(q - k > 3, torch.sin((q - k).float()), h.float()),
    ],
)
def test_found(bias: Callable) -> None:
    assert len(tables(lambda s, b, h, q, k: s + bias(h, q, k))) == 1


@pytest.mark.parametrize(
    "bias",
    [
        lambda h, q, k: 0.5 * (k - q),  # cheaper than reading it back
        lambda h, q, k: torch.sin((q + k).float()),
        lambda h, q, k: torch.sin((2 * k - q).float()),
        lambda h, q, k: torch.sin(q.to(torch.int8).to(torch.int32) - k),  # wraps before
        lambda h, q, k: torch.sin(k.float() - q.float()),  # rounds before
        lambda h, q, k: KEYS[k] * torch.sin(k.float()),
        lambda h, q, k: TABLE[h, (k // 3 - q // 3) % 9],
    ],
)
def test_not_found(bias: Callable) -> None:
    assert tables(lambda s, b, h, q, k: s + bias(h, q, k)) == []


def test_largest_part_of_a_score() -> None:
    def score_mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return torch.tanh(s * torch.cos((k - q).float())) + KEYS[k]

    assert tables(score_mod) == ["cos"]


@pytest.mark.parametrize("summed", [True, False])
def test_gradients_that_are_summed_first(summed: bool) -> None:
    def score_mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + TABLE[h, (k - q if summed else k + q) % 9]

    t = traced(score_mod)
    found = diagonal.find(t, derive(t, [0]), 16)
    assert [s.capture for s in found.sums] == ([0] if summed else [])
