"""Token statistics attention: the reference against the published formulas, kernels against the
reference through the numerics gate, in both directions, and what no call may change."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnengine as ae
from attnengine import gate, library, settings
from attnengine.noise import UNIT, Noise

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Channels: whole and partial vectors, one group of them and more.
FAMILIES = {F32: 40, BF16: 80, F16: 17, F64: 5}
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 100, 128, 129, 200, 257)
RUNNABLE = settings.ISAS[: settings.ISAS.index(library.cpu_isa()) + 1]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Problem:
    """One call and the gradient of its result."""

    w: Tensor
    temp: Tensor
    causal: bool
    bias: Tensor | None
    starts: Tensor | None
    dy: Tensor

    def run(self, f: Callable[..., Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """y and the gradients of f; with dtype, on operands of that type."""
        given = {"w": self.w, "temp": self.temp, "bias": self.bias}
        leaves = {
            n: x.detach().to(dtype or x.dtype).requires_grad_()
            for n, x in given.items() if x is not None
        }  # fmt: skip
        y = f(leaves["w"], leaves["temp"], self.causal, leaves.get("bias"), self.starts)
        found = torch.autograd.grad(y, list(leaves.values()), self.dy.to(y.dtype))
        grads = {f"d{n}": g for n, g in zip(leaves, found, strict=True)}
        return {"y": y.detach(), **grads}


def problem(
    dtype: torch.dtype,
    B: int,
    h: int,
    N: int,
    *,
    causal: bool = False,
    bias: bool = False,
    starts: list[int] | None = None,
    tokens_first: bool = False,
    seed: int = 0,
) -> Problem:
    g = torch.Generator().manual_seed(seed)
    d, wide = FAMILIES[dtype], F64 if dtype == F64 else F32

    def operand() -> Tensor:
        shape = (B, N, h, d) if tokens_first else (B, h, N, d)
        x = torch.randn(shape, generator=g, dtype=wide).to(dtype)
        return x.transpose(1, 2) if tokens_first else x

    temp = 1 + 0.3 * torch.randn(h, generator=g, dtype=wide)
    b = 0.02 * torch.randn(h, N, generator=g, dtype=wide) if bias else None
    cuts = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    return Problem(operand(), temp, causal, b, cuts, operand())


def random_problem(dtype: torch.dtype, seed: int) -> Problem:
    r = random.Random(f"{dtype} {seed}")
    causal = seed % 2 == 0
    N = r.choice(LENGTHS)
    starts = None
    if r.random() < 0.4:
        starts = sorted([0, N, *(r.randint(0, N) for _ in range(r.randint(0, 4)))])
    return problem(
        dtype, 1 if starts else r.choice((1, 2, 3)), r.choice((1, 2, 3, 5)), N, causal=causal,
        bias=causal and r.random() < 0.6, starts=starts, tokens_first=r.random() < 0.5, seed=seed,
    )  # fmt: skip


# -- the judge -------------------------------------------------------------------------------------


def noisy(
    w: Tensor, temp: Tensor, causal: bool, bias: Tensor | None, starts: Tensor | None, g: Any
) -> Tensor:
    """The formulas in fp64 with a relative error of UNIT in every term, and in its gradient."""

    def e(x: Tensor) -> Tensor:
        def wrong(x: Tensor) -> Tensor:
            return x * (UNIT * torch.randn(x.shape, generator=g, dtype=x.dtype))

        y = x + wrong(x.detach())
        y.register_hook(lambda grad: grad + wrong(grad))
        return y

    ends = starts.tolist() if starts is not None else [0, w.shape[2]]
    parts = []
    for a, b in zip(ends[:-1], ends[1:], strict=True):
        x = w[:, :, a:b]
        u = e(x.square())
        c = u.cumsum(2).clamp_min(1e-12) if causal else u.sum(2, keepdim=True).clamp_min(1e-24)
        r = e(u / c).sum(3)
        if bias is not None:
            r = r + e(w.shape[3] * bias[:, : b - a])
        s = e(temp[:, None] * e(r))
        z = torch.exp(s - s.detach().amax(1, keepdim=True))
        pi = e(z / e(z.sum(1, keepdim=True)))[..., None]
        products = e(pi * u)
        if causal:
            share = e(products.cumsum(2)) / e(pi.cumsum(2) + 1e-8)
        else:
            share = e(products.sum(2, keepdim=True)) / e(pi.sum(2, keepdim=True) + 1e-8)
        parts.append(e(-x * pi / (1 + e(share))))
    return torch.cat(parts, 2)


def judge(p: Problem, got: dict[str, Tensor]) -> None:
    golden = p.run(ae.token_statistics_reference, F64)
    half = p.w.dtype in gate.HALF
    ideal = eager = dict.fromkeys(golden)
    if half:
        ideal = p.run(ae.token_statistics_reference)

        def in_type(*args: Any) -> Tensor:
            return ae.token_statistics_reference(*args, dtype=p.w.dtype)

        eager = p.run(in_type)
    draws = [
        p.run(lambda *args, s=s: noisy(*args, torch.Generator().manual_seed(s)), F64)
        for s in range(4)
    ]
    B, h, N, d = p.w.shape
    counts = {"y": N, "dw": N + d, "dtemp": B * N * d, "dbias": B * N + d}
    bad = []
    for name, actual in got.items():
        errors = [(x[name] - golden[name]) / UNIT for x in draws]
        narrow = actual.dtype in gate.HALF  # the others have fp32's rules, whatever w's type
        report = gate.check(
            actual, golden[name], ideal[name] if narrow else None, eager[name] if narrow else None,
            name=name, compute=actual.dtype, noise=Noise(errors, errors, counts[name]),
        )  # fmt: skip
        if not report.ok:
            bad.append(str(report))
    if bad:
        raise gate.GateError(f"w {tuple(p.w.shape)} {p.w.dtype}\n" + "\n".join(bad))


# -- what it means ---------------------------------------------------------------------------------


def published_vision(w: Tensor, temp: Tensor) -> Tensor:
    """As the authors' vision model computes it: w [B, h, N, d], temp [h, 1]."""
    normed = F.normalize(w, dim=-2)
    pi = torch.softmax(torch.sum(normed**2, dim=-1) * temp, dim=1)
    dots = (pi / (pi.sum(dim=-1, keepdim=True) + 1e-8)).unsqueeze(-2) @ (w**2)
    return -(w * pi.unsqueeze(-1)) * (1.0 / (1 + dots))


