"""Measurements that need a process of their own: a Python program that prints one JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def run(program: str, *arguments: object, threads: int, **env: str) -> dict[str, Any]:
    """The JSON of the program's last line of output. Raises RuntimeError with the last line of its
    errors when it fails."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), **env},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(done.stdout.splitlines()[-1])
