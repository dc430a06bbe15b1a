"""Linear attention's kernels against the recurrence, through the numerics gate: forward, final
states and every gradient, of all kinds of decay, dtypes, ragged lengths and layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from linear_problems import FAMILIES, Problem, problem, verify
from torch import Tensor

import attnengine as ae

NAMES = pytest.mark.parametrize("name", FAMILIES)  # two modules each
# One module of each structure.
CORES = ("f32-scalar", "f32-channel-delta", "f32-features-sum", "bf16-delta")


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# -- against the recurrence ------------------------------------------------------------------------


@NAMES
def test_dense(name: str) -> None:
    verify(problem(FAMILIES[name], 1, B=2, heads=(1, 3), L=70, lengths=()))


@NAMES
def test_packed(name: str) -> None:
    verify(problem(FAMILIES[name], 2, heads=(2, 2), lengths=(0, 1, 65, 17)))


@pytest.mark.parametrize("L", [0, 1, 2, 8, 16, 17, 65])
@pytest.mark.parametrize("name", CORES)
def test_lengths(name: str, L: int) -> None:
    verify(problem(FAMILIES[name], 10 + L, B=1, heads=(1, 2), L=L, lengths=()))


@pytest.mark.parametrize("name", ["f32-scalar", "bf16-scalar-gates", "f16-delta-sum"])
def test_a_decay_of_one_number_for_each_head(name: str) -> None:
    verify(problem(FAMILIES[name], 3, B=2, heads=(2, 4), L=40, lengths=(), per_head=True))


@pytest.mark.parametrize("name", ["f32-scalar", "bf16-scalar"])
def test_long(name: str) -> None:
    """Many chunks; the states of few heads are scanned in segments."""
    p = problem(FAMILIES[name], 4, B=1, heads=(1, 1), L=1500, lengths=())
    (out, state), grads = p.run(ae.linear_attention)
    (want, final), golden = p.run(ae.reference)
    tolerance = 2e-2 if p.q.dtype == torch.bfloat16 else 2e-5
    for got, expected in ((out, want), (state, final), *((grads[n], golden[n]) for n in golden)):
        assert _distance(got, expected) < tolerance


def _distance(got: Tensor, want: Tensor) -> float:
    """Relative L2: of long sums, where the gate's fp64 recurrence would take minutes."""
    got, want = got.detach(), want.detach()
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


# -- invariances -----------------------------------------------------------------------------------


def operands(p: Problem) -> dict[str, Any]:
    given = {"q": p.q, "k": p.k, "v": p.v, "decay": p.decay, "beta": p.beta}
    return {n: x for n, x in given.items() if x is not None}


