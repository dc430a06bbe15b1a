"""Latency of the first result, each sample in its own process: compile (cold) and load (warm)."""

from __future__ import annotations

import tempfile
from pathlib import Path

from . import child
from .rows import Row
from .runner import Samples
from .session import Session

BARS = {"new spec": 6.0, "warm process": 0.3}  # seconds

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
    return child.run(PROGRAM, threads=threads, ATTNENGINE_CACHE_DIR=str(cache))


def measure(session: Session) -> None:
    """Rows `startup/...` in seconds: a new spec on an empty cache, and a warm process."""
    if any(session.wanted(f"startup/{name}") for name in BARS):
        session.attempt("startup", lambda: _measure(session))


def _measure(session: Session) -> list[Row]:
    cold: list[float] = []
    warm: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(1 if session.quick else 3):
            cache = Path(folder) / str(i)
            cache.mkdir()
            cold.append(first_output(cache, session.threads)["spec"])
            warm.append(first_output(cache, session.threads)["beyond_torch"])
    rows: list[Row] = []
    for name, times in (("new spec", cold), ("warm process", warm)):
        if session.wanted(f"startup/{name}"):
            samples = Samples(tuple(times))
            rows.append(
                Row(
                    name=f"startup/{name}",
                    unit="s",
                    ours=samples.median,
                    spread=samples.spread,
                    ratio=samples.median,
                    bar=BARS[name],
                    at_least=False,
                    ratio_unit="s",
                )
            )
    return rows
