"""Fixtures that several files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from bare_machine import Bare

from attnengine import build


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, and nothing remembered from before."""
    for name in list(os.environ):
        if name.startswith("ATTNENGINE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ATTNENGINE_CACHE_DIR", str(tmp_path / "cache"))
    build.forget()
    yield tmp_path
    build.forget()


@pytest.fixture
def bare(tmp_path: Path) -> Bare:
    """A machine without a compiler."""
    return Bare(tmp_path)
