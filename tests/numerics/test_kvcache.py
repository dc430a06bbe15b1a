"""attention_with_kvcache through the gate: dense and paged caches, ragged lengths, appends."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from caches import Cache
from hypothesis import given
from problems import BF16, F16, F32, HEADS, D, alibi, gathers, generator, operand_mods, sink
from torch import Tensor

import attnengine as ae
from attnengine import gate, variants
from attnengine.flash_args import flash_spec

BOTH = pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
PAGES = pytest.mark.parametrize("page", [None, 16, 64, 256])
RAGGED = (0, 1, 15, 16, 33, 200)


def check(cache: Cache, **options: Any) -> None:
    """flash-attn's arguments against the spec that says the same by itself."""
    cache.verify(flash_spec(**options), lambda: cache.call(return_lse=True, **options))


def check_spec(cache: Cache, spec: ae.AttentionSpec) -> None:
    cache.verify(spec, lambda: cache.call(return_lse=True, spec=spec))


# -- where keys lie --------------------------------------------------------------------------------


@BOTH
@PAGES
def test_one_row_over_ragged_lengths(dtype: torch.dtype, page: int | None) -> None:
    """Decode, with an empty sequence: its row gives 0 and -inf."""
    cache = Cache(dtype, RAGGED, page=page)
    check(cache)
    out, lse = cache.call(return_lse=True)
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all()


@PAGES
@pytest.mark.parametrize("L", [1, 2, 5, 17])
def test_rows_after_their_own_append(L: int, page: int | None) -> None:
    """Causal decode and chunked prefill: as many tokens are appended as there are rows, from the
    middle of a page into the next ones."""
    check(Cache(F32, RAGGED, L=L, new=L, page=page), causal=True)


@BOTH
@pytest.mark.parametrize("L, new", [(1, 4), (3, 1), (2, 40), (17, 1)])
def test_rows_and_appended_tokens_differ(dtype: torch.dtype, L: int, new: int) -> None:
    """Rows are counted from the last key back."""
    check(Cache(dtype, (0, 16, 31, 100), L=L, new=new, page=16))
    if L <= new:
        check(Cache(dtype, (0, 16, 31, 100), L=L, new=new, page=16), causal=True)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2), (8, 1), (40, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("L", [1, 3])
def test_groups_of_heads(heads: tuple[int, int], L: int) -> None:
    for page in (None, 16):
        check(Cache(BF16, (3, 90, 40), L=L, new=L, page=page, heads=heads), causal=True)


def test_rows_of_the_cache_in_any_order() -> None:
    check(Cache(F32, (5, 0, 44), L=2, new=2, rows=7), causal=True)
    check(Cache(BF16, (5, 0, 44), rows=5))


@pytest.mark.parametrize("page", [None, 16])
def test_left_padding(page: int | None) -> None:
    """Keys before cache_leftpad are absent; positions count from the first key."""
    check(Cache(F32, (20, 9, 50), L=2, new=2, page=page, leftpad=(18, 9, 17)), causal=True)
    check(Cache(F32, (20, 9, 50), page=page, leftpad=(20, 0, 33)))


@pytest.mark.parametrize("dtype, page", [(F32, 64), (BF16, None), (BF16, 16), (F16, 64)], ids=str)
def test_long_sequences_beside_short_ones(dtype: torch.dtype, page: int | None) -> None:
    """Their keys are cut among workers, and the parts merged."""
    slopes = alibi()[0].score_mod.__closure__[0].cell_contents.detach()  # type: ignore[union-attr]
    check(
        Cache(dtype, (1500, 1, 300, 0, 64), L=1, new=1, page=page),
        causal=True, alibi_slopes=slopes,
    )  # fmt: skip


@pytest.mark.parametrize("L, page", [(1, None), (4, None), (1, 64), (2, 16)])
def test_values_that_are_a_view_of_the_keys(L: int, page: int | None) -> None:
    """MLA: one head of keys, whose first elements are the values."""
    heads = (8, 1)
    check(Cache(BF16, (100, 7, 150), L=L, new=L, page=page, heads=heads, latent=True), causal=True)


@BOTH
@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("L, heads", [(1, (8, 2)), (2, (8, 1)), (3, (4, 4)), (17, (4, 2))], ids=str)
def test_head_dims_of_whole_vectors(
    dtype: torch.dtype, page: int | None, L: int, heads: tuple[int, int]
) -> None:
    """Few rows read keys and values where they lie."""
    lengths = (0, 5, 64, 131)
    check(Cache(dtype, lengths, L=L, new=L, page=page, heads=heads, d=64, dv=64), causal=True)


@pytest.mark.parametrize("latent", [True, False])
@pytest.mark.parametrize("L, page", [(1, 64), (4, None)])
def test_latent_attention(L: int, page: int | None, latent: bool) -> None:
    """DeepSeek's head dims: 512 of the latent, which are the values, and 64 of the positions."""
    sizes: dict[str, Any] = {"heads": (16, 1), "d": 576, "dv": 512, "latent": latent}
    check(Cache(BF16, (70, 0, 200), L=L, new=L, page=page, **sizes), causal=True)


lengths = st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65, 128]) | st.integers(0, 140)


