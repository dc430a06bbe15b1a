"""The numerics gate: one checker of outputs, statistics and gradients for every test and bench.

Golden is the fp64 reference on the rounded inputs. For 16-bit inputs all of these must hold:

(a) L2 error <= 1.5 x the ideal flash kernel's;
(b) worst row's relative error <= 3 x the ideal's worst row;
(c) largest error <= 2 x that of eager PyTorch in the same dtype + 1e-5;
(d) NaN and +-inf in the same places, in every dtype; what is too large to store is infinite;
(e) a row statistic within 1e-5 * max(1, |statistic|).

fp32: L2 error <= ``8 u (sqrt(terms) |golden| + |noise|)``, u = 2**-24, and a row's three times
that; fp64: the same form with ``1e-12 (|golden| + |noise|)``.

``noise`` is what happens to the golden result, per unit, when every weight, output row and term of
a dot product gets a random relative error: it gives a gradient that cancels to nothing, or a score
that a large q and k make sensitive, the scale on which it may be wrong. In a tensor that few rows
decide, the ideal kernel can be exact by luck; there, in proportion, the average effect of random
16-bit roundings of each weight, score gradient and output joins the ideal's error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .noise import Noise, noises, overflowed, term_counts
from .products import Precision
from .reference import eager, evaluate, ideal
from .spec import AttentionSpec

MANTISSA = 0.7355  # rms of 1/m over log-uniform mantissas m: a rounding's size in unit roundoffs
ULPS, U32 = 8.0, 2.0**-24
FEW = 36.0  # when as many rows decide an error, half of its square may be luck. With 16, a correct
# kernel failed 1 of 600 random problems of 1 to 40 keys, D from 1: roundings of like rows agree
HALF = (torch.bfloat16, torch.float16)


class GateError(AssertionError):
    """A result fails the gate; the message shows the rules it breaks and its worst element."""


@dataclass(frozen=True)
class Report:
    """One checked tensor: what was measured, against which limit, and what failed."""

    name: str
    measured: dict[str, tuple[float, float]]
    failures: list[str]

    @property
    def ok(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        if self.failures:
            return f"{self.name}: " + "\n  ".join(self.failures)
        numbers = ", ".join(f"{k} {x:.3g} of {lim:.3g}" for k, (x, lim) in self.measured.items())
        return f"{self.name}: {numbers}"


def check(
    actual: Tensor,
    golden: Tensor,
    ideal: Tensor | None = None,
    eager: Tensor | None = None,
    kind: str = "out",
    *,
    name: str | None = None,
    compute: torch.dtype | None = None,
    noise: Noise | None = None,
) -> Report:
    """Check one tensor against the rules above.

    golden: fp64. ideal, eager: what those models give, which 16-bit kernels need. kind: "out" for
    outputs and gradients, "stat" for row statistics. compute: dtype of the kernel's inputs
    (default: actual's; a captured tensor's gradient may be stored wider).
    """
    name, compute = name or kind, compute or actual.dtype
    if actual.shape != golden.shape:
        shapes = f"shape {tuple(actual.shape)}, expected {tuple(golden.shape)}"
        return Report(name, {}, [shapes])
    got = actual.detach().double()
    want = overflowed(golden.detach().double(), got, actual.dtype)
    verdict = _Verdict(name, got, want, ideal)
    if not verdict.same_specials() or want.numel() == 0:
        return verdict.report()
    error = _finite(got - want)
    if kind == "stat":
        allowed = 1e-12 if compute == torch.float64 else 1e-5
        limit = allowed * _finite(want).abs().clamp(min=1.0)
        if ideal is not None and compute in HALF:  # operand mods are rounded before the scores
            limit = limit.clamp(min=2.0 * _finite(ideal.double() - want).abs().max().item())
        verdict.elementwise("(e) error", error, limit)
        return verdict.report()
    noise = noise or Noise()
    floor = _Floor(want, noise, compute, actual.dtype)
    if compute not in HALF:
        verdict.total("L2 error", error, floor.total)
        verdict.rows("worst row's error", error, 3.0 * floor.rows, floor.scale)
        return verdict.report()
    if ideal is None or eager is None:
        raise ValueError(f"{name}: a 16-bit result needs ideal and eager to be checked against")
    best = _finite(ideal.double() - want)
    luck, lucky = _luck(want, noise, compute, actual.dtype)
    size = math.hypot(best.norm().item(), luck)
    verdict.total("(a) L2 error", error, 1.5 * size + floor.total)
    ratios = [(_rows(e).norm(dim=-1) / floor.scale).max() for e in (best, *lucky)]
    worst = max(r.item() for r in ratios)
    limit = 3.0 * worst * floor.scale + 3.0 * floor.rows
    verdict.rows("(b) worst row's error", error, limit, floor.scale)
    dense = _finite(eager.double() - want).abs().max().item()
    largest = max(dense, *[e.abs().max().item() for e in (best, *lucky)])
    limit = torch.full_like(want, 2.0 * largest + 1e-5 + floor.largest)
    verdict.elementwise("(c) largest error", error, limit)
    return verdict.report()


class _Floor:
    """Errors that sums in the accumulator's precision may have, for a tensor and for its rows;
    ``scale``: each row's size before its terms cancel, at least what can be stored accurately."""

    def __init__(
        self, golden: Tensor, noise: Noise, compute: torch.dtype, stored: torch.dtype
    ) -> None:
        want, rows = _finite(golden), _rows(_finite(golden))
        loud = [_finite(n) for n in noise.loud]
        if compute == torch.float64:
            a, b = 1e-12, 1e-12
        else:
            a, b = ULPS * U32 * math.sqrt(noise.count), ULPS * U32
        # What the accumulator cannot hold is 0 in a kernel: one smallest number per element.
        wide = compute == torch.float64
        tiny = torch.finfo(torch.float64 if wide else torch.float32).tiny
        row_norms = rows.norm(dim=-1)
        self.total = (
            tiny * math.sqrt(want.numel())
            + a * want.norm().item()
            + b * float(_rms([n.norm() for n in loud]))
        )
        self.rows = (
            tiny * math.sqrt(rows.shape[-1])
            + a * row_norms
            + b * _rms([_rows(n).norm(dim=-1) for n in loud])
        )
        if rows.shape[-1] <= 4:  # too few draws to know one row's noise: as loud as the others
            self.rows = self.rows.clamp(min=self.rows.square().mean().sqrt().item())
        self.largest = b * max((n.abs().max().item() for n in loud), default=0.0)
        terms = _rms([_rows(_finite(n)).norm(dim=-1) for n in noise.terms])
        self.scale = torch.maximum(row_norms, math.sqrt(3) * terms.expand_as(row_norms))
        least = torch.finfo(stored).tiny * math.sqrt(rows.shape[-1])
        self.scale = self.scale.clamp(min=max(tiny, least))


