"""From a linear-attention spec to a loaded kernel, once per meaning.

As :mod:`attnengine.program`: a program is found by the fingerprint of its hooks (code, constants
and kinds of captured tensors), so a fresh but identical lambda is not traced again, and remembers
its generated sources on disk, so a new process traces nothing.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import build, cache, dispatch, library
from ..arch import CUDA
from ..builtin import EXPORTED
from ..capture import Captures, captures_of, stable_text
from ..errors import KernelUnavailable
from ..ir import TORCH_DTYPES
from ..target import check_isa, default_isa
from . import builtin, serialize
from .elementwise import SIZES
from .plan_cuda import NO_GRADIENT
from .request import LinearRequest
from .spec import HOOKS, LinearAttentionSpec
from .stages import LinearSources, Sizes, pipeline, regenerated
from .stages import request_of as request_of

_MEMO_VERSION = 1


@dataclass
class LinearProgram:
    """One meaning compiled for one set of dtypes and head dims."""

    name: str
    request: LinearRequest
    isa: str
    sources: LinearSources
    extra: tuple[Tensor, ...]  # captured, but out of the fingerprint's sight
    forward_id: int = -1
    backward_id: int = -1
    exported: bool = False  # read from a graph that another process exported
    loaded: build.DeviceModule | None = None  # a CUDA kernel, once it is loaded
    lock: threading.Lock = field(default_factory=threading.Lock)

    def forward(self) -> int:
        if self.forward_id < 0:
            with self.lock:
                if self.forward_id < 0:
                    self.forward_id = self._load("forward")
        return self.forward_id

    def backward(self) -> int:
        if self.backward_id < 0:
            self._check_gradient()
            with self.lock:
                if self.backward_id < 0:
                    self.backward_id = self._load("backward")
        return self.backward_id

    def both(self) -> None:
        """Compile forward and backward at the same time."""
        self._check_gradient()
        with self.lock, ThreadPoolExecutor(2) as pool:
            kinds = [k for k in ("forward", "backward") if getattr(self, f"{k}_id") < 0]
            for kind, kernel in zip(kinds, pool.map(self._load, kinds), strict=True):
                setattr(self, f"{kind}_id", kernel)

    def load(self, kind: str) -> int:
        """The kernel id of "forward" or "backward", built now if it is not there yet."""
        return self.forward() if kind == "forward" else self.backward()

    @property
    def portable(self) -> str:
        """The operator's key that means this program in every process, on every machine."""
        text = self.sources.meaning
        return text if self.isa == default_isa() else serialize.with_isa(text, self.isa)

    @property
    def short_key(self) -> str:
        """The operator's key in this process."""
        return f"linear/{self.sources.key}/{self.isa}/{'.'.join(map(str, self.trainable))}"

    @property
    def trainable(self) -> list[int]:
        """Numbers of the captured tensors that get gradients, ascending."""
        return sorted({number for _, number, _ in self.sources.hook_grads})

    @property
    def differentiable(self) -> list[int]:
        """Numbers of the captured tensors that a call looks at to know if it needs a gradient."""
        has_gradient = self.sources.backward is not None
        return self.trainable if has_gradient else list(range(len(self.sources.captures)))

    def fits(self, sizes: Sizes) -> bool:
        """Whether the traced hooks mean the same for a call of these sizes."""
        return all(sizes[SIZES.index(name)] == size for name, size in self.sources.pins)

    def check_sizes(self, sizes: Sizes) -> None:
        """Raises ValueError unless the program fits."""
        if not self.fits(sizes):
            pinned = ", ".join(f"{name}={size}" for name, size in self.sources.pins)
            raise ValueError(
                f"B, Hk, H, L = {', '.join(map(str, sizes))}: the hooks of this program read "
                f"tensors or sizes that are for {pinned}; capture tensors that broadcast, or "
                "prepare or export for these sizes"
            )

    @property
    def is_cuda(self) -> bool:
        return self.isa in CUDA

    def _check_gradient(self) -> None:
        if self.is_cuda:
            raise NotImplementedError(NO_GRADIENT)
        if self.sources.backward is None:
            raise RuntimeError(
                f"this linear-attention spec has no gradient ({self.sources.no_backward}); run it "
                "under torch.no_grad(), or detach its operands and the captured tensors"
            )

    def _load(self, kind: str) -> int:
        source = getattr(self.sources, kind)
        captures = [(rank, TORCH_DTYPES[dtype]) for dtype, rank in self.sources.captures]
        try:
            if self.is_cuda:
                code, label = CUDA[self.isa].code, f"linear {kind} {self.name}"
                made = self.loaded = build.device_module(source, code, label)
                return library.load_cuda_kernel(
                    made.ptx_path, made.cubin_path, made.manifest, captures
                )
            path = build.module(source, self.isa, f"linear {kind} {self.name}")
        except KernelUnavailable as error:
            raise KernelUnavailable(error.problem, self._remedy(kind, source)) from None
        return library.load_kernel(path, captures)

    def _remedy(self, kind: str, source: str) -> str:
        def same(spec: LinearAttentionSpec) -> bool:
            request = replace(self.request, normalizer=spec.normalizer == "sum")
            made = program(spec, captures_for(spec), request, builtin.SIZES, self.isa)
            return getattr(made.sources, kind) == source

        text = builtin.prebuild_command(self.request, self.isa, same)
        return text + EXPORTED if self.exported else text


