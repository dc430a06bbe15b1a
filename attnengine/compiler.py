"""The host C++ compiler: which one, exactly which version, and one compile with a time limit.

Programs are identified here for the CUDA toolkit too, and failed compiles told apart.
"""

import errno
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from attnengine import settings
from attnengine.cache import text_get, text_put
from attnengine.cache_entry import canonical, sha256
from attnengine.elf import read_shared_object

_NAMES = ("c++", "g++", "clang++")  # c++ first: cpp_extension's own default
_WRAPPERS = ("ccache", "sccache", "distcc", "env")
# cpp_extension writes paths into a ninja file, where $ and : have a meaning, and into a shell line.
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9_./@+=,~ -]*")
# What g++, clang++, nvcc and ptxas say: of anything, of a killed part of them, of the source.
_ERROR = re.compile(r"\berror\s*: |\bfatal\s*: ")
_KILLED = re.compile(r"Killed signal terminated program|died due to signal")
_AT_FAULT = re.compile(r": error: |^ptxas .*(?:error|fatal)\s*: ", re.MULTILINE)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler or a tool beside it: the command as found, and what identifies its exact
    version."""

    command: str  # absolute path as found on PATH
    path: str  # the same with links resolved
    bytes: int
    mtime_ns: int
    version: str  # everything that it prints when asked for its version

    def identity(self) -> dict[str, str | int]:
        """What goes into a kernel's key."""
        return {
            "path": self.path,
            "bytes": self.bytes,
            "mtime_ns": self.mtime_ns,
            "version": self.version,
        }


class CompileFailed(Exception):
    """A compile that made no shared object: the reason, and all that the compiler said."""

    def __init__(self, reason: str, log: str, final: bool) -> None:
        super().__init__(reason)
        self.reason, self.log = reason, log
        self.final = final  # the source is at fault: trying again cannot help


def is_plain_path(path: Path | str) -> bool:
    """Whether a path means the same to ninja, to a shell and to us."""
    return _PLAIN_PATH.fullmatch(str(path)) is not None


def find_compiler() -> Compiler | str:
    """The compiler to use, or a sentence that says where it was looked for: ATTNENGINE_CXX, else
    CXX, else c++, g++ or clang++ on PATH."""
    choice, places = settings.compiler_choice(), settings.search_path()
    if choice is not None:
        variable, value = choice
        words = [value, *_program_words(value)]
        command = next(filter(None, (shutil.which(word, path=places) for word in words)), None)
        if command is None:
            return f"no C++ compiler: {variable}={value!r} is not an executable file or on {places}"
    else:
        command = next(filter(None, (shutil.which(name, path=places) for name in _NAMES)), None)
        if command is None:
            return (
                f"no C++ compiler: ATTNENGINE_CXX and CXX are unset, and none of "
                f"{', '.join(_NAMES)} is on PATH={places}"
            )
    command = os.path.abspath(command)
    if not is_plain_path(command):
        return f"the path of the C++ compiler has characters that ninja would change: {command!r}"
    try:
        return identified(command, "-v")
    except (OSError, subprocess.SubprocessError) as error:
        return f"the C++ compiler {command} does not run: {error}"


def identified(command: str, *question: str, without: tuple[str, ...] = ()) -> Compiler:
    """A program by its absolute path; ``question`` are the arguments that make it print its
    version, ``without`` environment variables that would change the answer. Raises OSError or
    SubprocessError when it does not run."""
    path = os.path.realpath(command)
    status = os.stat(path)
    return _identified(command, path, status.st_size, status.st_mtime_ns, question, without)


def _program_words(value: str) -> list[str]:
    """The program in a CXX such as `ccache g++ -m64`; flags in it are not taken over."""
    try:
        words = shlex.split(value)
    except ValueError:
        return []
    return [word for word in words if word not in _WRAPPERS and word[0:1] != "-"][:1]


@functools.lru_cache(maxsize=16)
def _identified(
    command: str,
    path: str,
    size: int,
    mtime_ns: int,
    question: tuple[str, ...],
    without: tuple[str, ...],
) -> Compiler:
    digest = sha256(canonical([command, path, size, mtime_ns, *question]))
    version = text_get("compiler", digest)
    if version is None:
        answer = subprocess.run(
            [command, *question],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            env=settings.child_environment(without, LC_ALL="C"),
            check=True,
        )
        version = (answer.stderr + answer.stdout).decode(errors="replace")
        text_put("compiler", digest, version)
    return Compiler(command, path, size, mtime_ns, version)


