"""Latency of the first result, each sample in its own process: compile (cold) and load (warm)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .report import Row
from .runner import Samples

# Prints the seconds from `import torch` done to the first output, and the part after the import of
# attnengine: what a new spec costs in a process that already uses the engine.
PROGRAM = """
import json, time, torch
q = torch.randn(1, 8, 128, 64)
t0 = time.perf_counter()
import attnengine as ae
t1 = time.perf_counter()
spec = ae.AttentionSpec(
    score_mod=lambda score, b, h, q_idx, kv_idx: score - 0.0625 * (q_idx - kv_idx).abs(),
    mask_mod=lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < 96),
)
out = ae.attention(q, q, q, spec)
assert bool(out.isfinite().all())
t2 = time.perf_counter()
print(json.dumps({"beyond_torch": t2 - t0, "spec": t2 - t1}))
"""


def first_output(cache: Path, threads: int) -> dict[str, float]:
    """Run PROGRAM in a fresh process on the cache folder `cache`."""
    env = {**os.environ, "ATTNENGINE_CACHE_DIR": str(cache), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(repeats: int, threads: int, wanted: Callable[[str], bool]) -> list[Row]:
    """Rows `startup/...` in seconds: a new spec on an empty cache, and a warm process."""
    rows: list[Row] = []
    cold: list[float] = []
    warm: list[float] = []
    if not (wanted("startup/new spec") or wanted("startup/warm process")):
        return rows
    with tempfile.TemporaryDirectory() as folder:
        for i in range(repeats):
            cache = Path(folder) / str(i)
            cache.mkdir()
            cold.append(first_output(cache, threads)["spec"])
            warm.append(first_output(cache, threads)["beyond_torch"])
    for name, times, bar in (("new spec", cold, 6.0), ("warm process", warm, 0.3)):
        if wanted(f"startup/{name}"):
            samples = Samples(tuple(times))
            rows.append(
                Row(
                    name=f"startup/{name}",
                    unit="s",
                    ours=samples.median,
                    spread=samples.spread,
                    ratio=samples.median,
                    bar=bar,
                    at_least=False,
                )
            )
    return rows
