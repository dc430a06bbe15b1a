"""Fresh random problems of linear attention, and their judge: the numerics gate against the fp64
recurrence, with the chunk form as ideal and eager PyTorch compute it.

A :class:`Family` fixes what a compiled module depends on; problems of a family share modules::

    for seed in range(20):
        verify(problem(FAMILIES["bf16-scalar"], seed))
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnengine as ae
from attnengine import gate
from attnengine.linear.chunked import eager
from attnengine.linear.ideal import evaluate, ideal
from attnengine.linear.reference import reference
from attnengine.noise import noises
from attnengine.products import Precision

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LENGTHS = (0, 1, 2, 5, 15, 16, 17, 31, 63, 64, 65, 100, 127, 128, 129, 200, 257)
OPERANDS = ("q", "k", "v", "decay", "beta", "initial_state")


@dataclass(frozen=True)
class Family:
    """What a module is compiled for. kind: of decay, "none", "scalar" or "channel". hooks: "none",
    "features" (elu + 1 on q and k, no captures) or "gates" (every hook, with captured tensors)."""

    dtype: torch.dtype = F32
    D: int = 40
    Dv: int = 24
    kind: str = "scalar"
    beta: bool = False
    normalizer: str | None = None
    hooks: str = "none"
    decay_dtype: torch.dtype | None = None  # None: the accumulator's
    beta_dtype: torch.dtype | None = None

    @property
    def acc(self) -> torch.dtype:
        return F64 if self.dtype == F64 else F32


FAMILIES = {
    "f32-scalar": Family(),
    "f32-channel-gates": Family(kind="channel", hooks="gates"),
    "f32-delta-gates": Family(beta=True, hooks="gates"),
    "f32-channel-delta": Family(kind="channel", beta=True, beta_dtype=BF16),
    "f32-features-sum": Family(kind="none", normalizer="sum", hooks="features"),
    "bf16-scalar": Family(BF16, 64, 64),
    "bf16-scalar-gates": Family(BF16, hooks="gates", decay_dtype=BF16),
    "bf16-channel": Family(BF16, kind="channel"),
    "bf16-delta": Family(BF16, 64, 64, beta=True),
    "bf16-channel-delta": Family(BF16, kind="channel", beta=True, beta_dtype=BF16),
    "bf16-scalar-sum": Family(BF16, normalizer="sum"),
    "f16-delta-sum": Family(F16, 17, 33, beta=True, normalizer="sum"),
    "f64-channel-delta-sum": Family(F64, 7, 5, "channel", True, "sum", "gates"),
}


@dataclass
class Problem:
    """One call, the cotangents of its results, and the captured tensors that get gradients."""

    family: Family
    q: Tensor
    k: Tensor
    v: Tensor
    spec: ae.LinearAttentionSpec
    decay: Tensor | None
    beta: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    cotangents: tuple[Tensor, Tensor]  # of the output and of the final state
    captures: dict[str, Tensor] = field(default_factory=dict)
    text: str = ""

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The operands that there are, by name, as leaves with their strides."""
        given = {n: getattr(self, n) for n in OPERANDS if getattr(self, n) is not None}
        return {n: x.detach().to(dtype or x.dtype).requires_grad_() for n, x in given.items()}

    def call(self, fn: Callable[..., Any], leaves: Mapping[str, Tensor], **options: Any) -> Any:
        """fn(q, k, v, spec, ...) -> its result."""
        q, k, v, *_ = leaves.values()
        rest = {n: x for n, x in leaves.items() if n not in ("q", "k", "v")}
        return fn(q, k, v, self.spec, cu_seqlens=self.cu_seqlens, **rest, **options)

    def gradients(
        self, out: Tensor, state: Tensor | None, leaves: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Gradients by name, for the problem's cotangents; zeros where nothing flows."""
        inputs = {**leaves, **self.captures}
        pairs = [(x, c) for x, c in zip((out, state), self.cotangents, strict=True)
                 if x is not None and x.requires_grad]  # fmt: skip
        found = torch.autograd.grad(
            [x for x, _ in pairs],
            list(inputs.values()),
            [c.to(x.dtype) for x, c in pairs],
            allow_unused=True,
        )
        zip_ = zip(inputs.items(), found, strict=True)
        return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip_}

    def run(self, fn: Callable[..., Any]) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        """((out, final state), gradients by name) of ``fn`` on fresh leaves."""
        leaves = self.leaves()
        out, state = self.call(fn, leaves, output_final_state=True)
        return (out.detach(), state.detach()), self.gradients(out, state, leaves)


