"""The checks on a real kernel: every barrier and every wait for copies of the forward template is
needed, so taking one out of its PTX must be reported, on every seed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import attnengine as ae
from attnengine import library
from attnengine.handle import Handle
from tests import ptxsim

pytestmark = pytest.mark.compiles
SEEDS = range(3)
INF, NAN = float("inf"), float("nan")


@dataclass
class Statement:
    line: int  # of the PTX, from 0
    text: str
    file: str  # where it comes from
    source_line: int


def statements(ptx: str, pattern: str) -> Iterator[Statement]:
    files = dict(re.findall(r'\.file\s+(\d+) "([^"]*)"', ptx))
    at = ("", 0)
    for i, line in enumerate(ptx.splitlines()):
        if location := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            at = (files.get(location[1], ""), int(location[2]))
        elif re.match(rf"\s*(?:{pattern})", line):
            yield Statement(i, line.strip(), *at)


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 1, 320, 64, generator=generator, dtype=torch.float32).to(torch.float16)
        for _ in range(3)
    )
    v[0, 0, 5, 3], v[0, 0, 200, 7] = INF, NAN  # for the passes that deal with them
    return q, k, v


@pytest.fixture(scope="module")
def handle() -> Handle:
    ptxsim.install()
    spec = ae.AttentionSpec(mask_mod=lambda b, h, q, k: q >= k)
    return ae.compile(spec, *operands(), target="sm_80", backward=False)


def kinds(handle: Handle, ptx: str, path: Path) -> list[str]:
    """The reports of a kernel, one per seed; "" where there is none."""
    path.write_text(ptx)
    kernel = library.load_cuda_kernel(path, None, handle.program.loaded.manifest, [])
    found = []
    for seed in SEEDS:
        ptxsim.seed(seed)
        try:
            torch.ops.attnengine.forward(*operands(), [], kernel, handle.scale, False)
            found.append("")
        except RuntimeError:
            found.append(ptxsim.report().split(":", 1)[0])
    return found


def without(ptx: str, statement: Statement) -> str:
    lines = ptx.splitlines(keepends=True)
    lines[statement.line] = "\n"
    return "".join(lines)


def test_the_kernel_itself_has_no_report(handle: Handle, tmp_path: Path) -> None:
    ptx = handle.program.loaded.ptx_path.read_text()
    assert kinds(handle, ptx, tmp_path / "kernel.ptx") == [""] * len(SEEDS)


def test_each_barrier_is_needed(handle: Handle, tmp_path: Path) -> None:
    ptx = handle.program.loaded.ptx_path.read_text()
    barriers = [s for s in statements(ptx, r"bar\.sync") if s.file.endswith("forward.cuh")]
    assert len(barriers) >= 3
    for i, barrier in enumerate(barriers):
        found = kinds(handle, without(ptx, barrier), tmp_path / f"{i}.ptx")
        assert set(found) <= {"race", "uninitialized", "cp.async"}, (barrier, found)


def test_the_wait_for_copies_is_needed(handle: Handle, tmp_path: Path) -> None:
    ptx = handle.program.loaded.ptx_path.read_text()
    waits = list(statements(ptx, r"cp\.async\.wait"))
    # The first is the one in the loop; after the loop nothing is under way.
    assert kinds(handle, without(ptx, waits[0]), tmp_path / "wait.ptx") == ["cp.async"] * len(SEEDS)
