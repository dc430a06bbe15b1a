"""One lock file per kernel, so that many processes compile it once.

The lock saves work and is never needed for correctness: entries are published by one rename. It
is an flock, so the kernel frees it when its holder dies, however it dies; a waiter that runs out
of patience goes on without it.
"""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger("attnengine.cache")
_POLL_S = 0.03
_PATIENCE_S = 5.0  # silent wait before the holder is named; compiles usually end sooner

_held: set[int] = set()


def _drop_in_child() -> None:
    # An flock lives as long as any copy of its descriptor: a forked child must not keep it.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)


def try_lock(path: Path) -> int | None:
    """Locks the file (created 0600) and returns its descriptor, or None when another holds it.

    Raises OSError when the file cannot be made or the file system has no locks.
    """
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            here = os.fstat(descriptor)
            try:
                current = os.stat(path)
                same = (current.st_dev, current.st_ino) == (here.st_dev, here.st_ino)
            except FileNotFoundError:
                same = False
            if same:
                _held.add(descriptor)
                return descriptor
            os.close(descriptor)  # a clean-up removed the file between open and lock: take the new
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise


def unlock(descriptor: int) -> None:
    """Gives back what try_lock returned."""
    if descriptor in _held:
        _held.discard(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # at once, even if a child is just being forked
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        facts = json.loads(path.read_text())
        age = time.time() - facts["since"]
        return f"pid {facts['pid']} on {facts['host']} for {age:.0f} s"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"


@contextmanager
def hold(path: Path, what: str, timeout_s: float) -> Iterator[bool]:
    """Holds the lock for the block; yields whether it was got within timeout_s."""
    started = time.monotonic()
    told = False
    descriptor = None
    try:
        descriptor = try_lock(path)
        while descriptor is None:
            waited = time.monotonic() - started
            if waited >= timeout_s:
                _log.warning(
                    "%s: lock %s still held by %s after %.0f s; building without it",
                    what, path, _holder(path), waited,
                )  # fmt: skip
                break
            if waited >= _PATIENCE_S and not told:
                told = True
                _log.warning("%s: waiting for %s, which is building it", what, _holder(path))
            time.sleep(_POLL_S)
            descriptor = try_lock(path)
    except OSError as error:
        _log.debug("%s: no lock (%s)", what, error)
    if descriptor is not None:
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(facts).encode(), 0)
        except OSError:
            pass  # a full disk: the lock holds all the same, only its holder stays unnamed
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            unlock(descriptor)
