"""What the CUDA kernels of linear attention are tested on: kernels, and the shapes of each.

``COVER`` is what CI runs: every kind of decay, both dtypes, hooks, the delta rule and the
normalizer. ``FULL`` has more head dims, up to the largest. Shapes are lengths around those of
chunks (64 tokens) and steps (8), packed sequences of which some are empty, and so many sequences
that the state pass takes its large tiles. CI runs every length of a step and more ragged ends on
both kinds of decay, the full matrix on every kernel.

    python -m tests.simulated --linear [--full]
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from attnengine import gate
from attnengine.linear import dispatch
from attnengine.linear.arguments import check_arguments
from attnengine.linear.handle import LinearHandle
from tests import ptxsim
from tests.numerics.linear_problems import Expected, Family, Problem, problem

BF16, F16 = torch.bfloat16, torch.float16
CROWD = 216  # sequences of a head: two blocks of the state pass for each of 108 multiprocessors


@dataclass(frozen=True)
class Shape:
    """Arguments of linear_problems.problem."""

    id: str
    L: int | None = None
    lengths: tuple[int, ...] = ()
    B: int | None = 1
    heads: tuple[int, int] = (1, 2)


CHUNKS = (
    Shape("1", 1),
    Shape("9", 9, B=2, heads=(1, 1)),
    Shape("63", 63),
    Shape("64", 64, heads=(1, 1)),
    Shape("65", 65, heads=(2, 4)),
    Shape("150", 150, heads=(1, 1)),
    Shape("packed", lengths=(0, 65, 0, 1, 70, 0)),
    Shape("steps", lengths=(0, 1, 0, 5, 2), heads=(2, 4)),
)
RAGGED = (
    *(Shape(str(L), L, B=1 + L % 2, heads=(1, 1 + L % 3)) for L in range(2, 9)),
    Shape("15", 15),
    Shape("130", 130, heads=(2, 2)),
)
CROWDED = Shape("crowd", lengths=(0, 70, 2) + (0,) * (CROWD - 4) + (1,), heads=(1, 1))


@dataclass(frozen=True)
class LinearCase:
    id: str
    family: Family

    @property
    def shapes(self) -> tuple[Shape, ...]:
        f = self.family
        plain = f.hooks == "none" and f.D == 64 and not f.beta
        return (*CHUNKS, *RAGGED, CROWDED) if plain else CHUNKS

    @property
    def all_shapes(self) -> tuple[Shape, ...]:
        return tuple(dict.fromkeys((*self.shapes, *RAGGED)))


def _case(
    kind: str, D: int, Dv: int, dtype: torch.dtype, note: str = "", **more: Any
) -> LinearCase:
    name = "bf16" if dtype == BF16 else "fp16"
    return LinearCase(f"linear-{kind}{note}-d{D}x{Dv}-{name}", Family(dtype, D, Dv, kind, **more))


COVER = (
    _case("scalar", 64, 64, BF16),
    _case("channel", 64, 64, F16),
    _case("channel", 40, 24, BF16, "-gates", hooks="gates", decay_dtype=BF16),
    _case("none", 100, 72, F16, "-features-sum", hooks="features", normalizer="sum"),
    _case("scalar", 64, 64, BF16, "-delta", beta=True, beta_dtype=BF16),
    _case("channel", 40, 24, F16, "-delta-sum", beta=True, normalizer="sum"),
)
FULL = (
    *COVER,
    _case("none", 64, 64, BF16),
    _case("scalar", 128, 128, BF16),
    _case("scalar", 128, 128, F16),
    _case("channel", 128, 128, BF16),
    _case("channel", 64, 64, BF16),
    _case("scalar", 64, 64, F16, "-gates", hooks="gates"),
    _case("scalar", 17, 33, BF16),
    _case("channel", 17, 33, F16),
    _case("scalar", 16, 200, BF16),
    _case("scalar", 256, 256, BF16),
    _case("channel", 256, 256, BF16),
    _case("scalar", 64, 64, BF16, "-sum", normalizer="sum"),
    _case("channel", 40, 24, BF16, "-sum", normalizer="sum"),
    _case("none", 64, 64, F16, "-delta", beta=True),
    _case("scalar", 128, 128, BF16, "-delta-gates", beta=True, hooks="gates"),
    _case("channel", 128, 128, BF16, "-delta", beta=True),
    _case("channel", 256, 256, BF16, "-delta", beta=True),
)


def by_id(name: str) -> LinearCase:
    return next(case for case in FULL if case.id == name)


class Forward(Problem):
    """A problem of which no gradients are asked."""

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return {n: x.detach() for n, x in super().leaves(dtype).items()}

    def gradients(
        self, out: Tensor, state: Tensor | None, leaves: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {}


class ForwardExpected(Expected):
    def _keys(self) -> list[str]:
        return ["out", "state"]


def forward_problem(family: Family, shape: Shape, seed: int) -> Forward:
    p = problem(family, seed, B=shape.B, heads=shape.heads, L=shape.L, lengths=shape.lengths)
    return Forward(**{f.name: getattr(p, f.name) for f in fields(Problem)})


@functools.cache
def expectation(case: LinearCase, shape: Shape, seed: int) -> ForwardExpected:
    """What a case's results must be on a shape."""
    with torch.no_grad():
        return ForwardExpected(forward_problem(case.family, shape, seed))


def handle_of(p: Problem, target: str = "sm_80") -> LinearHandle:
    """The CUDA kernels of a problem. In the simulator its tensors lie on the CPU, where
    ae.linear_attention would take those of the CPU."""
    a = check_arguments(
        p.q, p.k, p.v, p.spec, decay=p.decay, beta=p.beta, initial_state=p.initial_state,
        cu_seqlens=p.cu_seqlens,
    )  # fmt: skip
    request = dispatch.request_of(a, p.q, p.spec.normalizer == "sum")
    captures, sizes = dispatch.captures_for(p.spec), (a.B, a.Hk, a.H, a.L)
    program = dispatch.program(p.spec, captures, request, sizes, target)
    return LinearHandle(p.spec, program, dispatch.bound_tensors(program, captures), sizes)


@torch.no_grad()
def run(p: Problem, handle: LinearHandle | None = None) -> tuple[Tensor, Tensor]:
    """(out, final state) of the CUDA kernels."""
    out, state = (handle or handle_of(p)).run(
        p.q, p.k, p.v, p.decay, p.beta, p.initial_state, p.cu_seqlens, True
    )
    assert state is not None
    return out, state


def check(case: LinearCase, shape: Shape, seeds: Iterable[int], draw: int = 1) -> list[gate.Report]:
    """One shape through the gate, once per order of execution. Raises GateError, or RuntimeError
    with the simulator's report."""
    expected, reports = expectation(case, shape, draw), []
    handle = handle_of(expected.problem)
    for seed in seeds:
        ptxsim.seed(seed)
        reports += expected.check(run(expected.problem, handle))
    return reports
