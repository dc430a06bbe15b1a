"""Kernels made ahead of time: which ones are asked for, and their sources.

`attnengine prebuild --specs ...` reads requests with :func:`read_requests`, generates the sources
of all with :func:`kernels` and hands them to prebuild_run.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import build, dispatch, serialize
from .arch import CUDA
from .builtin import BUILTIN, DTYPE_WORDS, dtype_word, make_spec
from .key import FORM_WORDS, Form
from .plan_cuda import serves_dims
from .spec import AttentionSpec

DTYPES = tuple(dtype for dtype in dispatch.SUPPORTED if dtype != torch.float64)
"""dtypes of a request that names none; float64 is for gradient checks."""
HEAD_DIMS = (64, 128)
"""Head dims of a request that names none."""


@dataclass(frozen=True)
class Request:
    """One spec, to be compiled for every combination of dtypes and head dims.

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

    def __post_init__(self) -> None:
        if not isinstance(self.spec, AttentionSpec):
            raise TypeError(
                f"spec must be an attnengine.AttentionSpec, got {type(self.spec).__name__}"
            )
        dtypes = (self.dtypes,) if isinstance(self.dtypes, (str, torch.dtype)) else self.dtypes
        dims = (self.head_dims,) if isinstance(self.head_dims, int) else self.head_dims
        kinds = [(_dtype(dtype), *_dims(pair)) for dtype in dtypes for pair in dims]
        object.__setattr__(self, "_programs", tuple(dict.fromkeys(kinds)))
        words = (self.forms,) if isinstance(self.forms, str) else self.forms
        object.__setattr__(self, "_forms", _forms(words, self.shared_kv))

    def programs(self) -> tuple[tuple[torch.dtype, int, int], ...]:
        """(dtype, D, Dv) of every program."""
        found: tuple[tuple[torch.dtype, int, int], ...] = self.__dict__["_programs"]
        return found

    def kernel_forms(self) -> tuple[Form, ...]:
        """Which kernels a CUDA program has."""
        found: tuple[Form, ...] = self.__dict__["_forms"]
        return found


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


def _dtype(x: Any) -> torch.dtype:
    found = DTYPE_WORDS.get(x) if isinstance(x, str) else x
    if found not in dispatch.SUPPORTED:
        words = ", ".join(repr(dtype_word(dtype)) for dtype in dispatch.SUPPORTED)
        raise ValueError(f"dtypes has {x!r}: expected {words}, or the torch dtypes of these")
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


def serves(isa: str, dtype: torch.dtype, d: int, dv: int) -> bool:
    """Whether a target has kernels of a dtype and head dims at all: those for CUDA have fewer."""
    return isa not in CUDA or (dtype in dispatch.CUDA_SUPPORTED and serves_dims(d, dv))


def kernels(request: Request, dtype: torch.dtype, d: int, dv: int, isa: str) -> list[Kernel]:
    """The modules of one program, generated for a target that need not be this machine's.

    Raises TraceError for what cannot be expressed, ValueError for sizes without a template.
    """
    captures = dispatch.captures_for(request.spec)
    label = f"{dtype_word(dtype)} D{d}x{dv} {isa} {request.name}".rstrip()
    try:
        program = dispatch.program(request.spec, captures, dtype, d, dv, isa)
        if isa in CUDA:
            forms = [program.in_form(form) for form in request.kernel_forms()]
            return [_device_kernel(made, label) for made in forms]
    except NotImplementedError as error:
        raise ValueError(f"{request.name or 'spec'}: {error}") from None
    sources = program.sources
    found = [Kernel(sources.forward, isa, f"forward {label}")]
    if request.backward and sources.backward is not None:
        found.append(Kernel(sources.backward, isa, f"backward {label}"))
    return found


def _device_kernel(program: dispatch.Program, label: str) -> Kernel:
    sources, isa, form = program.sources, program.isa, program.form
    if sources.candidate > 0:  # this machine knows that the first spills; others look there first
        first = dispatch.regenerated(serialize.load(sources.meaning), isa, form).sources
        sources = dataclasses.replace(first, positions=sources.positions)
    program = dataclasses.replace(program, sources=sources, memo=None)
    text = label if form == Form() else f"{label} ({form.label})"
    return Kernel(sources.forward, CUDA[isa].code, f"forward {text}", program)


