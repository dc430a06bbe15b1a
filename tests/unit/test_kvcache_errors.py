"""Lengths, rows and pages that attention_with_kvcache refuses, leaving the cache as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kvcache_calls import DV, HQ, Arguments, B, case, check_refused, dense, ints, paged
from torch import Tensor

import attnengine as ae

pytestmark = pytest.mark.compiles


def table(row: int, column: int, page: int) -> Callable[[Tensor], Tensor]:
    def put(pages: Tensor) -> Tensor:
        pages[row, column] = page
        return pages

    return put


def test_the_arguments_are_good_before_they_are_changed() -> None:
    for make in (dense, paged):
        a = make()
        assert ae.attention_with_kvcache(**a).shape == (B, 2, HQ, DV)
        assert (
            ae.attention_with_kvcache(**{**a, "cache_seqlens": a["cache_seqlens"].long()})
            is not None
        )


def cases() -> Iterator[Any]:
    # lengths
    yield case(
        "negative length",
        dense,
        ValueError,
        r"cache_seqlens\[1\]=-1 must not be negative",
        cache_seqlens=ints(0, -1, 3),
    )
    yield case(
        "length beyond the cache",
        dense,
        ValueError,
        r"cache_seqlens\[2\]=19 and 2 appended tokens do not fit: the cache holds 20 positions",
        cache_seqlens=ints(0, 7, 19),
    )
    yield case(
        "length beyond the cache without append",
        dense,
        ValueError,
        r"cache_seqlens\[2\]=21 do not fit",
        cache_seqlens=ints(2, 7, 21),
        k=None,
        v=None,
    )
    yield case(
        "length beyond the pages",
        paged,
        ValueError,
        r"cache_seqlens\[0\]=47 and 2 appended tokens do not fit: block_table holds 3 pages of 16",
        cache_seqlens=ints(47, 30, 33),
    )
    yield case(
        "one length for all",
        dense,
        ValueError,
        r"cache_seqlens\[0\]=19 and 2 appended",
        cache_seqlens=19,
    )
    yield case(
        "a length of 64 bits",
        dense,
        ValueError,
        r"cache_seqlens\[0\]=2147483647 and 2",
        cache_seqlens=torch.tensor([2**32 + 3, 1, 1]),
    )
    yield case(
        "lengths of floats",
        dense,
        TypeError,
        "cache_seqlens has dtype torch.float32",
        cache_seqlens=torch.zeros(B),
    )
    yield case(
        "number of lengths",
        dense,
        ValueError,
        r"cache_seqlens has shape \[2\]; it needs 3 elements",
        cache_seqlens=ints(1, 2),
    )
    yield case(
        "rank of lengths",
        dense,
        ValueError,
        r"cache_seqlens must be 1-D \[B\]",
        cache_seqlens=ints(1, 2, 3)[None],
    )
    yield case("lengths that are text", dense, TypeError, "cache_seqlens='3'", cache_seqlens="3")
    yield case(
        "append without lengths",
        dense,
        ValueError,
        "k and v need cache_seqlens",
        cache_seqlens=None,
    )
    yield case(
        "causal rows before the first key",
        dense,
        ValueError,
        r"causal: q has 2 rows and sequence 0 has 1 keys",
        cache_seqlens=ints(1, 7, 18),
        k=None,
        v=None,
    )
    yield case(
        "causal rows before the first appended key",
        dense,
        ValueError,
        r"causal: q has 2 rows and sequence 0 has 1 keys",
        k=lambda k: k[:, :1],
        v=lambda v: v[:, :1],
    )
    yield case(
        "window without later keys",
        dense,
        ValueError,
        "causal: q has 2 rows",
        cache_seqlens=ints(1, 7, 18),
        k=None,
        v=None,
        causal=False,
        window_size=(-1, 0),
    )

    # left padding and rows
    yield case(
        "left padding beyond the length",
        dense,
        ValueError,
        r"cache_leftpad\[1\]=8 must lie in \[0, cache_seqlens\[1\]=7\]",
        cache_leftpad=ints(0, 8, 0),
    )
    yield case(
        "negative left padding",
        dense,
        ValueError,
        r"cache_leftpad\[2\]=-2 must lie",
        cache_leftpad=ints(0, 0, -2),
    )
    yield case(
        "left padding of the whole cache",
        dense,
        ValueError,
        "cache_leftpad needs cache_seqlens",
        cache_leftpad=ints(0, 0, 2),
        cache_seqlens=None,
        k=None,
        v=None,
    )
    yield case(
        "row out of range",
        dense,
        ValueError,
        r"cache_batch_idx\[2\]=3 is no row: the cache has rows 0 to 2",
        cache_batch_idx=ints(0, 1, 3),
    )
    yield case(
        "row below 0",
        dense,
        ValueError,
        r"cache_batch_idx\[0\]=-1 is no row",
        cache_batch_idx=ints(-1, 1, 2),
    )
    yield case(
        "two sequences append to a row",
        dense,
        ValueError,
        r"cache_batch_idx\[0\]=1 is the row of another sequence",
        cache_batch_idx=ints(1, 2, 1),
    )
    yield case(
        "fewer rows than sequences",
        lambda: dense(rows=2),
        ValueError,
        r"k_cache has shape \[2, 20, 2, 40\] and k \[3, 2, 2, 40\]",
    )
    yield case(
        "fewer rows than sequences, no append",
        lambda: dense(rows=2, new=0),
        ValueError,
        "for 3 sequences; it needs a row for each",
        cache_seqlens=ints(2, 7, 18),
    )
    yield case("one row for all, appended", lambda: dense(rows=1), ValueError, "it needs a row for")
    yield case(
        "expanded cache",
        dense,
        ValueError,
        "k_cache is expanded",
        k_cache=lambda x: x[:1].expand(B, -1, -1, -1),
    )

    # pages
    yield case(
        "page out of range",
        paged,
        ValueError,
        r"block_table\[1, 1\]=9 is no page: the cache has pages 0 to 8",
        block_table=table(1, 1, 9),
    )
    yield case(
        "page below 0",
        paged,
        ValueError,
        r"block_table\[2, 2\]=-1 is no page",
        block_table=table(2, 2, -1),
    )
    yield case(
        "page out of range, no append",
        lambda: paged(new=0),
        ValueError,
        r"block_table\[0, 0\]=77 is no page",
        block_table=table(0, 0, 77),
    )
    yield case(
        "two sequences append to a page",
        paged,
        ValueError,
        r"block_table\[0, 1\]=1 is used in two places",
        block_table=table(0, 1, 1),
    )
    yield case(
        "an append into a shared prefix",
        paged,
        ValueError,
        r"block_table\[1, 0\]=3 is used in two places",
        block_table=table(1, 0, 3),
    )
    yield case(
        "a page twice in one sequence",
        paged,
        ValueError,
        r"block_table\[2, 0\]=8 is used in two places",
        block_table=table(2, 0, 8),
    )
    yield case(
        "page size",
        lambda: {**dense(rows=9, S=24), "block_table": paged()["block_table"]},
        ValueError,
        r"page_size=24 \(k_cache \[9, 24, 2, 40\]\): a page must hold a multiple",
    )
    yield case(
        "pages and rows",
        paged,
        ValueError,
        "block_table and cache_batch_idx exclude",
        cache_batch_idx=ints(0, 1, 2),
    )
    yield case(
        "rank of the block table",
        paged,
        ValueError,
        r"block_table must be 2-D",
        block_table=lambda x: x[0],
    )
    yield case(
        "rows of the block table",
        paged,
        ValueError,
        r"block_table has shape \[2, 3\]; it needs 3 elements",
        block_table=lambda x: x[:2],
    )
    yield case(
        "a block table of floats",
        paged,
        TypeError,
        "block_table has dtype torch.float32",
        block_table=lambda x: x.float(),
    )


@pytest.mark.parametrize("make, new, error, match", list(cases()))
def test_bad_input_is_named_and_changes_nothing(
    make: Callable[..., Arguments], new: Arguments, error: type, match: str
) -> None:
    check_refused(make, new, error, match)


def test_entries_beyond_the_length_are_not_looked_at() -> None:
    a = paged(new=0)
    a["block_table"][0, 1:] = -5
    a["block_table"][2, 0] = 10**9
    a |= {"cache_leftpad": ints(0, 3, 16)}
    assert ae.attention_with_kvcache(**a).isfinite().all()


def test_a_page_in_which_no_key_is_left_is_not_looked_at() -> None:
    a = paged(new=0)
    a["block_table"][1, 1] = -1
    a |= {"cache_leftpad": ints(0, 30, 0), "causal": False}
    out = ae.attention_with_kvcache(**a)
    assert (out[1] == 0).all() and out.isfinite().all()


def test_shared_pages_are_read_and_kept_when_others_are_appended_to() -> None:
    a = paged()
    shared = a["k_cache"][5].clone()
    ae.attention_with_kvcache(**a)
    assert torch.equal(a["k_cache"][5], shared)
    assert torch.equal(a["k_cache"][3, :2], a["k"][0])
    assert torch.equal(a["k_cache"][1, 14:], a["k"][1])
