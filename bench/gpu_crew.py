"""Processes that work through jobs at the same time, each job within a time limit.

A process that dies or overruns is replaced, its job is answered with what is known about the end,
and the others go on. Only processes that were started here are ever ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from .gpu_deadline import Deadline

COMMAND = (sys.executable, "-m", "bench.gpu_worker")
LAST_WORDS = 2000  # characters of a dead process's standard error

Job = dict[str, Any]
Answer = dict[str, Any]


class Worker:
    """One process; does one job at a time."""

    def __init__(self, command: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self.words = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            env={**os.environ, **environment},
            start_new_session=True,  # what it starts (compilers) ends with it
        )
        self.job: Job | None = None
        self.limit = float("inf")
        self.text = b""

    def send(self, job: Job, limit: float) -> None:
        """Start a job, to be done by the time `limit`."""
        self.job, self.limit = job, limit
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: receive() says so
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()

    def receive(self) -> Answer | None:
        """The answer, when a whole line is there; of a dead process, its last words."""
        assert self.process.stdout is not None
        part = os.read(self.process.stdout.fileno(), 1 << 16)
        self.text += part
        if b"\n" in self.text:
            line, _, self.text = self.text.partition(b"\n")
            return json.loads(line)
        return None if part else self.lost("the process ended")

    def lost(self, why: str) -> Answer:
        """End the process, with all that it started; the answer of its job."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self.words.seek(0)
        said = self.words.read().decode(errors="replace")[-LAST_WORDS:].strip()
        ending = f" (exit status {code})" if code != -signal.SIGKILL else ""
        return {"ok": False, "error": f"{why}{ending}\n{said}", "fatal": True}

    def close(self) -> None:
        """End it and free its pipes."""
        if self.process.poll() is None:
            self.lost("closed")
        for pipe in (self.process.stdin, self.process.stdout, self.words):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


class Crew:
    """Up to `size` workers. Use as a context: they end with it."""

    def __init__(
        self,
        size: int,
        environment: Mapping[str, str] | None = None,
        command: tuple[str, ...] = COMMAND,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.size, self.command, self.clock = size, command, clock
        self.environment = dict(environment or {})
        self.workers: list[Worker] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.close()
        self.workers = []

    def run(
        self,
        jobs: list[Job],
        deadline: Deadline,
        limit_s: float,
        done: Callable[[Job, Answer], None],
    ) -> list[Job]:
        """Do the jobs in their order, each within `limit_s`, and give each answer to `done`.

        Returns the jobs that were not begun when the deadline came; those under way then are
        answered as cut off.
        """
        waiting, selector = list(jobs), selectors.DefaultSelector()
        try:
            for worker in self.workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
            while True:
                self._start(waiting, selector, deadline, limit_s)
                busy = [w for w in self.workers if w.job is not None]
                if not busy:
                    return waiting
                soonest = min(w.limit for w in busy) - self.clock()
                for key, _ in selector.select(max(0.0, min(soonest, 1.0))):
                    worker = key.data
                    found = worker.receive()
                    if found is not None:
                        self._finish(worker, found, selector, done)
                for worker in [w for w in self.workers if w.job and self.clock() >= w.limit]:
                    cut = deadline.left <= 0
                    why = "cut off: the run's time is up" if cut else "over its time limit"
                    found = {**worker.lost(why), "cut_off": cut}
                    self._finish(worker, found, selector, done)
        finally:
            selector.close()

    def _start(
        self,
        waiting: list[Job],
        selector: selectors.BaseSelector,
        deadline: Deadline,
        limit_s: float,
    ) -> None:
        """Give jobs to idle workers, and to new ones."""
        while waiting and deadline.left > 0:
            worker = next((w for w in self.workers if w.job is None), None)
            if worker is None:
                if len(self.workers) >= self.size:
                    return
                worker = Worker(self.command, self.environment)
                self.workers.append(worker)
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
            worker.send(waiting.pop(0), self.clock() + min(limit_s, deadline.left))

    def _finish(
        self,
        worker: Worker,
        found: Answer,
        selector: selectors.BaseSelector,
        done: Callable[[Job, Answer], None],
    ) -> None:
        job, worker.job = worker.job, None
        if found.get("fatal"):
            selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
            self.workers.remove(worker)
            worker.close()
        if job is not None:  # else it died while it had nothing to do
            done(job, found)
