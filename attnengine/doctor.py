"""What this machine can do for attnengine, in plain words, and what to do about what is missing."""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import dataclass
from typing import Any

from attnengine import cutlass, machine, settings
from attnengine.machine import (
    Cache,
    Cuda,
    Gpu,
    HostCompiler,
    OperatorLibrary,
    PrebuiltFolder,
    Processor,
    Torch,
)
from attnengine.nvcc import REMEDY

_MEANING = {
    "avx512_bf16": "bf16 products use dot-product instructions, twice the rate of float32",
    "avx512": "no bf16 dot products: bf16 and fp16 are widened to float32, 16 lanes",
    "avx2": "no bf16 dot products: bf16 and fp16 are widened to float32, 8 lanes",
    "portable": "no AVX2: 128-bit vectors without fused multiply-add; slow, meant for checking",
}


@dataclass(frozen=True)
class Report:
    """Everything, and the verdict. ``reason`` says why attention can, or cannot, run."""

    attnengine: str
    python: str
    platform: str
    torch: Torch
    operators: OperatorLibrary
    processor: Processor
    compiler: HostCompiler
    cuda: Cuda
    cache: Cache
    prebuilt: tuple[PrebuiltFolder, ...]
    can_run: bool
    reason: str


def examine() -> Report:
    """Gathers every fact and decides whether attention can run here."""
    torch, operators = machine.torch_facts(), machine.operator_facts()
    processor = machine.processor_facts(operators.isa)
    compiler = machine.compiler_facts(operators.isa)
    cache, folders = machine.cache_facts(), machine.prebuilt_facts()
    compiles = compiler.works and not compiler.disabled
    ready = sum(folder.modules for folder in folders)
    cached = cache.modules if compiler.command is not None else 0  # their names hold the compiler
    if torch.problem or operators.problem:
        can, why = False, "torch or the operator library is missing"
    elif processor.problem:
        can, why = False, "ATTNENGINE_ISA is set to what this machine does not run"
    elif compiles:
        can, why = True, "any spec can be compiled here"
    elif ready or cached:
        can = True
        why = f"nothing is compiled here: only the {ready} prebuilt and {cached} cached kernels run"
    else:
        can, why = False, "nothing can be compiled here and no kernel is ready"
    return Report(
        machine.installed_version("attnengine") or "unknown", platform.python_version(),
        platform.platform(), torch, operators, processor, compiler, machine.cuda_facts(), cache,
        folders, can, why,
    )  # fmt: skip


# -- words -----------------------------------------------------------------------------------------


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def lines(report: Report) -> list[str]:
    """The report for people: a word, a fact, and below what it means or what to do."""
    r, out = report, []

    def say(name: str, fact: str, *more: str | None) -> None:
        out.append(f"{name:11}{fact}")
        out.extend(f"{'':11}{text}" for text in more if text)

    def missing(problem: str | None) -> str | None:
        return f"! {problem}" if problem else None

    p, c, g = r.processor, r.compiler, r.cuda
    say("attnengine", r.attnengine)
    say("python", f"{r.python} on {r.platform}")
    say("torch", r.torch.version or "MISSING", missing(r.torch.problem))
    if r.operators.problem is None:
        say("operators", f"{r.operators.path}, loaded with torch {r.operators.torch}")
    else:
        say("operators", "MISSING", missing(r.operators.problem))
    pool = f", torch uses {p.threads} threads" if p.threads else ""
    say("processor", f"{p.name}: {p.cores} cores, {p.usable} hardware threads usable{pool}")
    best = r.operators.isa
    if best is not None:
        out.append(f"{'':11}instruction set {best}: {_MEANING[best]}")
    if p.asked is not None and p.problem is None:
        out.append(f"{'':11}ATTNENGINE_ISA={p.asked} is used instead: {_MEANING[p.asked]}")
    elif p.asked is None and p.problem is None:
        out.append(f"{'':11}ATTNENGINE_ISA is not set; it would choose a weaker one, to compare")
    if p.problem:
        out.append(f"{'':11}! {p.problem}")
    if c.command is None:
        say("compiler", f"MISSING: {c.problem}")
    elif not c.works:
        say("compiler", f"{c.command}: {c.version}", f"! DOES NOT WORK: {c.problem}")
    else:
        say("compiler", f"{c.command}: {c.version}", "it made a module, which was loaded again",
            f"flags {' '.join(c.flags)}")  # fmt: skip
    if c.disabled:
        out.append(f"{'':11}ATTNENGINE_DISABLE_JIT is set: nothing is compiled until it is unset")
    kept = r.cache
    if kept.writable:
        used = f"{size(kept.bytes)} of {size(kept.limit)}"
        say("cache", f"{kept.root}: {kept.modules} modules, {used}",
            *(f"broken: {text}" for text in kept.broken[:5]), missing(kept.problem))  # fmt: skip
    else:
        say("cache", f"UNUSABLE, a temporary folder is used instead: {kept.problem}")
    for f in r.prebuilt:
        isas = f" for {', '.join(f.isas)}" if f.isas else ""
        say("prebuilt", f"{f.root} ({f.source}): {f.modules} modules{isas}",
            *(f"broken: {text}" for text in f.broken[:5]), missing(f.problem))  # fmt: skip
    if not r.prebuilt:
        say("prebuilt", "none; attnengine prebuild makes kernels for machines without a compiler")
    say("gpu", f"{len(g.gpus)} found" + (f", driver for CUDA {g.driver}" if g.driver else ""),
        *map(_gpu_line, g.gpus), None if g.gpus else "attention runs on the CPU")  # fmt: skip
    for k in g.toolkits:
        say("cuda", f"{k.version} in {k.home} (from {k.found})", missing(k.problem))
    if not g.toolkits:
        say("cuda", f"no toolkit: CUDA kernels are compiled with one. {REMEDY}")
    if g.works:
        out.append(f"{'':11}nvcc and ptxas made a module for {', '.join(settings.DEVICE_TARGETS)}")
    elif g.toolkits or g.gpus:
        out.append(f"{'':11}! CUDA kernels cannot be compiled: {g.problem}")
    say("cutlass", g.cutlass or f"no headers: CUDA kernels include them. {cutlass.REMEDY}")
    out += ["", f"attention {'can' if r.can_run else 'CANNOT'} run here: {r.reason}"]
    return out


def _gpu_line(gpu: Gpu) -> str:
    text = f"{gpu.name}, compute capability {gpu.capability}"
    if float(gpu.capability) < 8.0:
        text += ": too old for CUDA kernels, which need 8.0 (Ampere); use CPU tensors"
    return text


def as_json(report: Report) -> str:
    """The report for machines: the fields of :class:`Report`."""
    data: dict[str, Any] = dataclasses.asdict(report)
    return json.dumps(data, indent=1)
