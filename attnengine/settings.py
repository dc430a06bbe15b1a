"""Every environment variable that attnengine reads, in one place, parsed and checked.

Values are read when asked for, never at import, so a test or a notebook may change them at any
time. A value that cannot be understood raises ValueError with the variable's name.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
"""Instruction sets that CPU modules are compiled for, weakest first."""
DEVICE_TARGETS = ("sm_80",)
"""Architectures that CUDA modules are compiled for; each also serves the newer ones, as PTX."""

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def _text(name: str) -> str | None:
    value = os.environ.get(name)
    return value if value else None


def _number(name: str, default: float) -> float:
    text = _text(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}={text!r}: expected a number >= 0; unset it for {default:g}")
    return value


def _flag(name: str) -> bool:
    text = os.environ.get(name, "").lower()
    if text not in _TRUE + _FALSE:
        raise ValueError(f"{name}={text!r}: expected 1 or 0")
    return text in _TRUE


def cache_dir() -> Path:
    """Root of the user's cache: ATTNENGINE_CACHE_DIR, else attnengine/ in the XDG cache folder."""
    own = _text("ATTNENGINE_CACHE_DIR")
    if own is not None:
        return Path(os.path.abspath(os.path.expanduser(own)))
    xdg = _text("XDG_CACHE_HOME")
    base = xdg if xdg and os.path.isabs(xdg) else os.path.expanduser("~/.cache")
    return Path(os.path.abspath(base)) / "attnengine"


def cache_limit_bytes() -> int:
    """ATTNENGINE_CACHE_LIMIT_MB (2048) in bytes; the least recently used entries go beyond it."""
    return int(_number("ATTNENGINE_CACHE_LIMIT_MB", 2048) * 2**20)


def aot_paths() -> tuple[Path, ...]:
    """ATTNENGINE_AOT_PATH: read-only folders of prebuilt modules, separated by os.pathsep."""
    text = os.environ.get("ATTNENGINE_AOT_PATH", "")
    return tuple(Path(os.path.abspath(part)) for part in text.split(os.pathsep) if part)


def jit_disabled() -> bool:
    """ATTNENGINE_DISABLE_JIT: never compile, use only what is prebuilt or already cached."""
    return _flag("ATTNENGINE_DISABLE_JIT")


def isa_override() -> str | None:
    """ATTNENGINE_ISA: one of ISAS instead of the best that this CPU has, or None."""
    text = _text("ATTNENGINE_ISA")
    if text is not None and text not in ISAS:
        raise ValueError(f"ATTNENGINE_ISA={text!r}: expected one of {', '.join(ISAS)}")
    return text


def compiler_choice() -> tuple[str, str] | None:
    """The C++ compiler that the user asked for, as (variable, value): ATTNENGINE_CXX, else CXX."""
    for name in ("ATTNENGINE_CXX", "CXX"):
        text = _text(name)
        if text is not None:
            return name, text
    return None


def cuda_home() -> tuple[str, str] | None:
    """The CUDA toolkit that the user points at, as (variable, value): CUDA_HOME, else CUDA_PATH."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        text = _text(name)
        if text is not None:
            return name, text
    return None


def cutlass_choice() -> str | None:
    """ATTNENGINE_CUTLASS: a folder with CUTLASS's headers, or None for the pip package's."""
    return _text("ATTNENGINE_CUTLASS")


def sync_debug() -> bool:
    """ATTNENGINE_SYNC_DEBUG: wait for each CUDA kernel, so that a fault names the one at fault."""
    return _flag("ATTNENGINE_SYNC_DEBUG")


def search_path() -> str:
    """PATH, on which compilers are looked for."""
    return os.environ.get("PATH", os.defpath)


def build_timeout_s() -> float:
    """ATTNENGINE_BUILD_TIMEOUT_S (300): a compile is killed, and a lock given up, after this."""
    return _number("ATTNENGINE_BUILD_TIMEOUT_S", 300)


def keep_failed() -> bool:
    """ATTNENGINE_KEEP_FAILED: keep everything of every failed build, not the last few logs."""
    return _flag("ATTNENGINE_KEEP_FAILED")


class _Exported:
    """Sets environment variables for the code inside, which reads them by itself. Threads that want
    the same values share them; one that wants others waits until they are restored. Nothing is
    touched when the environment already agrees."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders = 0
        self._current: dict[str, str] = {}
        self._saved: dict[str, str | None] = {}

    @contextmanager
    def __call__(self, variables: dict[str, str]) -> Iterator[None]:
        with self._changed:
            while self._holders and variables != self._current:
                self._changed.wait()
            if not self._holders:
                self._saved = {name: os.environ.get(name) for name in variables}
                self._current = dict(variables)
                for name, value in variables.items():
                    if self._saved[name] != value:
                        os.environ[name] = value
            self._holders += 1
        try:
            yield
        finally:
            with self._changed:
                self._holders -= 1
                if not self._holders:
                    for name, old in self._saved.items():
                        if old is None:
                            os.environ.pop(name, None)
                        elif os.environ.get(name) != old:
                            os.environ[name] = old
                    self._changed.notify_all()

    def forget(self) -> None:
        """As in a process that holds nothing: a forked child has no other thread."""
        self._changed, self._holders = threading.Condition(), 0


exported = _Exported()
"""Variables that torch's cpp_extension reads."""
exported_isa = _Exported()
"""ATTNENGINE_ISA, apart: what runs meanwhile may compile, which exports other variables."""


def child_environment(without: tuple[str, ...] = (), **changes: str) -> dict[str, str]:
    """A copy of the environment for a child process, some variables changed or left out."""
    kept = {name: value for name, value in os.environ.items() if name not in without}
    return {**kept, **changes}


def _after_fork() -> None:
    exported.forget()
    exported_isa.forget()


os.register_at_fork(after_in_child=_after_fork)