def _luck(
    want: Tensor, noise: Noise, compute: torch.dtype, stored: torch.dtype
) -> tuple[float, list[Tensor]]:
    """The part of an ideal kernel's error that may be luck: L2, and random errors of its size."""
    u = torch.finfo(compute).eps / 2
    ulp = torch.ldexp(torch.ones_like(want), torch.frexp(_finite(want))[1] - 1)
    ulp = ulp.clamp(min=torch.finfo(stored).tiny) * torch.finfo(stored).eps
    ulp = ulp.where(want != 0, 0.0)  # where no key is live, nothing is rounded
    draws = [_finite(n) * (MANTISSA * u) for n in noise.terms]
    rows = _rms([_rows(e).norm(dim=-1) for e in draws]).square() + _rows(ulp).square().sum(-1) / 12
    many = (rows.sum().square() / rows.square().sum().clamp(min=1e-300)).item()
    share = math.sqrt(FEW / max(many, 1.0))
    size = math.hypot(_rms([e.norm() for e in draws]).item(), ulp.norm().item() / 4)
    return share * size, [share * (e.abs() + ulp / 4) for e in draws]


def _rms(values: list[Tensor]) -> Tensor:
    if not values:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([v.square() for v in values]).mean(0).sqrt()


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def _rows(x: Tensor) -> Tensor:
    """[rows, row length]; a 1-D tensor has rows of one element."""
    return x.reshape(-1, 1) if x.dim() <= 1 else x.reshape(-1, x.shape[-1])


