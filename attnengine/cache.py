"""Where compiled modules and small texts are kept between processes.

    root/1/<2 hex>/<digest>/   one module: kernel.so or .ptx, source, command, log, manifest
    root/1/text/<kind>/        small JSON texts, one file each
    root/locks/<digest>        one flock per module under construction
    root/tmp/                  staging; whatever a killed process leaves is removed later
    root/failed/, quarantine/  the last failed builds and altered entries, for their reader

Modules are looked for in ATTNENGINE_AOT_PATH, in installed wheels of kernels, in the user's cache,
then in a folder private to this process, which takes the place of a cache that cannot be written.
Everything is published by one rename and checked against its manifest before it is used. Prebuilt
modules (prebuilt.py) are in the same layout.
"""

import atexit
import errno
import json
import os
import re
import shutil
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnengine import settings
from attnengine.cache_entry import (
    SCHEMA,
    canonical,
    check_private,
    is_digest,
    kernel_name,
    remove,
    seal,
    sha256,
    sync_folder,
    verify,
    write_file,
)
from attnengine.cache_lock import try_lock, unlock
from attnengine.errors import CacheError

ALIVE = ".alive"  # locked in a staging folder for as long as its process lives
_KIND = re.compile(r"[a-z][a-z0-9_]{0,31}")
_KEPT = 16  # failed builds, and altered entries, kept for reading


def is_full(error: OSError) -> bool:
    """Whether a write failed because the place cannot take more, rather than through a bug."""
    kinds = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
    return error.errno in kinds


class Store:
    """One root folder in the layout above."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def entries(self) -> Path:
        """The folder of this schema version."""
        return self.root / str(SCHEMA)

    def entry(self, digest: str) -> Path:
        """Where the module with this digest is, or would be."""
        return self.entries / digest[:2] / digest

    def prepare(self) -> None:
        """Makes the folders. Raises OSError or CacheError when they cannot be made, belong to
        somebody else, or cannot hold code (a noexec mount)."""
        for folder in (self.entries, *(self.root / name for name in ("locks", "tmp"))):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_private(folder, folder=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "not writable", str(folder))
        if os.statvfs(self.entries).f_flag & os.ST_NOEXEC:
            raise CacheError(f"{self.root} is on a file system mounted noexec")

    def find(self, digest: str) -> Path | None:
        """The verified kernel.so or kernel.ptx of an entry, or None. An altered entry is moved
        aside."""
        folder = self.entry(digest)
        try:
            manifest = verify(folder)
        except CacheError as error:
            self.quarantine(folder, str(error))
            return None
        except OSError:
            return None  # absent, or not to be read
        try:
            os.utime(folder)  # last use, for pruning
        except FileNotFoundError:
            return None
        except OSError:
            pass  # a read-only cache keeps no record of use
        return folder / kernel_name(manifest)

    def quarantine(self, folder: Path, reason: str) -> None:
        """Moves an entry out of the way, with a warning that says why."""
        aside = self.root / "quarantine" / f"{folder.name}-{uuid.uuid4().hex[:8]}"
        try:
            aside.parent.mkdir(mode=0o700, exist_ok=True)
            os.rename(folder, aside)
            keep_newest(aside.parent, _KEPT)
            what = f"moved to {aside} and built again"
        except FileNotFoundError:
            return  # another process was quicker
        except OSError as error:
            what = f"ignored ({error})"
        warnings.warn(f"attnengine cache: {reason}; {what}", RuntimeWarning, stacklevel=2)

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """A new private folder that disappears at the end of the block."""
        folder = self.root / "tmp" / f"{os.getpid()}-{uuid.uuid4().hex}"
        folder.mkdir(mode=0o700)
        alive = None
        try:
            try:
                alive = try_lock(folder / ALIVE)
            except OSError:
                pass  # no locks on this file system: the clean-up goes by age alone
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if alive is not None:
                unlock(alive)

    def publish(self, folder: Path, digest: str, label: str, facts: dict[str, Any]) -> Path:
        """Seals the files of a staged folder and renames it to its place; returns its kernel.

        When another process published first, its entry is used, unless it is altered.
        """
        seal(folder, digest, label, facts)
        target = self.entry(digest)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        for _ in range(2):
            try:
                os.rename(folder, target)
                sync_folder(target.parent)
                break
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                found = self.find(digest)
                if found is not None:
                    return found
        found = self.find(digest)
        if found is None:
            raise CacheError(f"{target} does not pass its own check just after it was written")
        return found

    def keep_failure(self, folder: Path, digest: str) -> Path:
        """Moves a failed build where its user can read it; returns that place."""
        kept = self.root / "failed" / f"{digest[:16]}-{uuid.uuid4().hex[:8]}"
        kept.parent.mkdir(mode=0o700, exist_ok=True)
        shutil.move(folder, kept)  # a copy when it was compiled on another file system
        if not settings.keep_failed():
            keep_newest(kept.parent, _KEPT)
        return kept


def keep_newest(folder: Path, count: int) -> None:
    """Deletes all but the newest `count` folders in a folder; errors are left for the next time."""

    def age(path: Path) -> float:
        try:
            return -path.stat().st_mtime
        except OSError:
            return 0.0

    for path in sorted(folder.iterdir(), key=age)[count:]:
        shutil.rmtree(path, ignore_errors=True)


_guard = threading.RLock()
_user: dict[Path, Store | None] = {}  # None: not to be read either
_read_only: set[Path] = set()
_private: Store | None = None


def _user_store() -> Store | None:
    """The user's cache if it may be read; one warning when it cannot be used fully."""
    root = settings.cache_dir()
    with _guard:
        if root not in _user:
            store = Store(root)
            _user[root] = store
            try:
                store.prepare()
            except CacheError as error:
                _user[root] = None
                _set_aside(root, error)
            except OSError as error:
                _set_aside(root, error)
                try:
                    check_private(store.entries, folder=True)
                except (OSError, CacheError):
                    _user[root] = None
        return _user[root]


