"""What every test run prints at its end: how many kernel modules it used, against the budget, and
what was skipped. Modules are distinct (source, instruction set) pairs asked for in this process."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

BUDGET = 220  # each costs seconds of compiling on a cold cache

_modules: dict[str, str] = {}  # digest -> the test file that asked first


def _counted(module: Any) -> Any:
    def counting(source: str, isa: str, label: str) -> Any:
        if '#include "cpu/' in source:
            digest = hashlib.sha256(f"{isa}\n{source}".encode()).hexdigest()
            _modules.setdefault(digest, _running[-1])
        return module(source, isa, label)

    return counting


_running = ["(outside a test)"]


@pytest.fixture(scope="session", autouse=True)
def _count_modules() -> Iterator[None]:
    from attnengine import build

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "module", _counted(build.module))
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--orders", type=int, default=1, help="orders of execution of each simulated decode call"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _running.append(item.nodeid.split("::")[0])
    try:
        return (yield)
    finally:
        _running.pop()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # an xdist worker: its controller sums up
        output["modules"] = _modules
    elif len(_modules) > BUDGET:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for digest, file in getattr(node, "workeroutput", {}).get("modules", {}).items():
        _modules.setdefault(digest, file)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    out = terminalreporter
    out.section("kernel modules")
    for file, count in sorted(Counter(_modules.values()).items()):
        out.line(f"{count:4d}  {file}")
    verdict = "" if len(_modules) <= BUDGET else ": OVER THE BUDGET, share more specs between tests"
    out.line(f"{len(_modules):4d}  of {BUDGET}{verdict}")
    skipped = out.stats.get("skipped", [])
    out.line(f"{len(skipped):4d}  tests skipped" + (" (reasons above)" if skipped else ""))
