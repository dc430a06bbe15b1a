"""Measured peaks of this machine: peaks.cpp, compiled on the fly for the CPU it runs on."""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from attnengine.compiler import Compiler, find_compiler

SOURCE = Path(__file__).with_name("peaks.cpp")


@dataclass(frozen=True)
class Peaks:
    """FLOP/s and bytes/s of `threads` busy threads; `bf16_flops` is 0 without bf16 dot products."""

    threads: int
    fp32_flops: float
    bf16_flops: float
    read_bytes: float

    def flops(self, dtype: torch.dtype) -> float:
        """The matmul peak that a kernel of this operand dtype is held against."""
        if dtype is torch.bfloat16 and self.bf16_flops:
            return self.bf16_flops
        return self.fp32_flops

    def line(self) -> str:
        """One printable line."""
        bf16 = f"{self.bf16_flops / 1e9:.0f} GFLOP/s" if self.bf16_flops else "not available"
        return (
            f"{self.threads} thread(s): fp32 FMA {self.fp32_flops / 1e9:.0f} GFLOP/s, "
            f"bf16 dot {bf16}, streaming read {self.read_bytes / 1e9:.1f} GB/s"
        )


def measure(thread_counts: list[int]) -> list[Peaks]:
    """Compile peaks.cpp with the compiler that kernels are built with; run it once per count."""
    compiler = find_compiler()
    if not isinstance(compiler, Compiler):
        raise RuntimeError(compiler)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "peaks"
        command = [compiler.command, "-O3", "-march=native", "-std=c++17", "-pthread", str(SOURCE)]
        subprocess.run([*command, "-o", str(binary)], check=True)
        measured = []
        for threads in thread_counts:
            text = subprocess.run(
                [str(binary), str(threads)], check=True, capture_output=True, text=True
            ).stdout
            measured.append(Peaks(threads=threads, **json.loads(text)))
    return measured
