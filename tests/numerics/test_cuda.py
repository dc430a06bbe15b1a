"""CUDA kernels through the numerics gate: their PTX, executed by the simulator, which also reports
races, bounds and misuse. No GPU is needed."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attnengine as ae
from attnengine import gate
from tests import ptxsim, simulated
from tests.cuda_cases import COVER, Case, Problem
from tests.numerics import problems

pytestmark = pytest.mark.usefixtures("simulator")
INF, NAN = float("inf"), float("nan")
SEEDS = (1, 2, 3)


@pytest.fixture(scope="module", autouse=True)
def simulator() -> Iterator[None]:
    ptxsim.install()
    yield


@pytest.mark.compiles
@pytest.mark.parametrize("case", COVER, ids=lambda case: case.id)
def test_cover(case: Case) -> None:
    """Every pair of row function, mask, score_mod, head dims and dtype."""
    outcome = simulated.run(case, SEEDS)
    assert outcome.error == ""
    assert outcome.spill_bytes == 0
    recorded = {o.id: o for o in simulated.recorded()}[case.id]
    if outcome.tile == recorded.tile:  # another nvcc may spill elsewhere, and take other tiles
        now, then = outcome.counters["instructions"], recorded.counters["instructions"]
        assert now["total"] <= 1.05 * then["total"]


def causal(**options: Any) -> ae.AttentionSpec:
    return ae.AttentionSpec(mask_mod=lambda b, h, q, k: q >= k, **options)


def operands(
    L: int, S: int, d: int = 64, dv: int = 64, H: int = 2, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    return problems.operands(dtype, H=H, Hkv=1, L=L, S=S, d=d, dv=dv)


# -- what a masked key holds -----------------------------------------------------------------------


@pytest.mark.compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inf_and_nan_reach_only_the_rows_that_see_their_key(dtype: torch.dtype) -> None:
    q, k, v = operands(150, 150, dtype=dtype)
    v[..., 100, 3], v[..., 101, 3], v[..., 140, 0] = INF, -INF, NAN
    v[..., 20, 5] = -INF
    k[..., 149, :] = NAN  # row 149 alone sees it
    for seed in SEEDS:
        ptxsim.seed(seed)
        out = ae.compile(causal(), q, k, v, target="sm_80", backward=False)(q, k, v)
        clean = v.clone()
        clean[~torch.isfinite(clean)] = 0
        want = ae.reference(q, k, clean, causal()).to(torch.float32)
        rows = torch.arange(150)
        assert torch.isfinite(out[..., rows < 20, :]).all()
        assert (out[..., (rows >= 20) & (rows < 149), 5] == -INF).all()
        assert (out[..., (rows >= 100) & (rows < 101), 3] == INF).all()
        assert out[..., (rows >= 101) & (rows < 149), 3].isnan().all()
        assert out[..., rows >= 140, 0].isnan().all()
        assert out[..., 149, :].isnan().all()
        seen = torch.isfinite(out)
        close = torch.isclose(out.float(), want, atol=0.05)
        assert bool(close[seen].all())


@pytest.mark.compiles
def test_a_score_of_minus_inf_is_a_dead_key() -> None:
    q, k, v = operands(70, 130)
    dead = torch.rand(130, generator=torch.Generator().manual_seed(1)) < 0.3
    bias = torch.where(dead, -INF, 0.0)
    v[..., dead, :] = NAN
    spec = ae.AttentionSpec(score_mod=lambda s, b, h, qi, ki: s + bias[ki])
    simulated.check(Problem(spec, q, k, v), SEEDS)
    bias.fill_(-INF)  # no key is left: the same kernel
    out, aux = ae.compile(spec, q, k, v, target="sm_80", backward=False)(q, k, v, return_aux=True)
    assert (out == 0).all() and (aux.lse == -INF).all()


@pytest.mark.compiles
def test_large_and_nan_queries() -> None:
    q, k, v = operands(40, 70)
    q[..., 3, :] *= 1e4
    q[..., 7, 0] = NAN
    out = ae.compile(causal(), q, k, v, target="sm_80", backward=False)(q, k, v)
    assert out[..., 7, :].isnan().all()
    others = torch.arange(40) != 7
    assert torch.isfinite(out[..., others, :]).all()


# -- captured tensors ------------------------------------------------------------------------------


@pytest.mark.compiles
def test_gathers_of_every_kind() -> None:
    spec, _ = problems.gathers(60, 150)
    q, k, v = problems.operands(torch.bfloat16)
    simulated.check(Problem(spec, q, k, v), SEEDS)


@pytest.mark.compiles
def test_an_index_out_of_range_is_reported_for_live_keys_only() -> None:
    q, k, v = operands(40, 70)
    table = torch.zeros(30)
    inside = ae.AttentionSpec(
        mask_mod=lambda b, h, qi, ki: ki < 30, score_mod=lambda s, b, h, qi, ki: s + table[ki]
    )
    simulated.check(Problem(inside, q, k, v), SEEDS[:1])
    outside = ae.AttentionSpec(score_mod=lambda s, b, h, qi, ki: s + table[ki])
    with pytest.raises(IndexError, match=r"captures\[0\] of shape \[30\]"):
        ae.compile(outside, q, k, v, target="sm_80", backward=False)(q, k, v)


@pytest.mark.compiles
def test_a_mask_of_captured_tensors_skips_what_its_tables_exclude() -> None:
    q, k, v = operands(300, 700, H=1)
    documents = torch.arange(700) // 100
    spec = ae.AttentionSpec(mask_mod=lambda b, h, qi, ki: documents[qi] == documents[ki])
    simulated.check(Problem(spec, q, k, v), SEEDS[:1])
    sparse = ptxsim.counters()
    simulated.check(Problem(ae.AttentionSpec(), q, k, v), SEEDS[:1])
    assert sparse["mma_flops"] < 0.6 * ptxsim.counters()["mma_flops"]


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.compiles
def test_keys_and_values_are_read_once_per_tile_of_rows() -> None:
    q, k, v = operands(256, 512, d=128, dv=128, H=1)
    handle = ae.compile(ae.AttentionSpec(), q, k, v, target="sm_80", backward=False)
    handle(q, k, v)
    counters, plan = ptxsim.counters(), handle.plan
    row_tiles = -(-256 // plan.block_m)
    planned = row_tiles * 512 * (128 + 128) * 2 + 256 * 128 * 2
    assert planned <= counters["global_read"]["bytes"] <= 1.02 * planned
    assert counters["global_read"]["sectors"] <= 1.02 * counters["global_read"]["ideal_sectors"]


@pytest.mark.compiles
def test_offsets_beyond_32_bits() -> None:
    """Rows that lie 2**25 elements apart: the last ones lie beyond 2**31 elements and bytes."""
    rows, stride, d = 70, 2**25, 64
    # Anonymous memory that is never touched between the rows costs nothing.
    no_reserve = 0x4000  # MAP_NORESERVE, which the module does not name
    memory = mmap.mmap(-1, (rows * stride + d) * 2, flags=mmap.MAP_PRIVATE | no_reserve)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storage = torch.frombuffer(memory, dtype=torch.bfloat16)
    q, k, v = operands(40, rows, H=1)
    far = storage.as_strided((1, 1, rows, d), (0, 0, stride, 1))
    far.copy_(k)
    simulated.check(Problem(causal(), q, far, v), SEEDS[:1])
    simulated.check(Problem(causal(), q, k, far), SEEDS[:1])


@pytest.mark.compiles
def test_the_same_bits_in_any_order_of_warps() -> None:
    """Approximations differ by their stated error from seed to seed, so: a row function without."""
    q, k, v = operands(200, 200)
    spec = ae.AttentionSpec(row_func=ae.ReLU(), mask_mod=lambda b, h, qi, ki: qi >= ki)
    handle = ae.compile(spec, q, k, v, target="sm_80", backward=False)
    results = []
    for seed in range(4):
        ptxsim.seed(seed)
        results.append(handle(q, k, v))
    assert all(torch.equal(results[0], x) for x in results)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    q, k, v = problems.operands(dtype)
    with pytest.raises(
        (NotImplementedError, TypeError), match=r"float16.*bfloat16|bfloat16.*float16"
    ):
        ae.compile(ae.AttentionSpec(), q, k, v, target="sm_80", backward=False)


def test_large_head_dims_are_refused() -> None:
    q, k, v = operands(4, 4, d=584)
    with pytest.raises(NotImplementedError, match="head_dim=584.*576"):
        ae.compile(ae.AttentionSpec(), q, k, v, target="sm_80", backward=False)
    q, k, v = operands(4, 4, d=288, dv=40)
    with pytest.raises(NotImplementedError, match="value_dim=40.*multiple of 32"):
        ae.compile(ae.AttentionSpec(), q, k, v, target="sm_80", backward=False)


def test_gradients_are_refused() -> None:
    q, k, v = operands(4, 4)
    with pytest.raises(NotImplementedError, match="gradient"):
        ae.compile(ae.AttentionSpec(), q, k, v, target="sm_80", backward=True)


@pytest.mark.compiles
def test_a_call_that_requires_grad_is_refused() -> None:
    q, k, v = operands(4, 4)
    handle = ae.compile(ae.AttentionSpec(), q, k, v, target="sm_80", backward=False)
    with pytest.raises(NotImplementedError, match="gradient"):
        handle(q.requires_grad_(), k, v)


@pytest.mark.compiles
def test_the_gate_catches_a_wrong_result() -> None:
    """The same call with one output row changed by 2 % fails: the tests above can."""
    q, k, v = operands(64, 64)
    handle = ae.compile(causal(), q, k, v, target="sm_80", backward=False)

    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, aux = handle(q, k, v, return_aux=True)
        out[..., 50, :] *= 1.02
        return out, aux

    with pytest.raises(gate.GateError):
        gate.compare(wrong, causal(), q, k, v, grads=False)
