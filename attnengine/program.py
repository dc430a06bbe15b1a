"""One meaning compiled: its kernels for one dtype and pair of head dims, built when first needed.

``program(spec, captures, element, D, Dv, isa)`` finds the program of a spec by its fingerprint
(code, constants and kinds of captured tensors), so a fresh but identical lambda is not traced
again. A program remembers its generated sources on disk: a new process traces nothing.

A CUDA program has a kernel for each *form* of calls (:class:`attnengine.key.Form`): the dense one,
caches and packed sequences of few or of many rows. They share the traced text; nothing is traced
again.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch

from . import build, builtin, cache, library, serialize
from .arch import CUDA
from .capture import Captures, stable_text
from .errors import KernelUnavailable
from .ir import DTYPE_NAMES, TORCH_DTYPES
from .key import Form
from .plan import Plan
from .source import forward_source
from .spec import AttentionSpec
from .stages import DENSE, NO_CUDA_GRADIENT, Sources, captures_for, pipeline, regenerated
from .target import default_isa

SEQUENCES = "sequences "
MOST_CANDIDATES = 4  # tiles that are compiled before a kernel that spills registers is taken
_MEMO_VERSION = 1


_programs: dict[tuple, Program] = {}
_tracing = threading.RLock()


@dataclass
class Statistics:
    """Counters since the process started: where programs came from."""

    traced: int = 0
    from_disk: int = 0
    from_memory: int = 0


statistics = Statistics()


@dataclass
class Program:
    """One meaning compiled for one element type and pair of head dims."""

    name: str
    element: torch.dtype
    isa: str
    sources: Sources
    extra: tuple[torch.Tensor, ...]  # captured, but out of the walk's sight
    memo: tuple[str, str] | None = None  # kind and name of the text on disk that holds the sources
    exported: bool = False  # read from a graph that another process exported
    forward_id: int = -1
    backward_id: int = -1
    loaded: build.DeviceModule | None = None  # a CUDA kernel, once it is loaded
    form: Form = Form()
    forms: dict[Form, Program] = field(default_factory=dict)  # the same meaning for other calls
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_cuda(self) -> bool:
        return self.isa in CUDA

    def forward(self) -> int:
        if self.forward_id < 0:
            with self.lock:
                if self.forward_id < 0:
                    self.forward_id = self._load("forward", self.sources.forward)
        return self.forward_id

    def in_form(self, form: Form) -> Program:
        """The program that serves the calls of ``form``: itself, but for CUDA kernels."""
        if not self.is_cuda or form == self.form:
            return self
        with self.lock:
            if form not in self.forms:
                self.forms[form] = _made_form(self, form)
            return self.forms[form]

    def backward(self) -> int:
        if self.backward_id < 0:
            if self.is_cuda:
                raise NotImplementedError(
                    f"{NO_CUDA_GRADIENT}, and q, k, v or a captured tensor requires grad: call "
                    "under torch.no_grad(), detach() them, or use CPU tensors (.cpu())"
                )
            if self.sources.backward is None:
                raise RuntimeError(
                    f"this attention spec has no gradient ({self.sources.no_backward}); "
                    "run it under torch.no_grad() or detach q, k, v and the captured tensors"
                )
            with self.lock:
                if self.backward_id < 0:
                    self.backward_id = self._load("backward", self.sources.backward)
        return self.backward_id

    def both(self) -> None:
        """Compile forward and backward at the same time."""
        if self.forward_id >= 0 or self.backward_id >= 0:
            self.forward()
            self.backward()
            return
        if self.sources.backward is None:
            self.backward()  # raises: says why
            return
        with self.lock, ThreadPoolExecutor(2) as pool:
            ahead = pool.submit(self._load, "forward", self.sources.forward)
            behind = pool.submit(self._load, "backward", self.sources.backward)
            self.forward_id = ahead.result()
            self.backward_id = behind.result()

    def load(self, kind: str) -> int:
        """The kernel id of "forward", "backward" or "sequences N" (forward, of sequences of at most
        N rows of a group of heads; "sequences N shared": v is the first columns of k), built now if
        it is not there yet."""
        if kind.startswith(SEQUENCES):
            rows, _, shared = kind.removeprefix(SEQUENCES).partition(" ")
            return self.of_sequences(int(rows), bool(shared))
        return self.forward() if kind == "forward" else self.backward()

    def of_sequences(self, rows: int, shared_kv: bool) -> int:
        """The kernel of calls on sequences of at most ``rows`` query rows times heads of a group;
        ``shared_kv``: v is the first columns of k. On the CPU it is the forward kernel."""
        return self.in_form(Form.of_sequences(rows, shared_kv)).forward()

    @property
    def portable(self) -> str:
        """The operator's key that means this program in every process, on every machine.

        An instruction set that is not this machine's default was asked for, and is part of it.
        """
        text = self.sources.meaning
        return text if self.isa == default_isa() else serialize.with_isa(text, self.isa)

    def _load(self, kind: str, source: str) -> int:
        captures = [(rank, TORCH_DTYPES[dtype]) for dtype, rank in self.sources.captures]
        try:
            if self.is_cuda:
                made = self.loaded = self.device_module()
                self._warn_of_spills(made)
                return library.load_cuda_kernel(
                    made.ptx_path, made.cubin_path, made.manifest, captures
                )
            path = build.module(source, self.isa, f"{kind} {self.name}")
        except KernelUnavailable as error:
            raise KernelUnavailable(error.problem, self._remedy(kind, source)) from None
        return library.load_kernel(path, captures)

    def device_module(self) -> build.DeviceModule:
        """The first candidate that spills no register, or the one that spills least of a few; what
        was chosen is remembered on disk."""
        code, label = CUDA[self.isa].code, f"forward {self.name}"
        made = build.device_module(self.sources.forward, code, label)
        if made.spill_bytes == 0 or self.sources.candidate > 0:
            return made
        p = regenerated(serialize.load(self.sources.meaning), self.isa, self.form)
        tried = {_tile(p.forward_plans[0])}
        chosen = self.sources
        for i, plan in enumerate(p.forward_plans):
            if _tile(plan) in tried:
                continue
            if made.spill_bytes == 0 or len(tried) == MOST_CANDIDATES:
                break
            tried.add(_tile(plan))
            source = forward_source(p.traced, plan, p.forward_key, ())
            other = build.device_module(source, code, label)
            if other.spill_bytes < made.spill_bytes:
                made, chosen = other, replace(self.sources, forward=source, candidate=i)
        self.sources = chosen
        if self.memo is not None:
            cache.text_put(*self.memo, chosen.to_json())
        return made

    def _warn_of_spills(self, made: build.DeviceModule) -> None:
        """No tile without spills was found: the kernel is right, and slower than it should be."""
        if made.spill_bytes:
            warnings.warn(
                f"attnengine: the CUDA kernel {self.name} spills {made.spill_bytes} bytes of "
                f"registers, which makes it slow, and the other tiles that were tried spill more; "
                "simplify score_mod or mask_mod, or split the heads (handle.module has the counts)",
                RuntimeWarning,
                stacklevel=2,
            )

    def _remedy(self, kind: str, source: str) -> str:
        meaning = serialize.load(self.sources.meaning)
        key = (self.element, meaning.head_dim, meaning.value_dim, self.isa)

        def same(spec: AttentionSpec) -> bool:
            found = program(spec, captures_for(spec), *key, self.form).sources
            return getattr(found, kind) == source

        text = builtin.prebuild_command(*key, self.form, same)
        return text + builtin.EXPORTED if self.exported else text


def _tile(plan: Plan) -> tuple[int, int, int]:
    return plan.block_m, plan.block_n, plan.warps


def program(
    spec: AttentionSpec,
    captures: Captures,
    element: torch.dtype,
    d: int,
    dv: int,
    isa: str,
    form: Form = DENSE,
) -> Program:
    """The program of a spec for the calls of ``form``: from memory, from disk, or traced now."""
    key = (captures.signature, element, d, dv, isa)
    if not captures.opaque:
        found = _programs.get(key)
        if found is not None:
            statistics.from_memory += 1
            return found.in_form(form)
    with _tracing:
        found = None if captures.opaque else _programs.get(key)
        if found is not None:
            return found.in_form(form)
        made = _made(spec, captures, element, d, dv, isa)
        # Tensors that the fingerprint did not see may be others next time.
        if not captures.opaque and not made.extra:
            _programs[key] = made
        return made.in_form(form)


def _made(
    spec: AttentionSpec, captures: Captures, element: torch.dtype, d: int, dv: int, isa: str
) -> Program:
    label = f"{DTYPE_NAMES[element]} D{d}x{dv} {isa}"
    memo = None
    if not captures.opaque:
        fields = (captures.signature, str(element), d, dv, isa)
        memo = hashlib.sha256(f"{generator()}{stable_text(fields)}".encode()).hexdigest()
        text = cache.text_get("trace", memo)
        if text is not None:
            statistics.from_disk += 1
            known = Sources.from_json(text)
            return Program(label, element, isa, known, (), memo=("trace", memo))
    stages = pipeline(spec, captures, element, d, dv, isa)
    statistics.traced += 1
    n = len(captures.tensors)
    hidden = [t for t, at in zip(stages.traced.captures, stages.traced.positions, strict=True)
              if at >= n]  # fmt: skip
    place = ("trace", memo) if memo is not None and not hidden else None
    if place is not None:
        cache.text_put(*place, stages.sources.to_json())
    order = sorted(at for at in stages.traced.positions if at >= n)
    by_position = dict(zip(stages.traced.positions, stages.traced.captures, strict=True))
    extra = tuple(by_position[at] for at in order)
    return Program(label, element, isa, stages.sources, extra, memo=place)


def _made_form(base: Program, form: Form) -> Program:
    """The same program with a kernel for other calls. Nothing is traced: the text says it all."""
    fields = (base.sources.meaning, base.isa, form)
    memo = hashlib.sha256(f"{generator()}{stable_text(fields)}".encode()).hexdigest()
    text = cache.text_get("trace", memo)
    if text is not None:
        statistics.from_disk += 1
        sources = Sources.from_json(text)
    else:
        sources = regenerated(serialize.load(base.sources.meaning), base.isa, form).sources
        cache.text_put("trace", memo, sources.to_json())
    # Positions count the captured tensors of the spec, which the text does not know.
    sources = replace(sources, positions=base.sources.positions)
    return replace(
        base, name=f"{base.name} {form.label}", sources=sources, memo=("trace", memo),
        forward_id=-1, backward_id=-1, loaded=None, form=form, forms={}, lock=threading.Lock(),
    )  # fmt: skip


_generator_text: str | None = None


def generator() -> str:
    """What, besides the spec, decides the generated source: our own code and torch's version."""
    global _generator_text
    if _generator_text is None:
        folder = library.PACKAGE
        digest = hashlib.sha256(f"{_MEMO_VERSION} {torch.__version__}".encode())
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
        _generator_text = digest.hexdigest()
    return _generator_text
