"""flex_attention's block masks: lists of blocks, ragged and cropped, per batch and head.

Truth is the dense formula from the block lists where eager torch ignores them (its compiled kernels
obey them, as ours do), else torch's eager ``flex_attention``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flex_calls import (
    BLOCK,
    PER_BATCH_AND_HEAD,
    causal,
    dense_attention,
    from_lists,
    masked,
    near,
    operands,
)
from torch import Tensor
from torch.nn.attention import flex_attention as flex

import attnengine as ae
from attnengine.blockmask import as_mask_mod

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


@pytest.mark.parametrize("separate", [True, False])
def test_block_mask_of_create_block_mask(separate: bool) -> None:
    mask = masked(causal, separate_full_blocks=separate)
    assert (mask.full_kv_num_blocks is not None) == separate
    q, k, v = operands()
    near(ae.flex_attention(q, k, v, block_mask=mask), flex.flex_attention(q, k, v, block_mask=mask))


@pytest.mark.parametrize(("L", "S"), [(1, 130), (130, 40), (33, 1)])
def test_ragged_lengths(L: int, S: int) -> None:
    mask = masked(causal, L, S)
    q, k, v = operands(B=1, Hq=2, Hkv=2, L=L, S=S)
    near(ae.flex_attention(q, k, v, block_mask=mask), flex.flex_attention(q, k, v, block_mask=mask))


def test_masks_per_batch_and_head() -> None:
    q, k, v = operands()
    for separate in (True, False):
        mask = masked(PER_BATCH_AND_HEAD, B=2, H=4, separate_full_blocks=separate)
        want = flex.flex_attention(q, k, v, block_mask=mask)
        near(ae.flex_attention(q, k, v, block_mask=mask), want)


@pytest.mark.parametrize("sizes", [{"B": 2, "H": 4}, {"H": 4}, {"B": 2}, {}])
def test_mask_broadcast_over_batch_and_heads(sizes: dict[str, int]) -> None:
    """The function that stands for a mask, pair by pair; the kernel reads nothing else."""
    mask = masked(PER_BATCH_AND_HEAD, **sizes)
    q, k, _ = operands()
    mod = as_mask_mod(mask, q, k)
    assert mod is not None
    got = mod(*torch.meshgrid(*[torch.arange(n) for n in (2, 4, 70, 70)], indexing="ij"))
    assert torch.equal(got, from_lists(mask, 2, 4))
    near(
        ae.flex_attention(q, k, q, block_mask=masked(causal)),
        flex.flex_attention(q, k, q, block_mask=masked(causal)),
    )


def lists(counts: list[int], indices: list[list[int]]) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(counts, dtype=torch.int32)[None, None],
        torch.tensor(indices, dtype=torch.int32)[None, None],
    )


def built(
    partial: tuple[list[int], list[list[int]]],
    full: tuple[list[int], list[list[int]]] | None,
    mask_mod: Callable | None,
    lengths: tuple[int, int] = (70, 70),
) -> Any:
    return flex.BlockMask.from_kv_blocks(
        *lists(*partial),
        *(lists(*full) if full else (None, None)),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=lengths,
        compute_q_blocks=False,
    )


# Entries past the count are undefined; here they name blocks that must stay dead.
LISTED: dict[str, tuple[Any, Any, Callable | None]] = {
    "strict subset of the mask": (([1, 2, 1], [[0, 2, 1], [0, 1, 2], [2, 0, 1]]), None, causal),
    "full blocks that the mask would cut": (
        ([1, 1, 0], [[0, 1, 2], [1, 0, 2], [0, 1, 2]]),
        ([1, 1, 2], [[2, 0, 1], [2, 1, 0], [0, 2, 1]]),
        causal,
    ),
    "no mask_mod": (([1, 3, 2], [[1, 0, 0], [2, 1, 0], [0, 1, 2]]), None, None),
    "an empty row of blocks": (([1, 0, 1], [[0, 1, 2], [0, 1, 2], [2, 1, 0]]), None, causal),
}


@pytest.mark.parametrize("case", LISTED)
@pytest.mark.parametrize("heads", [4, 2])
def test_block_lists_are_obeyed(case: str, heads: int) -> None:
    mask = built(*LISTED[case])
    live = from_lists(mask)
    q, k, v = operands(Hkv=heads, grad=True)
    out, aux = ae.flex_attention(
        q, k, v, block_mask=mask, enable_gqa=heads != 4, return_aux=ae.AuxRequest(lse=True)
    )
    want, lse = dense_attention(q, k, v, live)
    near(out, want)
    near(aux.lse, lse)
    assert not out[(~live.any(-1)).expand(out.shape[:3])].any()
    if mask.mask_mod is flex.noop_mask:
        return
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(out, (q, k, v), g)
    expected = torch.autograd.grad(want, (q, k, v), g.double())
    for a, b in zip(got, expected, strict=True):
        near(a, b, 1e-4)


def test_eager_torch_differs_where_lists_and_mask_disagree() -> None:
    """The reason why truth above is not eager torch."""
    mask = built(*LISTED["strict subset of the mask"])
    q, k, v = operands()
    eager = flex.flex_attention(q, k, v, block_mask=mask)
    assert (ae.flex_attention(q, k, v, block_mask=mask) - eager).abs().max() > 0.1


def test_changed_lists_are_seen() -> None:
    mask = built(*LISTED["strict subset of the mask"])
    q, k, v = operands()
    ae.flex_attention(q, k, v, block_mask=mask)
    mask.kv_num_blocks[0, 0, 0] = 0
    near(ae.flex_attention(q, k, v, block_mask=mask), dense_attention(q, k, v, from_lists(mask))[0])


def test_cropped_and_sliced_masks() -> None:
    whole = masked(causal, 128, 128)
    cropped = whole._adjust(70, 70)
    q, k, v = operands()
    near(
        ae.flex_attention(q, k, v, block_mask=cropped),
        flex.flex_attention(q, k, v, block_mask=masked(causal)),
    )
    by_batch = masked(causal, B=2, H=4)
    one = by_batch[:1]
    one.mask_mod = causal
    near(
        ae.flex_attention(q[:1], k[:1], v[:1], block_mask=one),
        flex.flex_attention(q[:1], k[:1], v[:1], block_mask=masked(causal)),
    )


def test_sliced_mask_without_its_mask_mod() -> None:
    sliced = masked(causal, B=2)[:1]
    q, k, v = operands(B=1)
    with pytest.raises(ValueError, match="mask_mod"):
        ae.flex_attention(q, k, v, block_mask=sliced)


def test_no_mask_of_torch() -> None:
    q, k, v = operands(L=33)
    none = flex._create_empty_block_mask(q, k)
    near(ae.flex_attention(q, k, v, block_mask=none), flex.flex_attention(q, k, v))


def test_noop_mask() -> None:
    q, k, v = operands(L=33)
    mask = masked(flex.noop_mask, 33, 70)
    near(ae.flex_attention(q, k, v, block_mask=mask), flex.flex_attention(q, k, v))
