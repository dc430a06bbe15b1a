"""Folders of ready modules, which are looked in before the cache.

A folder has the layout of a cache (cache.py) and a mark, prebuilt.json, that names the build of
attnengine it was made for. They are those of ATTNENGINE_AOT_PATH, then those that wheels of kernels
install under the namespace package attnengine_kernels: any number of wheels fit beside each other,
and none of their files is imported to find them. Every module is checked against its manifest
before it is loaded; a folder of another build is ignored with one warning.
"""

import importlib.util
import json
import os
import uuid
import warnings
from pathlib import Path

from attnengine import settings
from attnengine.cache import Store
from attnengine.cache_entry import kernel_name, verify, write_file
from attnengine.errors import CacheError

MARK = "prebuilt.json"
NAMESPACE = "attnengine_kernels"

_usable: dict[tuple[Path, str], bool] = {}
_installed: list[Path] | None = None
_reported: set[Path] = set()


def find(digests: list[str], build: str) -> Path | None:
    """The verified kernel of the first of these digests, or None. ``build`` is this attnengine's
    build id (staging.build_id). An altered entry is reported once and left alone."""
    for root in folders(build):
        for digest in digests:
            folder = Store(root).entry(digest)
            try:
                return folder / kernel_name(verify(folder, shared=True))
            except FileNotFoundError:
                continue
            except (CacheError, OSError) as error:
                _report(folder, f"prebuilt module not used: {error}")
    return None


def folders(build: str) -> list[Path]:
    """The folders to look in, in order. One warning for each that another build was made for."""
    found = [*settings.aot_paths(), *installed()]
    return [root for root in found if _fits(root, build)]


def installed() -> list[Path]:
    """The folders that installed wheels of kernels brought along, in the order of sys.path."""
    global _installed
    if _installed is None:
        try:
            spec = importlib.util.find_spec(NAMESPACE)
        except (ImportError, ValueError):
            spec = None
        places = spec.submodule_search_locations if spec is not None else None
        _installed = [
            folder
            for place in map(Path, places or ())
            if place.is_dir()
            for folder in sorted(place.iterdir())
            if (folder / MARK).is_file()
        ]
    return _installed


def mark(root: Path, build: str, version: str) -> None:
    """Marks a folder as made for this build. Raises CacheError when it was made for another one."""
    there = _read_mark(root)
    if there is not None and there.get("build") != build:
        raise CacheError(
            f"{root} has the kernels of another build of attnengine ({_named(there)}); delete it "
            "or choose another folder"
        )
    if there is None:
        staged = root / f".{MARK}-{uuid.uuid4().hex}"
        text = json.dumps({"build": build, "attnengine": version}, indent=1)
        write_file(staged, text.encode(), mode=0o644)
        os.replace(staged, root / MARK)


def _fits(root: Path, build: str) -> bool:
    known = _usable.get((root, build))
    if known is None:
        there = _read_mark(root)
        known = there is None or there.get("build") == build
        if not known:
            _report(
                root,
                f"the prebuilt kernels in {root} are not used: they are of build {_named(there)}, "
                f"and this one is {build[:12]}. Make them again with `attnengine prebuild`",
            )
        _usable[root, build] = known
    return known


def _read_mark(root: Path) -> dict[str, object] | None:
    """None where there is no mark, as in an absent folder: entries speak for themselves."""
    try:
        text = (root / MARK).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError):
        text = ""
    try:
        there = json.loads(text)
    except ValueError:
        there = {}
    return there if isinstance(there, dict) else {}


def _named(there: dict[str, object] | None) -> str:
    known = there or {}
    return f"{str(known.get('build', 'unknown'))[:12]}, attnengine {known.get('attnengine', '?')}"


def _report(place: Path, text: str) -> None:
    if place not in _reported:
        _reported.add(place)
        warnings.warn(f"attnengine: {text}", RuntimeWarning, stacklevel=4)


def forget() -> None:
    """Forgets which folders there are and which fit, as a new process would."""
    global _installed
    _installed = None
    _usable.clear()
    _reported.clear()
