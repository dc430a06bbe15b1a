"""What is compiled, under which name and with which flags, and the compile itself.

A CPU unit's compile is torch.utils.cpp_extension.load's, but only inside a staging folder of
ours: its own lock hangs after a kill, its cache reuses stale objects and it loads half-written
files. What it makes is tried in a child process. A CUDA unit is compiled to PTX by nvcc, and by
ptxas to the code of one architecture; nothing of it runs here. Either is hashed, and published by
the cache with one rename. Flags pass through a shell, so they come from the closed lists below and
from nowhere else.
"""

import dataclasses
import functools
import json
import platform
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from attnengine import headers, nvcc, ptx, settings
from attnengine.cache import Store
from attnengine.cache_entry import KERNEL, PTX, SCHEMA, canonical, plain_label, sha256, write_file
from attnengine.compiler import (
    CompileFailed,
    Compiler,
    compile_shared,
    find_compiler,
    inspect,
    is_plain_path,
    trial,
)
from attnengine.errors import BuildError
from attnengine.nvcc import DeviceCompiler, find_device_compiler

_CFLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    # GCC 12 crashes in this pass on some chains of masks; the kernels are vector code already.
    "-fno-tree-slp-vectorize",
    "-Wno-psabi",
)
_ISA_FLAGS = {
    "portable": ("-march=x86-64",),
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4",),
    "avx512_bf16": ("-march=x86-64-v4", "-mavx512bf16"),
}
# --as-needed comes ahead of the torch libraries that cpp_extension adds: none is then recorded.
_LDFLAGS = ("-shared", "-Wl,--as-needed")
# The device half only: no host code, so no CUDA library and no host object. PTX keeps the lines of
# the templates, by which the simulator and profilers report; it is the same code without them.
_NVCC_FLAGS = (
    "-ptx",
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-DNDEBUG",
    "-lineinfo",
)
_SYMBOLS = ("ae_info", "ae_workspace_bytes", "ae_launch")
_LOG_LINES = 40
_KEPT = (PTX, "build.log", "build.ninja", "templates", "cutlass")  # of a failed build


def templates_dir() -> Path:
    """The include root of generated units: templates/ in the installed package, else beside it."""
    package = Path(__file__).resolve().parent
    for folder in (package / "templates", package.parent / "templates"):
        if (folder / "common" / "abi.h").is_file():
            return folder
    raise BuildError(f"the kernel templates are missing: neither {package} nor its parent has them")


class Rejected(BuildError):
    """The compiler rejected the source itself: compiling it again would end the same way."""


def headers_digest(isa: str) -> str:
    """Hash of every template header that a unit of this target may include."""
    root = templates_dir()
    suffixes = (".h", ".cuh") if isa in settings.DEVICE_TARGETS else (".h",)
    return headers.digest(root, headers.listed(root, suffixes))


def abi_version() -> int:
    """The version of templates/common/abi.h, which modules report and the loader demands."""
    path = templates_dir() / "common" / "abi.h"
    found = _abi_of(path, path.stat().st_mtime_ns)
    if found is None:
        raise BuildError(f"{path} does not define AE_ABI_VERSION")
    return found


@functools.lru_cache(maxsize=4)
def _abi_of(path: Path, mtime_ns: int) -> int | None:
    version = re.search(r"^#define AE_ABI_VERSION (\d+)$", path.read_text(), re.MULTILINE)
    return int(version[1]) if version else None


def flags(isa: str) -> tuple[str, ...]:
    """Compiler flags for one of settings.ISAS on this machine's kind of processor, or for one of
    settings.DEVICE_TARGETS."""
    if isa in settings.DEVICE_TARGETS:
        return (*_NVCC_FLAGS, f"-arch={isa.replace('sm', 'compute')}")
    if isa.startswith("sm"):
        raise BuildError(
            f"{isa}: no CUDA kernels are compiled for this architecture; expected one of "
            f"{', '.join(settings.DEVICE_TARGETS)} (newer ones run its PTX), or use CPU tensors"
        )
    if isa not in settings.ISAS:
        raise BuildError(f"isa={isa!r}: expected one of {', '.join(settings.ISAS)}")
    if platform.machine().lower() in ("x86_64", "amd64"):
        return _CFLAGS + _ISA_FLAGS[isa]
    if isa != "portable":
        raise BuildError(f"isa={isa!r}: a {platform.machine()} compiler makes 'portable' only")
    return _CFLAGS


