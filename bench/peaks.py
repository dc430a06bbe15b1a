"""Measured peaks of this machine: peaks.cpp, compiled on the fly for the CPU it runs on."""

from __future__ import annotations

import ctypes
import functools
import statistics
import subprocess
import tempfile
import time
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


@functools.cache
def library() -> ctypes.CDLL:
    """peaks.cpp, built by the compiler that kernels are built with."""
    compiler = find_compiler()
    if not isinstance(compiler, Compiler):
        raise RuntimeError(compiler)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "peaks.so"
        options = ["-O3", "-march=native", "-std=c++17", "-pthread", "-shared", "-fPIC"]
        command = [compiler.command, *options, str(SOURCE), "-o", str(binary)]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(binary))  # stays mapped when the file is gone
    loaded.peaks.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_double)]
    loaded.peaks.restype = None
    loaded.read_once.argtypes = [ctypes.c_int]
    loaded.read_once.restype = ctypes.c_double
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.read_blocks.argtypes = [ctypes.c_int, pointer, pointer, number, pointer, number]
    loaded.read_blocks.restype = ctypes.c_double
    loaded.release_buffers.argtypes = []
    loaded.release_buffers.restype = None
    return loaded


class QuietRead:
    """A contestant of interleaved rounds that streams large buffers. It waits until the threads of
    a pool have stopped spinning, which would slow a plain read by a fifth, and times itself."""

    PAUSE_S = 0.03

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.bytes = library().read_once(threads)  # first touch
        self.seconds: list[float] = []

    def __call__(self) -> None:
        time.sleep(self.PAUSE_S)
        start = time.perf_counter()
        library().read_once(self.threads)
        self.seconds.append(time.perf_counter() - start)

    @property
    def rate(self) -> float:
        """Median bytes/s."""
        return self.bytes / statistics.median(self.seconds)


def measure(thread_counts: list[int], bursts: int = 3, pause_s: float = 0.5) -> list[Peaks]:
    """The best rates of several bursts of seven repetitions per thread count. The pauses keep one
    moment of other load from lowering a peak, and so from flattering every share of it."""
    best = {threads: [0.0, 0.0, 0.0] for threads in thread_counts}
    for burst in range(bursts):
        time.sleep(pause_s if burst else 0.0)
        for threads in thread_counts:
            rates = (ctypes.c_double * 3)()
            library().peaks(threads, rates)
            best[threads] = [max(pair) for pair in zip(best[threads], rates, strict=True)]
    library().release_buffers()
    return [Peaks(threads, *rates) for threads, rates in best.items()]
