"""Linear attention of few long sequences, whose chunks are tasks with their states in memory:
through the numerics gate, at every number of threads, and against calls that walk."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from linear_problems import FAMILIES, Problem, problem, verify
from torch import Tensor

import attnengine as ae

# Chunks here are of at most 64 tokens, and 16 of them are enough. Modules are those of test_linear.
LONG = 1030
FAMILY_NAMES = (
    "f32-scalar",
    "f32-channel-gates",
    "f32-features-sum",
    "bf16-scalar",
    "bf16-channel",
)
NAMES = pytest.mark.parametrize("name", FAMILY_NAMES)


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def attend(p: Problem, begin: int = 0, end: int | None = None, state: Tensor | None = None,
           v: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and final state of some tokens, from ``state``."""
    given = {"q": p.q, "k": p.k, "v": p.v if v is None else v, "decay": p.decay, "beta": p.beta}
    x = {n: t if t.dim() == 1 else t[:, :, begin:end] for n, t in given.items() if t is not None}
    return ae.linear_attention(spec=p.spec, initial_state=state, output_final_state=True, **x)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    distance = float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))
    assert distance < (1e-2 if dtype == torch.bfloat16 else 2e-6)


def test_chunks_are_tasks() -> None:
    """What this file is about: the plans say so, and that chunks are short enough for it."""
    for name in ("f32-scalar", "f32-channel-gates", "f32-features-sum", "bf16-scalar"):
        p = problem(FAMILIES[name], 0, B=1, heads=(1, 1), L=20, lengths=())
        text = ae.explain(p.spec, p.q, p.k, p.v, decay=p.decay).split("== backward plan")[0]
        assert "of fewer than 2 walks" in text
        chosen = text.split("chosen: chunks of ")[1].split()[0]
        assert 15 * int(chosen) < LONG


@NAMES
def test_dense(name: str) -> None:
    verify(problem(FAMILIES[name], 21, B=1, heads=(1, 1), L=LONG, lengths=()))


@pytest.mark.parametrize("lengths", [(0, 1, LONG, 0), (130, 2, LONG + 5, 17)])
@pytest.mark.parametrize("name", ["f32-features-sum", "bf16-scalar-gates"])
def test_packed(name: str, lengths: tuple[int, ...]) -> None:
    """Lengths of no tokens, a few and many; the table of their first chunks."""
    verify(problem(FAMILIES[name], 22, heads=(1, 1), lengths=lengths))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("lengths", [(), (0, 70, 2100, 1)], ids=["dense", "packed"])
@pytest.mark.parametrize("name", ["f32-scalar", "f32-features-sum", "bf16-channel"])
def test_the_same_bits_with_any_number_of_threads(name: str, lengths: tuple[int, ...]) -> None:
    """Spans are shorter with fewer threads."""
    L = None if lengths else 2171
    p = problem(FAMILIES[name], 23, B=1, heads=(1, 1), L=L, lengths=lengths)
    torch.set_num_threads(1)
    first, grads = p.run(ae.linear_attention)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        again, others = p.run(ae.linear_attention)
        for got, want in zip((*again, *others.values()), (*first, *grads.values()), strict=True):
            assert torch.equal(bits(got), bits(want)), f"{threads} threads"


@pytest.mark.parametrize("name", [n for n in FAMILY_NAMES if n != "f32-channel-gates"])
def test_parts_that_walk_are_the_whole(name: str) -> None:
    """Short calls, each from the state of the one before, go another way. (The gates are left out:
    they capture a number for each token of the whole.)"""
    p = problem(FAMILIES[name], 24, B=1, heads=(1, 1), L=LONG, lengths=())
    out, final = attend(p, state=p.initial_state)
    state, parts = p.initial_state, []
    for begin in range(0, LONG, 206):
        part, state = attend(p, begin, begin + 206, state)
        parts.append(part)
    close(torch.cat(parts, 2), out, p.q.dtype)
    assert state is not None
    close(state, final, p.q.dtype)


@pytest.mark.parametrize("name", ["f32-scalar", "bf16-channel"])
def test_a_decay_of_minus_infinity_forgets_everything(name: str) -> None:
    """At the ends of chunks and inside; what was before may be anything finite."""
    p = problem(FAMILIES[name], 25, B=1, heads=(1, 1), L=LONG, lengths=(), per_head=False)
    assert p.decay is not None
    p.decay = p.decay.clone()
    places = (0, 47, 64, 500, 960, LONG - 1)
    for t in places:
        p.decay[:, :, t] = -torch.inf
    D, Dv = p.q.shape[3], p.v.shape[3]
    state = torch.full((1, 1, D, Dv), 1e30)
    out, final = attend(p, state=state)
    for begin, end in zip(places, (*places[1:], LONG), strict=True):
        part, last = attend(p, begin, end)
        close(out[:, :, begin:end], part, p.q.dtype)
    close(final, last, p.q.dtype)


@pytest.mark.parametrize("name", ["f32-scalar", "bf16-channel", "f32-features-sum"])
def test_infinities_stay_where_the_recurrence_has_them(name: str) -> None:
    p = problem(FAMILIES[name], 26, B=1, heads=(1, 1), L=LONG, lengths=())
    v = p.v.clone()
    v[:, :, 500, 3] = torch.inf
    (clean, last), (out, final) = attend(p), attend(p, v=v)
    assert torch.equal(bits(out[:, :, :500]), bits(clean[:, :, :500]))
    others = [c for c in range(v.shape[3]) if c != 3]
    close(out[..., others], clean[..., others], p.q.dtype)
    close(final[..., others], last[..., others], p.q.dtype)
    assert not out[:, :, 500, 3].isfinite().any()
