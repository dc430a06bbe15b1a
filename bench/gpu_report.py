"""What a run on a GPU found, as JSON and as a short page; written anew after every case."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .gpu_caches import CacheCase
from .gpu_cases import Case, by_name
from .gpu_machine import ceiling_lines
from .gpu_peers import OURS
from .tables import markdown_table

STEM = "gpu"
HEADINGS = ("case", "problem", OURS, "rate", "of ceiling", "best other", "ratio", "others")
NOTES = (
    "Median of rounds in which all contestants take turns; ± half the interquartile range. FLOPs: "
    "2·pairs·(D + Dv), causal counts half. Rates of decode cases are bytes of operands and result, "
    "each moved once, over time; their caches are emptied before each call. Of ceiling: share of "
    "the measured matmul or read rate above, of KV caches (a GiB or more) of the copy rate. Ratio: "
    "best other's time by ours, from the same rounds. Every output was first compared with a dense "
    "fp64 reference on three bands of rows of two heads, and whole with the other contestants'; "
    "limit 2e-3 (fp16), 1e-2 (bf16)."
)


@dataclass
class Results:
    """Everything that one run found so far."""

    command: str
    started: str
    facts: dict[str, str] = field(default_factory=dict)
    ceilings: dict[str, Any] = field(default_factory=dict)
    clocks: dict[str, str] = field(default_factory=dict)
    builds: dict[str, Any] = field(default_factory=dict)  # timed case -> answer
    suite: dict[str, Any] = field(default_factory=dict)  # kernel -> answer
    timed: dict[str, dict[str, Any]] = field(default_factory=dict)  # case -> pass -> answer
    not_reached: list[str] = field(default_factory=list)
    state: str = "running"
    spent_s: float = 0.0

    @property
    def wrong(self) -> list[str]:
        """Kernels that gave a wrong result, or broke."""
        bad = [name for name, found in self.suite.items() if verdict(found) == "FAILED"]
        for name, passes in self.timed.items():
            mine = [p.get("rows", {}).get(OURS, {}) for p in passes.values()]
            broke = any(m.get("broke") or is_wrong(m.get("status", "")) for m in mine)
            bad += [name] if broke else []
        return bad


def is_wrong(status: str) -> bool:
    """Whether a contestant was refused for its output."""
    return status.startswith("AssertionError")


def verdict(found: dict[str, Any]) -> str:
    """passed, FAILED (wrong, or it broke the process), not built, or cut off."""
    if found.get("ok"):
        return "FAILED" if found.get("failures") else "passed"
    if found.get("cut_off"):
        return "cut off"
    return "FAILED" if found.get("fatal") else "not built"


def write(folder: Path, results: Results) -> None:
    """gpu.json and gpu.md under `folder`; a reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        f"{STEM}.json": json.dumps(vars(results), indent=1, default=str) + "\n",
        f"{STEM}.md": markdown(results),
    }
    for name, text in texts.items():
        part = folder / f".{name}.part"
        part.write_text(text)
        part.replace(folder / name)


# -- the page --------------------------------------------------------------------------------------


def markdown(results: Results) -> str:
    """The page."""
    lines = [f"# `{results.command}`", "", f"{results.started}; {results.state} after "
             f"{results.spent_s:.0f} s.", ""]  # fmt: skip
    lines += [", ".join(f"{name} {value}" for name, value in results.facts.items()) + ".", ""]
    lines += [f"- {line}" for line in ceiling_lines(results.ceilings)]
    if results.clocks:
        lines.append(f"- clocks: {', '.join(f'{n} {v}' for n, v in results.clocks.items())}")
    lines += ["", *suite_lines(results.suite), "", *timed_lines(results)]
    if results.not_reached:
        lines += ["", f"Not reached: {', '.join(results.not_reached)}."]
    return "\n".join(lines) + "\n"


