"""Builds libptxsim.so from the sources beside this file, with ninja, when they have changed."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Contraction would round once where PTX rounds twice. Nobody looks at floating-point exceptions,
# and a loop that may raise them out of order is one that vectorises.
FLAGS = (
    "-std=c++20 -O2 -ftree-vectorize -march=native -ffp-contract=off -fno-math-errno "
    "-fno-trapping-math -fPIC -Wall -Wextra"
)


def _machine() -> str:
    """-march=native means another thing on another processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith("flags")), "")


def _rules(sources: list[Path]) -> str:
    objects = " ".join(f"{s.stem}.o" for s in sources)
    return "\n".join(
        [
            "rule cc",
            f"  command = g++ {FLAGS} -I{ROOT}/csrc -I{HERE} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",  # into its place at once: a process may have the old one loaded
            "  command = g++ -shared $in -o $out.new -pthread -Wl,--no-undefined"
            " && mv $out.new $out",
            *(f"build {s.stem}.o: cc {s}" for s in sources),
            f"build libptxsim.so: link {objects}",
            "",
        ]
    )


@functools.cache
def library_path() -> Path:
    key = hashlib.sha256(_machine().encode()).hexdigest()[:8]
    folder = ROOT / "build" / f"ptxsim-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    rules = _rules(sorted(HERE.glob("*.cpp")))
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of pytest-xdist ask at the same time
        file = folder / "build.ninja"
        if not file.exists() or file.read_text() != rules:
            file.write_text(rules)
        ninja = [sys.executable, "-m", "ninja", "-C", str(folder)]
        built = subprocess.run(ninja, capture_output=True, text=True)
    if built.returncode != 0:
        raise RuntimeError(f"libptxsim.so does not build:\n{built.stdout[-8000:]}{built.stderr}")
    return folder / "libptxsim.so"
