"""One thread for what must not see the caller's modes and dispatch keys, which are thread-local.

A caller may be inside an operator, whose thread skips autograd: every derivative that is traced
there comes out as zero, in silence. It may be inside torch.export, which would record our tracing.

The thread never ends. torch built for CUDA, on a machine without a GPU, keeps a pointer to what the
first thread that entered a FakeTensorMode owns; when that thread is gone the next use crashes
(torch 2.11: make_fx in a thread that ends, then torch.export).
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_starting = threading.Lock()
_jobs: queue.SimpleQueue[tuple[Future, Callable[[], Any]]] | None = None
_thread: threading.Thread | None = None


def run(work: Callable[[], T]) -> T:
    """The result of ``work()``, run in the clean thread; raises what it raises."""
    if threading.current_thread() is _thread:
        return work()
    result: Future[T] = Future()
    _started().put((result, work))
    return result.result()


def _started() -> queue.SimpleQueue[tuple[Future, Callable[[], Any]]]:
    global _jobs, _thread
    with _starting:
        if _jobs is None:
            _jobs = queue.SimpleQueue()
            _thread = threading.Thread(
                target=_serve, args=(_jobs,), name="attnengine-tracing", daemon=True
            )
            _thread.start()
        return _jobs


def _serve(jobs: queue.SimpleQueue[tuple[Future, Callable[[], Any]]]) -> None:
    while True:
        result, work = jobs.get()
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)
        del result, work  # they hold the user's tensors


def _after_fork() -> None:  # the child has no such thread
    global _starting, _jobs, _thread
    _starting, _jobs, _thread = threading.Lock(), None, None


os.register_at_fork(after_in_child=_after_fork)
