"""A small module to compile, a compiler that counts, and new processes, for tests of the build."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attnengine import build
from attnengine.cache import Store

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

EXPORT = 'extern "C" __attribute__((visibility("default"))) '


def tiny(number: int = 7, abi: str = "AE_ABI_VERSION") -> str:
    """A module of a few lines that answers with a number."""
    return (
        '#include "common/abi.h"\n'
        f"{EXPORT}const ae_module_info* ae_info(void) {{\n"
        f"  static const ae_module_info info = {{{abi}, sizeof(ae_params)}};\n  return &info;\n}}\n"
        f"{EXPORT}int64_t ae_workspace_bytes(const ae_params*) {{ return {number}; }}\n"
        f"{EXPORT}int32_t ae_launch(const ae_params*, void*, ae_parallel_for) {{ return 0; }}\n"
    )


def answer(path: Path) -> int:
    function = ctypes.CDLL(str(path)).ae_workspace_bytes
    function.restype = ctypes.c_int64
    return int(function(None))


class Work:
    """A fresh cache and a compiler that counts its compiles and can be told to misbehave."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache = root, root / "cache"
        self.cxx, self.log, self.mood = root / "g++", root / "compiles", root / "mood"
        self.mood.write_text("")
        self.cxx.write_text(
            f"#!/bin/sh\nmood=$(cat '{self.mood}')\n"
            'case " $* " in *" -c "*)\n'
            f"  echo compile >> '{self.log}'\n"
            '  case "$mood" in\n'
            "    slow) sleep 30 ;;\n"
            "    killed) kill -9 $$ ;;\n"
            '    full) case "$PWD" in *cache*)\n'
            '      echo "fatal error: error writing: No space left on device" >&2; exit 1 ;;\n'
            "    esac ;;\n"
            f'  esac ;;\nesac\nexec {shutil.which("c++")} "$@"\n'
        )
        self.cxx.chmod(0o755)

    @property
    def compiles(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    @property
    def store(self) -> Store:
        return Store(self.cache)


def run_python(program: str, **variables: str) -> subprocess.Popen[str]:
    """A new process, in a group of its own, with the repository's attnengine."""
    root = str(Path(build.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": root, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
