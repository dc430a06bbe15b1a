"""The list of CUDA cases keeps its promises: what is covered, what wraps, what is in between."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import (
    COVER,
    EXTRA,
    FACTORS,
    FULL,
    LAYOUTS,
    Case,
    Shape,
    all_tuples,
    by_id,
    cover,
    laid_out,
    tuples,
)

import attnengine as ae
from attnengine import gate


def values(case: Case) -> tuple[str, ...]:
    """A case's values, one per factor."""
    dims, dtype = case.id.split("-")[-2:]
    return (case.row, case.mask, case.score, dims, dtype)


def test_every_pair_of_values_meets() -> None:
    found = {pair for case in COVER for pair in tuples(values(case))}
    assert all_tuples(FACTORS) <= found


def test_cover_is_as_small_as_a_pairwise_cover_can_be() -> None:
    sizes = sorted((len(f) for f in FACTORS), reverse=True)
    assert len(COVER) == sizes[0] * sizes[1] == 30


def test_full_matrix_has_every_meaning_and_contains_the_cover() -> None:
    assert len(FULL) == 96 + len(EXTRA) >= 60
    heads = {(case.row, case.mask, case.score) for case in FULL}
    assert heads == {(a, b, c) for a in FACTORS[0] for b in FACTORS[1] for c in FACTORS[2]}
    assert set(COVER) <= set(FULL) and set(EXTRA) <= set(FULL)
    assert len({case.id for case in FULL}) == len(FULL)
    assert all(by_id(case.id) is case for case in FULL)


def test_cover_is_greedy_and_deterministic() -> None:
    factors = (("a", "b"), ("x", "y"), ("0", "1"))
    pool = [(a, b, c) for a in factors[0] for b in factors[1] for c in factors[2]]
    chosen = cover(pool, all_tuples(factors))
    assert chosen == [("a", "x", "0"), ("a", "y", "1"), ("b", "x", "1"), ("b", "y", "0")]
    with pytest.raises(ValueError, match="no combination has"):
        cover(pool[:1], all_tuples(factors))


@pytest.mark.parametrize("block_m, block_n, stages", [(64, 64, 2), (64, 64, 3), (128, 128, 2)])
def test_first_shape_wraps_every_ring(block_m: int, block_n: int, stages: int) -> None:
    for case in (*COVER, *EXTRA):
        shape = case.shapes(block_m=block_m, block_n=block_n, stages=stages)[0]
        assert max(case.tiles(shape, block_m, block_n)) >= 2 * stages + 1, (case.id, shape)


def test_shapes_have_ragged_ends_groups_and_rows_without_keys() -> None:
    for case in COVER:
        shapes = case.shapes()
        assert any(s.L % 64 and s.S % 64 for s in shapes)
        assert {s.Hq // s.Hkv for s in shapes} >= {1, 2, 4}
        assert {0, 1} <= {s.S for s in shapes} and 1 in {s.L for s in shapes}
        assert any(s.L < s.S for s in shapes) and any(s.L > s.S > 1 for s in shapes)
        assert len({s.name for s in shapes}) == len(shapes)
    window = next(case for case in COVER if case.mask == "window")
    dead = next(s for s in window.shapes() if s.name == "dead-rows")
    assert 0 in window.tiles(dead, 1, 64)


def test_every_shape_meets_every_layout_somewhere() -> None:
    found = {(s.name, s.layout) for case in COVER for s in case.shapes()}
    assert {(n, at) for n, _ in found for at in LAYOUTS} - found <= {
        ("dead-rows", at) for at in LAYOUTS
    }


def test_layouts_keep_values_and_are_what_they_say() -> None:
    x = torch.randn(2, 3, 5, 16).half()
    for layout in LAYOUTS[:-1]:
        assert torch.equal(laid_out(x, layout), x), layout
    assert laid_out(x, "heads_last").stride() == (5 * 3 * 16, 16, 3 * 16, 1)
    assert laid_out(x, "padded").stride() == (3 * 5 * 24, 5 * 24, 24, 1)
    assert laid_out(x, "padded").data_ptr() % 16 == 0
    assert (
        laid_out(x, "unaligned").stride(2) == 17 and laid_out(x, "unaligned").data_ptr() % 16 == 2
    )
    assert laid_out(x, "columns").stride() == (3 * 5 * 16, 5 * 16, 1, 5)
    shared = laid_out(x, "shared")
    assert shared.shape == (1, 3, 5, 16) and shared.stride(1) == 0
    between = laid_out(x, "unaligned").as_strided((2 * 3 * 5,), (17,), 17)
    assert bool(between.isnan().all())


def test_problems_come_from_their_seed() -> None:
    case = next(c for c in COVER if c.score == "bias" and c.row == "sink")
    shape = case.shapes()[0]
    one, same, other = (case.problem(shape, seed) for seed in (1, 1, 2))
    assert torch.equal(one.q, same.q) and not torch.equal(one.q, other.q)
    assert torch.equal(one.spec.row_func.sink, same.spec.row_func.sink)
    assert one.q.dtype is case.dtype and one.v.shape[3] == case.dims[1]


@pytest.mark.parametrize("case", EXTRA, ids=lambda case: case.id)
def test_a_right_result_passes_the_gate(case: Case) -> None:
    """The reference in fp32, rounded, stands in for a kernel: the cases themselves are judged."""
    for shape in case.shapes()[4:]:
        judged(case, shape, wrong=False)


def test_a_wrong_result_does_not() -> None:
    for case in COVER[::5]:
        with pytest.raises(gate.GateError):
            judged(case, next(s for s in case.shapes() if s.name == "more-queries"), wrong=True)


def judged(case: Case, shape: Shape, wrong: bool) -> None:
    """Through the gate; `wrong`: with values 5 % too large."""
    problem = case.problem(shape, seed=3)
    factor = 1.05 if wrong else 1.0

    def run(q, k, v):
        return ae.reference(q, k, (v * factor).to(v.dtype), problem.spec, return_aux=True)

    gate.compare(run, problem.spec, problem.q, problem.k, problem.v, grads=False)