def _set_aside(root: Path, error: Exception) -> None:
    if root in _read_only:
        return
    _read_only.add(root)
    try:
        instead = f"into {_private_store().root}"
    except (OSError, CacheError) as second:
        instead = f"but that cannot be done either ({second})"
    warnings.warn(
        f"attnengine: the cache {root} cannot be used ({error}); kernels are compiled again in "
        f"every process, {instead}. Set ATTNENGINE_CACHE_DIR to a folder of yours that can be "
        "written.",
        RuntimeWarning,
        stacklevel=4,
    )


def _private_store() -> Store:
    global _private
    with _guard:
        if _private is None:
            owner = os.getpid()
            root = Path(tempfile.mkdtemp(prefix="attnengine-"))

            def clean() -> None:
                if os.getpid() == owner:  # a forked child exits too, but owns nothing
                    shutil.rmtree(root, ignore_errors=True)

            atexit.register(clean)
            store = Store(root)
            store.prepare()
            _private = store
        return _private


def stores() -> list[Store]:
    """The stores to read, in order: the user's, and this process's own once there is one."""
    found = [_user_store(), _private]
    return [store for store in found if store is not None]


def writable(act: Callable[[Store], Path]) -> Path:
    """Runs `act` on the user's store; on a place that is full or read-only, once more on a private
    one after a single warning."""
    store = _user_store()
    if store is not None and store.root not in _read_only:
        try:
            store.prepare()  # again: it may have been deleted under a running process
        except (OSError, CacheError) as error:
            _set_aside(store.root, error)
            return act(_private_store())
        try:
            return act(store)
        except OSError as error:
            if not is_full(error):
                raise
            _set_aside(store.root, error)
    return act(_private_store())


def find(digest: str) -> Path | None:
    """The verified kernel of a digest in the user's or the private store, or None."""
    for store in stores():
        found = store.find(digest)
        if found is not None:
            return found
    return None


def _text_path(store: Store, kind: str, digest: str) -> Path:
    if not _KIND.fullmatch(kind):
        raise ValueError(f"kind={kind!r}: expected a lower-case word of at most 32 characters")
    if not is_digest(digest):
        raise ValueError(f"digest={digest!r}: expected 64 lower-case hex digits")
    return store.entries / "text" / kind / f"{digest}.json"


def text_get(kind: str, digest: str) -> str | None:
    """The text remembered under a kind (a lower-case word) and a SHA-256 in hex, or None.

    A file that is altered, or that others could have written, counts as absent.
    """
    for store in stores():
        path = _text_path(store, kind, digest)
        try:
            check_private(path, folder=False)
            record = json.loads(path.read_bytes())
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                continue
            hashed = record.pop("seal", None)
            if hashed == sha256(canonical(record)) and record.get("name") == f"{kind}/{digest}":
                os.utime(path)  # last use, for pruning
                return str(record["text"])
        except (OSError, ValueError, CacheError):
            continue
    return None


def text_put(kind: str, digest: str, text: str) -> None:
    """Remembers a text under a kind and a digest, atomically. Never raises for a cache that cannot
    be written: the text is then forgotten with the process."""
    record = {"name": f"{kind}/{digest}", "text": text}
    record["seal"] = sha256(canonical(record))
    data = json.dumps(record).encode()

    def write(store: Store) -> Path:
        path = _text_path(store, kind, digest)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        staged = store.root / "tmp" / f"text-{uuid.uuid4().hex}"
        try:
            write_file(staged, data)
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)
        return path

    try:
        writable(write)
    except OSError as error:
        warnings.warn(f"attnengine: {kind} text not remembered: {error}", stacklevel=2)


def forget() -> None:
    """Forgets which roots were found usable, as a new process would."""
    global _private
    with _guard:
        _private = None
        _user.clear()
        _read_only.clear()


def discard(store: Store, folder: Path) -> None:
    """Deletes an entry of a store so that no reader sees half of it."""
    remove(folder, store.root / "tmp" / f"gone-{uuid.uuid4().hex}")


def _after_fork() -> None:
    global _guard
    _guard = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
