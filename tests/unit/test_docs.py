"""The documentation is true: its Python runs, its tables match the code, its commands exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from test_import_order import ORDER

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    """The page's Python blocks, padded with newlines so that tracebacks show the page's lines."""
    text = page.read_text()
    return [
        "\n" * text.count("\n", 0, match.start(1)) + match.group(1)
        for match in FENCE.finditer(text)
    ]


@pytest.mark.compiles
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_python_blocks_run(page: Path) -> None:
    """All blocks of a page run in order in one namespace, as a reader would type them."""
    namespace: dict[str, object] = {"__name__": page.stem}
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.compiles
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_example_runs(path: Path) -> None:
    runpy.run_path(str(path), run_name="__main__")


def test_environment_table_is_complete() -> None:
    """The README lists exactly the variables that settings.py reads, at most ten."""
    pattern = re.compile(r"ATTNENGINE_[A-Z_]+")
    read = set(pattern.findall((ROOT / "attnengine" / "settings.py").read_text()))
    listed = set(re.findall(r"^\| `(ATTNENGINE_[A-Z_]+)`", (ROOT / "README.md").read_text(), re.M))
    assert listed == read
    assert len(read) <= 10


def test_pipeline_page_names_every_module() -> None:
    page = (ROOT / "docs" / "how-a-call-flows.md").read_text()
    missing = [module for module in ORDER if f"`{module}`" not in page]
    assert not missing


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_paths_exist(page: Path) -> None:
    """Every `path/like.this` in backticks is a file or folder of the checkout."""
    pattern = re.compile(r"`((?:attnengine|bench|csrc|docs|examples|templates|tests)/[\w./-]*)`")
    missing = [path for path in pattern.findall(page.read_text()) if not (ROOT / path).exists()]
    assert not missing