# -- what --specs may say -------------------------------------------------------------------------


def read_requests(text: str) -> list[Request] | Callable[[], Any]:
    """The requests that ``--specs`` names, or a function whose kernels are wanted.

    ``builtin`` or ``builtin:NAME,NAME``; FILE.toml or FILE.json; FILE.py with ``SPECS``;
    FILE.py:NAME or MODULE:NAME, where NAME is an iterable of requests (or of specs), or a function.
    Raises ValueError that says what is wrong.
    """
    if text.partition(":")[0] == "builtin":
        return _builtin(text.partition(":")[2])
    if text.endswith((".toml", ".json")):
        return _from_table(Path(text))
    found = named_object(f"{text}:SPECS" if text.endswith(".py") else text)
    return found if callable(found) else as_requests(found, text)


def named_object(text: str) -> Any:
    """The object that FILE.py:NAME or MODULE:NAME means. The file's folder, or the current one, is
    where its imports are looked for first."""
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise ValueError(f"{text!r}: expected FILE.py:NAME or MODULE:NAME")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None or not Path(place).is_file():
            raise ValueError(f"{place!r} is not a Python file")
        sys.path.insert(0, str(Path(place).resolve().parent))
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ValueError(f"{place!r} cannot be imported: {error}") from None
    try:
        return getattr(module, name)
    except AttributeError:
        raise ValueError(f"{place!r} has no {name!r}") from None


def as_requests(found: Any, place: str) -> list[Request]:
    """Requests from an iterable of requests and specs. Raises ValueError for anything else."""
    if isinstance(found, (Request, AttentionSpec)):
        found = [found]
    if not isinstance(found, Iterable) or isinstance(found, (str, bytes, Mapping)):
        raise ValueError(
            f"{place} is a {type(found).__name__}, not a function and not an iterable of "
            "attnengine.prebuild.Request"
        )
    requests = []
    for number, item in enumerate(found):
        if not isinstance(item, (Request, AttentionSpec)):
            kind = type(item).__name__
            raise ValueError(f"{place}: item {number} is a {kind}, not a Request or AttentionSpec")
        request = Request(item) if isinstance(item, AttentionSpec) else item
        requests.append(dataclasses.replace(request, name=request.name or f"spec {number}"))
    if not requests:
        raise ValueError(f"{place} has no requests")
    return requests


def _builtin(text: str) -> list[Request]:
    known = list(dict.fromkeys(variant for variant, _ in BUILTIN))
    wanted = text.split(",") if text else known
    for name in wanted:
        if name not in known:
            raise ValueError(f"--specs builtin:{name}: expected names of {', '.join(known)}")
    return [
        Request(make_spec(variant, settings), name=variant)
        for variant, settings in BUILTIN
        if variant in wanted
    ]


_DEFAULTS = ("dtypes", "head_dims", "backward", "forms", "shared_kv")


def _from_table(path: Path) -> list[Request]:
    """A file of ``specs``, each a variant with its settings; dtypes, head_dims, backward, forms and
    shared_kv stand beside a variant, or above all of them as the default."""
    data = _load(path)
    specs = data.pop("specs", None)
    if not isinstance(specs, list) or not data.keys() <= set(_DEFAULTS):
        raise ValueError(
            f"{path}: expected an array `specs` of tables with a `variant`, and beside it at most "
            f"{', '.join(_DEFAULTS)}"
        )
    requests = []
    for number, table in enumerate(specs):
        if not isinstance(table, dict) or not isinstance(table.get("variant"), str):
            raise ValueError(f"{path}: specs[{number}] has no `variant`")
        entry = {**data, **table}
        options = {name: entry.pop(name) for name in _DEFAULTS if name in entry}
        variant = entry.pop("variant")
        try:
            requests.append(Request(make_spec(variant, entry), name=variant, **options))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: specs[{number}]: {error}") from None
    return as_requests(requests, str(path))


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    try:
        if path.suffix == ".json":
            data = json.loads(text)
        else:
            try:
                tomllib = importlib.import_module("tomllib")
            except ImportError:
                raise ValueError("TOML needs Python 3.11; write it as JSON") from None
            data = tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return data if isinstance(data, dict) else {"specs": data}