def build_id() -> str:
    """Names every module that this build of attnengine can use at all: ABI, templates and flags.

    What else decides a module, its source, is in its own name; a generator that has changed makes
    other sources, but the modules of the same sources stay right.
    """
    key = {
        "schema": SCHEMA,
        "abi": abi_version(),
        "templates": [headers_digest("portable"), headers_digest(settings.DEVICE_TARGETS[0])],
        "machine": platform.machine().lower(),
        "cflags": [_CFLAGS, _ISA_FLAGS, _NVCC_FLAGS],
        "ldflags": _LDFLAGS,
    }
    return sha256(canonical(key))


def runs_here(isa: str) -> bool:
    """Whether this processor has the instruction set, one of settings.ISAS."""
    from attnengine import _host  # only who compiles asks

    return settings.ISAS.index(isa) <= settings.ISAS.index(_host.cpu_isa())


@dataclass(frozen=True)
class Unit:
    """One module to be had: its source, and the two names under which it is looked for."""

    source: str
    isa: str  # one of settings.ISAS, or of settings.DEVICE_TARGETS for a CUDA unit
    label: str
    cflags: tuple[str, ...]
    abi: int
    content: str  # digest without the compiler: names prebuilt modules
    digest: str | None  # digest with the compiler: names cache entries; None without a compiler
    compiler: Compiler | DeviceCompiler | str  # or why there is none

    @property
    def file(self) -> str:
        """The name of its source in an entry."""
        return "kernel.cu" if self.isa in settings.DEVICE_TARGETS else "kernel.cpp"


def name_unit(source: str, isa: str, label: str) -> Unit:
    """Names a module by everything that can change its bits; torch's version is not among it."""
    cflags, abi, device = flags(isa), abi_version(), isa in settings.DEVICE_TARGETS
    compiler = find_device_compiler() if device else find_compiler()
    key = {
        "schema": SCHEMA,
        "abi": abi,
        "templates": headers_digest(isa),
        "source": sha256(source.encode()),
        "isa": isa,
        "machine": "gpu" if device else platform.machine().lower(),
        "cflags": cflags,
        "ldflags": () if device else _LDFLAGS,
    }
    content = sha256(canonical(key))
    digest = None
    if not isinstance(compiler, str):
        digest = sha256(canonical({**key, "compiler": compiler.identity()}))
    return Unit(source, isa, plain_label(label), cflags, abi, content, digest, compiler)


def compile_unit(
    store: Store, wanted: Unit, digest: str, compiler: Compiler | DeviceCompiler
) -> Path:
    """Compiles a unit in a staging folder of `store` and publishes it under `digest`; returns the
    path of its kernel. Raises BuildError (Rejected when the source is at fault), or OSError when
    the store cannot take it."""
    started = time.monotonic()
    with store.stage() as stage, _compile_folder(stage) as work:
        entry = stage / "entry"
        entry.mkdir(mode=0o700)
        (work / wanted.file).write_text(wanted.source)
        (work / "templates").symlink_to(templates_dir())
        commands = _commands(wanted, compiler)
        command = " && ".join(map(shlex.join, commands))
        seconds = {}
        try:
            if isinstance(compiler, Compiler):
                _compile_host(wanted, compiler, f"ae_{digest[:16]}", work, entry)
            else:
                seconds = _compile_device(wanted, compiler, commands, work, entry)
        except CompileFailed as failure:
            raise _failure(store, wanted, digest, command, work, failure, started) from None
        seconds["seconds"] = round(time.monotonic() - started, 3)
        write_file(entry / wanted.file, wanted.source.encode())
        record = {"command": command, "compiler": compiler.identity(), **seconds}
        write_file(entry / "cmd.json", json.dumps(record, indent=1).encode())
        write_file(entry / "build.log", f"{command}\nok, {seconds['seconds']} s\n".encode())
        facts = {
            "isa": wanted.isa,
            "abi": wanted.abi,
            "cflags": wanted.cflags,
            "content": wanted.content,
        }
        return store.publish(entry, digest, wanted.label, facts)


