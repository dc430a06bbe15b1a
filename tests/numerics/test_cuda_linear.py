"""CUDA kernels of linear attention through the numerics gate: their PTX, executed by the simulator,
which also reports races, bounds and misuse. No GPU is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import attnengine as ae
from attnengine import gate, library
from tests import cuda_linear_cases as cases
from tests import ptxsim
from tests.cuda_linear_cases import COVER, LinearCase, Shape
from tests.numerics.linear_problems import Family
from tests.ptxsim.test_mutants import statements, without

pytestmark = pytest.mark.usefixtures("simulator")
SEEDS = (1, 2, 3)
BF16, INF = torch.bfloat16, float("inf")
SCALAR, CHANNEL = COVER[:2]
SPOILED = (Shape("6", 6), Shape("130", 130), Shape("packed", lengths=(70, 1, 0, 50)))


@pytest.fixture(scope="module", autouse=True)
def simulator() -> Iterator[None]:
    ptxsim.install()
    yield


@pytest.mark.compiles
@pytest.mark.parametrize(
    "case, shape",
    [pytest.param(c, s, id=f"{c.id}-{s.id}") for c in COVER for s in c.shapes],
)
def test_cover(case: LinearCase, shape: Shape) -> None:
    cases.check(case, shape, SEEDS)


@pytest.mark.compiles
@pytest.mark.parametrize("case", COVER, ids=lambda case: case.id)
def test_no_register_is_spilled(case: LinearCase) -> None:
    module = cases.handle_of(cases.forward_problem(case.family, case.shapes[0], 1)).program.loaded
    assert module is not None
    assert module.spill_bytes == 0
    assert all(e["stack_bytes"] == 0 for e in module.manifest["entries"].values())


def plain(L: int, case: LinearCase = SCALAR, seed: int = 0, **more: Any) -> cases.Forward:
    """A problem of one sequence without -Inf among its decays."""
    p = cases.forward_problem(case.family, Shape("", L, heads=(1, 2)), seed)
    shape = p.q.shape if case is CHANNEL else p.v.shape[:3]
    if case is CHANNEL:
        shape = torch.Size((*p.v.shape[:3], p.q.shape[3]))
    g = torch.Generator().manual_seed(seed)
    decay = torch.nn.functional.logsigmoid(torch.randn(shape, generator=g) + 2)
    options = {"decay": decay, "initial_state": None, "cu_seqlens": None, **more}
    return replace(p, **options)


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


# -- decays ----------------------------------------------------------------------------------------


@pytest.mark.compiles
@pytest.mark.parametrize("case", [SCALAR, CHANNEL], ids=lambda case: case.id)
def test_a_decay_of_minus_infinity_forgets_all(case: LinearCase) -> None:
    """What follows it is what a sequence of its own gives, and nothing is NaN."""
    p = plain(150, case)
    assert p.decay is not None
    for at in (0, 70, 71, 100):
        p.decay[:, :, at] = -INF
    out, state = cases.run(p)
    assert torch.isfinite(out).all() and torch.isfinite(state).all()
    cut = {n: getattr(p, n)[:, :, 100:] for n in ("q", "k", "v", "decay")}
    alone, last = cases.run(replace(p, **cut))
    assert distance(out[:, :, 100:], alone) < 4e-3
    assert distance(state, last) < 4e-3


@pytest.mark.compiles
@pytest.mark.parametrize("case", [SCALAR, CHANNEL], ids=lambda case: case.id)
def test_strong_decays_do_not_overflow(case: LinearCase) -> None:
    p = plain(130, case)
    assert p.decay is not None
    p.decay.fill_(-80.0)
    p.decay[:, :, ::3] = -1e-3
    expected = cases.ForwardExpected(p)
    expected.check(cases.run(p))


@pytest.mark.compiles
@pytest.mark.parametrize("bad", [0.5, float("nan")])
@pytest.mark.parametrize("L", [1, 70])
def test_a_positive_decay_is_reported(L: int, bad: float) -> None:
    p = plain(L)
    assert p.decay is not None
    p.decay[0, 1, L - 1] = bad
    with pytest.raises(ValueError, match=f"largest log-decay .* is {bad}, limit 0"):
        cases.run(p)


# -- Inf and NaN -----------------------------------------------------------------------------------


def spoil(x: Tensor, places: int, seed: int) -> None:
    """Inf, -Inf and NaN at random elements, none of them twice."""
    g = torch.Generator().manual_seed(seed)
    for i, at in enumerate(torch.randperm(x.numel(), generator=g)[:places].tolist()):
        x[tuple(torch.unravel_index(torch.tensor(at), x.shape))] = (INF, -INF, float("nan"))[i % 3]


def check_spoiled(p: cases.Forward) -> None:
    """Inf and NaN are where the recurrence has them, and elsewhere is what it has."""
    limit = {BF16: 2e-2, torch.float16: 4e-3}[p.family.dtype]
    want = p.call(ae.reference, p.leaves(torch.float64), output_final_state=True)
    for got, expected in zip(cases.run(p), want, strict=True):
        finite = expected.isfinite()
        assert torch.equal(got.isfinite(), finite)
        assert not finite.any() or distance(got[finite], expected[finite]) < limit


@pytest.mark.compiles
@pytest.mark.parametrize("shape", SPOILED, ids=lambda shape: shape.id)
@pytest.mark.parametrize("case", COVER[:2] + COVER[3:], ids=lambda case: case.id)
def test_inf_and_nan_reach_no_earlier_token(case: LinearCase, shape: Shape) -> None:
    for seed in SEEDS:
        p = cases.forward_problem(case.family, shape, seed)
        ptxsim.seed(seed)
        spoil(p.v, 3 if shape.L == 6 else 12, seed)
        check_spoiled(p)


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["q", "k", "beta"])
def test_other_operands_with_inf_and_nan(name: str) -> None:
    """Every column is lost from such a token of k or beta on."""
    for case in COVER[4:] if name == "beta" else (*COVER[:2], *COVER[4:]):
        p = cases.forward_problem(case.family, Shape("", 130, heads=(1, 2)), 3)
        x = getattr(p, name)
        for t in (74, 90, 75):
            spoil(x[:, :, t], 1, t)
            check_spoiled(p)


# -- the state -------------------------------------------------------------------------------------


@pytest.mark.compiles
@pytest.mark.parametrize("case", COVER[:2] + COVER[4:], ids=lambda case: case.id)
def test_steps_continue_a_state(case: LinearCase) -> None:
    """A prefix, then token by token: the same as all at once."""
    p = cases.forward_problem(case.family, Shape("", 14, heads=(1, 2)), 5)
    p = replace(p, initial_state=None)
    whole, last = cases.run(p)
    state, outs = None, []
    for begin, end in ((0, 11), (11, 12), (12, 13), (13, 14)):
        cut = {
            n: x if x is None or x.dim() == 1 else x[:, :, begin:end]
            for n, x in ((n, getattr(p, n)) for n in ("q", "k", "v", "decay", "beta"))
        }
        out, state = cases.run(replace(p, initial_state=state, **cut))
        outs.append(out)
    assert distance(torch.cat(outs, 2), whole) < 8e-3
    assert state is not None and distance(state, last) < 8e-3


@pytest.mark.compiles
def test_without_tokens_the_state_stays() -> None:
    p = plain(0, initial_state=torch.randn(1, 2, 64, 64))
    out, state = cases.run(p)
    assert out.shape == (1, 2, 0, 64)
    assert p.initial_state is not None and torch.equal(state, p.initial_state)


@pytest.mark.compiles
@pytest.mark.parametrize("L", [64, 130])
@pytest.mark.parametrize("case", [SCALAR, COVER[4]], ids=lambda case: case.id)
def test_without_a_final_state(case: LinearCase, L: int) -> None:
    """A single chunk then needs no state pass."""
    p = plain(L, case)
    handle = cases.handle_of(p)
    operands = (p.q, p.k, p.v, p.decay, p.beta, None, None)
    with torch.no_grad():
        out, state = handle.run(*operands, False)
    assert state is None
    assert distance(out, cases.run(p, handle)[0]) < 1e-3


@pytest.mark.compiles
@pytest.mark.parametrize("case", [SCALAR, CHANNEL], ids=lambda case: case.id)
def test_tiles_of_both_sizes_give_the_same_bits(case: LinearCase) -> None:
    """Beside many empty sequences the state pass takes its large tiles, alone its small ones."""
    p = plain(150, case)
    crowd = replace(p, cu_seqlens=torch.tensor([0] + [150] * (cases.CROWD // 2)))
    (out, state), (many, states) = cases.run(p), cases.run(crowd)
    assert torch.equal(out, many) and torch.equal(state[0], states[0])
    assert not states[1:].any()


@pytest.mark.compiles
def test_large_fp16_states() -> None:
    """Sums that fp16 cannot hold: states are scaled where they become operands."""
    p = plain(130, CHANNEL, initial_state=1e6 * torch.rand(1, 2, 64, 64))
    assert p.family.dtype == torch.float16 and p.decay is not None
    p = replace(p, q=p.q * 1e-3, decay=torch.zeros_like(p.decay))
    out, state = cases.run(p)
    want, last = p.call(ae.reference, p.leaves(torch.float64), output_final_state=True)
    assert distance(out, want) < 5e-4 and distance(state, last) < 1e-6
    # What is largest is looked for among numbers alone.
    p.v[:, :, 3, 5] = INF
    out, state = cases.run(p)
    others = [n for n in range(64) if n != 5]
    want, last = p.call(ae.reference, p.leaves(torch.float64), output_final_state=True)
    assert distance(out[..., others], want[..., others]) < 5e-4
    assert distance(state[..., others], last[..., others]) < 1e-6


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.compiles
def test_the_state_of_a_step_is_read_and_written_once() -> None:
    p = plain(1, initial_state=torch.randn(1, 2, 64, 64))
    cases.run(p)
    counters = ptxsim.counters()
    state = 2 * 64 * 64 * 4
    assert counters["regions"]["state"]["read"] == state
    assert counters["regions"]["final_state"]["written"] == state
    read = counters["global_read"]
    assert read["sectors"] <= 1.05 * read["ideal_sectors"]


@pytest.mark.compiles
@pytest.mark.parametrize("case", [SCALAR, CHANNEL], ids=lambda case: case.id)
def test_outputs_are_computed_without_conflicts(case: LinearCase) -> None:
    cases.run(plain(128, case))
    counters = ptxsim.counters()
    assert counters["matrix_bank_conflicts"] == 0
    assert counters["local_read_bytes"] + counters["local_write_bytes"] == 0
    read = counters["global_read"]
    assert read["sectors"] <= 1.1 * read["ideal_sectors"]


@pytest.mark.compiles
def test_the_gate_catches_a_wrong_result() -> None:
    expected = cases.expectation(SCALAR, SCALAR.shapes[2], 1)
    out, state = cases.run(expected.problem)
    out[..., 50, :] *= 1.02
    with pytest.raises(gate.GateError):
        expected.check((out, state))


@pytest.mark.compiles
def test_each_barrier_is_needed(tmp_path: Path) -> None:
    """Of the delta rule's kernels, which are most: without it there is a report."""
    problems = [plain(130, COVER[4]), plain(3, COVER[4])]
    handle = cases.handle_of(problems[0])
    module = handle.program.loaded
    assert module is not None
    ptx = module.ptx_path.read_text()
    barriers = [s for s in statements(ptx, r"bar\.sync") if "/linear/" in s.file]
    assert len(barriers) >= 10
    for i, barrier in enumerate(barriers):
        path = tmp_path / f"{i}.ptx"
        path.write_text(without(ptx, barrier))
        kernel = library.load_cuda_kernel(path, None, module.manifest, [])
        found = []
        for p in problems:
            with contextlib.suppress(RuntimeError), torch.no_grad():
                operands = (p.q, p.k, p.v, p.decay, p.beta, None, None, [])
                torch.ops.attnengine.linear_forward(*operands, kernel, handle.scale, True)
                continue
            found.append(ptxsim.report().split(":", 1)[0])
        assert found and set(found) <= {"race", "uninitialized", "cp.async"}, barrier


