"""Operands and options that attention_with_kvcache refuses, leaving the cache as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kvcache_calls import Arguments, case, change, check_refused, dense, ints

import attnengine as ae

pytestmark = pytest.mark.compiles


def cases() -> Iterator[Any]:
    # operands
    yield case("not a tensor", dense, TypeError, "q must be a torch.Tensor, got list", q=[1])
    yield case("rank", dense, ValueError, r"q must be 4-D \[B, Lq, Hq, D\]", q=lambda q: q[0])
    yield case(
        "rank of the cache", dense, ValueError, "v_cache must be 4-D", v_cache=lambda v: v[0]
    )
    yield case(
        "a cache of one dimension", dense, ValueError, "k_cache must be 4-D", k_cache=ints(1)
    )
    yield case("no cache", dense, TypeError, "k_cache must be a torch.Tensor", k_cache=[])
    yield case(
        "dtype",
        dense,
        TypeError,
        "q, k_cache and v_cache must share one dtype",
        q=lambda q: q.bfloat16(),
    )
    yield case(
        "integers",
        dense,
        TypeError,
        "supported are torch.float32",
        **{n: lambda x: x.int() for n in ("q", "k_cache", "v_cache")},
    )
    yield case(
        "head_dim",
        dense,
        ValueError,
        r"k_cache has head_dim 39 and q has 40",
        k_cache=lambda x: x[..., :39],
    )
    yield case(
        "lengths of the cache",
        dense,
        ValueError,
        "must agree in all but the last size",
        v_cache=lambda x: x[:, :19],
    )
    yield case(
        "heads",
        dense,
        ValueError,
        "q has 3 heads, which is not a multiple of the 2",
        q=lambda q: q[:, :, :3],
    )
    yield case("k without v", dense, ValueError, "v must be given", v=None)
    yield case("v without k", dense, ValueError, "k must be given", k=None)
    yield case("batch of k", dense, ValueError, r"k has shape \(2, 2, 2, 40\)", k=lambda k: k[:2])
    yield case(
        "heads of v", dense, ValueError, r"v has shape \(3, 2, 1, 24\)", v=lambda v: v[:, :, :1]
    )
    yield case("tokens of v", dense, ValueError, "k has 2 new tokens and v 1", v=lambda v: v[:, :1])
    yield case("dtype of k", dense, TypeError, "k is torch.float64", k=lambda k: k.double())
    yield case(
        "gradients",
        dense,
        NotImplementedError,
        "q requires grad.*torch.no_grad",
        q=lambda q: q.requires_grad_(),
    )
    yield case(
        "gradients of what is appended",
        dense,
        NotImplementedError,
        "v requires grad",
        v=lambda v: v.requires_grad_(),
    )

    # rotary
    cos, sin = torch.rand(64, 8), torch.rand(64, 8)
    both = {"rotary_cos": cos, "rotary_sin": sin}
    yield case(
        "rotary without k", dense, ValueError, "k and v must be given", k=None, v=None, **both
    )
    yield case(
        "cos without sin", dense, TypeError, "rotary_sin must be a floating tensor", rotary_cos=cos
    )
    yield case(
        "shapes of cos and sin",
        dense,
        ValueError,
        r"rotary_cos has shape \(64, 8\) and",
        rotary_cos=cos,
        rotary_sin=sin[:, :4],
    )
    yield case(
        "rotary of more than head_dim",
        dense,
        ValueError,
        "with R up to the head_dim 40",
        rotary_cos=torch.rand(64, 21),
        rotary_sin=torch.rand(64, 21),
    )
    yield case(
        "short rotary table",
        dense,
        ValueError,
        "rotary_cos has 19 positions and 20 are",
        rotary_cos=cos[:19],
        rotary_sin=sin[:19],
    )
    yield case(
        "rotary at a negative length",
        dense,
        ValueError,
        r"cache_seqlens\[0\]=-4 must not",
        cache_seqlens=ints(-4, 0, 0),
        **both,
    )

    # what attention means
    spec = ae.AttentionSpec()
    yield case(
        "spec and flash arguments",
        dense,
        ValueError,
        "spec and causal, softcap are both given",
        spec=spec,
        softcap=2.0,
    )
    yield case("no spec", dense, TypeError, "spec must be an attnengine.AttentionSpec", spec=3)
    yield case("window of one number", dense, TypeError, "window_size=5", window_size=5)
    yield case(
        "window of one number, not causal", dense, TypeError, "window_size=5",
        window_size=5, causal=False,
    )  # fmt: skip
    yield case("window below -1", dense, ValueError, r"window_size=\(-2, 0\)", window_size=(-2, 0))
    yield case("softcap", dense, ValueError, "softcap=-1.0", softcap=-1.0)
    yield case("softmax_scale", dense, ValueError, "softmax_scale=nan", softmax_scale=float("nan"))
    yield case(
        "slopes", dense, ValueError, r"alibi_slopes has shape \(\)", alibi_slopes=torch.tensor(1.0)
    )
    yield case("slopes that are a list", dense, TypeError, "alibi_slopes=", alibi_slopes=[1.0])


@pytest.mark.parametrize("make, new, error, match", list(cases()))
def test_bad_input_is_named_and_changes_nothing(
    make: Callable[..., Arguments], new: Arguments, error: type, match: str
) -> None:
    check_refused(make, new, error, match)


def test_gradients_are_refused_only_where_they_are_asked_for() -> None:
    a = change(dense, q=lambda q: q.requires_grad_())
    with torch.no_grad():
        assert not ae.attention_with_kvcache(**a).requires_grad


def test_autocast_casts_what_is_new_and_not_the_cache() -> None:
    a = dense()
    half = {n: a[n].bfloat16() for n in ("k_cache", "v_cache")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ae.attention_with_kvcache(**{**a, **half})
        assert out.dtype == torch.bfloat16
        with pytest.raises(TypeError, match="q, k_cache and v_cache must share one dtype"):
            ae.attention_with_kvcache(**a)
