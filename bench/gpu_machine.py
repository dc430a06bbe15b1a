"""The machine that a run was on: what it is, its clocks, and ceilings measured on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import torch

from . import gpu_peers
from .gpu_clock import Stopwatch, stopwatch, take_turns

MATMUL = 8192  # m, n and k
BUFFER = 4 * 2**30  # bytes, at most a sixteenth of the device's memory
EXP2_LOOP = 512  # dependent exponentials per element: the arithmetic dwarfs the traffic
EXP2_SOURCE = """
template <typename T> T chain(T x) {
  for (int i = 0; i < LOOP; ++i) {
    asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    x = -x;
  }
  return x;
}
"""
CLOCKS = (
    "clocks.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.draw",
    "clocks_throttle_reasons.active",
)


def asked(command: list[str]) -> str:
    """First lines of a tool's answer; empty where it does not answer."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def smi(*fields: str) -> dict[str, str]:
    """Fields of the first GPU, as the driver's tool prints them."""
    answer = asked(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"])
    values = answer.splitlines()[0].split(",") if answer else []
    return {f: v.strip() for f, v in zip(fields, values, strict=False)}


def clocks() -> dict[str, str]:
    """Now."""
    return smi(*CLOCKS)


def facts() -> dict[str, str]:
    """What the numbers depend on."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda of torch": str(torch.version.cuda),
        "cpu cores": str(os.cpu_count()),
    }
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": p.name,
            "compute capability": f"{p.major}.{p.minor}",
            "multiprocessors": str(p.multi_processor_count),
            "memory": f"{p.total_memory / 2**30:.0f} GiB",
            "L2": f"{getattr(p, 'L2_cache_size', 0) / 2**20:.0f} MiB",
            "cudnn": str(torch.backends.cudnn.version()),
        }
        limits = smi("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
        found |= {f"nvidia-smi {name}": value for name, value in limits.items()}
    nvcc = asked(["nvcc", "--version"]).splitlines()
    found["nvcc"] = nvcc[-2] if len(nvcc) > 1 else "not on the PATH"
    found |= {f"peer {name}": version for name, version in gpu_peers.installed().items()}
    found["attnengine"] = _own_version()
    return found


def _own_version() -> str:
    try:
        import attnengine as ae

        return ae.__version__
    except Exception as error:  # not installed, or built for another torch: baselines still run
        return f"cannot be imported: {type(error).__name__}: {error}"


def measure(device: str = "cuda", quick: bool = False) -> dict[str, Any]:
    """Ceilings: matmul FLOP/s on random data, copy and read bytes/s, exponentials/s; with the text
    of an error in place of a number that could not be measured."""
    watch, rates = stopwatch(device), dict[str, Any]()
    n = 256 if quick else MATMUL
    for name, measured in (
        ("matmul bf16", lambda: matmul(watch, device, torch.bfloat16, n)),
        ("matmul fp16", lambda: matmul(watch, device, torch.float16, n)),
        ("copy", lambda: copy(watch, device, quick)),
        ("read", lambda: read(watch, device, quick)),
        ("exp2", lambda: exp2(watch, device)),
    ):
        try:
            rates[name] = measured()
        except Exception as error:
            rates[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return {"ceilings": rates, "clocks": clocks()}


def best(watch: Stopwatch, run: Callable[[], object], budget_s: float = 0.5) -> float:
    """Median seconds of a call."""
    return take_turns({"run": run}, watch, budget_s)["run"].median


def matmul(watch: Stopwatch, device: str, dtype: torch.dtype, n: int) -> float:
    """FLOP/s of a product of square matrices."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * n**3 / best(watch, lambda: torch.mm(a, b, out=out))


def _elements(device: str, quick: bool) -> int:
    """fp32 numbers in a buffer."""
    if quick:
        return 2**18
    return int(min(BUFFER, gpu_peers.memory(torch.device(device)) / 16)) // 4


def copy(watch: Stopwatch, device: str, quick: bool) -> float:
    """Bytes/s, read and written both counted."""
    source = torch.randn(_elements(device, quick), device=device)
    target = torch.empty_like(source)
    return 2.0 * 4 * source.numel() / best(watch, lambda: target.copy_(source))


def read(watch: Stopwatch, device: str, quick: bool) -> float:
    """Bytes/s of a reduction to one number."""
    source = torch.randn(_elements(device, quick), device=device)
    return 4.0 * source.numel() / best(watch, lambda: source.sum())


def exp2(watch: Stopwatch, device: str) -> float:
    """ex2.approx per second, of all multiprocessors."""
    from torch.cuda.jiterator import _create_jit_fn

    chain = _create_jit_fn(EXP2_SOURCE.replace("LOOP", str(EXP2_LOOP)))
    x = torch.rand(2**22, device=device)
    return x.numel() * EXP2_LOOP / best(watch, lambda: chain(x))


def ceiling_lines(rates: dict[str, Any]) -> list[str]:
    """One printable line per ceiling."""
    units = {"matmul": (1e12, "TFLOP/s"), "copy": (1e12, "TB/s"), "read": (1e12, "TB/s")}
    lines = []
    for name, value in rates.items():
        scale, unit = units.get(name.split()[0], (1e12, "T/s"))
        text = value if isinstance(value, str) else f"{value / scale:.4g} {unit}"
        lines.append(f"{name}: {text}")
    return lines
