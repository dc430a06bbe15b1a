"""Requests without pairs of tokens: linear attention, and token statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import statistics_ops
from .arch import CUDA
from .builtin import STATISTICS
from .capture import captures_of
from .dispatch import CUDA_SUPPORTED
from .ir import DTYPE_NAMES
from .linear import builtin, dispatch, plan_cuda
from .linear.elementwise import SIZES
from .linear.request import DECAY_KINDS, LinearRequest
from .linear.spec import HOOKS, LinearAttentionSpec
from .linear.stages import Sizes
from .prebuild_request import DTYPES, HEAD_DIMS, Kernel, Wanted, known_dtype
from .statistics_source import KINDS, StatisticsPlan, statistics_source

SpecOf = Callable[[torch.dtype, int, int], LinearAttentionSpec]


@dataclass(frozen=True)
class LinearKernels(Wanted):
    """One linear-attention spec, to be compiled for every combination of dtypes and head dims.

    Args:
        spec: captured tensors count by dtype, rank, which of their dimensions are 1 and
            ``requires_grad``; their sizes, batch, heads and lengths are free when the kernel runs.
            Where hooks read operands (Mamba2's output gate), a function (dtype, D, Dv) -> spec.
        dtypes: of q, k and v: torch dtypes or "bf16", "fp16", "fp32", "fp64"; one or several.
        head_dims: D of q and k, or (D, Dv) where v's differs; one D or a sequence of either.
        backward: also the gradient, where the spec has one. CUDA kernels have none.
        decay: "none"; "scalar", a number per token or head; "channel", one for each channel of k.
        decay_dtype: of the log-decay; None: fp32, for fp64 operands fp64.
        delta: whether calls give a beta.
        beta_dtype: of beta; None: q's.
        sizes: B, Hk, H, L that captured tensors broadcast to; None: read off the tensors.
        name: for messages.

    Raises ValueError for a dtype, head dims or a decay that no kernel has, TypeError for what is no
    spec.
    """

    spec: LinearAttentionSpec | SpecOf
    dtypes: str | torch.dtype | Sequence[str | torch.dtype] = DTYPES
    head_dims: int | Sequence[int | tuple[int, int]] = HEAD_DIMS
    backward: bool = True
    name: str = ""
    decay: str = "none"
    decay_dtype: str | torch.dtype | None = None
    delta: bool = False
    beta_dtype: str | torch.dtype | None = None
    sizes: Sizes | None = None

    OPTIONS = (*Wanted.OPTIONS, "decay_dtype", "beta_dtype")

    def __post_init__(self) -> None:
        if not isinstance(self.spec, LinearAttentionSpec) and not callable(self.spec):
            raise TypeError(
                "spec must be an attnengine.LinearAttentionSpec or a function that returns one, "
                f"got {type(self.spec).__name__}"
            )
        super().__post_init__()
        if self.decay not in DECAY_KINDS:
            raise ValueError(
                f"decay={self.decay!r}: expected one of {', '.join(map(repr, DECAY_KINDS))}"
            )
        for name, given, there in (
            ("decay_dtype", self.decay_dtype, self.decay != "none"),
            ("beta_dtype", self.beta_dtype, self.delta),
        ):
            if given is not None and known_dtype(name, given) is not None and not there:
                raise ValueError(
                    f"{name}={given!r} of calls without it: say delta=True, or decay='scalar' or "
                    "'channel'"
                )

    def refused(self, isa: str, dtype: torch.dtype, d: int, dv: int) -> str:
        most = plan_cuda.MAX_DIM
        if isa not in CUDA or (dtype in CUDA_SUPPORTED and max(d, dv) <= most):
            return ""
        return f"CUDA kernels of linear attention are bf16 or fp16 with head dims up to {most}"

    def request(self, dtype: torch.dtype, d: int, dv: int) -> LinearRequest:
        """Which kernel is wanted, beside what the hooks say."""
        spec = self._spec(dtype, d, dv)
        decay = beta = None
        if self.decay != "none":
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            decay = DTYPE_NAMES[known_dtype("decay_dtype", self.decay_dtype or wide)]
        if self.delta:
            beta = DTYPE_NAMES[known_dtype("beta_dtype", self.beta_dtype or dtype)]
        normalizer = spec.normalizer == "sum"
        return LinearRequest(DTYPE_NAMES[dtype], d, dv, self.decay, decay, beta, normalizer)

    def kernels(self, dtype: torch.dtype, d: int, dv: int, isa: str) -> list[Kernel]:
        spec, request = self._spec(dtype, d, dv), self.request(dtype, d, dv)
        sizes = self.sizes or _sizes(spec, request.decay_kind)
        try:
            program = dispatch.program(spec, dispatch.captures_for(spec), request, sizes, isa)
        except NotImplementedError as error:
            raise ValueError(f"{self.name or 'spec'}: {error}") from None
        label = f"{program.name} {self.name}".rstrip()
        code = CUDA[isa].code if isa in CUDA else isa
        found = [Kernel(program.sources.forward, code, f"linear forward {label}")]
        if self.backward and program.sources.backward is not None:
            found.append(Kernel(program.sources.backward, code, f"linear backward {label}"))
        return found

    def _spec(self, dtype: torch.dtype, d: int, dv: int) -> LinearAttentionSpec:
        spec = self.spec
        if isinstance(spec, LinearAttentionSpec):
            return spec
        made = spec(dtype, d, dv)
        if not isinstance(made, LinearAttentionSpec):
            raise TypeError(
                f"{self.name or 'spec'}({dtype}, {d}, {dv}) returned {type(made).__name__}, "
                "expected an attnengine.LinearAttentionSpec"
            )
        return made


def _sizes(spec: LinearAttentionSpec, decay: str) -> Sizes:
    """Sizes of a call that the tensors captured by hooks broadcast to: their own, where they are
    not 1."""
    found = dict(zip(SIZES, builtin.SIZES, strict=True))
    for hook in HOOKS:
        heads = "Hk" if hook in ("q_mod", "k_mod") else "H"
        axes = ("B", heads, "L") if hook == "decay_mod" and decay == "scalar" else (
            "B", heads, "L", "width")  # fmt: skip
        for x in captures_of(getattr(spec, hook)).tensors:
            for axis, size in zip(reversed(axes), reversed(x.shape), strict=False):
                if size != 1 and x.dim() <= len(axes):
                    found[axis] = size
    return found["B"], found["Hk"], found["H"], found["L"]


def linear_variant(variant: str, settings: Mapping[str, Any], **options: Any) -> LinearKernels:
    """The request of a variant of :mod:`attnengine.linear.variants`. Raises ValueError for a name
    or a setting that there is not."""
    kind = builtin.kind_of(variant, settings)

    def spec(dtype: torch.dtype, d: int, dv: int) -> LinearAttentionSpec:
        return builtin.spec_of(variant, settings, dtype, d, dv)

    name = builtin.PREFIX + variant
    return LinearKernels(spec, name=name, decay=kind.decay, delta=kind.delta, **options)


@dataclass(frozen=True)
class StatisticsKernels(Wanted):
    """Token statistics attention, to be compiled for every combination of dtypes and head dims; one
    kernel serves causal calls, others, packed sequences and steps.

    Args:
        dtypes: of w: torch dtypes or "bf16", "fp16", "fp32", "fp64"; one or several.
        head_dims: of w, one or several.
        backward: also the gradient.
        name: for messages.

    Raises ValueError for a dtype or head dims that no kernel has.
    """

    dtypes: str | torch.dtype | Sequence[str | torch.dtype] = DTYPES
    head_dims: int | Sequence[int | tuple[int, int]] = HEAD_DIMS
    backward: bool = True
    name: str = STATISTICS

    def refused(self, isa: str, dtype: torch.dtype, d: int, dv: int) -> str:
        if isa in CUDA:
            return "token statistics attention has kernels for CPUs"
        if d != dv or d > statistics_ops.MAX_HEAD_DIM:
            most = statistics_ops.MAX_HEAD_DIM
            return f"token statistics attention has one head dim, 1 to {most}"
        return ""

    def kernels(self, dtype: torch.dtype, d: int, dv: int, isa: str) -> list[Kernel]:
        plans = [StatisticsPlan(kind, dtype, d) for kind in KINDS]
        plans = plans if self.backward else plans[:1]
        return [Kernel(statistics_source(p), isa, f"{p.label} {isa}") for p in plans]