@given(
    sequences=st.lists(st.tuples(lengths, st.integers(0, 9)), min_size=1, max_size=5),
    L=st.sampled_from([1, 1, 2, 3, 5, 17]),
    new=st.sampled_from([0, 1, 3, 20]),
    page=st.sampled_from([None, 16, 48, 64]),
    heads=st.sampled_from([(1, 1), (4, 2), (8, 1), (6, 3)]),
    dtype=st.sampled_from([F32, BF16]),
)
def test_any_cache(
    sequences: list, L: int, new: int, page: int | None, heads: tuple, dtype: torch.dtype
) -> None:
    """Causal where every row has a key."""
    ends = [n for n, _ in sequences]
    pads = [min(n, pad) for n, pad in sequences]
    fewest = min(n - p + new for n, p in zip(ends, pads, strict=True))
    check(Cache(dtype, ends, L, new, page, heads, leftpad=pads), causal=fewest >= L)


def test_a_cache_shared_by_all_sequences() -> None:
    """One row of keys, as for several samples of one prompt, each of its own length."""
    one = Cache(F32, (60,), L=1)
    q = torch.randn(3, 1, HEADS, D, generator=generator(3))
    lengths = torch.tensor([60, 20, 1], dtype=torch.int32)
    out = ae.attention_with_kvcache(q, one.k_cache, one.v_cache, cache_seqlens=lengths)
    for b, n in enumerate(lengths.tolist()):
        row = ae.attention_with_kvcache(q[b : b + 1], one.k_cache, one.v_cache, cache_seqlens=n)
        torch.testing.assert_close(out[b : b + 1], row, rtol=1e-6, atol=1e-6)


def test_lengths_as_one_number_or_none() -> None:
    cache = Cache(F32, (50, 50))
    k, v = (x[:, :50].contiguous() for x in (cache.k_cache, cache.v_cache))
    want = cache.call()
    assert torch.equal(ae.attention_with_kvcache(cache.q, k, v), want)
    assert torch.equal(
        ae.attention_with_kvcache(cache.q, cache.k_cache, cache.v_cache, cache_seqlens=50), want
    )


# -- what attention means --------------------------------------------------------------------------


def test_window_softcap_and_alibi() -> None:
    """flash-attn's arguments, by absolute positions."""
    for page in (None, 16):
        check(Cache(BF16, RAGGED, L=4, new=4, page=page), causal=True, window_size=(30, 0))
        check(Cache(F32, RAGGED, L=3, new=4, page=page), softcap=5.0)
    slopes = torch.rand(HEADS, generator=generator(30))
    check(Cache(BF16, RAGGED, L=5, new=5, page=64), causal=True, alibi_slopes=slopes)
    check(Cache(F32, (40, 90), leftpad=(7, 50)), causal=True, alibi_slopes=slopes)


def test_window_to_both_sides() -> None:
    check(Cache(F32, RAGGED, L=9, new=10, page=16), window_size=(20, 3))


def test_slopes_of_each_sequence() -> None:
    slopes = torch.rand(3, HEADS, generator=generator(5))
    check(Cache(F32, (20, 3, 70), L=2, new=2), alibi_slopes=slopes)


@pytest.mark.parametrize("page", [None, 16])
def test_spec_with_a_learnable_sink(page: int | None) -> None:
    check_spec(Cache(BF16, RAGGED, L=3, new=3, page=page), sink()[0])


