"""One cache entry: a folder named by its digest whose manifest lists every file with its hash.

A CPU module's entry holds `kernel.so` and `kernel.cpp`, a CUDA module's `kernel.ptx`,
`kernel.cubin`, `cuda.json` and `kernel.cu`; both `cmd.json`, `build.log` and, written last,
`manifest.json`. Nothing in it is executed or unpickled before the manifest, the owner and the
permissions have been checked.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import time
from pathlib import Path
from typing import Any

from attnengine.errors import CacheError

SCHEMA = 1
"""Version of the layout and of the keys; entries of another version are never looked at."""

MANIFEST = "manifest.json"
KERNEL = "kernel.so"
PTX = "kernel.ptx"
_DIGEST = re.compile(r"[0-9a-f]{64}")


def kernel_name(manifest: dict[str, Any]) -> str:
    """The file that an entry is there for: kernel.so, or kernel.ptx of a CUDA module."""
    return KERNEL if KERNEL in manifest["files"] else PTX


def is_digest(text: str) -> bool:
    """Whether the text is a SHA-256 in lower-case hex, the only name an entry may have."""
    return _DIGEST.fullmatch(text) is not None


def sha256(data: bytes) -> str:
    """SHA-256 as hex."""
    return hashlib.sha256(data).hexdigest()


def canonical(value: Any) -> bytes:
    """The one JSON spelling of a value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def plain_label(label: str) -> str:
    """The label as it is stored and printed: at most 120 printable ASCII characters, the others
    replaced, so that it can neither break a line nor drive a terminal."""
    return re.sub(r"[^A-Za-z0-9 _.,:;=+*/()\[\]<>@-]", "?", str(label))[:120]


def check_private(path: Path, folder: bool, shared: bool = False) -> os.stat_result:
    """Raises CacheError unless the path is a real file (or folder) of ours or root's that nobody
    else can write; `shared` (a folder the user configured) allows any owner."""
    status = path.lstat()
    kind = stat.S_ISDIR if folder else stat.S_ISREG
    if not kind(status.st_mode):
        raise CacheError(f"{path} is not a {'folder' if folder else 'regular file'}")
    if not shared and status.st_uid not in (os.getuid(), 0):
        raise CacheError(f"{path} belongs to uid {status.st_uid}, not to uid {os.getuid()} or root")
    if status.st_mode & (stat.S_IWOTH if shared else stat.S_IWOTH | stat.S_IWGRP):
        raise CacheError(f"{path} can be written by others (mode {status.st_mode & 0o777:o})")
    return status


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Writes a new file and waits until it is on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some file systems cannot sync a folder; a lost entry is rebuilt
    finally:
        os.close(descriptor)


def seal(folder: Path, digest: str, label: str, facts: dict[str, Any]) -> None:
    """Writes the manifest of the files in `folder`; the entry is complete after this."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST:
            data = path.read_bytes()
            files[path.name] = {"bytes": len(data), "sha256": sha256(data)}
    manifest = {
        **facts,
        "schema": SCHEMA,
        "digest": digest,
        "label": plain_label(label),
        "created": int(time.time()),
        "files": files,
    }
    manifest["seal"] = sha256(canonical(manifest))
    write_file(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
    sync_folder(folder)


def read_manifest(folder: Path, shared: bool = False) -> dict[str, Any]:
    """The manifest of an entry, its own seal checked; CacheError when missing or altered."""
    path = folder / MANIFEST
    try:
        check_private(path, folder=False, shared=shared)
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CacheError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CacheError(f"{path} is not a manifest")
    if manifest.pop("seal", None) != sha256(canonical(manifest)):
        raise CacheError(f"{path} was altered")
    if manifest.get("schema") != SCHEMA or manifest.get("digest") != folder.name:
        raise CacheError(f"{path} describes another entry")
    return manifest


def verify(folder: Path, shared: bool = False) -> dict[str, Any]:
    """Checks everything about an entry and returns its manifest.

    Raises CacheError with the reason: a part is missing, truncated or altered, or somebody else
    could have written it. FileNotFoundError means that there is no such entry.
    """
    check_private(folder, folder=True, shared=shared)
    manifest = read_manifest(folder, shared)
    if kernel_name(manifest) not in manifest["files"]:
        raise CacheError(f"{folder} has no {KERNEL} and no {PTX}")
    for name, expected in manifest["files"].items():
        path = folder / name
        try:
            if os.path.basename(name) != name:
                raise CacheError(f"{folder} lists the file {name!r} outside itself")
            size = check_private(path, folder=False, shared=shared).st_size
            if size != expected["bytes"]:
                raise CacheError(f"{path} has {size} bytes, its manifest says {expected['bytes']}")
            if sha256(path.read_bytes()) != expected["sha256"]:
                raise CacheError(f"{path} differs from the hash in its manifest")
        except FileNotFoundError:
            raise CacheError(f"{path} is missing") from None
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error}") from None
    return manifest


def folder_bytes(folder: Path) -> int:
    """Bytes of the files directly in a folder."""
    total = 0
    with os.scandir(folder) as items:
        for item in items:
            total += item.stat(follow_symlinks=False).st_size
    return total


def remove(folder: Path, aside: Path) -> None:
    """Deletes an entry so that no reader sees half of it: renamed to the free name `aside` first.

    Raises OSError when even the rename fails.
    """
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