# -- refusals --------------------------------------------------------------------------------------


def refused(family: Family, L: int = 4, target: str = "sm_80") -> None:
    cases.handle_of(cases.forward_problem(family, Shape("", L), 0), target)


def test_what_has_no_kernel_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"f32.*float16 and bfloat16.*\.half\(\)"):
        refused(Family(torch.float32, 64, 64))
    with pytest.raises(NotImplementedError, match=r"D=257.*256.*split the heads"):
        refused(Family(BF16, 257, 64))
    with pytest.raises(NotImplementedError, match=r"shared memory of sm_86"):
        refused(Family(BF16, 256, 256, "channel"), target="sm_86")


@pytest.mark.compiles
def test_gradients_are_refused() -> None:
    handle = cases.handle_of(plain(4))
    with pytest.raises(NotImplementedError, match=r"no gradient.*no_grad"):
        handle.program.backward()


@pytest.mark.compiles
def test_cuda_tensors_without_a_gpu() -> None:
    p = plain(70)
    handle = cases.handle_of(p)
    with FakeTensorMode():
        q, k, v, g = (
            torch.empty(x.shape, dtype=x.dtype, device="cuda:0")
            for x in (p.q, p.k, p.v, p.decay)
            if x is not None
        )
        out, state = handle.run(q, k, v, g, None, None, None, True)
        assert out.shape == v.shape and state is not None and state.shape == (1, 2, 64, 64)
        assert out.device == state.device == q.device
        assert (out.dtype, state.dtype) == (BF16, torch.float32)
        with pytest.raises(NotImplementedError, match=r"q is torch.float32 on cuda:0.*\.half\(\)"):
            ae.linear_attention(q.float(), k.float(), v.float(), decay=g)
        with pytest.raises(NotImplementedError, match=r"no gradient.*no_grad"):
            handle.run(q, k, v.requires_grad_(), g, None, None, None, True)
    with pytest.raises(ValueError, match=r"not of the kind.*sm_80.*attnengine.compile again"):
        handle(p.q, p.k, p.v, decay=p.decay)