def test_spec_with_captured_tensors() -> None:
    """Gathers by absolute positions; the tensors may require grad where none is asked for."""
    spec, _ = gathers(70, 150, stored=BF16)
    check_spec(Cache(F32, (0, 5, 30, 60), L=4, new=4, page=16), spec)


def test_operand_mods_apply_to_what_the_cache_holds() -> None:
    check_spec(Cache(BF16, (0, 5, 80), L=2, new=2, page=16), operand_mods()[0])


def test_scale_of_any_sign() -> None:
    for scale in (0.3, -0.2, 0.0):
        check(Cache(F32, (9, 40), L=2, new=2), causal=True, softmax_scale=scale)


def test_a_spec_means_the_same_with_a_cache_as_without() -> None:
    """The last rows of a causal call, row by row from a cache."""
    spec = variants.causal()
    cache = Cache(F32, (37,), L=37)
    q, k, v = cache.dense()
    with torch.no_grad():
        whole = ae.attention(q, k, v, spec)
        for row in (0, 5, 36):
            step = ae.attention_with_kvcache(
                cache.q[:, row : row + 1], cache.k_cache, cache.v_cache, spec=spec,
                cache_seqlens=row + 1,
            )  # fmt: skip
            torch.testing.assert_close(step[0, 0], whole[0, :, row], rtol=1e-5, atol=1e-5)


# -- rotary ----------------------------------------------------------------------------------------


def turned(x: Tensor, positions: Tensor, interleaved: bool, size: int) -> Tensor:
    """x [B, L, H, D] rotated as complex numbers in fp64; positions [B, L]."""
    angle = positions[..., None, None] * 0.7 ** torch.arange(size // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)
    first = x[..., :size].double()
    pairs = first.unflatten(-1, (-1, 2)) if interleaved else first.unflatten(-1, (2, -1)).mT
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    first = pairs.flatten(-2) if interleaved else pairs.mT.flatten(-2)
    return torch.cat([first, x[..., size:].double()], -1)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [16, D])
def test_rotary(interleaved: bool, causal: bool, size: int) -> None:
    """New keys and rows are rotated at their positions; without a mask, rows all at the first."""
    cache = Cache(F32, (0, 7, 30), L=3, new=3, page=16)
    lengths = cache.tables["cache_seqlens"]
    angle = torch.arange(64)[:, None] * 0.7 ** torch.arange(size // 2, dtype=torch.float64)
    positions = lengths[:, None] + torch.arange(3)
    want_k = turned(cache.k, positions, interleaved, size)
    at = positions if causal else lengths[:, None].expand(-1, 3)
    want_q = turned(cache.q, at, interleaved, size)

    old, given = cache.q, cache.k.clone()
    out = cache.call(
        causal=causal, rotary_cos=angle.cos().float(), rotary_sin=angle.sin().float(),
        rotary_interleaved=interleaved,
    )  # fmt: skip
    assert cache.q is old and torch.equal(cache.k, given)  # arguments stay as they were
    for b, (rows, places) in enumerate(cache.place):
        stored = cache.k_cache[rows[-3:], places[-3:]]
        torch.testing.assert_close(stored.double(), want_k[b], rtol=1e-5, atol=1e-5)
    cache.q = want_q.float()
    same = ae.attention_with_kvcache(
        cache.q, cache.k_cache, cache.v_cache, causal=causal,
        **{**cache.tables, "cache_seqlens": lengths + 3},
    )  # fmt: skip
    torch.testing.assert_close(out, same, rtol=1e-5, atol=1e-5)


# -- the row function and its statistics -----------------------------------------------------------


def test_row_functions_without_merge_and_lse() -> None:
    """Their work is not split; asking for a statistic that they do not save is an error."""
    spec = ae.AttentionSpec(row_func=ae.ReLU())
    cache = Cache(F16, (500, 3, 0), d=64, dv=64, page=16)
    with torch.no_grad():
        out = cache.call(spec=spec)
        gate.compare(
            lambda q, k, v: out.transpose(1, 2), cache.dense_spec(spec), *cache.dense(), grads=False
        )
    with pytest.raises(ValueError, match=r"row function ReLU saves \[\] and no 'lse'"):
        cache.call(spec=spec, return_lse=True)


# -- threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [None, 16])
def test_the_same_bits_on_any_number_of_threads(page: int | None) -> None:
    cache = Cache(BF16, (1000, 3, 400), L=1, page=page)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(cache.call(return_lse=True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