class _Verdict:
    """Collects what one tensor breaks, with the element that shows it."""

    def __init__(self, name: str, got: Tensor, want: Tensor, ideal: Tensor | None) -> None:
        self.name, self.got, self.want, self.ideal = name, got, want, ideal
        self.measured: dict[str, tuple[float, float]] = {}
        self.failures: list[str] = []

    def report(self) -> Report:
        return Report(self.name, self.measured, self.failures)

    def show(self, flat: int) -> str:
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), self.want.shape))
        got, want = self.got.flatten()[flat].item(), self.want.flatten()[flat].item()
        best = "" if self.ideal is None else f", ideal {self.ideal.flatten()[flat].item():.9g}"
        return f"[{', '.join(map(str, at))}]: got {got:.9g}, golden {want:.9g}{best}"

    def same_specials(self) -> bool:
        """Rule (d)."""
        for what, test in (
            ("NaN", torch.isnan),
            ("+inf", torch.isposinf),
            ("-inf", torch.isneginf),
        ):
            differ = test(self.got) != test(self.want)
            if differ.any():
                at = self.show(int(differ.flatten().nonzero()[0]))
                n = int(differ.sum())
                self.failures.append(f"(d) {what} in other places ({n} of {differ.numel()}), {at}")
        return not self.failures

    def total(self, rule: str, error: Tensor, limit: float) -> None:
        self.judge(rule, error.norm().item(), limit, int(error.abs().argmax()))

    def rows(self, rule: str, error: Tensor, limit: Tensor, scale: Tensor) -> None:
        rows = _rows(error)
        norms = rows.norm(dim=-1)
        row = int((norms / limit.clamp(min=1e-300)).argmax())
        flat = row * rows.shape[1] + int(rows[row].abs().argmax())
        size = scale[row].item()
        self.judge(f"{rule} (relative)", norms[row].item() / size, limit[row].item() / size, flat)

    def elementwise(self, rule: str, error: Tensor, limit: Tensor) -> None:
        flat = int((error.abs() / limit).argmax())
        self.judge(rule, error.flatten()[flat].abs().item(), limit.flatten()[flat].item(), flat)

    def judge(self, rule: str, value: float, limit: float, flat: int) -> None:
        self.measured[rule] = (value, limit)
        if not value <= limit:
            text = f"{rule} {value:.4g}, limit {limit:.4g}; worst {self.show(flat)}"
            self.failures.append(text)


# -- the driver ------------------------------------------------------------------------------------


