"""The work of `attnengine prebuild`: generate, compile what is missing, write folder or wheel."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from . import build, dispatch, settings, staging
from .arch import CUDA
from .cache import Store
from .errors import BuildError
from .kernel_wheel import write_wheel
from .prebuild import Kernel, LinearKernels, Request, Wanted, as_requests, read_requests

_SECONDS = 4.0  # one module on one core, where the cache knows of none: median of 900 builds
_DEVICE_SECONDS = 10.0  # the same of a CUDA module
_CUDA_WORDS = {word: isa for isa in CUDA for word in (isa, isa.replace("_", ""))}


@dataclass(frozen=True)
class Options:
    """What the command line says. ``dtypes``, ``head_dims``, ``forms`` (with ``shared_kv``),
    ``decay_dtype``, ``beta_dtype`` and ``forward_only`` overrule what the requests say, where they
    have such a thing; ``jobs`` None: one for each processor of this process."""

    specs: str
    target: str
    out: Path
    wheel: bool = False
    jobs: int | None = None
    dtypes: Sequence[str] = ()
    head_dims: Sequence[Any] = ()
    forward_only: bool = False
    forms: Sequence[str] = ()
    shared_kv: bool = False
    decay_dtype: str | None = None
    beta_dtype: str | None = None


def prebuild(options: Options, console: Console) -> int:
    """Makes the kernels and prints what it does. Returns 1 when some could not be compiled.

    Raises ValueError for options that do not fit, KernelUnavailable without a compiler, CacheError
    or OSError when the result cannot be written.
    """
    isas = target_isas(options.target)
    found = read_requests(options.specs)
    used: list[tuple[staging.Unit, Path]] = []
    if callable(found):
        used, found = _called(found, options.specs, isas)
    wanted = _generated(_overruled(found, options), isas, console)
    made, failed = _compiled(wanted, options.jobs, console)
    _write([*used, *made], options, console)
    if failed:
        console.print(next(iter(failed.values())), style="red", markup=False, soft_wrap=True)
        labels = ", ".join(failed)
        console.print(f"{len(failed)} kernels could not be compiled: {labels}", markup=False)
    return 1 if failed else 0


def target_isas(target: str) -> list[str]:
    """What a list of targets stands for: cpu (this machine's best), cpu:ISA, cpu:all, or sm80 and
    the like for CUDA, separated by commas."""
    found: list[str] = []
    for word in target.split(","):
        device, _, isa = word.partition(":")
        if device == "cpu" and isa in ("", "all", *settings.ISAS):
            found += settings.ISAS if isa == "all" else [isa or dispatch.default_isa()]
        elif word in _CUDA_WORDS:
            found.append(_CUDA_WORDS[word])
        else:
            words = [f"cpu:{isa}" for isa in (*settings.ISAS, "all")]
            words += [word for word in _CUDA_WORDS if word not in CUDA]
            raise ValueError(
                f"--target {target}: expected cpu (this machine's best) or {', '.join(words)}; "
                "several are separated by commas"
            )
    return list(dict.fromkeys(found))


def _called(
    function: Callable[[], Any], name: str, isas: list[str]
) -> tuple[list[tuple[staging.Unit, Path]], list[Wanted]]:
    """The modules that a function uses while it runs, and the requests that it returns."""
    if len(isas) > 1 or isas[0] not in settings.ISAS or not staging.runs_here(isas[0]):
        raise ValueError(
            f"{name} is a function, which is run to see what it uses: for one instruction set that "
            "this processor has (--target cpu:ISA); attnengine.prebuild.Request is compiled for any"
        )
    requests: list[Wanted] = []
    with settings.exported_isa({"ATTNENGINE_ISA": isas[0]}), build.collecting() as used:
        result = function()
    if isinstance(result, (list, tuple)) and result and isinstance(result[0], Wanted):
        requests = as_requests(result, name)
    if not used and not requests:
        raise ValueError(f"{name} ran without using any kernel")
    return used, requests


def _overruled(requests: Iterable[Wanted], options: Options) -> list[Wanted]:
    changes: dict[str, Any] = {}
    if options.dtypes:
        changes["dtypes"] = tuple(options.dtypes)
    if options.head_dims:
        changes["head_dims"] = tuple(options.head_dims)
    if options.forward_only:
        changes["backward"] = False
    if options.shared_kv and not options.forms:
        raise ValueError("--shared-kv belongs to --forms: say which, such as --forms decode")
    found = []
    for request in requests:
        own = dict(changes)
        if isinstance(request, Request) and options.forms:
            own |= {"forms": tuple(options.forms), "shared_kv": options.shared_kv}
        if isinstance(request, LinearKernels):
            if options.decay_dtype and request.decay != "none":
                own["decay_dtype"] = options.decay_dtype
            if options.beta_dtype and request.delta:
                own["beta_dtype"] = options.beta_dtype
        found.append(dataclasses.replace(request, **own))  # type: ignore[type-var]
    return found


def _generated(requests: list[Wanted], isas: list[str], console: Console) -> list[Kernel]:
    """The modules of all requests, each source once."""
    programs, left_out = [], Counter[str]()
    for isa in isas:
        for request in requests:
            for program in request.programs():
                why = request.refused(isa, *program)
                if why:
                    left_out[why] += 1
                else:
                    programs.append((request, *program, isa))
    if left_out and not programs:
        every = "; ".join(left_out)
        raise ValueError(f"{every}: none of the requests is; see --dtypes and --head-dims")
    for why, count in left_out.items():
        console.print(f"{why}: {count} others are not made", soft_wrap=True)
    found: dict[tuple[str, str], Kernel] = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("generating", total=len(programs))
        for request, dtype, d, dv, isa in programs:
            progress.update(task, description=f"generating {request.name}")
            for kernel in request.kernels(dtype, d, dv, isa):
                found.setdefault((kernel.isa, kernel.source), kernel)
            progress.advance(task)
    return list(found.values())


def _compiled(
    wanted: list[Kernel], jobs: int | None, console: Console
) -> tuple[list[tuple[staging.Unit, Path]], dict[str, str]]:
    """(modules, the error of each label that failed). Says first how many and how long."""
    jobs = len(os.sched_getaffinity(0)) if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: expected at least 1")
    units = [staging.name_unit(k.source, k.isa, k.label) for k in wanted]
    missing = [kernel for kernel, unit in zip(wanted, units, strict=True) if not build.ready(unit)]
    if wanted:
        text = f"{len(wanted)} kernels, {len(wanted) - len(missing)} of them compiled already"
        if missing:
            typical = {kind: _typical_seconds(kind) for kind in (False, True)}
            work = sum(typical[kernel.isa in settings.DEVICE_TARGETS] for kernel in missing)
            minutes = work / min(jobs, len(missing)) / 60
            about = f"{minutes:.0f} min" if minutes >= 1.5 else f"{max(1, minutes * 60):.0f} s"
            text += f"; the others take about {about} with {jobs} jobs"
        console.print(text)
    failed: dict[str, str] = {}
    with (
        build.collecting() as made,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(jobs) as pool,
    ):
        task = progress.add_task("compiling", total=len(wanted))
        running = {pool.submit(kernel.build): kernel for kernel in wanted}
        try:
            for done in as_completed(running):
                kernel = running[done]
                progress.update(task, advance=1, description=f"compiled {kernel.label}")
                try:
                    done.result()
                except BuildError as error:
                    failed[kernel.label] = str(error)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return made, failed


def _typical_seconds(device: bool) -> float:
    """What a module for CUDA, or for a CPU, took, over those that the cache has."""
    seconds = []
    for record in Store(settings.cache_dir()).entries.glob("[0-9a-f][0-9a-f]/*/cmd.json"):
        try:
            known = json.loads(record.read_bytes())
            if ("nvcc_seconds" in known) == device:
                seconds.append(float(known["seconds"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sum(seconds) / len(seconds) if seconds else _DEVICE_SECONDS if device else _SECONDS


def _write(modules: list[tuple[staging.Unit, Path]], options: Options, console: Console) -> None:
    count = len({unit.content for unit, _ in modules})
    if not count:
        return
    out = options.out
    if not options.wheel and out.suffix != ".whl":
        new = build.export(modules, out)
        console.print(f"{count} kernels, {new} new in {out}", soft_wrap=True)
        console.print(f"use them with ATTNENGINE_AOT_PATH={out.absolute()}", soft_wrap=True)
        return
    name = "attnengine-kernels-" + re.sub("[:,]", "-", options.target.replace(":all", ""))
    place = out
    if out.suffix == ".whl":
        place, name = out.parent, out.name.removesuffix(".whl").partition("-")[0]
    with tempfile.TemporaryDirectory() as folder:
        build.export(modules, Path(folder))
        wheel = write_wheel(Path(folder), place, name, build.version(), staging.build_id())
    size = wheel.stat().st_size / 2**20
    console.print(f"{count} kernels in {wheel} ({size:.1f} MiB)", soft_wrap=True)
    console.print(f"use them with pip install --no-deps {wheel}", soft_wrap=True)