def compile_shared(
    compiler: Compiler,
    folder: Path,
    source: Path,
    include: Path,
    name: str,
    cflags: tuple[str, ...],
    ldflags: tuple[str, ...],
    timeout_s: float,
) -> bytes:
    """Compiles one source file in a private folder and returns the shared object's bytes.

    Every path must be plain (is_plain_path) and every flag a constant of ours. Raises
    CompileFailed, or OSError when the folder cannot take what the compiler writes.
    """
    from torch.utils import cpp_extension  # 0.05 s, and only when something is compiled

    needed = _ninja_path()
    if Path(os.path.realpath(shutil.which("c++") or "")) != Path(compiler.path) or (
        settings.compiler_choice() is not None
    ):
        needed["CXX"] = compiler.command
    overdue = threading.Event()

    def stop() -> None:
        overdue.set()
        for _ in range(50):
            if not _kill_inside(folder):
                break
            time.sleep(0.02)

    watchdog = threading.Timer(timeout_s, stop)
    watchdog.daemon = True
    with settings.exported(needed):
        watchdog.start()
        try:
            # is_standalone: the result is not loaded into this process, which would happen before
            # anything about it has been checked; -shared makes it a library all the same.
            built = cpp_extension.load(
                name=name,
                sources=[str(source)],
                extra_cflags=list(cflags),
                extra_ldflags=list(ldflags),
                extra_include_paths=[str(include)],
                build_directory=str(folder),
                is_python_module=False,
                is_standalone=True,
            )
            data = Path(built).read_bytes()
        except RuntimeError as error:
            raise failure(str(error), overdue.is_set(), timeout_s) from None
        finally:
            watchdog.cancel()
    # cpp_extension adds torch's library folder as the run path of every link.
    run_path = cpp_extension.TORCH_LIB_PATH.encode() + b"\0"
    return data.replace(run_path, bytes(len(run_path)))


def _ninja_path() -> dict[str, str]:
    """PATH with the ninja of Python's own package, when none is installed otherwise."""
    places = settings.search_path()
    if shutil.which("ninja", path=places) is not None:
        return {}
    try:
        import ninja
    except ImportError:
        raise CompileFailed("ninja is not installed: pip install ninja", "", False) from None
    return {"PATH": f"{ninja.BIN_DIR}{os.pathsep}{places}"}


def failure(log: str, overdue: bool, timeout_s: float) -> Exception:
    """What a failed compile was: CompileFailed, or OSError when the place was full."""
    if overdue:
        reason = (
            f"stopped after {timeout_s:g} s; set ATTNENGINE_BUILD_TIMEOUT_S to allow it more time"
        )
        return CompileFailed(reason, log, final=False)
    for text in ("No space left on device", "Disk quota exceeded", "Read-only file system"):
        if text in log:
            return OSError(errno.ENOSPC, f"{text} while compiling: {log[-2000:]}")
    if not _ERROR.search(log) or _KILLED.search(log):
        return CompileFailed("the compiler was killed (out of memory?)", log, final=False)
    return CompileFailed("the compiler rejected it", log, final=_AT_FAULT.search(log) is not None)


def _kill_inside(folder: Path) -> bool:
    """Kills the processes that work in a folder: ninja and its compilers. True if there were any
    (a new one may have started meanwhile)."""
    found = False
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd") == str(folder):
                os.kill(int(process.name), signal.SIGKILL)
                found = True
        except OSError:
            continue  # gone, or another user's
    return found


def inspect(library: Path, symbols: tuple[str, ...]) -> None:
    """Checks a new module by its ELF tables, for an instruction set that cannot run here: its
    symbols, that all it refers to was found when it was linked, and that it does not bring torch's
    libraries along. Raises CompileFailed."""
    try:
        found = read_shared_object(library.read_bytes())
    except ValueError as error:
        raise CompileFailed(f"the module does not load: {error}", "", final=False) from None
    missing = [name for name in symbols if name not in found.defined]
    if missing or found.unbound:
        text = ", ".join([*missing, *found.unbound])
        raise CompileFailed(f"the module has undefined symbols: {text}", "", final=True)
    if any(name.startswith(("libtorch", "libc10")) for name in found.needed):
        raise CompileFailed("the module depends on torch's libraries", "", final=True)


_TRIAL = """
import ctypes, json, sys
library = ctypes.CDLL(sys.argv[1])
for name in sys.argv[2:]:
    getattr(library, name)
library.ae_info.restype = ctypes.POINTER(ctypes.c_uint32)
try:
    maps = open("/proc/self/maps").read()
except OSError:
    maps = ""
torch = any(name in maps for name in ("/libtorch", "/libc10"))
print(json.dumps({"abi": library.ae_info()[0], "torch": torch}))
"""


def trial(library: Path, abi: int, symbols: tuple[str, ...]) -> None:
    """Loads a new module in a child process, where a crash harms nobody, and checks its symbols,
    its ABI version, and that it does not bring torch's libraries along. Raises CompileFailed."""
    if not sys.executable:
        return  # an embedded interpreter cannot be started again
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRIAL, str(library), *symbols],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileFailed(f"the module could not be tried: {error}", "", False) from None
    if answer.returncode != 0:
        log = answer.stderr.strip()
        raise CompileFailed("the module does not load", log, final=False)
    facts = json.loads(answer.stdout)
    if facts["abi"] != abi:
        raise CompileFailed(f"the module has ABI {facts['abi']}, expected {abi}", "", final=True)
    if facts["torch"]:
        raise CompileFailed("the module depends on torch's libraries", "", final=True)
