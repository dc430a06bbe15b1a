"""From a spec to a loaded kernel, once per meaning: the memory and the disk know it afterwards.

``bind(spec, element, D, Dv)`` finds the program of a spec by its fingerprint (code, constants and
kinds of captured tensors), so a fresh but identical lambda is not traced again, and rebinds the
captured tensors. A program remembers its generated sources on disk: a new process traces nothing.
"""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import build, builtin, cache, clean_thread, library, plan_cuda, serialize
from .arch import CUDA
from .aten import Unsupported
from .capture import Captures, captures_of_spec, stable_text
from .derive import Derived, derive, derive_quiet
from .errors import KernelUnavailable, TraceError
from .ir import DTYPE_NAMES, TORCH_DTYPES
from .key import Form, KernelKey, backward_key, forward_key
from .plan import Plan, candidates
from .source import forward_source
from .source_backward import backward_source
from .spec import AttentionSpec
from .target import default_isa, isa_of
from .trace import Traced, trace

SUPPORTED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CUDA_SUPPORTED = (torch.bfloat16, torch.float16)
NO_CUDA_GRADIENT = "CUDA kernels have no gradient in this version"
DENSE = Form()
SEQUENCES = "sequences "
MOST_CANDIDATES = 4  # tiles that are compiled before a kernel that spills registers is taken
_MEMO_VERSION = 1


@dataclass(frozen=True)
class Sources:
    """What generation produced for one program: all that a later process needs."""

    forward: str
    backward: str | None
    no_backward: str  # why there is no backward, for the error
    stats: tuple[str, ...]  # saved statistics that the caller sees
    positions: tuple[int, ...]  # capture number -> position in the spec's captured tensors
    captures: tuple[tuple[str, int], ...]  # dtype and rank of each capture
    grads: tuple[int, ...]
    passes: int
    key: str
    stored: int  # saved statistics in all, those for backward included
    meaning: str  # the program as text (serialize): what an exported graph carries
    candidate: int = 0  # which forward plan: not the first where that one's kernel spills registers

    def to_json(self) -> str:
        return json.dumps(self.__dict__)

    @staticmethod
    def from_json(text: str) -> Sources:
        data = json.loads(text)
        for name in ("stats", "positions", "grads"):
            data[name] = tuple(data[name])
        data["captures"] = tuple((d, r) for d, r in data["captures"])
        return Sources(**data)


@dataclass(frozen=True)
class Pipeline:
    """Every stage of one program, for ``explain`` and for handles."""

    traced: Traced
    derived: Derived | None
    quiet: Derived | None  # the same without gradients of the statistics, if it has fewer passes
    no_backward: str
    forward_key: KernelKey
    backward_key: KernelKey | None
    forward_plans: list[Plan]
    backward_plans: list[Plan]
    sources: Sources


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
            return getattr(program(spec, captures_for(spec), *key).sources, kind) == source

        text = builtin.prebuild_command(*key, same)
        if self.exported:
            text += (
                "\n  or, for an exported program, --specs kernels.py:run with a function run() "
                "that loads its file and calls it"
            )
        return text


def _tile(plan: Plan) -> tuple[int, int, int]:
    return plan.block_m, plan.block_n, plan.warps


_programs: dict[tuple, Program] = {}
_tracing = threading.RLock()


@dataclass
class Statistics:
    """Counters since the process started: where programs came from."""

    traced: int = 0
    from_disk: int = 0
    from_memory: int = 0


statistics = Statistics()


def pipeline(
    spec: AttentionSpec, captures: Captures, element: torch.dtype, d: int, dv: int, isa: str
) -> Pipeline:
    """Run trace, derive, key, plan and source. Raises TraceError, NotImplementedError."""
    dtype = "f64" if element == torch.float64 else "f32"

    def stages() -> Pipeline:
        return _after_trace(trace(spec, captures.tensors, dtype), element, d, dv, isa)

    return clean_thread.run(stages)


def regenerated(meaning: serialize.Meaning, isa: str, form: Form = DENSE) -> Pipeline:
    """Derive, key, plan and source of a program that was read. Raises NotImplementedError."""
    m = meaning
    return clean_thread.run(
        lambda: _after_trace(m.traced, m.element, m.head_dim, m.value_dim, isa, form)
    )


