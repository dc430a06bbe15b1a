"""flex_attention against torch's own: the same answers, the same refusals, and a CPU backward.

Truth is torch's eager ``flex_attention`` where it computes the same thing; what differs on block
masks is in test_flex_block_masks.py.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flex_calls import (
    PER_BATCH_AND_HEAD,
    SLOPES,
    D,
    alibi,
    causal,
    dense_attention,
    masked,
    near,
    operands,
)
from torch import Tensor
from torch.nn.attention import flex_attention as flex

import attnengine as ae

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


# -- forms of the callables ------------------------------------------------------------------------


class Alibi:
    def __init__(self, slopes: Tensor) -> None:
        self.slopes = slopes

    def __call__(
        self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
    ) -> Tensor:
        return score + self.slopes[h] * (kv_idx - q_idx)

    def method(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self(score, b, h, q_idx, kv_idx)


def with_slopes(
    slopes: Tensor, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
) -> Tensor:
    return score + slopes[h] * (kv_idx - q_idx)


def with_default(
    score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, sign: int = 1
) -> Tensor:
    return score + SLOPES[h] * (kv_idx - q_idx)


FORMS: dict[str, Callable] = {
    "function": alibi,
    "lambda": lambda s, b, h, q, k: s + SLOPES[h] * (k - q),
    "partial": functools.partial(with_slopes, SLOPES),
    "default argument": with_default,
    "callable object": Alibi(SLOPES),
    "bound method": Alibi(SLOPES).method,
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_score_mod(form: str) -> None:
    q, k, v = operands()
    want = flex.flex_attention(q, k, v, alibi)
    near(ae.flex_attention(q, k, v, FORMS[form]), want)


def test_plain_attention_with_nothing() -> None:
    q, k, v = operands(L=33, S=70)
    near(ae.flex_attention(q, k, v), flex.flex_attention(q, k, v))


@pytest.mark.parametrize("scale", [None, 0.5, 1.0, -0.3])
def test_scale_comes_before_score_mod(scale: float | None) -> None:
    q, k, v = operands()
    near(
        ae.flex_attention(q, k, v, alibi, scale=scale),
        flex.flex_attention(q, k, v, alibi, scale=scale),
    )


def test_score_mod_that_masks() -> None:
    def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where((q >= k) & (q != 5), s, -math.inf)

    q, k, v = operands()
    want, want_aux = flex.flex_attention(q, k, v, mod, return_aux=flex.AuxRequest(lse=True))
    out, aux = ae.flex_attention(q, k, v, mod, return_aux=ae.AuxRequest(lse=True))
    near(out, want)
    near(aux.lse, want_aux.lse)
    assert not out[:, :, 5].any() and bool((aux.lse[:, :, 5] == -math.inf).all())


def test_poison_at_masked_pairs_reaches_nothing() -> None:
    table = torch.randn(70)

    def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s / (q >= k) + table[q - k]  # infinite, and beyond the table, where q < k

    q, k, v = operands(grad=True)
    live = torch.ones(70, 70, dtype=torch.bool).tril()
    clean, _ = dense_attention(q, k, v, live, lambda s, b, h, q, k: s + table[(q - k).clamp(min=0)])
    out = ae.flex_attention(q, k, v, mod, block_mask=masked(causal))
    near(out, clean)
    grads = [torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, clean)]
    for a, b in zip(*grads, strict=True):
        near(a, b, 1e-4)


# -- heads, aux outputs, layouts -------------------------------------------------------------------


def test_grouped_query_attention() -> None:
    q, k, v = operands(Hkv=2)
    near(
        ae.flex_attention(q, k, v, alibi, masked(causal), enable_gqa=True),
        flex.flex_attention(q, k, v, alibi, masked(causal), enable_gqa=True),
    )


def test_keys_shared_by_the_batch() -> None:
    q, k, v = operands(B=2, Bkv=1)
    mask = masked(PER_BATCH_AND_HEAD, B=2, H=4)
    want = flex.flex_attention(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), block_mask=mask)
    near(ae.flex_attention(q, k, v, block_mask=mask), want)


def top_scores(q: Tensor, k: Tensor, live: Tensor) -> Tensor:
    """The largest final score of each row under ``alibi``."""
    s = q.double() @ k.double().mT / math.sqrt(D)
    b, h, i, j = torch.meshgrid(*[torch.arange(n) for n in s.shape], indexing="ij")
    return alibi(s, b, h, i, j).masked_fill(~live, -math.inf).amax(-1)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("max_scores", [False, True])
def test_return_aux(lse: bool, max_scores: bool) -> None:
    q, k, v = operands()
    mask = masked(causal)
    want, want_aux = flex.flex_attention(q, k, v, alibi, mask, return_aux=flex.AuxRequest(lse=lse))
    if max_scores:  # torch refuses it on the CPU
        live = torch.ones(70, 70, dtype=torch.bool).tril()
        want_aux = want_aux._replace(max_scores=top_scores(q, k, live).float())
    for request in (flex.AuxRequest, ae.AuxRequest):
        asked = request(lse=lse, max_scores=max_scores)
        out, aux = ae.flex_attention(q, k, v, alibi, mask, return_aux=asked)
        near(out, want)
        for got, expected in ((aux.lse, want_aux.lse), (aux.max_scores, want_aux.max_scores)):
            assert (got is None) == (expected is None)
            if got is not None:
                assert got.shape == (2, 4, 70) and got.dtype == expected.dtype == torch.float32
                near(got, expected)


def test_return_lse_is_deprecated() -> None:
    q, k, v = operands()
    with pytest.warns(FutureWarning, match="return_aux"):
        out, lse = ae.flex_attention(q, k, v, alibi, return_lse=True)
    _, aux = ae.flex_attention(q, k, v, alibi, return_aux=ae.AuxRequest(lse=True))
    assert torch.equal(lse, aux.lse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ae.flex_attention(q, k, v, alibi)


def test_both_ways_of_asking_for_lse() -> None:
    q, k, v = operands()
    with pytest.raises(ValueError, match="return_lse and return_aux"):
        ae.flex_attention(q, k, v, return_lse=True, return_aux=ae.AuxRequest(lse=True))


def test_kernel_options_are_accepted() -> None:
    q, k, v = operands()
    options = {"BLOCK_M": 64, "num_warps": 4, "PRESCALE_QK": True, "BACKEND": "AUTO"}
    want = ae.flex_attention(q, k, v, alibi)
    assert torch.equal(ae.flex_attention(q, k, v, alibi, kernel_options=options), want)
    with pytest.raises(TypeError, match="kernel_options"):
        ae.flex_attention(q, k, v, kernel_options=64)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)])
def test_output_follows_the_strides_of_q(order: tuple[int, ...]) -> None:
    q, k, v = operands(L=33, S=33)
    inverse = [order.index(i) for i in range(4)]
    laid = q.permute(order).contiguous().permute(inverse)
    out = ae.flex_attention(laid, k, v)
    want = flex.flex_attention(laid, k, v)
    near(out, want)
    assert out.stride() == want.stride()


def test_double_precision() -> None:
    q, k, v = operands(dtype=torch.float64)
    want, want_aux = flex.flex_attention(
        q, k, v, alibi, masked(causal), return_aux=flex.AuxRequest(lse=True)
    )
    out, aux = ae.flex_attention(
        q, k, v, alibi, masked(causal), return_aux=ae.AuxRequest(lse=True, max_scores=True)
    )
    near(out, want, 1e-12)
    assert aux.lse.dtype == aux.max_scores.dtype == torch.float64
    near(aux.lse, want_aux.lse, 1e-12)
    live = torch.ones(70, 70, dtype=torch.bool).tril()
    near(aux.max_scores, top_scores(q, k, live), 1e-12)


# -- gradients, which torch's own flex_attention refuses on the CPU --------------------------------


def test_gradients_with_captures_and_statistics() -> None:
    slopes = SLOPES.clone().requires_grad_()
    table = torch.randn(4, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    gain = torch.tensor(1.5, requires_grad=True)

    def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        bias = table[h, (q - k).abs() % 8] + table[h, k % 8] * table[h, 0]
        return gain * s + slopes[h] * (k - q) / 16 + bias

    q, k, v = operands(Hkv=2, grad=True)
    out, aux = ae.flex_attention(
        q, k, v, mod, masked(causal), enable_gqa=True, return_aux=ae.AuxRequest(True, True)
    )
    assert aux.lse.requires_grad and not aux.max_scores.requires_grad
    live = torch.ones(70, 70, dtype=torch.bool).tril()[None, None]
    want, lse = dense_attention(q, k, v, live, mod)
    near(out, want)
    g = torch.Generator().manual_seed(5)
    dout, dlse = torch.randn(out.shape, generator=g), torch.randn(lse.shape, generator=g)
    leaves = (q, k, v, slopes, table, gain)
    got = torch.autograd.grad((out, aux.lse), leaves, (dout, dlse))
    expected = torch.autograd.grad((want, lse), leaves, (dout.double(), dlse.double()))
    for name, a, b in zip(("q", "k", "v", "slopes", "table", "gain"), got, expected, strict=True):
        assert a.dtype == torch.float32, name
        near(a / b.abs().max(), b / b.abs().max(), 1e-5)


# -- refusals --------------------------------------------------------------------------------------


def test_mismatched_lengths() -> None:
    q, k, v = operands(L=64)
    with pytest.raises(ValueError, match=r"\(70, 70\).*\(64, 70\).*create_block_mask"):
        ae.flex_attention(q, k, v, block_mask=masked(causal))


@pytest.mark.parametrize(("sizes", "text"), [({"B": 3}, "batch 3"), ({"H": 2}, "heads 2")])
def test_mask_of_other_batch_or_heads(sizes: dict[str, int], text: str) -> None:
    q, k, v = operands()
    with pytest.raises(ValueError, match=f"block_mask has {text}, expected 1 or"):
        ae.flex_attention(q, k, v, block_mask=masked(causal, **sizes))


def test_heads_without_enable_gqa() -> None:
    q, k, v = operands(Hkv=2)
    with pytest.raises(ValueError, match="4 heads.*2; pass enable_gqa=True"):
        ae.flex_attention(q, k, v)
    q, k, v = operands(Hkv=3)
    with pytest.raises(ValueError, match="4 heads.*not a multiple of the 3"):
        ae.flex_attention(q, k, v, enable_gqa=True)


def test_keys_of_batch_one_without_a_block_mask() -> None:
    q, k, v = operands(Bkv=1)
    with pytest.raises(ValueError, match="batch 2 and key has 1"):
        ae.flex_attention(q, k, v)


@pytest.mark.parametrize("mask", [causal, torch.ones(70, 70, dtype=torch.bool), 5])
def test_not_a_block_mask(mask: Any) -> None:
    q, k, v = operands()
    with pytest.raises(TypeError, match="block_mask must be a torch BlockMask"):
        ae.flex_attention(q, k, v, block_mask=mask)


def test_score_mod_of_wrong_arity() -> None:
    q, k, v = operands()
    with pytest.raises(TypeError, match="score_mod takes 5 positional arguments"):
        ae.flex_attention(q, k, v, causal)
