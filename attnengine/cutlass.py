"""CUTLASS's headers, which CUDA units include: which folder, which version, and their hash."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from attnengine import headers, settings
from attnengine.cache import text_get, text_put
from attnengine.cache_entry import canonical, sha256

# The first whose pip package has cutlass/version.h; the kernels were compiled with 3.5.0 and 4.2.0.
AT_LEAST = (3, 5)
_SUFFIXES = (".h", ".hpp", ".cuh", ".inl")
REMEDY = "pip install 'attnengine[cuda]', or set ATTNENGINE_CUTLASS to a folder that has them"


@dataclass(frozen=True)
class Cutlass:
    """The include folder, and what it holds."""

    include: Path
    version: str
    found: str  # ATTNENGINE_CUTLASS, or the pip package


def find_cutlass() -> Cutlass | str:
    """CUTLASS's headers, or a sentence that says what is wrong and what to do: ATTNENGINE_CUTLASS
    (a checkout or its include folder), else the pip package nvidia-cutlass."""
    choice = settings.cutlass_choice()
    if choice is not None:
        found = f"ATTNENGINE_CUTLASS={choice!r}"
        places = [Path(choice).absolute() / "include", Path(choice).absolute()]
        missing = f"CUTLASS headers missing: {found} has no include/cutlass/version.h; {REMEDY}"
    else:
        found = "pip package nvidia-cutlass"
        spec = importlib.util.find_spec("cutlass_library")
        roots = (spec.submodule_search_locations or ()) if spec is not None else ()
        places = [Path(root) / "source" / "include" for root in roots]
        missing = (
            "CUTLASS headers missing: ATTNENGINE_CUTLASS is unset and the pip package "
            f"nvidia-cutlass is not installed; {REMEDY}"
        )
    for include in places:
        try:
            text = (include / "cutlass" / "version.h").read_text(errors="replace")
        except OSError:
            continue
        return _checked(include, text, found)
    return missing


def _checked(include: Path, text: str, found: str) -> Cutlass | str:
    parts = [
        re.search(rf"^#define CUTLASS_{name}\s+(\d+)", text, re.MULTILINE)
        for name in ("MAJOR", "MINOR", "PATCH")
    ]
    numbers = tuple(int(part[1]) for part in parts if part is not None)
    version, least = ".".join(map(str, numbers)) or "unknown", ".".join(map(str, AT_LEAST))
    if numbers < AT_LEAST:
        return (
            f"CUTLASS {version} in {include} ({found}) is too old: the kernels need {least} or "
            f"newer; {REMEDY}"
        )
    return Cutlass(include, version, found)


def contents(cutlass: Cutlass) -> str:
    """Hash over all headers. They are 26 MB: the disk remembers it for their sizes and times."""
    files = headers.listed(cutlass.include, _SUFFIXES)
    name = sha256(canonical([str(cutlass.include), files]))
    known = text_get("cutlass", name)
    if known is None:
        known = headers.digest(cutlass.include, files)
        text_put("cutlass", name, known)
    return known