def _after_trace(
    traced: Traced, element: torch.dtype, d: int, dv: int, isa: str, form: Form = DENSE
) -> Pipeline:
    name = DTYPE_NAMES[element]
    meaning = serialize.dump(traced, element, d, dv)
    wanted = [i for i, t in enumerate(traced.captures) if t.requires_grad and t.is_floating_point()]
    if isa in CUDA:
        return _cuda_pipeline(traced, name, d, dv, isa, meaning, form)
    derived, quiet, why = None, None, ""
    try:
        derived = derive(traced, wanted)
        quiet = derive_quiet(traced, wanted, derived)
    except (TraceError, Unsupported) as e:
        why = str(e)
    saved = derived.final_states if derived is not None else ()
    fkey = forward_key(traced, name, d, dv, saved)
    fplans = candidates(fkey, traced, None, isa)
    forward = forward_source(traced, fplans[0], fkey, saved)
    bkey, bplans, backward = None, [], None
    if derived is not None:
        bkey = backward_key(traced, derived, name, d, dv)
        bplans = candidates(bkey, traced, derived, isa)
        backward = backward_source(traced, derived, bplans[0], bkey, quiet)
    sources = Sources(
        forward, backward, why, tuple(traced.row.saved), traced.positions, fkey.captures,
        derived.grads if derived is not None else (),
        len(derived.passes) if derived is not None else 0,
        fkey.digest(), len(traced.row.saved) + len(saved), meaning,
    )  # fmt: skip
    return Pipeline(traced, derived, quiet, why, fkey, bkey, fplans, bplans, sources)


def _cuda_pipeline(
    traced: Traced, element: str, d: int, dv: int, isa: str, meaning: str, form: Form
) -> Pipeline:
    key = replace(forward_key(traced, element, d, dv, ()), form=form)
    plans = plan_cuda.candidates(key, traced, isa)
    stats = tuple(traced.row.saved)
    sources = Sources(
        forward_source(traced, plans[0], key, ()), None, NO_CUDA_GRADIENT, stats,
        traced.positions, key.captures, (), 0, key.digest(), len(stats), meaning,
    )  # fmt: skip
    return Pipeline(traced, None, None, NO_CUDA_GRADIENT, key, None, plans, [], sources)


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
        if not captures.opaque:
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
        base, name=f"{base.name} {_form_label(form)}", sources=sources, memo=("trace", memo),
        forward_id=-1, backward_id=-1, loaded=None, form=form, forms={}, lock=threading.Lock(),
    )  # fmt: skip


def _form_label(form: Form) -> str:
    text = f"decode {form.decode_rows} rows" if form.decode_rows else "sequences"
    return f"{text}, shared KV" if form.shared_kv else text


def shares_keys(k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether v is the first columns of k in memory."""
    return (
        v.shape[3] <= k.shape[3]
        and k.stride() == v.stride()
        and k.numel() > 0
        and k.data_ptr() == v.data_ptr()
    )


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


def bound_tensors(made: Program, captures: Captures) -> list[torch.Tensor]:
    """The captured tensors of a spec in the order in which its kernels number them."""
    known = len(captures.tensors)
    return [
        captures.tensors[at] if at < known else made.extra[at - known]
        for at in made.sources.positions
    ]


def check_operands(q: Any, k: Any, v: Any) -> None:
    """What must hold before a kernel can be chosen. Raises TypeError, ValueError,
    NotImplementedError."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} must be 4-D [B, H, L, D], got shape {tuple(x.shape)}; add or merge "
                "dimensions with unsqueeze/reshape"
            )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}; "
            "move them with .to()"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in SUPPORTED:
        raise TypeError(
            f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; supported are "
            "torch.float32, torch.float64, torch.bfloat16 and torch.float16: cast with .to()"
        )
    if q.device.type == "cuda" and q.dtype not in CUDA_SUPPORTED:
        raise NotImplementedError(
            f"q is {q.dtype} on {q.device}; CUDA kernels support torch.float16 and torch.bfloat16: "
            "cast q, k and v with .half() or .bfloat16(), or use CPU tensors (.cpu())"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(
            f"k has head_dim {k.shape[3]} but q has {q.shape[3]} (q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}); the last dimension of q and k must agree"
        )


def captures_for(spec: AttentionSpec) -> Captures:
    """The captures of a spec, read once: a spec is frozen, so is what its callables close over."""
    found = spec.__dict__.get("_captures")
    if found is None:
        found = captures_of_spec(spec)
        spec.__dict__["_captures"] = found
    return found


def resolve(
    spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, isa: str | None = None
) -> tuple[Program, list[torch.Tensor]]:
    """The program of ``spec`` for these operands, and its captured tensors in kernel order."""
    check_operands(q, k, v)
    captures = captures_for(spec)
    made = program(spec, captures, q.dtype, q.shape[3], v.shape[3], isa or isa_of(q))
    return made, bound_tensors(made, captures)


def tensors_require_grad(tensors: Sequence[torch.Tensor]) -> bool:
    return any(t.requires_grad for t in tensors)
