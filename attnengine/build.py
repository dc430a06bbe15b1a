"""From generated source to a checked module, compiled once and remembered for good: a shared object
for a CPU, PTX and the code of one architecture for CUDA.

Looked for among the prebuilt modules and in the cache, else compiled. Any number of threads and
processes may ask for the same module: one compiles it, and the others wait for that.
"""

import importlib.metadata
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnengine import cache, nvcc, prebuilt, ptx, settings
from attnengine.cache import Store
from attnengine.cache_entry import KERNEL, MANIFEST, PTX, read_manifest, seal, write_file
from attnengine.cache_lock import hold
from attnengine.cache_upkeep import prune
from attnengine.errors import BuildError, CacheError, KernelUnavailable
from attnengine.staging import Rejected, Unit, build_id, compile_unit, name_unit

_guard = threading.Lock()
_once: dict[str, threading.Lock] = {}
_paths: dict[tuple[Path, str], Path] = {}
_failed: dict[str, str] = {}
_collected: list[tuple[Unit, Path]] | None = None

# Not the command and the log, which name this machine's paths.
_SHIPPED = (KERNEL, "kernel.cpp", PTX, ptx.CUBIN, ptx.MANIFEST, "kernel.cu")


def module(source: str, isa: str, label: str) -> Path:
    """The path of a verified kernel.so, or kernel.ptx with its other files beside it, compiled from
    `source`; made now if it is in no cache.

    Args:
        source: the C++ unit; its include root is templates_dir(). Must export ae_info,
            ae_workspace_bytes and ae_launch (templates/common/abi.h); a CUDA unit defines ae_KIND
            for the kind in its manifest line (ptx.py), and may include CUTLASS.
        isa: one of settings.ISAS, or of settings.DEVICE_TARGETS for a CUDA unit.
        label: a name for people; never used in a command, a path or a key.

    Raises:
        KernelUnavailable: it would have to be compiled, and there is no compiler, or
            ATTNENGINE_DISABLE_JIT is set.
        BuildError: compiling or trying it failed; names the command, the log and the source kept.

    Any number of threads and processes may ask for the same module: one of them compiles it, and
    different modules compile at the same time.
    """
    wanted = name_unit(source, isa, label)
    name = wanted.digest or wanted.content
    place = (settings.cache_dir(), name)
    with _guard:
        once = _once.setdefault(name, threading.Lock())
    with once:
        path = _paths.get(place)
        if path is None or not path.exists():
            path = _resolve(wanted)
            _paths[place] = path
    if _collected is not None:
        _collected.append((wanted, path))
    return path