# -- the judge -------------------------------------------------------------------------------------


class Expected:
    """What a problem's results must be; checks any number of kernels."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.half = problem, problem.family.dtype in gate.HALF
        wide = problem.leaves(F64)

        def results(out: Tensor, state: Tensor, leaves: Mapping[str, Tensor]) -> list[Tensor]:
            grads = problem.gradients(out, state, leaves)
            return [out.detach(), state.detach(), *grads.values()]

        def evaluated(precision: Precision) -> list[Tensor]:
            return results(*problem.call(evaluate, wide, precision=precision), wide)

        options = {"output_final_state": True, "dtype": F64}
        self.golden = results(*problem.call(reference, wide, **options), wide)
        self.names = ["out", "state", *[f"d{n}" for n in (*wide, *problem.captures)]]
        small = problem.v[..., 0].numel() * problem.q.shape[3] * problem.v.shape[3] <= 2**22
        draws = 8 if small else 4
        terms, loud = (draws, 2) if self.half else (0, draws)
        upcast = problem.family.dtype != F64
        self.noise = noises(evaluated, self.golden, self._counts(), terms, loud, upcast)
        self.ideal: list[Any] = [None] * len(self.golden)
        self.eager = self.ideal
        if self.half:
            leaves = problem.leaves()
            models = [problem.call(fn, leaves, output_final_state=True) for fn in (ideal, eager)]
            self.ideal, self.eager = (results(*m, leaves) for m in models)

    def _counts(self) -> list[int]:
        """How many terms one element of a result sums."""
        p = self.problem
        (B, Hk, L, D), (H, Dv) = p.q.shape, p.v.shape[1::2]
        counts = {"out": L + D, "state": L, "q": L + Dv, "k": (L + Dv) * (H // Hk), "v": L + D}
        counts |= {"decay": L * D, "beta": L + D + Dv, "initial_state": L}
        pairs = B * H * L * max(D, Dv)
        for name, x in p.captures.items():
            counts[name] = L + pairs // max(1, x.numel())
        if p.decay is not None and p.decay.dim() == 1:
            counts["decay"] *= B * L
        return [max(1, counts[n.removeprefix("d") if n != "decay" else n]) for n in self._keys()]

    def _keys(self) -> list[str]:
        present = [n for n in OPERANDS if getattr(self.problem, n) is not None]
        return ["out", "state", *present, *self.problem.captures]

    def check(
        self, outputs: tuple[Tensor, ...] | Tensor, grads: Mapping[str, Tensor] | None = None
    ) -> list[gate.Report]:
        """Outputs: out or (out, final state); grads: by name, those that are to be checked. Raises
        GateError with all that failed."""
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        given = dict(zip(("out", "state"), outputs, strict=False))
        given |= {f"d{n}": x for n, x in (grads or {}).items()}
        dtype, reports = self.problem.family.dtype, []
        for name, actual in given.items():
            i = self.names.index(name)
            models = (self.golden[i], self.ideal[i], self.eager[i])
            compute = dtype
            if actual.dtype in gate.HALF and not self.half:
                # A gradient of 16 bits beside wider operands is rounded once.
                compute = actual.dtype
                once = models[0].double() * (1.0 + torch.finfo(compute).eps)
                models = (models[0], once, once)
            reports.append(
                gate.check(actual, *models, name=name, compute=compute, noise=self.noise[i])
            )
        bad = [str(r) for r in reports if not r.ok]
        if bad:
            raise gate.GateError(self.problem.text + "\n" + "\n".join(bad))
        return reports


def check_linear(
    problem: Problem,
    outputs: tuple[Tensor, ...] | Tensor,
    grads: Mapping[str, Tensor] | None = None,
) -> list[gate.Report]:
    """A kernel's results on a problem through the gate; see Expected.check."""
    return Expected(problem).check(outputs, grads)


