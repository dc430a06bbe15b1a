"""A process that works on the device for `python -m bench.gpu`: one JSON job a line, one answer.

What a kernel under test does to it (a fault, a hang) costs one job, not the run. Jobs:
{"do": "machine" | "suite" | "build" | "time", ...arguments}. Answers: {"ok": true, ...} or
{"ok": false, "error": text, "fatal": whether the device's context is lost}.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from . import gpu_machine, gpu_suite, gpu_timing

JOBS: dict[str, Callable[..., Any]] = {
    "machine": gpu_machine.measure,
    "suite": gpu_suite.check,
    "build": gpu_suite.build_timed,
    "time": gpu_timing.measure,
}
LONGEST_TEXT = 4000  # characters of an error; a compiler's log ends with what matters


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """What one job gives."""
    arguments = {name: value for name, value in job.items() if name != "do"}
    try:
        return {"ok": True, **JOBS[job["do"]](**arguments)}
    except Exception as error:
        text = f"{gpu_timing.describe(error)}\n{traceback.format_exc()[-LONGEST_TEXT:]}"
        return {"ok": False, "error": text, "fatal": gpu_timing.is_fatal(error)}


def main() -> int:
    """Answer jobs until the input ends. What libraries print goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        found = answer(json.loads(line))
        answers.write(json.dumps(found) + "\n")
        answers.flush()
        if found.get("fatal"):
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