def published_language(w: Tensor, temp: Tensor, bias: Tensor) -> Tensor:
    """As the authors' language model computes it: bias [h, block, 1]."""
    squares = w**2
    denominator = torch.cumsum(squares, dim=-2).clamp_min(1e-12)
    normed = squares / denominator + bias[:, : w.shape[2], :]
    pi = torch.softmax(normed.sum(dim=-1) * temp, dim=1)
    dots = torch.cumsum(squares * pi.unsqueeze(-1), dim=-2)
    dots = dots / (pi.cumsum(dim=-1) + 1e-8).unsqueeze(-1)
    return -(w * pi.unsqueeze(-1)) * (1.0 / (1 + dots))


@pytest.mark.parametrize("size", [(2, 3, 50, 8), (1, 1, 4, 3), (2, 12, 1, 16)], ids=str)
def test_reference_is_what_was_published(size: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(1)
    w = torch.randn(size, generator=g, dtype=F64)
    temp = 1 + torch.rand(size[1], 1, generator=g, dtype=F64)
    bias = 0.1 * torch.randn(size[1], 64, 1, generator=g, dtype=F64)
    torch.testing.assert_close(ae.token_statistics_reference(w, temp), published_vision(w, temp))
    got = ae.token_statistics_reference(w, temp, True, bias)
    torch.testing.assert_close(got, published_language(w, temp, bias))


def test_reference_of_packed_sequences() -> None:
    p = problem(F64, 1, 2, 30, causal=True, bias=True, starts=[0, 7, 7, 30])
    y = ae.token_statistics_reference(p.w, p.temp, True, p.bias, p.starts)
    for a, b in ((0, 7), (7, 30)):
        alone = ae.token_statistics_reference(p.w[:, :, a:b], p.temp, True, p.bias)
        torch.testing.assert_close(y[:, :, a:b], alone)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal: bool) -> None:
    for starts, h in ((None, 3), ([0, 2, 2, 9], 2)):
        p = problem(F64, 1 if starts else 2, h, 9, causal=causal, bias=causal, starts=starts)
        given = [x.requires_grad_() for x in (p.w, p.temp, p.bias) if x is not None]

        def f(w: Tensor, temp: Tensor, bias: Tensor | None = None, p: Problem = p) -> Tensor:
            return ae.token_statistics_attention(w, temp, p.causal, bias, p.starts)

        assert torch.autograd.gradcheck(f, given)


