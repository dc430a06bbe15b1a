"""README's Speed table, made from a record, between two markers."""

from __future__ import annotations

from pathlib import Path

from .record import Record
from .rows import Row, count_bars
from .tables import markdown_table

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
DTYPES = ("bf16", "fp16", "fp32")
NOTHING = "–"

# (label, group, part of the name after the dtype and D, peer); parts are joined by " / ".
PEER_LINES: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("forward, D=64, full / causal, vs SDPA", "forward", ("d64/full", "d64/causal"), "sdpa"),
    ("forward, D=128, full / causal, vs SDPA", "forward", ("d128/full", "d128/causal"), "sdpa"),
    (
        "64 heads of 128 / 256 / 512 tokens, causal, vs SDPA",
        "short",
        ("d64/s128/causal", "d64/s256/causal", "d64/s512/causal"),
        "sdpa",
    ),
    (
        "forward + backward, D=64, full / causal, vs SDPA",
        "training",
        ("d64/full", "d64/causal"),
        "sdpa",
    ),
    (
        "forward + backward, D=128, full / causal, vs SDPA",
        "training",
        ("d128/full", "d128/causal"),
        "sdpa",
    ),
    (
        "ALiBi / softcap / window 256 / documents, vs FlexAttention",
        "variants",
        ("d64/alibi", "d64/softcap", "d64/window256", "d64/document"),
        "flex",
    ),
)
# What things cost beside our own plain kernel: (label, group, parts, peer, unit of the bar).
COST_LINES: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    (
        "ALiBi / softcap, against causal",
        "variants",
        ("d64/alibi", "d64/softcap"),
        "our plain kernel",
    ),
    (
        "sigmoid / ReLU / a user's softmax, against softmax",
        "rows",
        ("d64/forward/sigmoid", "d64/forward/relu", "d64/forward/user-softmax-lse"),
        "our softmax",
    ),
    (
        "learnable bias [H,S,S] / T5, forward + backward",
        "bias",
        ("d64/bias-fp32", "d64/t5-fp32"),
        "our plain",
    ),
    (
        "windows of 128 / 1024, per visited tile, against causal",
        "windows",
        ("d64/w128", "d64/w1024"),
        "causal, per visited pair",
    ),
    (
        "extra memory of forward + backward at 32k tokens, against the bytes of q + k + v",
        "memory",
        ("d64/s32768",),
        "bytes of q + k + v",
    ),
)


def section(record: Record) -> str:
    """The Markdown between the markers, without them; ends with a newline."""
    at = {(row.name, row.peer): row for row in record.rows}
    where, peak = record.environment, record.peaks[-1]
    rates = f"{peak.fp32_flops / 1e9:.0f} GFLOP/s of fp32 FMA"
    if peak.bf16_flops:
        rates = f"{peak.bf16_flops / 1e9:.0f} GFLOP/s of bf16 dot products, {rates}"
    lines = [
        f"On {where['threads']} threads of {where['cpu']} (measured: {rates}, "
        f"{peak.read_bytes / 1e9:.0f} GB/s of streaming read), torch {where['torch']}; B=1, H=8, "
        "S=2048 unless said. Times the peer's speed, and share of the measured peak:",
        "",
        *_peer_table(at),
    ]
    costs = _cost_table(at)
    if costs:
        lines += ["", "Times the time of our own plain kernel, with the bar:", "", *costs]
    lines += _sentences(record)
    return "\n".join(lines) + "\n"


def _peer_table(at: dict[tuple[str, str], Row]) -> list[str]:
    made = []
    for text, group, parts, peer in PEER_LINES:
        cells = [text]
        for dtype in DTYPES:
            rows = [at.get((f"{group}/{dtype}/{part}", peer)) for part in parts]
            cells.append(_join([row and row.ratio_text for row in rows]))
            shares = [row and f"{row.share_of_peak or 0:.0%}" for row in rows]
            cells.append(_join(shares) if group in ("forward", "training") else "")
        if any(cells[1:]):
            made.append(tuple(cells))
    headings = ["case"]
    for dtype in DTYPES:
        headings += [dtype, "of peak"]
    return _without_empty_columns(tuple(headings), made)


def _cost_table(at: dict[tuple[str, str], Row]) -> list[str]:
    made = []
    for text, group, parts, peer in COST_LINES:
        found = {
            dtype: [at.get((f"{group}/{dtype}/{part}", peer)) for part in parts]
            for dtype in ("bf16", "fp32")
        }
        cells = [_join([row and row.ratio_text for row in rows]) for rows in found.values()]
        bars = dict.fromkeys(row.bar_text for rows in found.values() for row in rows if row)
        if any(cells):
            made.append((text, *cells, " / ".join(bars)))
    return markdown_table(("cost", "bf16", "fp32", "bar"), made) if made else []


def _sentences(record: Record) -> list[str]:
    """Decode, calls, start, verdicts and where the rest is."""
    said = []
    decode = record.groups().get("decode", [])
    share = next((r for r in decode if r.ratio_unit == "%"), None)
    if share is not None:
        names = {"sdpa": "SDPA's", "flex": "FlexAttention's"}
        times = [f"{r.ratio_text} {names[r.peer]} speed" for r in decode if r.peer in names]
        said.append(
            f"One query against 8192 keys (32 heads on 8, D=128, bf16) takes {share.ours:.2g} ms: "
            f"{share.ratio_text} of the streaming read, {' and '.join(times)}."
        )
    at = {row.name: row for row in record.rows}
    plain, grad = at.get("calls/attention"), at.get("calls/attention with grad")
    if plain and grad:
        said.append(
            f"A call on tiny tensors costs {plain.ratio_text} of SDPA's ({grad.ratio_text} with "
            "gradients)."
        )
    cold, warm = at.get("startup/new spec"), at.get("startup/warm process")
    if cold and warm:
        said.append(
            f"A new spec gives its first output after {cold.ours:.2g} s, and {warm.ours:.2g} s in "
            "later processes."
        )
    met, bars = count_bars(list(record.rows))
    missing = f" {len(record.failures)} case(s) failed." if record.failures else ""
    said.append(
        f"{met} of {bars} bars are met;{missing} every row, with its bar, and the plots: "
        "[bench/results/report.md](bench/results/report.md)."
    )
    lines = ["", " ".join(said)]
    if any(row.intensity is not None for row in record.rows):
        lines += ["", "![Roofline of every case](bench/results/roofline.png)"]
    return lines


def _join(texts: list[str | None]) -> str:
    if not any(texts):
        return ""
    return " / ".join(text or NOTHING for text in texts)


def _without_empty_columns(headings: tuple[str, ...], lines: list[tuple[str, ...]]) -> list[str]:
    kept = [i for i in range(len(headings)) if any(line[i] for line in lines)]

    def pick(cells: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(cells[i] for i in kept)

    return markdown_table(pick(headings), [pick(line) for line in lines])


def recorded(text: str) -> str:
    """What stands between the markers of a README. Raises ValueError when one is missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README needs the lines {BEGIN} and {END}, once each")
    return text.split(BEGIN + "\n")[1].split(END)[0]


def updated(text: str, made: str) -> str:
    """The README with `made` between its markers."""
    recorded(text)
    before, rest = text.split(BEGIN + "\n")
    return before + BEGIN + "\n" + made + END + rest.split(END)[1]
