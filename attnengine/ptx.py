"""Device code as text: what nvcc's PTX says, made the same on every machine, and ptxas's report.

Nothing of it is executed. The generated source of a CUDA unit carries its launch facts in one line,
``// manifest: {json}``, to which the build adds what ptxas found.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnengine.compiler import CompileFailed

CUBIN = "kernel.cubin"
MANIFEST = "cuda.json"
_MANIFEST = re.compile(r"^// manifest: (\{.*\})$", re.MULTILINE)
_FILE = re.compile(r'^(\s*\.file\s+\d+\s+)"([^"]*)".*$', re.MULTILINE)
_ENTRY = re.compile(r"^\s*(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)", re.MULTILINE)
# Names with internal linkage carry eight hex digits that nvcc takes from the path of the source.
_INTERNAL = re.compile(r"_INTERNAL_([0-9a-f]{8})_\d+_kernel_cu_")
_BYTES = re.compile(r"(?:^\.b8 [\d,]+\n)+", re.MULTILINE)
_NUMBERS_A_LINE = 40  # as nvcc writes them


@dataclass(frozen=True)
class Resources:
    """What one entry needs. Spills of functions that are not inlined count for every entry."""

    registers: int
    spill_bytes: int  # stores and loads
    stack_bytes: int
    static_shared: int


def source_manifest(source: str) -> dict[str, Any]:
    """The facts in the manifest line of a generated source. Raises CompileFailed without them."""
    found = _MANIFEST.findall(source)
    if len(found) != 1:
        raise CompileFailed(f"the source has {len(found)} manifest lines, expected 1", "", True)
    try:
        facts = json.loads(found[0])
    except ValueError as error:
        raise CompileFailed(f"the manifest line is not JSON: {error}", "", True) from None
    for name, kind in (("kind", str), ("threads", int), ("shared_bytes", int)):
        if type(facts.get(name)) is not kind:
            reason = f"the manifest line has {name}={facts.get(name)!r}: expected {kind.__name__}"
            raise CompileFailed(reason, "", True)
    return dict(facts)


def portable(text: str, folder: Path, toolkit: Path) -> str:
    """The PTX of ``folder``/kernel.cu without a trace of the machine: paths of its line table start
    at the folder (templates/..., cutlass/...) or the toolkit (cuda/...), and internal names do not
    depend on where it was compiled."""
    here = os.path.realpath(folder) + os.sep

    def file_line(found: re.Match[str]) -> str:
        name = os.path.normpath(found[2])
        if name.startswith(here):
            name = name[len(here) :]
        elif name.startswith(os.path.realpath(toolkit) + os.sep) or name.startswith(
            os.path.normpath(toolkit) + os.sep
        ):
            name = "cuda/" + name.rpartition("/include/")[2]
        else:
            name = "host/" + os.path.basename(name)
        return f'{found[1]}"{name}"'

    text = _FILE.sub(file_line, text)
    code, mark, strings = text.partition(".section\t.debug_str")
    data = "".join(
        bytes(_numbers(found[0])).decode("latin-1") for found in _BYTES.finditer(strings)
    )
    for unique in sorted({*_INTERNAL.findall(code), *_INTERNAL.findall(data)}):
        plain = "0" * len(unique)
        code = code.replace(f"_{unique}_", f"_{plain}_")
        strings = _BYTES.sub(lambda found, u=unique, p=plain: _renamed(found[0], u, p), strings)  # type: ignore[misc]
    return code + mark + strings


def _numbers(lines: str) -> list[int]:
    return [int(number) for line in lines.splitlines() for number in line[4:].split(",")]


def _renamed(lines: str, old: str, new: str) -> str:
    """A string of the line table, written as decimal bytes, with a part of it replaced."""
    data = bytes(_numbers(lines)).replace(f"_{old}_".encode(), f"_{new}_".encode())
    step = _NUMBERS_A_LINE
    rows = (data[start : start + step] for start in range(0, len(data), step))
    return "".join(f".b8 {','.join(map(str, row))}\n" for row in rows)


def entries(text: str) -> list[str]:
    """The kernels that a PTX text defines."""
    return _ENTRY.findall(text)


def resources(log: str, names: list[str]) -> dict[str, Resources]:
    """What ``ptxas -v`` reports of the entries. Raises CompileFailed when it leaves one out."""
    found: dict[str, tuple[int, int]] = {}
    current = ""
    frames: dict[str, tuple[int, int]] = {}
    for line in log.splitlines():
        title = re.search(r"Function properties for (\S+)", line)
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        )
        used = re.search(r"Used (\d+) registers", line)
        if title:
            current = title[1]
        elif frame:
            stack, stores, loads = map(int, frame.groups())
            frames[current] = stack, stores + loads
        elif used and current in names:
            shared = re.search(r"(\d+) bytes smem", line)
            found[current] = int(used[1]), int(shared[1]) if shared else 0
    outside = sum(spilled for name, (_, spilled) in frames.items() if name not in names)
    missing = [name for name in names if name not in found or name not in frames]
    if missing:
        raise CompileFailed(f"ptxas reports nothing of {', '.join(missing)}", log, final=False)
    return {
        name: Resources(found[name][0], frames[name][1] + outside, frames[name][0], found[name][1])
        for name in names
    }


def check_entries(names: list[str], manifest: dict[str, Any]) -> None:
    """The entries are those that the manifest promises: ae_KIND, ae_tables where the mask reads
    captured tensors, ae_schedule and ae_combine where work is split. Raises CompileFailed."""
    expected = {f"ae_{manifest['kind']}"}
    if manifest["kind"] == "linear_forward":
        first = "ae_linear_solve" if manifest.get("delta") else "ae_linear_states_split"
        expected = {first, "ae_linear_states", "ae_linear_outputs", "ae_linear_step"}
    if manifest.get("mask_captures"):
        expected.add("ae_tables")
    if manifest.get("slot_bytes"):
        expected |= {"ae_schedule", "ae_combine"}
    if set(names) != expected:
        reason = (
            f"the unit has the entries {', '.join(sorted(names)) or '(none)'}: its manifest "
            f"promises {', '.join(sorted(expected))}"
        )
        raise CompileFailed(reason, "", True)
