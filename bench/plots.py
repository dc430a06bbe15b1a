"""Pictures of a record, for the page and for Markdown: a roofline and bars of ratios."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .record import Record
from .rows import Row

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 4,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
# Colours that stay apart for colour-blind readers (Okabe and Ito).
COLOURS = {"attnengine": "#0072b2", "sdpa": "#e69f00", "flex": "#009e73"}
NAMES = {"attnengine": "attnengine", "sdpa": "SDPA", "flex": "FlexAttention"}
MARKERS = {"forward": "o", "training": "s", "short": "^", "variants": "D", "decode": "*"}
MARKER_NAMES = {
    "forward": "forward",
    "training": "forward + backward",
    "short": "short (128 to 512)",
    "variants": "ALiBi, softcap, window, document",
    "decode": "decode (one query)",
}
MET, MISSED, PLAIN = "#0072b2", "#d55e00", "#999999"
ROW_INCHES = 0.235
DPI = 100


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; the figure is closed."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    plt.close(figure)
    return out.getvalue()


def pictures(record: Record) -> dict[str, bytes]:
    """PNG files by name; a picture without data is left out."""
    with plt.rc_context(STYLE):
        made = {
            "roofline": roofline(record),
            "against-torch": against_torch(record),
            "own-costs": own_costs(record),
            "shares": shares(record),
        }
        return {name: png(figure) for name, figure in made.items() if figure is not None}


def points(record: Record, dtype: str) -> list[tuple[str, str, float, float]]:
    """(contestant, group, FLOP/byte, GFLOP/s) of every row of `dtype` whose intensity is known."""
    found: dict[tuple[str, str], tuple[str, str, float, float]] = {}
    for row in record.rows:
        if row.intensity is None or row.gflops is None or row.name.split("/")[1] != dtype:
            continue
        found[(row.name, "")] = ("attnengine", row.group, row.intensity, row.gflops)
        if row.peer in NAMES and row.peer_gflops is not None:
            found[(row.name, row.peer)] = (row.peer, row.group, row.intensity, row.peer_gflops)
    return list(found.values())


def roofline(record: Record) -> Figure | None:
    """Arithmetic intensity against rate, one panel for bf16 and one for fp32."""
    data = {dtype: points(record, dtype) for dtype in ("bf16", "fp32")}
    if not any(data.values()):
        return None
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.9), sharey=True, layout="constrained")
    for axes, (dtype, found) in zip(panels, data.items(), strict=True):
        _roofs(axes, record, dtype)
        for contestant, group, x, y in found:
            axes.plot(
                x, y, MARKERS.get(group, "o"), color=COLOURS[contestant],
                markersize=11 if group == "decode" else 6,
                markeredgecolor="white", markeredgewidth=0.6,
            )  # fmt: skip
        axes.set_title(f"{dtype} operands")
        axes.set_xlabel("arithmetic intensity, FLOP per byte of operands and results")
        axes.grid(True, which="major", color="#eeeeee")
        axes.set_axisbelow(True)
    panels[0].set_ylabel("GFLOP/s")
    used = [g for g in MARKERS if any(p[1] == g for found in data.values() for p in found)]
    seen = [c for c in COLOURS if any(p[0] == c for found in data.values() for p in found)]
    keys = [Line2D([], [], marker="o", ls="", color=COLOURS[c], label=NAMES[c]) for c in seen]
    keys += [
        Line2D([], [], marker=MARKERS[g], ls="", color="#555555", label=MARKER_NAMES[g])
        for g in used
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _roofs(axes: Axes, record: Record, dtype: str) -> None:
    """The measured roofs of all threads: DRAM read, FMA and, for bf16, dot products."""
    peak = record.peaks[-1]
    low, high = 1.0, 40_000.0  # room for the names beyond the last point
    flat = [("FMA", peak.fp32_flops / 1e9)]
    if dtype == "bf16" and peak.bf16_flops:
        flat.append(("bf16 dot", peak.bf16_flops / 1e9))
    top, read = max(rate for _, rate in flat), peak.read_bytes / 1e9
    ridge = top / read
    axes.plot([low, ridge], [low * read, top], color="#444444", lw=1.2)
    axes.annotate(f"DRAM read {read:.0f} GB/s", (2.3, 1.4 * read), color="#444444")
    for name, rate in flat:
        start = rate / read
        style = "-" if rate == top else "--"
        axes.plot([start, high], [rate, rate], color="#444444", lw=1.2, ls=style)
        axes.annotate(
            f"{name} {rate:.0f} GFLOP/s", (high, rate * 1.06), ha="right", va="bottom",
            color="#444444",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(1.0, 1.6 * max(top, (peak.bf16_flops or top * 1e9) / 1e9))


def _bars(axes: Axes, panel: Panel) -> None:
    """Horizontal bars of ratios, first row on top; a black tick where the bar is; numbers in a
    column at the right."""
    for i, row in enumerate(panel.rows):
        assert row.ratio is not None
        factor = 100.0 if row.ratio_unit == "%" else 1.0
        colour = {"pass": MET, "miss": MISSED, "": PLAIN}[row.verdict]
        axes.barh(i, row.ratio * factor, color=colour, height=0.72)
        if row.bar is not None:
            axes.plot([row.bar * factor] * 2, [i - 0.45, i + 0.45], color="black", lw=1.8)
        axes.annotate(
            row.ratio_text, (1.14, i), xycoords=("axes fraction", "data"), ha="right",
            va="center", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(panel.rows)), panel.labels)
    axes.set_ylim(len(panel.rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7)


def _stack(columns: list[list[Panel]]) -> Figure | None:
    """Panels in columns, every bar of the same height."""
    columns = [column for column in columns if column]
    if not columns:
        return None
    tallest = max(sum(len(panel.rows) + 3 for panel in column) for column in columns)
    figure = plt.figure(figsize=(5.2 * len(columns), ROW_INCHES * (tallest + 1.5)))
    step = 1 / (tallest + 1.5)
    for c, column in enumerate(columns):
        at = 1.0
        for panel in column:
            at -= 1.6 * step
            title_at = ((c + 0.02) / len(columns), at + 0.3 * step)
            figure.text(*title_at, panel.title, fontsize=10, weight="bold")
            height = len(panel.rows) * step
            left, width = (c + 0.36) / len(columns), 0.52 / len(columns)
            _bars(figure.add_axes((left, at - height, width, height)), panel)
            at -= height + 1.4 * step
    figure.text(0.01, 0.4 * step, NOTE, fontsize=8, color="#444444")
    return figure


NOTE = "black tick: the bar; blue: met; orange: missed; grey: no bar"


@dataclass(frozen=True)
class Panel:
    """Bars under one title."""

    title: str
    rows: list[Row]
    labels: list[str]


def panel(
    record: Record, group: str, title: str, peers: Sequence[str] = (), within: str = ""
) -> list[Panel]:
    """A panel of the group's rows against `peers` (none: every share of a peak), of those with
    `within` in their name; an empty list when there are none."""
    rows = [
        row
        for row in record.groups().get(group, [])
        if row.ratio is not None
        and (not within or f"/{within}/" in row.name)
        and (row.peer in peers if peers else row.ratio_unit == "%" and "full" not in row.peer)
    ]
    return [Panel(title, rows, labels(rows, bool(peers)))] if rows else []


def labels(rows: Sequence[Row], with_peers: bool) -> list[str]:
    """What tells the rows apart: the parts of their names, and peers, that are not all the same."""
    words = [
        row.name.split("/")[1:] + ([NAMES.get(row.peer, row.peer)] if with_peers else [])
        for row in rows
    ]
    if len({len(w) for w in words}) > 1:
        return [row.name for row in rows]
    kept = [i for i in range(len(words[0])) if len({w[i] for w in words}) > 1] or [0]
    return [", ".join(_word(w[i]) for i in kept) for w in words]


def _word(part: str) -> str:
    if part[:1] in ("d", "s", "w") and part[1:].isdigit():
        return {"d": "D=", "s": "S=", "w": "window "}[part[0]] + part[1:]
    return WORDS.get(part, part)


WORDS = {
    "alibi": "ALiBi",
    "window256": "window 256",
    "document": "documents",
    "relu": "ReLU",
    "user-softmax-lse": "user softmax, lse",
    "user-softmax-mr": "user softmax, m and r",
    "bias-fp32": "[H,S,S] in fp32",
    "bias-bf16": "[H,S,S] in bf16",
    "t5-fp32": "T5 in fp32",
    "t5-bf16": "T5 in bf16",
}


def against_torch(record: Record) -> Figure | None:
    """How many times as fast as SDPA and FlexAttention."""
    left = panel(record, "forward", "Forward: times SDPA's speed", ["sdpa"])
    left += panel(record, "short", "64 short heads, bf16: times SDPA's speed", ["sdpa"])
    right = panel(record, "training", "Forward + backward: times SDPA's speed", ["sdpa"])
    right += panel(record, "variants", "Variants: times FlexAttention's speed", ["flex"])
    right += panel(record, "decode", "Decode, bf16: times the peer's speed", ["sdpa", "flex"])
    return _stack([left, right])


def own_costs(record: Record) -> Figure | None:
    """What mods, masks, row functions and parameters cost beside our own plain kernel."""
    visited, memory = ["causal, per visited pair"], ["bytes of q + k + v"]
    left = panel(record, "variants", "Mods: times our plain kernel's time", ["our plain kernel"])
    left += panel(record, "windows", "Windows: time per visited pair, causal = 1", visited)
    left += panel(
        record, "bias", "Bias, forward + backward: times the plain time", ["our plain"]
    )  # fmt: skip
    title = "times softmax's time"
    right = panel(record, "rows", f"Row functions: {title}", ["our softmax"], "forward")
    right += panel(
        record, "rows", f"Forward + backward: {title}", ["our softmax"], "forward+backward"
    )
    right += panel(record, "memory", "Extra memory: times the bytes of q, k, v", memory)
    return _stack([left, right])


def shares(record: Record) -> Figure | None:
    """Shares, in %: of the measured peak, and of the rate without a mask."""
    left = panel(record, "forward", "Forward: % of the matmul peak")
    left += panel(record, "decode", "Decode, bf16: % of the streaming read")
    left += panel(record, "training", "Forward + backward: % of the matmul peak")
    right = panel(record, "forward", "Causal: % of full's rate per FLOP", ["full, per FLOP"])
    return _stack([left, right])