def compare(
    run: Callable[[Tensor, Tensor, Tensor], Any],
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    captures: Mapping[str, Tensor] | None = None,
    grads: bool = True,
    mma_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[Report]:
    """Check ``run(q, k, v) -> out`` or ``(out, {name: statistic})`` against the spec's meaning.

    Checks the output, every statistic, and, with ``grads``, the gradients of q, k, v and of
    ``captures`` (leaf tensors of the spec that require grad, by name) for random cotangents of the
    output and of the statistics that require grad. q, k, v keep their strides. mma_dtype: what the
    kernel rounds weights to (default: q's dtype). Raises GateError reporting all that failed.
    """
    leaves = _leaves((q, k, v), grads)
    with torch.set_grad_enabled(grads):
        got = run(*leaves)
    out, stats = got if isinstance(got, tuple) else (got, {})
    names = [n for n, x in stats.items() if x.requires_grad]
    expected = Expectation(
        spec, q, k, v, captures=captures, grads=grads, stats=names, mma_dtype=mma_dtype, seed=seed
    )
    return expected.judge(out, stats, leaves)


class Expectation:
    """What a spec must give on q, k, v; checks any number of kernels. Arguments as of compare.

    stats: the statistics that get cotangents; a checked kernel must return these with grad.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        captures: Mapping[str, Tensor] | None = None,
        grads: bool = True,
        stats: Sequence[str] = (),
        mma_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self.inputs, self.captures = (q, k, v), dict(captures or {})
        self.grads, self.stats = grads, list(stats)
        generator = torch.Generator().manual_seed(seed)
        shapes = [(*q.shape[:3], v.shape[3]), *[q.shape[:3] for _ in self.stats]]
        random = [torch.randn(shape, generator=generator) for shape in shapes]
        self.cotangents = [x.to(q.device, q.dtype) for x in random]

        wide, upcast = _leaves((q, k, v), grads, torch.float64), q.dtype != torch.float64
        with torch.set_grad_enabled(grads):
            out, self.saved = evaluate(*wide, spec, Precision(torch.float64, upcast=upcast))
        self.golden = self.results(out, self.saved, wide)

        def evaluated(precision: Precision) -> list[Tensor]:
            with torch.set_grad_enabled(grads):
                return self.results(*evaluate(*wide, spec, precision), wide)

        half, pairs = q.dtype in HALF, q.shape[:3].numel() * k.shape[2]
        few = q.shape[:3].numel() <= 512 or bool(self.captures)  # luck needs a fair average
        draws = 8 if pairs <= 2**16 else 4 if few else 1
        terms, loud = (draws, min(draws, 2)) if half else (0, draws)
        counts = term_counts(q, k, list(self.captures.values()))
        self.noise = noises(evaluated, self.golden, counts, terms, loud, upcast)
        self.ideal: list[Any] = [None] * len(self.golden)
        self.eager, self.near = self.ideal, dict[str, Tensor]()
        if half:
            leaves = _leaves((q, k, v), grads)
            with torch.set_grad_enabled(grads):
                out, self.near = ideal(*leaves, spec, mma_dtype, return_aux=True)
                dense, dense_saved = eager(*leaves, spec, return_aux=True)
            self.ideal = self.results(out, self.near, leaves)
            self.eager = self.results(dense, dense_saved, leaves)

    def results(
        self, out: Tensor, stats: Mapping[str, Tensor], leaves: tuple[Tensor, ...]
    ) -> list[Tensor]:
        """out, then the gradients of q, k, v and the captures."""
        if not self.grads:
            return [out.detach()]
        outputs, inputs = [out, *[stats[n] for n in self.stats]], [*leaves, *self.captures.values()]
        return [out.detach(), *_gradients(outputs, inputs, self.cotangents)]

    def check(self, run: Callable[[Tensor, Tensor, Tensor], Any]) -> list[Report]:
        """Run a kernel and check it; see compare."""
        leaves = _leaves(self.inputs, self.grads)
        with torch.set_grad_enabled(self.grads):
            got = run(*leaves)
        out, stats = got if isinstance(got, tuple) else (got, {})
        return self.judge(out, stats, leaves)

    def judge(
        self, out: Tensor, stats: Mapping[str, Tensor], leaves: tuple[Tensor, ...]
    ) -> list[Report]:
        """Check a kernel's results; ``leaves`` are the q, k, v that it ran on."""
        compute, want = leaves[0].dtype, self.golden[0].shape
        if out.shape != want or out.dtype != compute:
            kind = f"{tuple(out.shape)} {out.dtype}"
            raise GateError(f"out is {kind}, expected {tuple(want)} {compute}")
        labels = ["out", "dq", "dk", "dv", *[f"d{n}" for n in self.captures]]
        reports = []
        for i, actual in enumerate(self.results(out, stats, leaves)):
            given = (self.golden[i], self.ideal[i], self.eager[i])
            noise, name, rules = self.noise[i], labels[i], compute
            if actual.dtype in HALF and compute not in HALF:
                # A captured tensor of 16 bits beside wider operands: its gradient is rounded once.
                rules = actual.dtype
                rounded = given[0].double() * (1.0 + torch.finfo(rules).eps)
                given = (given[0], rounded, rounded)
            reports.append(check(actual, *given, name=name, compute=rules, noise=noise))
        for n, x in stats.items():
            if n not in self.saved:
                text = f"no such statistic; the spec saves {[*self.saved]}"
                reports.append(Report(n, {}, [text]))
                continue
            near = self.near.get(n)
            reports.append(check(x, self.saved[n], near, kind="stat", name=n, compute=compute))
        bad = [str(r) for r in reports if not r.ok]
        if bad:
            shapes = f"q {tuple(leaves[0].shape)}, k {tuple(leaves[1].shape)} {compute}"
            raise GateError(shapes + "\n" + "\n".join(bad))
        return reports


def _leaves(
    inputs: tuple[Tensor, Tensor, Tensor], grads: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.detach().to(dtype or x.dtype).requires_grad_(grads) for x in inputs)
    return q, k, v


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of the inputs; zeros where no output depends on one."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        list(inputs),
        [c.to(o.dtype) for o, c in pairs],
        allow_unused=True,
    )
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]
