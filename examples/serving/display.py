"""Serves the same requests with attnengine and with SDPA, shows how, and checks every token."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from typing import TextIO

import torch

from .model import Config, Model, Paged, PagedSdpa
from .scheduler import Engine, traffic, verify

PAGE_SIZE = 16  # tokens
# How far below the best logit of the recompute (their standard deviation is 1) a token's may lie:
# in bfloat16, the roundings of sums in another order choose between near equals.
CLOSE = {"float32": 0.0, "bfloat16": 0.2}

UP, CLEAR, GREEN, PLAIN = "\x1b[{}A", "\x1b[K", "\x1b[32m", "\x1b[0m"


def bar(done: int, total: int, width: int = 24) -> str:
    filled = done * width // total
    return f"{GREEN}{'█' * filled}{PLAIN}{'·' * (width - filled)} {done} of {total}"


def speed(engine: Engine) -> float:
    """Generated tokens per second of the engine's own time, prompts included."""
    return engine.generated / engine.seconds if engine.seconds else 0.0


class Display:
    """The first engine's state and the speed of all: redrawn in place on a terminal, elsewhere a
    line now and then."""

    def __init__(self, engines: list[Engine], stream: TextIO | None = None) -> None:
        self.engines, self.stream = engines, stream or sys.stdout
        self.live, self.drawn, self.shown = self.stream.isatty(), 0, 0.0

    def update(self, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self.shown < (0.05 if self.live else 2.0):
            return
        self.shown = now
        e = self.engines[0]
        used = e.pool.total - len(e.pool.free)
        counts = f"running {len(e.running)}, waiting {len(e.waiting)}, finished {len(e.finished)}"
        state = f"step {e.steps}: {counts}, preempted {e.preempted}"
        speeds = [f"{engine.cache.name} {speed(engine):.1f} tokens/s" for engine in self.engines]
        if not self.live:
            pages = f"{used} of {e.pool.total} pages in use"
            print("; ".join([state, pages, *speeds]), file=self.stream)
            return
        lines = [state, f"pages {bar(used, e.pool.total)}, {e.pool.taken} handed out", *speeds]
        for r in e.running:
            progress = bar(len(r.generated), r.wanted)
            lines.append(f"  request {r.number:<3d} {len(r.prompt):5d} tokens + {progress}")
        lines += [""] * (e.batch - len(e.running))
        self.stream.write(UP.format(self.drawn) if self.drawn else "")
        self.stream.writelines(f"{line}{CLEAR}\n" for line in lines)
        self.stream.flush()
        self.drawn = len(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.serving")
    parser.add_argument("--check", action="store_true", help="few short requests: a test")
    parser.add_argument("--dtype", default="float32", choices=CLOSE)
    options = parser.parse_args(arguments)
    count, pages, batch, prompts, answers = 16, 640, 12, (128, 1536), (32, 160)
    if options.check:
        count, pages, batch, prompts, answers = 6, 12, 4, (3, 70), (8, 24)

    config = Config(getattr(torch, options.dtype))
    model = Model(config)
    requests = traffic(count, prompts, answers, config.vocabulary)
    print(
        f"{config.layers} layers, {config.heads}/{config.kv_heads} heads of {config.head_dim}, "
        f"{options.dtype}; {count} requests of {prompts[0]} to {prompts[1]} tokens, "
        f"{pages} pages of {PAGE_SIZE} tokens, {torch.get_num_threads()} threads"
    )
    with torch.inference_mode():
        engines = []
        for kind in (Paged, PagedSdpa):
            warm = Engine(model, kind(config, 4, PAGE_SIZE), traffic(2, (5, 9), (3, 3), 9), 2)
            while warm.waiting or warm.running:  # compiles the kernel
                warm.step()
            cache = kind(config, pages, PAGE_SIZE)
            engines.append(Engine(model, cache, deepcopy(requests), batch))
        display = Display(engines)
        while any(engine.waiting or engine.running for engine in engines):
            for engine in engines:  # in turns: both meet the same machine
                engine.step()
            display.update()
        display.update(last=True)
        ours, sdpa = engines
        tokens, different, gap, margin = verify(model, ours.finished)
    print(
        f"{speed(ours):.1f} tokens/s, {speed(sdpa):.1f} with SDPA: "
        f"{speed(ours) / speed(sdpa):.2f}x, prompts included\n"
        f"{tokens - different} of {tokens} tokens identical to a dense recompute of each request "
        f"alone, whose best two logits are at least {margin:.1e} apart"
    )
    if gap > CLOSE[options.dtype]:
        print(f"FAILED: a token's logit lies {gap:.1e} below the best")
        return 1
    return 0
