"""CUDA C++ of the simulator's tests, compiled by the toolkit that kernels are compiled by."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import pytest

from attnengine import nvcc

HERE = Path(__file__).parent
COMPILER = nvcc.find_device_compiler()
needs_nvcc = pytest.mark.skipif(isinstance(COMPILER, str), reason=str(COMPILER))


@functools.cache
def ptx_of(source: str, folder: Path, *options: str, target: int = 80) -> str:
    """The PTX of a source beside this file; ``folder`` takes what the compiler writes."""
    assert not isinstance(COMPILER, str), COMPILER
    out = folder / f"{Path(source).stem}{target}.ptx"
    command = [COMPILER.nvcc.command, f"-ccbin={COMPILER.host.command}", "-ptx", "-std=c++17"]
    command += [f"-arch=compute_{target}", *options, str(HERE / source), "-o", str(out)]
    subprocess.run(command, check=True)
    return out.read_text()