def cut(x: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    """Tokens begin to end of every operand."""
    return {n: t if t.dim() == 1 else t[:, :, begin:end] for n, t in x.items()}


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    assert _distance(got, want) < tolerance


@pytest.mark.parametrize("name", CORES)
def test_steps_are_the_whole(name: str) -> None:
    p = problem(FAMILIES[name], 5, B=2, heads=(2, 4), L=21, lengths=())
    x, spec = operands(p), p.spec
    want, final = ae.linear_attention(spec=spec, output_final_state=True, **x)
    state, steps = None, []
    for t in range(21):
        out, state = ae.linear_attention_step(spec=spec, state=state, **cut(x, t, t + 1))
        steps.append(out)
    close(torch.cat(steps, 2), want, p.q.dtype)
    close(state, final, p.q.dtype)


@pytest.mark.parametrize("kind, delta", [("scalar", False), ("channel", True)])
def test_a_step_whose_states_go_past_the_caches(kind: str, delta: bool) -> None:
    """Rows of 33 or 49 columns under a normalizer, stored as lines: at 16 MB of states or more."""
    B, H, D, Dv = (1, 4096, 32, 32) if not delta else (2, 1500, 32, 48)
    g = torch.Generator().manual_seed(H)
    q, k = (torch.rand(B, H, 1, D, generator=g) for _ in range(2))
    v = torch.randn(B, H, 1, Dv, generator=g)
    decay = -torch.rand(B, H, 1, *((D,) if kind == "channel" else ()), generator=g)
    decay[:, 7] = -torch.inf
    x = {"q": q, "k": k / D, "v": v, "decay": decay}
    if delta:
        x["beta"] = torch.rand(B, H, 1, generator=g)
    spec = ae.LinearAttentionSpec(normalizer="sum")
    before = torch.rand(B, H, D, Dv + 1, generator=g)
    assert before.nbytes >= 16 << 20
    few = {n: t[:, 5:9] for n, t in x.items()}
    for state in (before, None):
        some = None if state is None else state[:, 5:9]
        out, after = ae.linear_attention_step(spec=spec, state=state, **x)
        want, final = ae.reference(
            spec=spec, initial_state=state, output_final_state=True, **x, dtype=torch.float64
        )
        close(out, want, torch.float32)
        close(after, final, torch.float32)
        close(after[..., Dv], final[..., Dv], torch.float32)
        part, last = ae.linear_attention_step(spec=spec, state=some, **few)  # stays in the caches
        assert torch.equal(bits(out[:, 5:9]), bits(part))
        assert torch.equal(bits(after[:, 5:9]), bits(last))


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("at", [1, 16, 50, 64])
def test_a_state_that_is_carried_over(name: str, at: int) -> None:
    p = problem(FAMILIES[name], 6, B=1, heads=(1, 2), L=97, lengths=())
    x = operands(p)
    want, final = ae.linear_attention(spec=p.spec, output_final_state=True, **x)
    a, state = ae.linear_attention(spec=p.spec, output_final_state=True, **cut(x, 0, at))
    b, state = ae.linear_attention(
        spec=p.spec, initial_state=state, output_final_state=True, **cut(x, at, 97)
    )
    close(torch.cat([a, b], 2), want, p.q.dtype)
    close(state, final, p.q.dtype)


@pytest.mark.parametrize("name", CORES)
def test_packed_sequences_are_calls_of_their_own(name: str) -> None:
    lengths = (33, 0, 64, 1, 70)
    p = problem(FAMILIES[name], 7, heads=(1, 2), lengths=lengths)
    x = operands(p)
    out, final = ae.linear_attention(
        spec=p.spec, cu_seqlens=p.cu_seqlens, output_final_state=True, **x
    )
    begin = 0
    for n, length in enumerate(lengths):
        one, state = ae.linear_attention(
            spec=p.spec, output_final_state=True, **cut(x, begin, begin + length)
        )
        close(out[:, :, begin : begin + length], one, p.q.dtype)
        close(final[n], state[0], p.q.dtype)
        begin += length


def bits(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("name", ["f32-scalar", "f32-delta-gates", "bf16-delta", "bf16-channel"])
@pytest.mark.parametrize(
    "sizes", [dict(B=3, heads=(2, 4), L=130), dict(B=1, heads=(1, 1), L=700)], ids=["many", "one"]
)
def test_the_same_bits_with_any_number_of_threads(name: str, sizes: dict) -> None:
    p = problem(FAMILIES[name], 8, lengths=(), **sizes)
    first, grads = p.run(ae.linear_attention)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        again, others = p.run(ae.linear_attention)
        for got, want in zip((*again, *others.values()), (*first, *grads.values()), strict=True):
            assert torch.equal(bits(got), bits(want)), f"{threads} threads"


# -- extremes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f32-scalar", "f32-channel-delta", "bf16-delta"])
def test_a_decay_of_minus_infinity_forgets_everything(name: str) -> None:
    p = problem(FAMILIES[name], 9, B=1, heads=(1, 2), L=40, lengths=(), per_head=False)
    assert p.decay is not None
    x = operands(p)
    x["decay"] = x["decay"].clone()
    x["decay"][:, :, 20] = -torch.inf
    if p.initial_state is not None:
        x["initial_state"] = p.initial_state
    leaves = {n: t.detach().requires_grad_() for n, t in x.items()}
    out = ae.linear_attention(spec=p.spec, **leaves)
    after = ae.linear_attention(
        spec=p.spec, **{n: t for n, t in cut(x, 20, 40).items() if n != "initial_state"}
    )
    close(out[:, :, 20:], after, p.q.dtype)
    out.sum().backward()
    for t in leaves.values():
        assert t.grad is not None and t.grad.isfinite().all()


@pytest.mark.parametrize("operand", ["q", "k", "v", "beta", "dout"])
@pytest.mark.parametrize("name", ["f32-delta-gates", "f32-channel-delta", "bf16-delta"])
def test_what_is_not_finite_stays_in_backward(name: str, operand: str) -> None:
    """NaN at one token: gradients that the recurrence keeps finite are finite."""
    p = problem(FAMILIES[name], 12, B=1, heads=(1, 1), L=70, lengths=(), per_head=False)
    x = {n: t.clone() for n, t in operands(p).items()}
    dout = torch.randn(p.v.shape, generator=torch.Generator().manual_seed(12)).to(p.v.dtype)
    (dout if operand == "dout" else x[operand])[0, 0, 20] = torch.nan

    def gradients(call: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in x.values()]
        out = call(spec=p.spec, **dict(zip(x, leaves, strict=True)))
        return list(torch.autograd.grad(out, leaves, dout))

    for n, got, want in zip(
        x, gradients(ae.linear_attention), gradients(ae.reference), strict=True
    ):
        wild = want.isfinite() & ~got.isfinite()
        assert not wild.any(), (n, wild.nonzero().tolist()[:4])


# -- the derivatives themselves --------------------------------------------------------------------


@pytest.mark.parametrize("L, lengths", [(20, ()), (19, (3, 0, 16))], ids=["dense", "packed"])
def test_gradcheck(L: int, lengths: tuple[int, ...]) -> None:
    """Finite differences through the generated fp64 kernels, captured tensors included."""
    p = problem(FAMILIES["f64-channel-delta-sum"], 11, heads=(1, 2), lengths=lengths, L=None if
                lengths else L, B=None if lengths else 2)  # fmt: skip
    leaves = p.leaves()
    leaves.pop("initial_state", None)
    N = len(lengths) or 2
    leaves["initial_state"] = torch.rand(N, 2, 7, 6, dtype=torch.float64, requires_grad=True)
    given = [*leaves.values(), *p.captures.values()]

    def f(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(leaves, values, strict=False))
        return p.call(ae.linear_attention, named, output_final_state=True)

    assert torch.autograd.gradcheck(f, given, fast_mode=True, atol=1e-6)