# -- kernels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("dtype", FAMILIES, ids=str)
def test_random_problems(dtype: torch.dtype, seed: int) -> None:
    p = random_problem(dtype, seed)
    judge(p, p.run(ae.token_statistics_attention))


@pytest.mark.parametrize("causal", [False, True])
def test_other_instruction_sets(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx2" not in RUNNABLE:
        pytest.skip(f"this CPU runs {library.cpu_isa()} at best, not avx2")
    monkeypatch.setenv("ATTNENGINE_ISA", "avx2")
    for starts in (None, [0, 70, 90, 150]):
        B = 1 if starts else 2
        p = problem(BF16, B, 3, 150, causal=causal, bias=causal, starts=starts)
        judge(p, p.run(ae.token_statistics_attention))


CUTS = {
    "one": (1, 700, None),
    "few": (3, 300, None),
    "many": (8, 130, None),
    "packed": (1, 700, [0, 0, 5, 69, 69, 133, 700, 700]),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("causal", [False, True])
def test_same_bits_at_every_thread_count(cut: str, causal: bool) -> None:
    """Walks along sequences, whole ones in a task, and scans by blocks: the same sums."""
    B, N, starts = CUTS[cut]
    p = problem(F32, B, 4, N, causal=causal, bias=causal, starts=starts)
    results = []
    for count in (1, 2, 3, 7):
        with threads(count):
            results.append(p.run(ae.token_statistics_attention))
    for other in results[1:]:
        assert all(torch.equal(x, results[0][n]) for n, x in other.items())
    judge(p, results[0])


@pytest.mark.parametrize("causal", [False, True])
def test_several_waves(causal: bool) -> None:
    """Of 8 MB of operands, among them results that go past the caches."""
    starts = [0, 20, 9000, 30000]
    p = problem(F32, 1, 4, 30000, causal=causal, starts=starts, tokens_first=True)
    results = []
    for count in (1, 3):
        with threads(count):
            results.append(p.run(ae.token_statistics_attention))
    assert all(torch.equal(x, results[0][n]) for n, x in results[1].items())
    golden = p.run(ae.token_statistics_reference, F64)
    for name, x in results[0].items():
        assert (x - golden[name]).norm() <= 2e-6 * golden[name].norm()


@pytest.mark.parametrize("dtype", FAMILIES, ids=str)
def test_steps_are_the_causal_run(dtype: torch.dtype) -> None:
    p = problem(dtype, 2, 3, 90, causal=True, bias=True)
    whole = ae.token_statistics_attention(p.w, p.temp, True, p.bias)
    state, parts = None, []
    for a, b in ((0, 1), (1, 2), (2, 70), *((i, i + 1) for i in range(70, 90))):
        y, state = ae.token_statistics_attention_step(p.w[:, :, a:b], p.temp, state, p.bias)
        parts.append(y)
    got, unit = torch.cat(parts, 2), torch.finfo(dtype).eps
    # At most one rounding to w's type apart.
    limit = (1e-5 if dtype != F64 else 1e-13) + (unit * whole.abs() if dtype in gate.HALF else 0)
    assert ((got - whole).abs() <= limit).all()
    wide = F64 if dtype == F64 else F32
    assert all(x.dtype == wide for x in state[:3]) and state.position.tolist() == [90, 90]
    u = p.w.to(wide).square()
    torch.testing.assert_close(state.c, u.sum(2))


def test_steps_at_positions_of_their_own() -> None:
    """Rows of a batch that began at different times."""
    p = problem(F32, 2, 3, 20, causal=True, bias=True)
    parts = [p.w[i : i + 1, :, : 5 * i + 4] for i in range(2)]
    states = [ae.token_statistics_attention_step(x, p.temp, None, p.bias)[1] for x in parts]
    state = ae.TokenStatisticsState(*map(torch.cat, zip(*states, strict=True)))
    new = torch.stack([p.w[0, :, 4:5], p.w[1, :, 9:10]])
    y, after = ae.token_statistics_attention_step(new, p.temp, state, p.bias)
    whole = ae.token_statistics_attention(p.w, p.temp, True, p.bias)
    torch.testing.assert_close(y[0, :, 0], whole[0, :, 4], atol=1e-5, rtol=0)
    torch.testing.assert_close(y[1, :, 0], whole[1, :, 9], atol=1e-5, rtol=0)
    assert after.position.tolist() == [5, 10] and state.position.tolist() == [4, 9]


# -- values that are not ordinary ------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-8, 1e-4, 1e4, 1e8])
@pytest.mark.parametrize("causal", [False, True])
def test_scales(causal: bool, scale: float) -> None:
    """Up to sums that are clamped, and sums that are large; channels without any value too."""
    p = problem(F32, 2, 3, 40, causal=causal)
    p.w *= scale
    p.w[:, 0, :, 3] = 0
    p.w[0, 1, :20] = 0
    got = p.run(ae.token_statistics_attention)
    assert all(x.isfinite().all() for x in got.values())
    golden = p.run(ae.token_statistics_reference, F64)
    for name, x in got.items():
        near = 1e-5 * golden[name].abs().max().item()
        torch.testing.assert_close(x.double(), golden[name], rtol=1e-4, atol=near + 1e-37)


@pytest.mark.parametrize("temp", [0.0, -3.0, 50.0])
def test_temperatures(temp: float) -> None:
    """Weights that are all equal, inverted, and those of one head."""
    for causal in (False, True):
        p = problem(F32, 1, 4, 90, causal=causal)
        p.temp.fill_(temp)
        judge(p, p.run(ae.token_statistics_attention))


def test_one_head_has_weight_one() -> None:
    p = problem(F32, 2, 1, 33)
    got = p.run(ae.token_statistics_attention)
    share = p.w.double().square().mean(2, keepdim=True)
    torch.testing.assert_close(got["y"].double(), -p.w.double() / (1 + share), rtol=1e-5, atol=1e-6)
    assert not got["dtemp"].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_acts(bad: float) -> None:
    p = problem(F32, 1, 2, 100, causal=True, starts=[0, 40, 100])
    p.w[0, 1, 50, 7] = bad
    y = ae.token_statistics_attention(p.w, p.temp, True, None, p.starts)
    want = ae.token_statistics_reference(p.w.double(), p.temp, True, None, p.starts)
    assert torch.equal(y.isfinite(), want.isfinite())
    assert y[:, :, :50].isfinite().all() and not y[:, 1, 50].isfinite().any()
    y = ae.token_statistics_attention(p.w, p.temp, False, None, p.starts)
    assert y[:, :, :40].isfinite().all() and y[:, :, 40:].isnan().all()


# -- the judge is a judge --------------------------------------------------------------------------


def _late(w: Tensor, temp: Tensor, causal: bool, bias: Tensor | None, starts: Any) -> Tensor:
    """Sums that lack the token itself."""
    before = torch.cat([torch.zeros_like(w[:, :, :1]), w[:, :, :-1]], 2)
    y = ae.token_statistics_attention(before, temp, causal, bias, starts)
    return torch.where(before == 0, 0.0, y / before) * w


MUTANTS: dict[str, Callable[..., Tensor]] = {
    "scale": lambda *a: 1.01 * ae.token_statistics_attention(*a),
    "bias once": lambda w, t, c, b, s: ae.token_statistics_attention(w, t, c, b / w.shape[3], s),
    "late": _late,
    "temp": lambda w, t, c, b, s: ae.token_statistics_attention(w, t * 1.001, c, b, s),
    "not causal": lambda w, t, c, b, s: ae.token_statistics_attention(w, t) + 0 * b.sum(),
    "detached sums": lambda w, t, c, b, s: (
        (y := ae.token_statistics_attention(w, t, c, b, s)) + (w - w.detach()) * 1e-3 * y.detach()
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant: str) -> None:
    p = problem(F32, 2, 3, 70, causal=True, bias=True)
    judge(p, p.run(ae.token_statistics_attention))
    with pytest.raises(gate.GateError):
        judge(p, p.run(MUTANTS[mutant]))
