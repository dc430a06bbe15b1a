"""One page of a run: report.html (self-contained), report.md with its PNG files, README's table."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from . import plots, speed
from .record import NOTES, RESULTS, Record
from .rows import HEADINGS, Row, count_bars
from .tables import markdown_table

GROUP_TITLES = {
    "forward": "Forward against SDPA",
    "short": "Short sequences, 64 heads",
    "training": "Forward and backward against SDPA",
    "variants": "Variants against compiled FlexAttention",
    "windows": "Windows: time against tiles",
    "rows": "Row functions against the built-in softmax",
    "bias": "Learnable biases, forward and backward",
    "decode": "Decode: one query, streaming K and V",
    "serving": "Decode over KV caches: batches, ragged lengths, pages, MLA",
    "linear": "Linear attention: chunks, decode steps, growth with the length",
    "statistics": "Token statistics attention",
    "memory": "Memory of forward and backward",
    "calls": "Cost of a call",
    "startup": "First result",
}
PICTURE_TITLES = {
    "roofline": "Roofline: rates under the measured roofs of this machine",
    "against-torch": "Speed relative to torch's SDPA and FlexAttention",
    "shares": "Shares of measured rates",
    "own-costs": "Costs relative to our own plain kernel",
}
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #ffffff;
       max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; }
td, th { padding: 3px 10px; border-bottom: 1px solid #e4e4e4; text-align: left; }
td:nth-child(n+2) { white-space: nowrap; font-variant-numeric: tabular-nums; }
.pass { color: #00639a; } .miss { color: #b84700; font-weight: 600; }
img { max-width: 100%; } .note { color: #555555; font-size: 13px; }
"""


def facts(record: Record) -> list[str]:
    """What a reader needs before the numbers: command, machine, peaks, verdicts."""
    met, bars = count_bars(list(record.rows))
    where = ", ".join(f"{key} {value}" for key, value in record.environment.items())
    return [
        f"Command: {record.command}",
        where,
        *[peak.line() for peak in record.peaks],
        f"{met} of {bars} bars met",
        *[f"Not measured: {failure}" for failure in record.failures],
    ]


def markdown(record: Record, pictures: list[str]) -> str:
    """The page for a Markdown reader; `pictures` are names of PNG files beside it."""
    lines = ["# attnengine on the CPU", "", *[f"- {fact}" for fact in facts(record)], "", NOTES]
    for name in pictures:
        lines += ["", f"![{PICTURE_TITLES[name]}]({name}.png)"]
    for group, rows in record.groups().items():
        lines += ["", f"## {GROUP_TITLES.get(group, group)}", ""]
        lines += markdown_table(HEADINGS, [row.cells() for row in rows])
    return "\n".join(lines) + "\n"


def _html_table(rows: list[Row]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in HEADINGS)
    body = []
    for row in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row.cells())
        body.append(f'<tr class="{row.verdict}">{cells}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def page(record: Record, pictures: dict[str, bytes]) -> str:
    """The same as one HTML file that needs no other."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>attnengine on the CPU</title><style>{CSS}</style></head><body>",
        "<h1>attnengine on the CPU</h1><ul>",
        *[f"<li>{html.escape(fact)}</li>" for fact in facts(record)],
        f'</ul><p class="note">{html.escape(NOTES)}</p>',
    ]
    for name, data in pictures.items():
        title = html.escape(PICTURE_TITLES[name])
        source = base64.b64encode(data).decode()
        parts.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{source}">')
    for group, rows in record.groups().items():
        parts.append(f"<h2>{html.escape(GROUP_TITLES.get(group, group))}</h2>{_html_table(rows)}")
    return "\n".join(parts) + "\n</body></html>\n"


def write(folder: Path, record: Record, readme: Path | None = None) -> list[Path]:
    """Write report.html, report.md and the pictures under `folder`; README's Speed table too when
    `folder` is the recorded results'. Returns the paths."""
    pictures = plots.pictures(record)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytes] = {f"{name}.png": data for name, data in pictures.items()}
    files["report.html"] = page(record, pictures).encode()
    files["report.md"] = markdown(record, list(pictures)).encode()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    paths = [folder / name for name in files]
    readme = readme or (speed.README if folder.resolve() == RESULTS.resolve() else None)
    if readme is not None:
        readme.write_text(speed.updated(readme.read_text(), speed.section(record)))
        paths.append(readme)
    return paths