@dataclass(frozen=True)
class DeviceModule:
    """A CUDA module: a folder with its PTX, the same as code of one architecture, and what the
    launcher must know (cuda.json)."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def ptx_path(self) -> Path:
        return self.folder / PTX

    @property
    def cubin_path(self) -> Path:
        return self.folder / ptx.CUBIN

    @property
    def registers(self) -> int:
        """Per thread, of the entry that needs most."""
        return max(entry["registers"] for entry in self.manifest["entries"].values())

    @property
    def spill_bytes(self) -> int:
        """Stores and loads of spilled registers, over all entries: 0 in a good kernel."""
        return sum(entry["spill_bytes"] for entry in self.manifest["entries"].values())


def device_module(source: str, target: str, label: str) -> DeviceModule:
    """The verified module of a CUDA unit, as :func:`module`, with what ptxas found."""
    folder = module(source, target, label).parent
    return DeviceModule(folder, json.loads((folder / ptx.MANIFEST).read_bytes()))


def ready(wanted: Unit) -> Path | None:
    """The verified kernel of a unit that need not be compiled, or None."""
    names = [wanted.content] + ([wanted.digest] if wanted.digest else [])
    found = prebuilt.find(names, build_id())
    if found is None and wanted.digest is not None:
        found = cache.find(wanted.digest)
    return found


def _resolve(wanted: Unit) -> Path:
    found = ready(wanted)
    if found is not None:
        return found
    digest, compiler = wanted.digest, wanted.compiler
    if digest is None or isinstance(compiler, str):
        raise _unavailable(wanted, str(compiler))
    if settings.jit_disabled():
        raise _unavailable(wanted, "ATTNENGINE_DISABLE_JIT is set")
    if digest in _failed:
        raise BuildError(_failed[digest])

    def make(store: Store) -> Path:
        lock = store.root / "locks" / digest
        with hold(lock, wanted.label, settings.build_timeout_s()):
            present = store.find(digest)
            if present is not None:
                return present
            path = compile_unit(store, wanted, digest, compiler)
        prune(store, settings.cache_limit_bytes(), keep=frozenset((digest,)))
        return path

    try:
        return cache.writable(make)
    except Rejected as error:
        _failed[digest] = str(error)
        raise
    except OSError as error:
        raise BuildError(f"compiling {wanted.label!r} failed: {error}") from error


def _unavailable(wanted: Unit, reason: str) -> KernelUnavailable:
    aot = os.pathsep.join(map(str, settings.aot_paths())) or "(unset)"
    wheels = os.pathsep.join(map(str, prebuilt.installed())) or "(none)"
    return KernelUnavailable(
        f"kernel {wanted.label!r} ({wanted.isa}, digest {wanted.content}) is not prebuilt and "
        f"cannot be compiled: {reason}.\n"
        f"  looked in ATTNENGINE_AOT_PATH: {aot}\n"
        f"  looked in installed wheels of kernels: {wheels}\n"
        f"  looked in the cache: {settings.cache_dir()}",
        remedy("FILE", wanted.isa),
    )


def remedy(specs: str, isa: str) -> str:
    """What to do about a missing module: the prebuild command, with its --specs argument."""
    here, target = "install g++ 11 or newer, or where there is one run", f"cpu:{isa}"
    if isa not in settings.ISAS:  # what a CUDA kernel is planned for
        here, target = f"{nvcc.REMEDY}; or where there is one run", isa.replace("_", "")
    return (
        f"  next step: {here}\n"
        f"    attnengine prebuild --specs {specs} --target {target} --out DIR\n"
        "  and here set ATTNENGINE_AOT_PATH=DIR (or pip install the wheel that --wheel makes)"
    )


@contextmanager
def collecting() -> Iterator[list[tuple[Unit, Path]]]:
    """Lists every module that is asked for inside the block, in all threads."""
    global _collected
    outer, _collected = _collected, []
    try:
        yield _collected
    finally:
        _collected = outer


def export(modules: list[tuple[Unit, Path]], out: Path) -> int:
    """Copies modules into a folder for ATTNENGINE_AOT_PATH, readable by everybody, under names that
    do not depend on the compiler. Returns how many were new there. Raises CacheError when the
    folder cannot be written or has modules of another build."""
    target, new = Store(out), 0
    try:
        target.entries.mkdir(parents=True, exist_ok=True)
        prebuilt.mark(out, build_id(), version())
    except OSError as error:
        raise CacheError(f"{out} cannot be written: {error}") from error
    for wanted, path in modules:
        folder = target.entry(wanted.content)
        if folder.exists():
            continue
        folder.parent.mkdir(exist_ok=True)
        known = read_manifest(path.parent, shared=True)
        facts = {name: known[name] for name in ("isa", "abi", "cflags", "content")}
        with tempfile.TemporaryDirectory(prefix=".new-", dir=target.entries) as staged:
            entry = Path(staged) / "entry"
            entry.mkdir(mode=0o755)
            for name in sorted(known["files"].keys() & _SHIPPED):
                write_file(entry / name, (path.parent / name).read_bytes())
            seal(entry, wanted.content, known["label"], facts)
            for file in entry.iterdir():
                file.chmod(0o644)
            try:
                os.rename(entry, folder)
            except OSError as error:
                if not (folder / MANIFEST).exists():
                    raise CacheError(f"{folder} cannot be written: {error}") from error
        new += 1
    return new


def version() -> str:
    """attnengine's own, as its metadata says."""
    try:
        return importlib.metadata.version("attnengine")
    except importlib.metadata.PackageNotFoundError:  # on PYTHONPATH, not installed
        return "unknown"


def forget() -> None:
    """Forgets which modules were found and which failed, as a new process would."""
    _paths.clear()
    _failed.clear()
    cache.forget()
    prebuilt.forget()


def _after_fork() -> None:
    global _guard
    _guard = threading.Lock()
    _once.clear()  # a lock may be held by a thread that the child does not have


os.register_at_fork(after_in_child=_after_fork)
