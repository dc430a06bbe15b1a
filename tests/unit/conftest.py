"""Fixtures that several files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from bare_machine import Bare
from build_work import Work

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


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    """A cache of its own, and a compiler that counts."""
    for name in list(os.environ):
        if name.startswith("ATTNENGINE_"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("CXX", raising=False)
    made = Work(tmp_path)
    monkeypatch.setenv("ATTNENGINE_CACHE_DIR", str(made.cache))
    monkeypatch.setenv("ATTNENGINE_CXX", str(made.cxx))
    build.forget()
    yield made
    build.forget()
