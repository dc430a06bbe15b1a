"""`attnengine demo`: the engine's main job, shown and checked in about three minutes.

Part 1 (`race`) compiles three variants written in plain PyTorch (`variants`), checks each against
the reference forward and backward, and times it beside SDPA and compiled FlexAttention. Part 2
(`gpt`) trains a character-level GPT on English prose with such a variant. Tables go to the
terminal; a picture, the numbers and the generated C++ go to the output folder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import gpt, picture, race


def run(out: Path, quick: bool, console: Console) -> int:
    """Run both parts and write everything under `out`. Returns 0, or 1 when a check failed."""
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    console.rule("1. Three variants, from Python to a fused kernel")
    results = race.run(out, quick, console)
    console.rule("2. A small GPT on the prose of Python's own manual")
    training = gpt.run(quick, console)
    picture.draw(out / "demo.png", results, training)
    record = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "variants": [result.record() for result in results],
        "training": training.record(),
    }
    (out / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    failures = [line for result in results for line in result.failures] + training.failures
    for line in failures:
        console.print(f"FAILED {line}", style="bold red")
    console.rule()
    files = ", ".join(sorted(path.name for path in out.iterdir()))
    console.print(f"{time.perf_counter() - began:.0f} s. In {out}: {files}")
    if not failures:
        console.print("Every check passed.", style="bold green")
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the demo: `--out FOLDER`, `--quick`. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="attnengine demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("attnengine-demo"))
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer steps")
    args = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    return run(args.out, args.quick, console)