def verify(problem: Problem, fn: Callable[..., Any] | None = None) -> list[gate.Report]:
    """Output, final state and every gradient of ``fn`` (default: ae.linear_attention)."""
    return check_linear(problem, *problem.run(fn or ae.linear_attention))


# -- random problems -------------------------------------------------------------------------------


def problem(
    family: Family,
    seed: int,
    *,
    B: int | None = None,
    heads: tuple[int, int] | None = None,
    L: int | None = None,
    lengths: tuple[int, ...] | None = None,
    per_head: bool | None = None,
) -> Problem:
    """A random problem: sizes, layouts, values. What is given is fixed: heads (Hk, H), ``lengths``
    of packed sequences (() for none), ``per_head`` for a decay [H]."""
    roll, dice = random.Random(seed), _Dice(seed)
    if lengths is None:
        packed = B in (None, 1) and L is None and roll.random() < 0.35
        lengths = tuple(roll.choice(LENGTHS[:-1]) for _ in range(roll.randint(1, 4) * packed))
    if lengths:
        B, L = 1, sum(lengths)
    B = roll.choice((1, 1, 2, 3)) if B is None else B
    L = roll.choice((*LENGTHS, roll.randint(1, 300))) if L is None else L
    Hk, H = heads or roll.choice(((1, 1), (1, 3), (2, 2), (2, 4), (3, 3), (1, 5)))
    D, Dv, dtype = family.D, family.Dv, family.dtype
    q, k, v = (dice.normal(B, h, L, n) for h, n in ((Hk, D), (Hk, D), (H, Dv)))
    if family.normalizer:  # a denominator well away from 0, or 0
        q, k = q.abs() + 0.1, k.abs()
    if family.beta:  # a unit key, else the delta rule grows
        k = F.normalize(k, dim=-1) * (1.0 if family.hooks != "features" else D**0.5)
    if family.normalizer and family.hooks == "none" and dtype != F16 and roll.random() < 0.2:
        k[:, :, :2] = 0.0  # gradients of 1e6, more than fp16 holds
    columns = Dv + bool(family.normalizer)
    N = len(lengths) or B
    initial, kind = None, roll.choice(("none", "state", "whole"))
    if kind != "none":
        initial = dice.normal(N, H, D, columns if kind == "whole" else Dv)
        if kind == "whole" and family.normalizer:
            initial[..., -1].abs_()
        initial = roll.choice((_dense, _sliced))(initial).to(family.acc)
    decay = None
    if family.kind != "none":
        head = roll.random() < 0.3 if per_head is None else per_head
        shape = (B, H, L, D) if family.kind == "channel" else (H,) if head else (B, H, L)
        decay = _decay(dice, roll, shape, raw=family.hooks == "gates")
        decay = roll.choice((_dense, _sliced))(decay).to(family.decay_dtype or family.acc)
    beta = None
    if family.beta:
        beta = dice.uniform(B, H, L) * roll.choice((1.0, 2.0))
        beta = torch.where(dice.uniform(B, H, L) < 0.05, 0.0, beta)
        beta = roll.choice((_dense, _turned))(beta).to(family.beta_dtype or family.acc)
    spec, captures = _spec(family, dice, (B, Hk, H, L), roll)
    layout = roll.choice((_dense, _turned, _sliced))
    q, k, v = (layout(x).to(dtype) for x in (q, k, v))
    dout = roll.choice((_dense, _turned, _repeated))(dice.normal(B, H, L, Dv)).to(dtype)
    cotangents = dout, dice.normal(N, H, D, columns).to(family.acc)
    cu = None
    if lengths:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        cu = ends.to(roll.choice((torch.int32, torch.int64)))
    text = (
        f"seed {seed}: B {B}, heads {Hk}/{H}, L {L}, packed {lengths}, {family}, "
        f"decay {None if decay is None else tuple(decay.shape)}, initial {kind}, {layout.__name__}"
    )
    return Problem(
        family, q, k, v, spec, decay, beta, initial, cu, cotangents, captures, text
    )  # fmt: skip


