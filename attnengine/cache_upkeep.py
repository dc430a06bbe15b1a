"""Listing, checking, shrinking and emptying a cache; also the clean-up after killed builds."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from attnengine.cache import ALIVE, Store, discard
from attnengine.cache_entry import folder_bytes, is_digest, read_manifest, verify
from attnengine.cache_lock import try_lock, unlock
from attnengine.errors import CacheError

_YOUNG_S = 60.0  # an entry used this recently may be on its way into a process: spared by pruning
_STAGED_S = 3600.0  # age at which a staging folder without a lock file is abandoned


@dataclass(frozen=True)
class Entry:
    """One module or text of a cache, as it is listed."""

    path: Path
    digest: str
    label: str
    isa: str
    bytes: int
    used: float  # seconds since the epoch
    problem: str | None = None


def modules(store: Store, check: bool = False) -> list[Entry]:
    """The modules of a store, least recently used first; `check` hashes every file. An entry that
    cannot be read, or fails the check, carries its problem."""
    found = []
    for folder in sorted(store.entries.glob("[0-9a-f][0-9a-f]/*")):
        label, isa, problem = "", "", None
        try:
            used, size = folder.stat().st_mtime, folder_bytes(folder)
            manifest = verify(folder) if check else read_manifest(folder)
            label, isa = str(manifest.get("label", "")), str(manifest.get("isa", ""))
        except FileNotFoundError:
            continue  # removed meanwhile
        except NotADirectoryError:
            used, size, problem = 0.0, 0, "not a folder"
        except (CacheError, OSError) as error:
            problem = str(error)
        found.append(Entry(folder, folder.name, label, isa, size, used, problem))
    return sorted(found, key=lambda entry: entry.used)


def _texts(store: Store) -> list[Entry]:
    found = []
    for path in store.entries.glob("text/*/*.json"):
        try:
            status = path.stat()
        except OSError:
            continue
        found.append(Entry(path, path.stem, path.parent.name, "", status.st_size, status.st_mtime))
    return found


def total_bytes(store: Store) -> int:
    """Bytes of all modules and texts."""
    return sum(entry.bytes for entry in [*modules(store), *_texts(store)])


def prune(
    store: Store, limit: int, keep: frozenset[str] = frozenset(), young_s: float = _YOUNG_S
) -> int:
    """Removes the least recently used modules and texts until at most `limit` bytes are left, and
    what killed processes left behind. Spares the digests in `keep` and anything used within
    `young_s` seconds. Returns the bytes freed."""
    clean(store)
    entries = sorted([*modules(store), *_texts(store)], key=lambda entry: entry.used)
    excess = sum(entry.bytes for entry in entries) - limit
    freed, now = 0, time.time()
    for entry in entries:
        if freed >= excess:
            break
        if entry.digest in keep or now - entry.used < young_s:
            continue
        if _drop(store, entry):
            freed += entry.bytes
    return freed


def _drop(store: Store, entry: Entry) -> bool:
    try:
        if entry.path.is_dir():
            discard(store, entry.path)
        else:
            entry.path.unlink()
    except OSError:
        return False  # another process was quicker, or it is not ours to remove
    return True


def clean(store: Store) -> None:
    """Removes staging folders whose process is gone, and locks of modules that nobody builds."""
    for path in _listed(store.root / "tmp"):
        if _abandoned(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    for path in _listed(store.root / "locks"):
        if is_digest(path.name):
            try:
                descriptor = try_lock(path)
                if descriptor is not None:
                    path.unlink(missing_ok=True)  # a waiter sees the new file and locks that
                    unlock(descriptor)
            except OSError:
                continue


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _abandoned(path: Path) -> bool:
    alive = path / ALIVE
    try:
        if alive.exists():
            descriptor = try_lock(alive)
            if descriptor is None:
                return False
            unlock(descriptor)
            return True
        return time.time() - path.stat().st_mtime > _STAGED_S
    except OSError:
        return False


def verify_all(store: Store, repair: bool = False) -> list[Entry]:
    """Every module whose check fails, with its problem; `repair` also removes it."""
    broken = [entry for entry in modules(store, check=True) if entry.problem is not None]
    if repair:
        for entry in broken:
            _drop(store, entry)
    return broken


def clear(store: Store) -> int:
    """Removes every module, text, failed build and altered entry. Builds that are going on are
    left to finish. Returns the bytes freed."""
    freed = 0
    for entry in [*modules(store), *_texts(store)]:
        if _drop(store, entry):
            freed += entry.bytes
    for name in ("failed", "quarantine"):
        shutil.rmtree(store.root / name, ignore_errors=True)
    clean(store)
    return freed


def exists(store: Store) -> bool:
    """Whether anything was ever cached there."""
    return os.path.isdir(store.entries)