def suite_lines(suite: dict[str, Any]) -> list[str]:
    """The numerics suite: counts, then each kernel that did not pass."""
    if not suite:
        return ["No kernel has been through the numerics suite."]
    verdicts = [verdict(found) for found in suite.values()]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts)))
    done = [found for found in suite.values() if found.get("ok")]
    lines = [f"Numerics suite: {len(suite)} kernels: {counts}."]
    if done:
        used = max(found["used"] for found in done)
        lines.append(
            f"{sum(f['calls'] for f in done)} calls judged; at most {used:.0%} of a limit used; "
            f"building took {max(f['build_s'] for f in done):.0f} s at most for one kernel."
        )
    groups: dict[str, list[str]] = {}
    for name, found in suite.items():
        if verdict(found) != "passed":
            text = found["failures"][0] if found.get("ok") else found.get("error", "")
            first = (text.strip().splitlines() or [""])[0]
            groups.setdefault(f"{verdict(found)}: {first}", []).append(name)
    return lines + [f"- {text} ({', '.join(names)})" for text, names in groups.items()]


def timed_lines(results: Results) -> list[str]:
    """The table of times, and why the missing ones are missing."""
    if not results.timed:
        return ["Nothing was timed."]
    lines = [NOTES, ""]
    lines += markdown_table(HEADINGS, [cells(n, p, results) for n, p in results.timed.items()])
    reasons: dict[str, list[str]] = {}
    for name, passes in results.timed.items():
        for answer in passes.values():
            if not answer.get("ok", True):
                first = answer.get("error", "").strip().splitlines()[:1]
                reasons.setdefault(f"not timed: {' '.join(first)}", []).append(name)
            for contestant, row in answer.get("rows", {}).items():
                if row.get("status") != "ok":
                    where = reasons.setdefault(f"{contestant}: {row.get('status')}", [])
                    where += [name] if name not in where else []
    if reasons:
        lines += ["", "Without a time:", ""]
        lines += [f"- {text} ({', '.join(names)})" for text, names in reasons.items()]
    return lines


def cells(name: str, passes: dict[str, Any], results: Results) -> tuple[str, ...]:
    """A case as a line of the table, in the order of HEADINGS."""
    case = by_name(name)
    others, pairs = [], []  # (contestant, ms), and (its ms / ours, contestant, ms)
    mine: dict[str, Any] = {}
    for answer in passes.values():
        rows = answer.get("rows", {})
        own = rows.get(OURS, {})
        mine = own if own and "ms" not in mine else mine
        for contestant, row in rows.items():
            if contestant != OURS and "ms" in row:
                others.append((contestant, row["ms"]))
                if "ms" in own:
                    pairs.append((row["ms"] / own["ms"], contestant, row["ms"]))
    ours = f"{mine['ms']:.4g} ms ±{mine['spread']:.0%}" if "ms" in mine else without_time(mine)
    fast = min(pairs)[1:] if pairs else min(others, key=lambda o: o[1], default=("", 0.0))
    shown = mine.get("ms") or fast[1]
    rate, share = rates(case, shown * 1e-3, results.ceilings) if shown else ("", "")
    listed = ", ".join(f"{n} {ms:.4g}" for n, ms in others if n != fast[0])
    return (
        name,
        case.shape,
        ours,
        rate if "ms" in mine else "",
        share if "ms" in mine else "",
        f"{fast[0]} {fast[1]:.4g} ms" if fast[0] else "",
        f"{min(pairs)[0]:.2f}x" if pairs else "",
        listed,
    )


def without_time(mine: dict[str, Any]) -> str:
    """Our cell when there is no time; the reason in full is below the table."""
    if is_wrong(mine.get("status", "")):
        return "WRONG OUTPUT"
    if mine.get("broke"):
        return "BROKE THE DEVICE"
    return "cannot run this yet" if mine else "not timed"


def rates(case: Case, seconds: float, ceilings: dict[str, Any]) -> tuple[str, str]:
    """The rate of a time and its share of the measured ceiling: bytes for a decode, else FLOPs."""
    if case.decode:
        ceiling = ceilings.get("copy" if isinstance(case, CacheCase) else "read")
        rate, unit = case.bytes / seconds, "TB/s"
    else:
        word = "matmul bf16" if "bf16" in case.shape else "matmul fp16"
        rate, ceiling, unit = case.flops / seconds, ceilings.get(word), "TFLOP/s"
    share = f"{rate / ceiling:.0%}" if isinstance(ceiling, float) else ""
    return f"{rate / 1e12:.4g} {unit}", share