def _commands(wanted: Unit, compiler: Compiler | DeviceCompiler) -> list[list[str]]:
    """What is run in the folder of a unit's source (for a CPU unit, what amounts to it)."""
    if isinstance(compiler, Compiler):
        words = (*wanted.cflags, *_LDFLAGS, f"-I{templates_dir()}", wanted.file, "-o", KERNEL)
        return [[compiler.command, *words]]
    # Relative paths: they are what the line table and __FILE__ say.
    front = (f"-ccbin={compiler.host.command}", "-Itemplates", "-Icutlass", wanted.file, "-o", PTX)
    back = (f"-arch={wanted.isa}", "-v", PTX, "-o", ptx.CUBIN)
    return [
        [compiler.nvcc.command, *wanted.cflags, *front],
        [compiler.ptxas.command, *back],
    ]


def _compile_host(wanted: Unit, compiler: Compiler, name: str, work: Path, entry: Path) -> None:
    """Writes kernel.so into the entry, tried, or where it cannot run inspected."""
    data = compile_shared(
        compiler,
        work,
        work / wanted.file,
        work / "templates",
        name,
        wanted.cflags,
        _LDFLAGS,
        settings.build_timeout_s(),
    )
    write_file(entry / KERNEL, data)
    if runs_here(wanted.isa):
        trial(entry / KERNEL, wanted.abi, _SYMBOLS)
    else:
        inspect(entry / KERNEL, _SYMBOLS)


def _compile_device(
    wanted: Unit, compiler: DeviceCompiler, commands: list[list[str]], work: Path, entry: Path
) -> dict[str, float]:
    """Writes kernel.ptx, kernel.cubin and cuda.json into the entry; returns the seconds of each
    command."""
    manifest = ptx.source_manifest(wanted.source)
    (work / "cutlass").symlink_to(compiler.cutlass.include)
    started = time.monotonic()
    nvcc.run(commands[0], work, settings.build_timeout_s())
    text = ptx.portable((work / PTX).read_text(), work, compiler.home)
    names = ptx.entries(text)
    ptx.check_entries(names, manifest)
    (work / PTX).write_text(text)
    middle = time.monotonic()
    # In a folder without the sources: ptxas would write their sizes and times into the line table.
    apart = work / "apart"
    apart.mkdir(mode=0o700)
    (apart / PTX).write_text(text)
    log = nvcc.run(commands[1], apart, settings.build_timeout_s())
    needs = ptx.resources(log, names)
    done = time.monotonic()
    manifest |= {"target": wanted.isa, "abi": wanted.abi}
    manifest["entries"] = {name: dataclasses.asdict(need) for name, need in needs.items()}
    write_file(entry / PTX, text.encode())
    write_file(entry / ptx.CUBIN, (apart / ptx.CUBIN).read_bytes())
    write_file(entry / ptx.MANIFEST, json.dumps(manifest, indent=1).encode())
    return {"nvcc_seconds": round(middle - started, 3), "ptxas_seconds": round(done - middle, 3)}


@contextmanager
def _compile_folder(stage: Path) -> Iterator[Path]:
    """A folder inside the stage to compile in; elsewhere when ninja would misread its path."""
    if is_plain_path(stage):
        work = stage / "work"
        work.mkdir(mode=0o700)
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="attnengine-", ignore_cleanup_errors=True) as other:
        if not is_plain_path(other):
            raise BuildError(
                f"neither {stage} nor {other} is a path that ninja can read; set TMPDIR"
            )
        yield Path(other)


def _failure(
    store: Store,
    wanted: Unit,
    digest: str,
    command: str,
    work: Path,
    failure: CompileFailed,
    started: float,
) -> BuildError:
    seconds = time.monotonic() - started
    (work / "build.log").write_text(f"{command}\n{failure.reason}\n\n{failure.log}\n")
    if not settings.keep_failed():
        for path in work.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in (wanted.file, *_KEPT):
                path.unlink(missing_ok=True)
    try:
        kept = str(store.keep_failure(work, digest))
    except OSError as error:
        kept = f"(not kept: {error})"
    tail = "\n".join(f"    {line}" for line in failure.log.splitlines()[-_LOG_LINES:])
    message = (
        f"compiling {wanted.label!r} for {wanted.isa} failed after {seconds:.1f} s: "
        f"{failure.reason}\n"
        f"  command: {command}\n"
        f"  kept:    {kept} ({wanted.file}, build.log)\n"
        f"  last lines of the log:\n{tail or '    (none)'}"
    )
    return Rejected(message) if failure.final else BuildError(message)