class _Dice:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=F64)


def _decay(dice: _Dice, roll: random.Random, shape: tuple[int, ...], raw: bool) -> Tensor:
    """Log-decays, weak, usual or strong; ``raw``: of any sign, for a decay_mod to turn negative."""
    if raw:
        return dice.normal(*shape) * roll.choice((0.5, 3.0))
    kind = roll.choice(("weak", "usual", "strong", "mixed"))
    weak, usual, strong = (
        -1e-3 * dice.uniform(*shape),
        F.logsigmoid(dice.normal(*shape) + 2.0),
        -20.0 * dice.uniform(*shape),
    )
    which = dice.uniform(*shape)
    mixed = torch.where(which < 0.6, weak, torch.where(which < 0.9, usual, strong))
    g = {"weak": weak, "usual": usual, "strong": strong, "mixed": mixed}[kind]
    if roll.random() < 0.4:
        g = g.where(dice.uniform(*shape) > 0.03, -torch.inf)
    return g.where(dice.uniform(*shape) > 0.03, 0.0)


def _spec(
    family: Family, dice: _Dice, sizes: tuple[int, int, int, int], roll: random.Random
) -> tuple[ae.LinearAttentionSpec, dict[str, Tensor]]:
    B, Hk, H, L = sizes
    options: dict[str, Any] = {"normalizer": family.normalizer}
    options["scale"] = roll.choice((None, None, 1.0, 0.3))
    if family.hooks == "none":
        return ae.LinearAttentionSpec(**options), {}
    if family.hooks == "features":
        small = (2.0 * family.D) ** -0.5
        options |= {"q_mod": lambda x: F.elu(x) + 1.0, "k_mod": lambda x: (F.elu(x) + 1.0) * small}
        return ae.LinearAttentionSpec(**options), {}

    def leaf(x: Tensor, dtype: torch.dtype = family.acc) -> Tensor:
        return x.to(dtype).requires_grad_()

    a, u = leaf(dice.normal(Hk, 1, 1)), leaf(0.6 + 0.3 * dice.uniform())
    gate_, bias = leaf(dice.normal(B, H, L, 1)), leaf(dice.normal(H, 1))
    z, skip = leaf(dice.normal(B, H, L, family.Dv), family.dtype), leaf(dice.normal(family.Dv))
    width = leaf(dice.normal(family.D))
    captures = {"a": a, "u": u, "gate": gate_, "z": z, "skip": skip}

    def scalar(x: Tensor) -> Tensor:
        return -F.softplus(x + bias)

    def channel(x: Tensor) -> Tensor:
        return -F.softplus(x - 1.0) * torch.sigmoid(width)

    if family.kind != "none":
        captures |= {"bias": bias} if family.kind == "scalar" else {"width": width}
        options["decay_mod"] = scalar if family.kind == "scalar" else channel
    spec = ae.LinearAttentionSpec(
        q_mod=lambda x: x * torch.sigmoid(a),
        k_mod=lambda x: torch.tanh(x * u),
        v_mod=lambda x: x * torch.sigmoid(gate_),
        out_mod=lambda x: x * F.silu(z.to(x.dtype)) + skip,
        **options,
    )
    return spec, captures


# -- layouts ---------------------------------------------------------------------------------------


def _dense(x: Tensor) -> Tensor:
    return x.contiguous()


def _turned(x: Tensor) -> Tensor:
    """[B, L, H, ..] in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _sliced(x: Tensor) -> Tensor:
    """Part of a wider tensor."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    wide[..., 2:-1] = x
    return wide[..., 2:-1]


def _repeated(x: Tensor) -> Tensor:
    """One row for all tokens."""
    return x[:, :, :1].expand(x.shape) if x.shape[2] else x
