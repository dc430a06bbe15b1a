"""A folder of prebuilt modules as a wheel that pip installs.

The wheel holds data only: the folder goes to attnengine_kernels/NAME/, a namespace package without
code, where prebuilt.py finds it. Format: PyPA's binary distribution format 1.0, PEP 440 versions.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import zipfile
from pathlib import Path

from .cache_entry import KERNEL
from .platform_tag import platform_tag
from .prebuilt import NAMESPACE

_TIME = (1980, 1, 1, 0, 0, 0)  # the oldest that zip has: equal kernels make equal wheels


def write_wheel(folder: Path, place: Path, name: str, version: str, build: str) -> Path:
    """Packs ``folder`` into a wheel in ``place``; returns its path.

    ``name`` is the distribution's, ``version`` that of the attnengine it is for, and ``build`` the
    build id, whose first digits make the wheel's version. Raises ValueError for a bad name, OSError
    when it cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9]+([-_.][A-Za-z0-9]+)*", name):
        raise ValueError(f"{name!r} is no name of a Python distribution")
    plain = re.sub(r"[-_.]+", "_", name).lower()
    own = f"{version}+{build[:12]}"
    tag = f"py3-none-{platform_tag(folder.rglob(KERNEL))}"
    info = f"{plain}-{own}.dist-info"
    files = {
        f"{NAMESPACE}/{plain}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {plain.replace('_', '-')}\nVersion: {own}\n"
        f"Summary: Attention kernels compiled ahead of time for attnengine {version}\n"
        f"Requires-Dist: attnengine=={version}\n"
    ).encode()
    files[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: attnengine ({version})\nRoot-Is-Purelib: false\n"
        f"Tag: {tag}\n"
    ).encode()
    record = "".join(f"{file},{_hashed(data)},{len(data)}\n" for file, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    place.mkdir(parents=True, exist_ok=True)
    wheel = place / f"{plain}-{own}-{tag}.whl"
    staged = wheel.with_name(f".{wheel.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(staged, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, data in files.items():
                entry = zipfile.ZipInfo(file, _TIME)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = 0o100644 << 16
                archive.writestr(entry, data)
        os.replace(staged, wheel)
    finally:
        staged.unlink(missing_ok=True)
    return wheel


def _hashed(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"sha256={digest}"
