"""What may be asked for ahead of time, and the modules that it takes: requests of attention specs,
and what all requests share."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from . import build, dispatch, serialize
from .arch import CUDA
from .builtin import DTYPE_WORDS, dtype_word
from .key import FORM_WORDS, Form
from .plan_cuda import HEAD_DIMS as CUDA_HEAD_DIMS
from .plan_cuda import serves_dims
from .spec import AttentionSpec

DTYPES = tuple(dtype for dtype in dispatch.SUPPORTED if dtype != torch.float64)
"""dtypes of a request that names none; float64 is for gradient checks."""
HEAD_DIMS = (64, 128)
"""Head dims of a request that names none."""


@dataclass(frozen=True)
class Kernel:
    """One module to be had, as build.module takes it. A CUDA program chooses its module among
    several when the first spills registers, and all that it looks at are to be had."""

    source: str
    isa: str
    label: str
    program: dispatch.Program | None = None

    def build(self) -> None:
        """Compiles what is in no cache. Raises BuildError, KernelUnavailable."""
        if self.program is None:
            build.module(self.source, self.isa, self.label)
        else:
            self.program.device_module()


class Wanted(ABC):
    """A request: one meaning, to be compiled for every combination of dtypes and head dims.

    Raises ValueError for a dtype or head dims that no kernel has.
    """

    dtypes: str | torch.dtype | Sequence[str | torch.dtype]
    head_dims: int | Sequence[int | tuple[int, int]]
    backward: bool
    name: str
    OPTIONS: ClassVar[tuple[str, ...]] = ("dtypes", "head_dims", "backward")
    """Fields that a table of a file, or the command line, may give."""

    def __post_init__(self) -> None:
        dtypes = (self.dtypes,) if isinstance(self.dtypes, (str, torch.dtype)) else self.dtypes
        dims = (self.head_dims,) if isinstance(self.head_dims, int) else self.head_dims
        kinds = [(known_dtype("dtypes", x), *_dims(pair)) for x in dtypes for pair in dims]
        object.__setattr__(self, "_programs", tuple(dict.fromkeys(kinds)))

    def programs(self) -> tuple[tuple[torch.dtype, int, int], ...]:
        """(dtype, D, Dv) of every program."""
        found: tuple[tuple[torch.dtype, int, int], ...] = self.__dict__["_programs"]
        return found

    @abstractmethod
    def refused(self, isa: str, dtype: torch.dtype, d: int, dv: int) -> str:
        """What kernels there are for a target, where it has none of a dtype and head dims at all;
        empty where it has."""

    @abstractmethod
    def kernels(self, dtype: torch.dtype, d: int, dv: int, isa: str) -> list[Kernel]:
        """The modules of one program, generated for a target that need not be this machine's.

        Raises TraceError for what cannot be expressed, ValueError for sizes without a template.
        """


@dataclass(frozen=True)
class Request(Wanted):
    """One attention spec, to be compiled for every combination of dtypes and head dims.

    Args:
        spec: captured tensors count by dtype, rank and ``requires_grad``; their sizes, the number
            of heads, the group size and all lengths are free when the kernel runs.
        dtypes: of q, k and v: torch dtypes or "bf16", "fp16", "fp32", "fp64"; one or several.
        head_dims: D, or (D, Dv) where they differ; one D or a sequence of either.
        backward: also the gradient, where the spec has one.
        forms: the calls that CUDA kernels are for, one word or several: "dense"
            (:func:`attnengine.attention`), "decode" (caches and packed sequences of at most 64
            query rows times heads of a group: three kernels, of tiles of 16, 32 and 64 rows;
            "decode16", "decode32" or "decode64" is one of them), "prefill" (those of more rows). A
            CPU kernel serves all calls.
        shared_kv: in the forms of caches, v is the first columns of k in memory (MLA's latent).
        name: for messages.

    Raises ValueError for a dtype, a head dim or a form that no kernel has, TypeError for what is no
    spec.
    """

    spec: AttentionSpec
    dtypes: str | torch.dtype | Sequence[str | torch.dtype] = DTYPES
    head_dims: int | Sequence[int | tuple[int, int]] = HEAD_DIMS
    backward: bool = True
    name: str = ""
    forms: str | Sequence[str] = "dense"
    shared_kv: bool = False

    OPTIONS = (*Wanted.OPTIONS, "forms", "shared_kv")

    def __post_init__(self) -> None:
        if not isinstance(self.spec, AttentionSpec):
            raise TypeError(
                f"spec must be an attnengine.AttentionSpec, got {type(self.spec).__name__}"
            )
        super().__post_init__()
        words = (self.forms,) if isinstance(self.forms, str) else self.forms
        object.__setattr__(self, "_forms", _forms(words, self.shared_kv))

    def kernel_forms(self) -> tuple[Form, ...]:
        """Which kernels a CUDA program has."""
        found: tuple[Form, ...] = self.__dict__["_forms"]
        return found

    def refused(self, isa: str, dtype: torch.dtype, d: int, dv: int) -> str:
        if isa not in CUDA or (dtype in dispatch.CUDA_SUPPORTED and serves_dims(d, dv)):
            return ""
        return f"CUDA kernels are bf16 or fp16 with {CUDA_HEAD_DIMS}"

    def kernels(self, dtype: torch.dtype, d: int, dv: int, isa: str) -> list[Kernel]:
        captures = dispatch.captures_for(self.spec)
        label = f"{dtype_word(dtype)} D{d}x{dv} {isa} {self.name}".rstrip()
        try:
            program = dispatch.program(self.spec, captures, dtype, d, dv, isa)
            if isa in CUDA:
                forms = [program.in_form(form) for form in self.kernel_forms()]
                return [_device_kernel(made, label) for made in forms]
        except NotImplementedError as error:
            raise ValueError(f"{self.name or 'spec'}: {error}") from None
        sources = program.sources
        found = [Kernel(sources.forward, isa, f"forward {label}")]
        if self.backward and sources.backward is not None:
            found.append(Kernel(sources.backward, isa, f"backward {label}"))
        return found


def known_dtype(name: str, x: Any) -> torch.dtype:
    """The dtype that a field says. Raises ValueError for one that operands do not have."""
    found = DTYPE_WORDS.get(x) if isinstance(x, str) else x
    if found not in dispatch.SUPPORTED:
        words = ", ".join(repr(dtype_word(dtype)) for dtype in dispatch.SUPPORTED)
        raise ValueError(f"{name} has {x!r}: expected {words}, or the torch dtypes of these")
    return found


def _dims(x: Any) -> tuple[int, int]:
    pair = (x, x) if isinstance(x, int) else tuple(x) if isinstance(x, (list, tuple)) else ()
    if len(pair) != 2 or not all(type(n) is int and n > 0 for n in pair):
        raise ValueError(f"head_dims has {x!r}: expected D, or (D, Dv) such as (192, 128)")
    return pair[0], pair[1]


def _forms(words: Sequence[str], shared_kv: bool) -> tuple[Form, ...]:
    for word in words:
        if word not in FORM_WORDS:
            raise ValueError(f"forms has {word!r}: expected {', '.join(map(repr, FORM_WORDS))}")
    forms = [form for word in words for form in FORM_WORDS[word]]
    if not forms:
        raise ValueError(f"forms is empty: expected some of {', '.join(map(repr, FORM_WORDS))}")
    if not shared_kv:
        return tuple(dict.fromkeys(forms))
    if not all(form.sequences for form in forms):
        raise ValueError("shared_kv=True is of caches: forms must not have 'dense'")
    return tuple(dict.fromkeys(dataclasses.replace(form, shared_kv=True) for form in forms))


def _device_kernel(program: dispatch.Program, label: str) -> Kernel:
    sources, isa, form = program.sources, program.isa, program.form
    if sources.candidate > 0:  # this machine knows that the first spills; others look there first
        first = dispatch.regenerated(serialize.load(sources.meaning), isa, form).sources
        sources = dataclasses.replace(first, positions=sources.positions)
    program = dataclasses.replace(program, sources=sources, memo=None)
    text = label if form == Form() else f"{label} ({form.label})"
    return Kernel(sources.forward, CUDA[isa].code, f"forward {text}", program)
