"""The headers of a folder, and one hash over what they contain."""

import os
from pathlib import Path

from attnengine.cache_entry import canonical, sha256

Listing = tuple[tuple[str, int, int], ...]
"""Path below the folder, bytes and time of change of every header."""


def listed(root: Path, suffixes: tuple[str, ...]) -> Listing:
    """The headers below a folder, in one order on every machine."""
    found = []
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            if name.endswith(suffixes):
                path = os.path.join(folder, name)
                status = os.stat(path)
                found.append((os.path.relpath(path, root), status.st_size, status.st_mtime_ns))
    return tuple(found)


_digests: dict[tuple[Path, Listing], str] = {}


def digest(root: Path, files: Listing) -> str:
    """Hash of names and contents, computed again only when a file's size or time changed."""
    known = _digests.get((root, files))
    if known is None:
        contents = sorted([name, sha256((root / name).read_bytes())] for name, _, _ in files)
        known = _digests[root, files] = sha256(canonical(contents))
    return known
