"""examples/serving: every token is the dense recompute's, a wrong page is noticed, pages are given
back, and the display redraws in place."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from examples.serving.display import PAGE_SIZE, Display, main
from examples.serving.model import Config, Group, Model, Paged
from examples.serving.scheduler import Engine, PagePool, Request, traffic, verify

VOCABULARY = Config().vocabulary


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small products, beside other tests: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.compiles
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--dtype", dtype]) == 0
    text = capsys.readouterr().out
    identical, tokens = map(int, re.findall(r"(\d+) of (\d+) tokens identical", text)[0])
    assert identical == tokens if dtype == "float32" else identical > 0.9 * tokens
    assert int(re.findall(r"preempted (\d+); 0 of \d+ pages", text)[-1]) > 0


@pytest.mark.compiles
def test_a_wrong_page_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Engine.group

    def wrong(self: Engine, members: list[Request], rows: slice) -> Group:
        group = right(self, members, rows)
        if members[0].cached == 20:  # for one token, two pages of a request in each other's place
            group.pages[0] = group.pages[0].flip(0)
        return group

    model, verdicts = Model(Config()), []
    for group in (right, wrong):
        monkeypatch.setattr(Engine, "group", group)
        requests = traffic(1, (18, 18), (6, 6), VOCABULARY)
        engine = Engine(model, Paged(model.config, 4, PAGE_SIZE), requests, 1)
        with torch.inference_mode():
            run(engine)
            verdicts.append(verify(model, engine.finished))
    assert [v[0] for v in verdicts] == [6, 6]
    assert verdicts[0][1] == 0 and verdicts[1][1] > 0


# -- the scheduler, over a model that guesses ------------------------------------------------------


def guess(tokens: Tensor, positions: Tensor, last: Tensor, cache: Paged) -> Tensor:
    assert len(tokens) == len(positions) == cache.groups[-1].rows.stop
    assert len(last) == sum(len(g.lengths) for g in cache.groups)
    return torch.randn(len(last), VOCABULARY)


def run(engine: Engine) -> None:
    """To the end, with the books audited at every step."""
    while engine.waiting or engine.running:
        engine.step()
        held = [page for r in engine.running for page in r.pages]
        assert sorted([*held, *engine.pool.free]) == list(range(engine.pool.total))
        for r in engine.running:
            assert len(r.pages) * engine.page_size >= r.cached == len(r.tokens()) - 1
        assert len(engine.running) <= engine.batch
        assert engine.steps < 10_000


@given(
    pages=st.integers(8, 40),
    batch=st.integers(1, 6),
    count=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_every_request_is_served(pages: int, batch: int, count: int, seed: int) -> None:
    requests = traffic(count, (1, 70), (1, 50), VOCABULARY, seed)  # 120 tokens: 8 pages
    engine = Engine(guess, Paged(Config(layers=1), pages, PAGE_SIZE), requests, batch)  # type: ignore[arg-type]
    run(engine)
    assert sorted(r.number for r in engine.finished) == list(range(count))
    assert all(len(r.generated) == r.wanted and not r.pages for r in engine.finished)
    assert len(engine.pool.free) == pages


def test_page_pool() -> None:
    pool = PagePool(3)
    pages = pool.take(2)
    with pytest.raises(MemoryError, match="2 pages wanted, 1 of 3 are free"):
        pool.take(2)
    pool.give_back(pages)
    with pytest.raises(ValueError, match="free already"):
        pool.give_back(pages[:1])
    assert sorted(pool.take(3)) == [0, 1, 2]


# -- the display -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO) -> list[str]:
    """What a display writes at the beginning and in the middle of a run."""
    requests = traffic(3, (20, 20), (9, 9), VOCABULARY)
    engine = Engine(guess, Paged(Config(layers=1), 8, PAGE_SIZE), requests, 2)  # type: ignore[arg-type]
    display, written = Display([engine], stream), []
    for _ in range(2):
        stream.truncate(stream.seek(0))
        display.update(last=True)
        written.append(stream.getvalue())
        for _ in range(4):
            engine.step()
    return written


def test_display_on_a_terminal() -> None:
    first, later = shown(Terminal())
    assert first.count("\n") == later.count("\n") == 5  # two requests, running or not
    assert later.startswith("\x1b[5A") and "request 0" in later and "4 of 9" in later
    assert "request" not in first


def test_display_elsewhere() -> None:
    first, later = shown(io.StringIO())
    assert first.count("\n") == later.count("\n") == 1 and "\x1b" not in later
    assert "running 2" in later and "of 8 pages in use" in later
