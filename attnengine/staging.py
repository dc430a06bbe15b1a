"""What is compiled, under which name and with which flags, and the compile itself.

The compile is torch.utils.cpp_extension.load's, but only inside a staging folder of ours: its own
lock hangs after a kill, its cache reuses stale objects and it loads half-written files. What it
makes is tried in a child process, hashed, and published by the cache with one rename. Its flags
pass through a shell, so they come from the closed lists below and from nowhere else.
"""

import json
import os
import platform
import re
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from attnengine import settings
from attnengine.cache import Store
from attnengine.cache_entry import KERNEL, SCHEMA, canonical, plain_label, sha256, write_file
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
_SYMBOLS = ("ae_info", "ae_workspace_bytes", "ae_launch")
_LOG_LINES = 40


def templates_dir() -> Path:
    """The include root of generated units: templates/ in the installed package, else beside it."""
    package = Path(__file__).resolve().parent
    for folder in (package / "templates", package.parent / "templates"):
        if (folder / "common" / "abi.h").is_file():
            return folder
    raise BuildError(f"the kernel templates are missing: neither {package} nor its parent has them")


class Rejected(BuildError):
    """The compiler rejected the source itself: compiling it again would end the same way."""


@dataclass(frozen=True)
class Headers:
    """What the templates contain: one hash over all headers, and the ABI version they define."""

    digest: str
    abi: int


_headers: tuple[object, Headers] | None = None


def headers() -> Headers:
    """Hash of every template header, computed again only when a file's size or time changed."""
    global _headers
    root = templates_dir()
    files = []
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            if name.endswith(".h"):
                path = os.path.join(folder, name)
                status = os.stat(path)
                files.append((path, status.st_size, status.st_mtime_ns))
    known = _headers
    if known is not None and known[0] == files:
        return known[1]
    contents = [
        (os.path.relpath(path, root), sha256(Path(path).read_bytes())) for path, _, _ in files
    ]
    text = (root / "common" / "abi.h").read_text()
    version = re.search(r"^#define AE_ABI_VERSION (\d+)$", text, re.MULTILINE)
    if version is None:
        raise BuildError(f"{root}/common/abi.h does not define AE_ABI_VERSION")
    found = Headers(sha256(canonical(sorted(contents))), int(version[1]))
    _headers = (files, found)
    return found


def flags(isa: str) -> tuple[str, ...]:
    """Compiler flags for one of settings.ISAS on this machine's kind of processor."""
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
    tree = headers()
    key = {
        "schema": SCHEMA,
        "abi": tree.abi,
        "templates": tree.digest,
        "machine": platform.machine().lower(),
        "cflags": [_CFLAGS, _ISA_FLAGS],
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
    isa: str
    label: str
    cflags: tuple[str, ...]
    abi: int
    content: str  # digest without the compiler: names prebuilt modules
    digest: str | None  # digest with the compiler: names cache entries; None without a compiler
    compiler: Compiler | str  # or why there is none


def name_unit(source: str, isa: str, label: str) -> Unit:
    """Names a module by everything that can change its bits; torch's version is not among it."""
    cflags, tree, compiler = flags(isa), headers(), find_compiler()
    key = {
        "schema": SCHEMA,
        "abi": tree.abi,
        "templates": tree.digest,
        "source": sha256(source.encode()),
        "isa": isa,
        "machine": platform.machine().lower(),
        "cflags": cflags,
        "ldflags": _LDFLAGS,
    }
    content = sha256(canonical(key))
    digest = None
    if isinstance(compiler, Compiler):
        digest = sha256(canonical({**key, "compiler": compiler.identity()}))
    return Unit(source, isa, plain_label(label), cflags, tree.abi, content, digest, compiler)


def compile_unit(store: Store, wanted: Unit, digest: str, compiler: Compiler) -> Path:
    """Compiles a unit in a staging folder of `store` and publishes it under `digest`; returns the
    path of its kernel.so. Raises BuildError (Rejected when the source is at fault), or OSError when
    the store cannot take it."""
    started = time.monotonic()
    with store.stage() as stage, _compile_folder(stage) as work:
        entry = stage / "entry"
        entry.mkdir(mode=0o700)
        source, include = work / "kernel.cpp", work / "templates"
        source.write_text(wanted.source)
        include.symlink_to(templates_dir())
        command = " ".join(
            shlex.quote(word)
            for word in (
                compiler.command,
                *wanted.cflags,
                *_LDFLAGS,
                f"-I{templates_dir()}",
                "kernel.cpp",
                "-o",
                KERNEL,
            )
        )
        try:
            data = compile_shared(
                compiler,
                work,
                source,
                include,
                f"ae_{digest[:16]}",
                wanted.cflags,
                _LDFLAGS,
                settings.build_timeout_s(),
            )
            write_file(entry / KERNEL, data)
            if runs_here(wanted.isa):
                trial(entry / KERNEL, wanted.abi, _SYMBOLS)
            else:
                inspect(entry / KERNEL, _SYMBOLS)
        except CompileFailed as failure:
            raise _failure(store, wanted, digest, command, work, failure, started) from None
        seconds = round(time.monotonic() - started, 3)
        write_file(entry / "kernel.cpp", wanted.source.encode())
        record = {"command": command, "compiler": compiler.identity(), "seconds": seconds}
        write_file(entry / "cmd.json", json.dumps(record, indent=1).encode())
        write_file(entry / "build.log", f"{command}\nok, {seconds} s\n".encode())
        facts = {
            "isa": wanted.isa,
            "abi": wanted.abi,
            "cflags": wanted.cflags,
            "content": wanted.content,
        }
        return store.publish(entry, digest, wanted.label, facts)


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
            if path.name not in ("kernel.cpp", "build.log", "build.ninja", "templates"):
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
        f"  kept:    {kept} (kernel.cpp, build.log)\n"
        f"  last lines of the log:\n{tail or '    (none)'}"
    )
    return Rejected(message) if failure.final else BuildError(message)
