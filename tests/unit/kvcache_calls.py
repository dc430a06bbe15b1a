"""Calls of attention_with_kvcache to be changed into bad ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnengine as ae

B, HQ, HKV, D, DV = 3, 4, 2, 40, 24  # head dims of tests/numerics, whose kernels these calls share
Arguments = dict[str, Any]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(rows: int = B, S: int = 20, L: int = 2, new: int = 2) -> Arguments:
    """A call that appends two tokens to a dense cache, causal."""
    g = torch.Generator().manual_seed(0)
    made = {
        "q": torch.randn(B, L, HQ, D, generator=g),
        "k_cache": torch.randn(rows, S, HKV, D, generator=g),
        "v_cache": torch.randn(rows, S, HKV, DV, generator=g),
        "cache_seqlens": ints(0, 7, 18),
        "causal": True,
    }
    if new:
        made["k"] = torch.randn(B, new, HKV, D, generator=g)
        made["v"] = torch.randn(B, new, HKV, DV, generator=g)
    return made


def paged(**sizes: int) -> Arguments:
    """The same in pages of 16 tokens; sequences 0 and 1 share the full page 5."""
    table = torch.tensor([[5, 3, 0], [5, 1, 7], [4, 2, 8]], dtype=torch.int32)
    made = dense(rows=9, S=16, **sizes)
    return {**made, "block_table": table, "cache_seqlens": ints(16, 30, 33)}


def change(make: Callable[..., Arguments], **new: Any) -> Arguments:
    """Arguments with some replaced; a callable makes the new value from the old one."""
    made = make()
    for name, value in new.items():
        made[name] = value(made.get(name)) if callable(value) else value
    return {n: x for n, x in made.items() if x is not None}


def case(name: str, make: Callable[..., Arguments], error: type, match: str, **new: Any) -> Any:
    """A parameter of check_refused."""
    return pytest.param(make, new, error, match, id=name)


def check_refused(make: Callable[..., Arguments], new: Arguments, error: type, match: str) -> None:
    """The error names what is wrong, and the cache is as it was."""
    arguments = change(make, **new)
    caches = [x for x in (arguments["k_cache"], arguments["v_cache"]) if isinstance(x, Tensor)]
    before = [x.clone() for x in caches]
    with pytest.raises(error, match=match):
        ae.attention_with_kvcache(**arguments)
    for x, y in zip(caches, before, strict=True):
        assert torch.equal(x, y)