# ----------------------------------------------------------------------------------- what is known


@dataclass
class Statistics:
    """Counters since the process started: where programs came from."""

    traced: int = 0
    from_disk: int = 0
    from_memory: int = 0


statistics = Statistics()
_programs: dict[tuple, list[LinearProgram]] = {}  # of other sizes, where hooks depend on them
_tracing = threading.RLock()


def captures_of_spec(spec: LinearAttentionSpec) -> Captures:
    """Fingerprint of a spec's hooks, in the order of HOOKS."""
    return captures_of(*(getattr(spec, name) for name in HOOKS))


def captures_for(spec: LinearAttentionSpec) -> Captures:
    """The captures of a spec, read once: a spec is frozen, so is what its callables close over."""
    found = spec.__dict__.get("_captures")
    if found is None:
        found = spec.__dict__["_captures"] = captures_of_spec(spec)
    return found


def program(
    spec: LinearAttentionSpec, captures: Captures, request: LinearRequest, sizes: Sizes, isa: str
) -> LinearProgram:
    """The program of a spec: from memory, from disk, or traced now."""
    key = (captures.signature, request, isa)
    found = None if captures.opaque else _remembered(key, sizes)
    if found is not None:
        statistics.from_memory += 1
        return found
    with _tracing:
        found = None if captures.opaque else _remembered(key, sizes)
        if found is None:
            found = _made(spec, captures, request, sizes, isa)
            # Tensors that the fingerprint did not see may be others next time.
            if not captures.opaque and not found.extra:
                _programs.setdefault(key, []).append(found)
        return found


def _remembered(key: tuple, sizes: Sizes) -> LinearProgram | None:
    for known in _programs.get(key, ()):
        if known.fits(sizes):
            return known
    return None


def _made(
    spec: LinearAttentionSpec, captures: Captures, request: LinearRequest, sizes: Sizes, isa: str
) -> LinearProgram:
    name = label(request, isa)
    memo = None
    if not captures.opaque:
        fields = (captures.signature, str(request), isa)
        memo = hashlib.sha256(f"{generator()}{stable_text(fields)}".encode()).hexdigest()
        text = cache.text_get("trace", memo)
        if text is not None:
            known = LinearProgram(name, request, isa, LinearSources.from_json(text), ())
            if known.fits(sizes):
                statistics.from_disk += 1
                return known
    stages = pipeline(spec, captures, request, sizes, isa)
    statistics.traced += 1
    traced, n = stages.traced, len(captures.tensors)
    places = zip(traced.positions, traced.captures, strict=True)
    hidden = dict(sorted((at, t) for at, t in places if at >= n))
    if memo is not None and not hidden:
        cache.text_put("trace", memo, stages.sources.to_json())
    return LinearProgram(name, request, isa, stages.sources, tuple(hidden.values()))


def label(request: LinearRequest, isa: str) -> str:
    words = [request.element, f"D{request.d}x{request.dv}"]
    if request.decay_kind != "none":
        words.append(f"{request.decay_kind} decay {request.decay_dtype}")
    if request.delta:
        words.append(f"beta {request.beta_dtype}")
    if request.normalizer:
        words.append("normalizer")
    return " ".join([*words, isa])


@functools.cache
def generator() -> str:
    """What, besides the spec, decides the generated source: our own code and torch's version."""
    digest = hashlib.sha256(f"{_MEMO_VERSION} {dispatch.generator()}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def bound_tensors(made: LinearProgram, captures: Captures) -> list[Tensor]:
    """The captured tensors of a spec in the order in which its kernels number them."""
    known = len(captures.tensors)
    return [
        captures.tensors[at] if at < known else made.extra[at - known]
        for at in made.sources.positions
    ]


def check_place(q: Tensor) -> None:
    """Raises NotImplementedError where no kernel of linear attention runs."""
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(
            f"q is on {q.device}; linear attention runs on CPU and CUDA tensors: use "
            "CPU tensors (.cpu()), or attnengine.reference on this device"
        )
    if q.device.type == "cuda" and q.dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError(
            f"q is {q.dtype} on {q.device}; CUDA kernels of linear attention support torch.float16 "
            "and torch.bfloat16: cast q, k and v with .half() or .bfloat16(), or use CPU tensors "
            "(.cpu())"
        )


_read: dict[str, LinearProgram] = {}


def program_of(text: str) -> LinearProgram:
    """The program that a graph exported elsewhere carries, generated for this machine.

    Raises ValueError when the text is damaged or of another format, or asks for instructions that
    this CPU lacks. Nothing is compiled yet.
    """
    with _tracing:
        found = _read.get(text)
        if found is None:
            found = _read[text] = _generated(text)
        return found


def _generated(text: str) -> LinearProgram:
    meaning = serialize.load(text)
    isa = meaning.isa or default_isa()
    if meaning.isa is not None:
        check_isa(isa)
    request = meaning.traced.request
    memo = hashlib.sha256(f"{generator()}{isa} {text}".encode()).hexdigest()
    known = cache.text_get("export", memo)
    if known is not None:
        statistics.from_disk += 1
        sources = LinearSources.from_json(known)
    else:
        sources = regenerated(meaning.traced, isa).sources
        cache.text_put("export", memo, sources.to_json())
    return LinearProgram(
        f"exported {label(request, isa)}", request, isa, sources, (), exported=True
    )
