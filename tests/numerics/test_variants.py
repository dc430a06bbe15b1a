"""Every entry of ae.variants through the gate: output, statistics and all gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import BF16, F32, HEADS, Captures, alibi, generator, leaf, operands, sink, verify

import attnengine as ae
from attnengine import variants

BATCH, LENGTH, KEYS = 2, 90, 150
Built = tuple[ae.AttentionSpec, Captures]


def documents(*shape: int) -> torch.Tensor:
    return torch.randint(0, 4, shape, generator=generator(1)).sort(-1).values


def t5(dtype: torch.dtype) -> Built:
    table = leaf(32, HEADS, seed=2, dtype=dtype)
    return variants.t5_bias(table, causal=dtype == BF16), {"table": table}


def learned_bias(dtype: torch.dtype) -> Built:
    """In the dtype of the model, broadcast over the queries."""
    bias = leaf(BATCH, HEADS, 1, KEYS, seed=3, dtype=dtype)
    return variants.learned_bias(bias), {"bias": bias}


def sigmoid(dtype: torch.dtype) -> Built:
    bias = leaf(HEADS, seed=4) if dtype == F32 else leaf(seed=4)
    return variants.sigmoid(bias), {"bias": bias}


def retention(dtype: torch.dtype) -> Built:
    decay = (torch.rand(HEADS, generator=generator(5)) * 0.1 + 0.9).requires_grad_()
    return variants.retention(decay), {"decay": decay}


BUILD: dict[str, Callable[[torch.dtype], Built]] = {
    "causal": lambda dtype: (variants.causal(), {}),
    "sliding_window": lambda dtype: (variants.sliding_window(30, causal=dtype == BF16), {}),
    "dilated": lambda dtype: (variants.dilated(10, 3, causal=dtype == BF16), {}),
    "prefix_lm": lambda dtype: (
        variants.prefix_lm(torch.tensor([20, 60]) if dtype == F32 else 37),
        {},
    ),
    "document": lambda dtype: (
        variants.document(documents(BATCH, KEYS) if dtype == BF16 else documents(KEYS)),
        {},
    ),
    "neighborhood_2d": lambda dtype: (variants.neighborhood_2d(9, 10, 5), {}),
    "alibi": lambda dtype: alibi(),
    "softcap": lambda dtype: (variants.softcap(5.0, causal=dtype == BF16), {}),
    "t5_bias": t5,
    "learned_bias": learned_bias,
    "sink": lambda dtype: sink(),
    "sigmoid": sigmoid,
    "relu": lambda dtype: (variants.relu(causal=dtype == BF16), {}),
    "retention": retention,
}

# One dtype each keeps the suite within its budget of modules: masks are the same integer arithmetic
# in both, and every kind of score, bias and row function meets both somewhere in this folder.
CASES = [("causal", F32), ("causal", BF16), ("sliding_window", BF16), ("dilated", F32)]
CASES += [("prefix_lm", F32), ("document", BF16), ("neighborhood_2d", BF16), ("alibi", BF16)]
CASES += [("softcap", F32), ("t5_bias", BF16), ("learned_bias", BF16)]
CASES += [("sink", BF16), ("sigmoid", F32), ("relu", BF16), ("retention", F32)]
FORWARD_ONLY = [("sliding_window", BF16), ("neighborhood_2d", BF16), ("dilated", F32)]


def test_every_variant_is_here() -> None:
    """The functions of ae.variants that make a spec."""
    made = set()
    for name, f in vars(variants).items():
        if getattr(f, "__annotations__", {}).get("return") == "AttentionSpec":
            made.add(name)
    assert made == set(BUILD) == {name for name, _ in CASES}


@pytest.mark.parametrize("name, dtype", CASES)
def test_variant(name: str, dtype: torch.dtype) -> None:
    spec, captures = BUILD[name](dtype)
    square = name == "neighborhood_2d"
    batch = BATCH if dtype == F32 or name in ("document", "prefix_lm", "learned_bias") else 1
    q, k, v = operands(dtype, B=batch, L=LENGTH, S=LENGTH if square else KEYS)
    verify(spec, q, k, v, captures, grads=(name, dtype) not in FORWARD_ONLY)
