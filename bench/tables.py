"""Tables as text."""

from __future__ import annotations


def markdown_table(headings: tuple[str, ...], lines: list[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table."""
    made = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    return made + ["| " + " | ".join(cells) + " |" for cells in lines]
