"""Pictures of a record, for the page and for Markdown: a roofline and bars of ratios."""

from __future__ import annotations

import io
from collections.abc import Sequence

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
                x, y, MARKERS.get(group, "o"), color=COLOURS[contestant], markersize=6,
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
    low, high = 1.0, 10_000.0
    flat = [("FMA", peak.fp32_flops / 1e9)]
    if dtype == "bf16" and peak.bf16_flops:
        flat.append(("bf16 dot", peak.bf16_flops / 1e9))
    top, read = max(rate for _, rate in flat), peak.read_bytes / 1e9
    ridge = top / read
    axes.plot([low, ridge], [low * read, top], color="#444444", lw=1.2)
    axes.annotate(
        f"DRAM read {read:.0f} GB/s", (1.3, 1.3 * read * 1.25), rotation=0, color="#444444"
    )
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


def _bars(axes: Axes, rows: Sequence[Row], labels: Sequence[str], title: str, unit: str) -> None:
    """Horizontal bars of ratios, first row on top; a black tick where the bar is."""
    factor = 100.0 if unit == "%" else 1.0
    for i, row in enumerate(rows):
        assert row.ratio is not None
        colour = {"pass": MET, "miss": MISSED, "": PLAIN}[row.verdict]
        axes.barh(i, row.ratio * factor, color=colour, height=0.72)
        reach = row.ratio
        if row.bar is not None:
            axes.plot([row.bar * factor] * 2, [i - 0.45, i + 0.45], color="black", lw=1.8)
            if row.ratio <= row.bar <= row.ratio * 1.25:  # the number would lie on the tick
                reach = row.bar
        axes.annotate(
            row.ratio_text, (reach * factor, i), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)
    axes.set_title(title)


def _stack(columns: list[list[tuple[str, list[Row], list[str]]]], unit: str, note: str) -> Figure:
    """Panels in columns, every bar of the same height."""
    tallest = max(sum(len(rows) + 2 for _, rows, _ in column) for column in columns)
    width = 5.4 * len(columns)
    figure = plt.figure(figsize=(width, max(2.2, ROW_INCHES * tallest + 0.6)))
    bottom, top = 0.5 / figure.get_figheight(), 1.0
    step = (top - bottom) / tallest
    for c, column in enumerate(columns):
        at = top
        for title, rows, labels in column:
            at -= 1.5 * step
            height = len(rows) * step
            left = (c + 0.33) / len(columns)
            axes = figure.add_axes((left, at - height, 0.63 / len(columns), height))
            _bars(axes, rows, labels, title, unit)
            axes.tick_params(axis="x", labelsize=7)
            at -= height + 0.5 * step
    figure.text(0.01, 0.12 / figure.get_figheight(), note, fontsize=8, color="#444444")
    return figure


NOTE = "black tick: the bar; blue: met; orange: missed; grey: no bar"


def _panels(
    record: Record, groups: dict[str, str], chosen: Sequence[str]
) -> list[tuple[str, list[Row], list[str]]]:
    """(title, rows, labels) of the groups that have rows against one of the `chosen` peers."""
    panels = []
    by_group = record.groups()
    for group, title in groups.items():
        rows = [r for r in by_group.get(group, []) if r.peer in chosen and r.ratio is not None]
        if rows:
            several = len({r.peer for r in rows}) > 1
            labels = [
                label(r) + (f", {NAMES.get(r.peer, r.peer)}" if several else "") for r in rows
            ]
            panels.append((title, rows, labels))
    return panels


def label(row: Row) -> str:
    """The name without its group, in words: bf16, D=64, causal."""
    parts = row.name.split("/")[1:]
    words = []
    for part in parts:
        if part[:1] == "d" and part[1:].isdigit():
            words.append(f"D={part[1:]}")
        elif part[:1] == "s" and part[1:].isdigit():
            words.append(f"S={part[1:]}")
        else:
            words.append(part)
    return ", ".join(words)


def against_torch(record: Record) -> Figure | None:
    """How many times as fast as SDPA and FlexAttention."""
    left = _panels(
        record,
        {"forward": "forward: times SDPA's speed", "short": "short: times SDPA's speed"},
        ("sdpa",),
    )
    right = _panels(record, {"training": "forward + backward: times SDPA's speed"}, ("sdpa",))
    right += _panels(record, {"variants": "variants: times FlexAttention's speed"}, ("flex",))
    right += _panels(record, {"decode": "decode: times the peer's speed"}, ("sdpa", "flex"))
    columns = [column for column in (left, right) if column]
    return _stack(columns, "x", NOTE) if columns else None


def own_costs(record: Record) -> Figure | None:
    """What mods, masks, row functions and parameters cost beside our own plain kernel."""
    kernel = ("our plain kernel",)
    left = _panels(record, {"variants": "mods: times our plain kernel's time"}, kernel)
    left += _panels(
        record, {"windows": "windows: time per visited pair / full causal's"},
        ("causal, per visited pair",),
    )  # fmt: skip
    left += _panels(
        record, {"bias": "forward + backward with bias: times plain's time"}, ("our plain",)
    )
    right = _panels(record, {"rows": "row functions: times softmax's time"}, ("our softmax",))
    right += _panels(
        record, {"memory": "extra memory: times the bytes of q + k + v"}, ("bytes of q + k + v",)
    )
    columns = [column for column in (left, right) if column]
    return _stack(columns, "x", NOTE) if columns else None


def shares(record: Record) -> Figure | None:
    """Shares, in %: of the measured peak, and of the rate without a mask."""
    titles = {
        "forward": "forward: % of the matmul peak",
        "training": "forward + backward: % of the matmul peak",
        "decode": "decode: % of the streaming read",
    }
    columns: list[list[tuple[str, list[Row], list[str]]]] = [[], []]
    by_group = record.groups()
    for group, title in titles.items():
        rows = [r for r in by_group.get(group, []) if r.ratio_unit == "%" and "full" not in r.peer]
        if rows:
            columns[0].append((title, rows, [label(r) for r in rows]))
    columns[1] = _panels(
        record, {"forward": "causal: % of full's rate per FLOP"}, ("full, per FLOP",)
    )
    columns = [column for column in columns if column]
    return _stack(columns, "%", NOTE) if columns else None
