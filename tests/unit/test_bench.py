"""The benchmark's logic without its clock: verdicts, derived rows, checks, the report."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import attnengine as ae
from bench import agreement, attention, child, decode, memory, record, report, siblings, speed
from bench.__main__ import ALL_GROUPS
from bench.cases import GROUPS, Case, Peer, attention_cases, make_operands
from bench.decode import Decode
from bench.peaks import Peaks
from bench.record import Record
from bench.rows import Row, count_bars, per_flop_row, per_work_row, share_row
from bench.runner import Samples, interleave
from bench.session import Session
from bench.variants import VARIANTS, Variant, learned_bias, row_functions, t5, window

PEAKS = (Peaks(1, 100e9, 200e9, 20e9), Peaks(2, 200e9, 400e9, 30e9))
ROW = Row("forward/bf16/d64/full", "ms", 10.0, 0.01, "sdpa", 40.0, 4.0, 3.5, gflops=300.0)


def steady(seconds: float) -> Samples:
    """Every round took as long."""
    return Samples((seconds,) * 5)


def attention_rows(case: Case, **seconds: float) -> list[Row]:
    """The rows of a case whose contestants took these times."""
    times = {name.replace("_", "-"): steady(s) for name, s in seconds.items()}
    return attention.case_rows(case, times, 1e-3, PEAKS[1])


# -- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, bar, at_least, verdict",
    [
        (3.5, 3.5, True, "pass"), (3.499, 3.5, True, "miss"), (4.0, None, True, ""),
        (1.1, 1.1, False, "pass"), (1.101, 1.1, False, "miss"), (None, 1.1, False, ""),
        (float("nan"), 3.5, True, "miss"), (float("nan"), 1.1, False, "miss"),
    ],
)  # fmt: skip
def test_verdict(ratio: float | None, bar: float | None, at_least: bool, verdict: str) -> None:
    assert dataclasses.replace(ROW, ratio=ratio, bar=bar, at_least=at_least).verdict == verdict


def test_bars_are_counted() -> None:
    missed = dataclasses.replace(ROW, ratio=3.0)
    assert count_bars([ROW, missed, dataclasses.replace(ROW, bar=None)]) == (1, 2)


def test_share_row_is_held_against_the_peak() -> None:
    row = share_row(dataclasses.replace(ROW, share_of_peak=0.649), 0.65, "bf16 dot peak")
    assert (row.verdict, row.ratio_text, row.bar_text) == ("miss", "65%", ">= 65%")
    assert row.ours == ROW.ours and row.peer_value is None


def test_per_flop_row_compares_rates() -> None:
    assert per_flop_row(ROW, 340.0, 0.88).verdict == "pass"  # 300 / 340 = 0.882
    assert per_flop_row(ROW, 342.0, 0.88).verdict == "miss"
    with pytest.raises(ValueError, match="FLOP rate"):
        per_flop_row(dataclasses.replace(ROW, gflops=None), 340.0, 0.88)


def test_per_work_row_is_one_when_time_is_proportional() -> None:
    row = per_work_row(ROW, "visited pair", work=25.0, base_ms=40.0, base_work=100.0, bar=1.25)
    assert row.ratio == pytest.approx(1.0) and row.verdict == "pass"
    slow = per_work_row(ROW, "visited pair", work=19.0, base_ms=40.0, base_work=100.0, bar=1.25)
    assert slow.verdict == "miss"


def test_peer_rate() -> None:
    assert ROW.peer_gflops == pytest.approx(75.0)


def test_rows_survive_json_and_older_records_are_read() -> None:
    data = json.loads(json.dumps(ROW.as_dict()))
    assert data["verdict"] == "pass" and Row.from_dict(data) == ROW
    assert Row.from_dict({"name": "a/b", "unit": "ms", "ours": 1.0, "spread": 0.0, "gone": 3})


# -- cases ----------------------------------------------------------------------------------------

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def test_every_bar_has_a_case() -> None:
    """(group, dtype, D, variant, contestant) -> bar, and the shares of the peak."""
    bars: dict[tuple, float | None] = {}
    shares: dict[tuple, float | None] = {}
    for group in GROUPS:
        for c in attention_cases(group, quick=False):
            key = (group, c.dtype, c.dim, c.variant)
            shares[key] = c.share_bar
            for peer in c.peers:
                bars[(*key, peer.name)] = peer.bar
    for dim in (64, 128):
        for name in ("full", "causal"):
            for dtype, bar in ((BF16, 3.5), (FP16, 3.0), (FP32, 2.0)):
                assert bars["forward", dtype, dim, name, "sdpa"] == bar
        assert bars["forward", BF16, dim, "causal", "full"] == 0.88
        for dtype, bar in ((BF16, 2.5), (FP32, 1.8)):
            assert bars["training", dtype, dim, "causal", "sdpa"] == bar
            assert shares["training", dtype, dim, "causal"] == 0.55
    assert shares["forward", BF16, 64, "full"] == 0.65
    assert shares["forward", BF16, 128, "full"] == 0.75
    assert shares["forward", FP32, 128, "full"] == 0.72
    for dtype, bar in ((BF16, 8.0), (FP32, 3.0)):
        for name in ("alibi", "softcap", "window256", "document"):
            assert bars["variants", dtype, 64, name, "flex"] == bar
        assert bars["variants", dtype, 64, "alibi", "plain"] == 1.15
        assert bars["variants", dtype, 64, "softcap", "plain"] == 1.35
    short = attention_cases("short", quick=False)
    assert {(c.length, c.variant) for c in short} == {
        (n, name) for n in (128, 256, 512) for name in ("full", "causal")
    }
    assert all(c.batch * c.heads == 64 and c.peers == (Peer("sdpa", 3.0),) for c in short)


def test_names_are_unique_and_groups_known() -> None:
    names = [c.name for group in GROUPS for c in attention_cases(group, quick=False)]
    assert len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names} <= set(ALL_GROUPS)


def test_documented_groups_exist() -> None:
    page = (record.RESULTS.parents[1] / "docs" / "benchmarks.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(ALL_GROUPS)


@pytest.mark.parametrize("name", [*VARIANTS, "w100"])
def test_live_pairs_are_those_of_the_mask(name: str) -> None:
    """Causal counts half, without half of the diagonal: n / 2 pairs less per document."""
    n = 300
    variant = window(n, 2, 100) if name == "w100" else VARIANTS[name](n, 2)
    q_idx, kv_idx = torch.arange(n)[:, None], torch.arange(n)
    live = torch.ones(n, n, dtype=torch.bool)
    if variant.mask_mod is not None:
        live = variant.mask_mod(torch.tensor(0), torch.tensor(0), q_idx, kv_idx)
    assert float(live.sum()) - variant.live in (0.0, n / 2)


def test_offset_moves_the_queries() -> None:
    """The last queries alone, with an offset, are the last queries of the whole."""
    q, k, v = (x.double() for x in make_operands((1, 2, 40, 8), FP32))
    for variant in (*(make(40, 2) for make in VARIANTS.values()), learned_bias(40, 2, FP32)):
        whole = ae.reference(q, k, v, variant.spec(), dtype=torch.float64)
        part = ae.reference(q[:, :, 30:], k, v, variant.spec(offset=30), dtype=torch.float64)
        torch.testing.assert_close(part, whole[:, :, 30:])


def test_user_written_softmax_is_softmax() -> None:
    q, k, v = (x.double() for x in make_operands((1, 1, 20, 8), FP32))
    made = row_functions(20)
    want = ae.reference(q, k, v, made["softmax"].spec())
    for name in ("user-softmax-lse", "user-softmax-mr"):
        torch.testing.assert_close(ae.reference(q, k, v, made[name].spec()), want)


def test_rates_and_rows_of_a_case() -> None:
    """Times in, verdicts out: one row per peer, and the share of the peak after the first."""
    case = Case("variants", "alibi", BF16, 64, (Peer("flex", 8.0), Peer("plain", 1.15)))
    assert case.flops == 4 * 8 * (2048**2 / 2) * 64
    assert case.intensity == pytest.approx(512.0)
    flex, plain = attention_rows(case, attnengine=0.010, flex=0.081, plain=0.008)
    assert flex.ratio == pytest.approx(8.1) and flex.verdict == "pass"
    assert plain.ratio == pytest.approx(1.25) and plain.verdict == "miss"
    causal = Case("forward", "causal", BF16, 64, (Peer("sdpa", 3.5), Peer("full", 0.88)))
    sdpa, whole = attention_rows(causal, attnengine=0.010, sdpa=0.030, full=0.018)
    assert sdpa.verdict == "miss" and whole.ratio == pytest.approx(0.9)
    assert whole.verdict == "pass" and whole.peer_value is None
    full_case = dataclasses.replace(causal, variant="full", peers=(Peer("sdpa"),), share_bar=0.65)
    _, share = attention_rows(full_case, attnengine=full_case.flops / 260e9, sdpa=1.0)
    assert share.ratio == pytest.approx(0.65) and share.peer == "bf16 dot peak"


def test_decode_is_held_against_bytes_of_k_and_v() -> None:
    case = Decode()
    assert case.bytes == 33_554_432
    times = {"attnengine": case.bytes / 18e9, "sdpa": 0.05, "read": 0.02}
    rows = decode.case_rows(case, {n: steady(s) for n, s in times.items()}, 1e-3, 30e9)
    assert [r.peer for r in rows] == ["sdpa", "read of 30.0 GB/s"]
    assert rows[1].ratio == pytest.approx(0.6) and rows[1].bar == 0.6


def test_memory_row() -> None:
    assert memory.row("memory/x", 200, 100).verdict == "pass"
    assert memory.row("memory/x", 201, 100).verdict == "miss"


def test_windows_are_compared_per_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    contest = siblings.windows(BF16, 2048, 8)
    assert list(contest.variants) == ["causal", "w128", "w256", "w512", "w1024"]
    visited = {name: v.live * 1.5 for name, v in contest.variants.items()}
    seconds = {name: steady(pairs * 1e-9) for name, pairs in visited.items()}
    result = siblings.Result(seconds, dict.fromkeys(seconds, 0.0), visited)
    monkeypatch.setattr(siblings, "run", lambda contest, session: result)
    rows = siblings.measure_windows(contest, Session(2, peaks=list(PEAKS)))
    assert len(rows) == 8 and all(r.ratio == pytest.approx(1.0) for r in rows)
    assert [r.verdict for r in rows] == ["pass", ""] * 4


# -- checks ---------------------------------------------------------------------------------------


def dense(variant: Variant, factor: float = 1.0):
    """A kernel that is right, or wrong by a factor."""
    return lambda q, k, v: ae.reference(q, k, v, variant.spec()) * factor


def test_wrong_outputs_are_not_timed() -> None:
    operands, variant = make_operands((1, 2, 200, 8), FP32), VARIANTS["document"](200, 2)
    good = dense(variant)(*operands)
    assert agreement.check_output("case", good, variant, operands) < 1e-6
    late = good.clone()
    late[:, 0, -1] *= 1.01
    with pytest.raises(AssertionError, match="case differs by"):
        agreement.check_output("case", late, variant, operands)
    with pytest.raises(AssertionError, match="case: flex differs"):
        agreement.check_peers("case", [good], {"flex": lambda: (good * 1.001,)}, FP32)
    late[0, 0, 0, 0] = float("nan")
    with pytest.raises(AssertionError, match="differs by inf"):
        agreement.check_peers("case", [good], {"sdpa": lambda: (late,)}, FP32)


def test_wrong_gradients_are_not_timed() -> None:
    operands = make_operands((1, 2, 40, 8), FP32)
    for variant in (learned_bias(40, 2, FP32), t5(40, 2, FP32), row_functions(40)["sigmoid"]):
        agreement.check_gradients("case", dense(variant), variant, operands)
        with pytest.raises(AssertionError, match="gradients"):
            agreement.check_gradients("case", dense(variant, 1.001), variant, operands)


def test_runs_that_differ_are_not_timed() -> None:
    agreement.check_repeats("case", lambda: (torch.ones(3),))
    turns: Iterator[torch.Tensor] = iter(torch.tensor([[1.0], [1.0 + 2**-23]]))
    with pytest.raises(AssertionError, match="differ in their bits"):
        agreement.check_repeats("case", lambda: (next(turns),))


# -- the run --------------------------------------------------------------------------------------


def test_rounds_interleave() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleave(runs, budget_s=0.0, min_rounds=4, max_rounds=4, sample_s=0.0)
    assert all(len(s.seconds) == 4 for s in times.values())
    assert "".join(order[-12:]) == "abcbcacababc"


def test_only_selects_groups_and_starts_of_names() -> None:
    session = Session(2, only=("short", "forward/bf16"))
    assert session.wanted("short/bf16/d64/s128/full") and session.wanted("forward/bf16/d64/full")
    assert session.wanted("forward") and not session.wanted("calls/forward+backward")
    assert not session.wanted("forward/fp32/d64/full") and not session.wanted("shortest/x")


def test_a_failing_case_does_not_end_the_run() -> None:
    session = Session(2)
    session.attempt("forward/fp16", lambda: torch.empty(0).argmax())  # type: ignore[arg-type]
    session.attempt("forward/bf16", lambda: [ROW])
    assert session.rows == [ROW] and session.failures[0].startswith("forward/fp16: IndexError: ")


def test_child_process() -> None:
    program = "import json, os, sys; print(json.dumps([sys.argv[1], os.environ['A']]))"
    assert child.run(program, 3, threads=1, A="b") == ["3", "b"]
    with pytest.raises(RuntimeError, match="ValueError: no"):
        child.run("raise ValueError('no')", threads=1)


# -- the report -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Record:
    """Some rows of every kind, with times made up."""
    rows: list[Row] = []
    for group in ("forward", "variants"):
        for case in attention_cases(group, quick=False):
            seconds = {p.name: 3 * case.flops / 400e9 for p in case.peers}
            times = {"attnengine": case.flops / 300e9, **seconds}
            rows += attention_rows(case, **{k.replace("-", "_"): t for k, t in times.items()})
    times = {"attnengine": steady(2e-3), "sdpa": steady(0.05), "read": steady(0.02)}
    rows += decode.case_rows(Decode(), times, 1e-3, 30e9)
    rows.append(memory.row("memory/bf16/d64/s32768", 120, 96))
    calls = Row("calls/attention", "us", 4.4, 0.0, "sdpa", 4.6, 0.95, 1.25, at_least=False)
    rows += [calls, dataclasses.replace(calls, name="calls/attention with grad", ratio=1.5)]
    where = {"cpu": "A <CPU>", "threads": "2", "torch": "2.13"}
    return Record("python -m bench cpu", where, PEAKS, tuple(rows), ("short/x: ValueError: <no>",))


def test_record_survives_its_file(small: Record, tmp_path: Path) -> None:
    paths = record.write(tmp_path, "cpu", small)
    assert record.load(paths[0]) == small
    text = paths[1].read_text()
    assert "forward/bf16/d64/full" in text and "short/x: ValueError" in text
    with pytest.raises(FileNotFoundError, match="python -m bench cpu"):
        record.load(tmp_path / "none.json")


def test_report_is_one_page(small: Record, tmp_path: Path) -> None:
    paths = report.write(tmp_path, small)
    pictures = [p for p in paths if p.suffix == ".png"]
    names = {"roofline.png", "against-torch.png", "own-costs.png", "shares.png"}
    assert {p.name for p in pictures} == names
    assert all(p.stat().st_size < 200_000 for p in pictures)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    embedded = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert {base64.b64decode(x) for x in embedded} == {p.read_bytes() for p in pictures}
    assert not re.search(r"(?:src|href)=\"(?!data:)", page), "a page that needs no other file"
    assert "A &lt;CPU&gt;" in page and "&lt;no&gt;" in page
    for row in small.rows:
        assert f"<td>{row.name}</td>" in page and f"| {row.name} |" in text
    assert all(f"({p.name})" in text for p in pictures)


def test_report_of_few_rows(small: Record, tmp_path: Path) -> None:
    """A picture without data is left out, and so are its rows of README's table."""
    calls = [row for row in small.rows if row.group == "calls"]
    few = dataclasses.replace(small, rows=tuple(calls))
    assert {p.suffix for p in report.write(tmp_path, few)} == {".html", ".md"}
    assert "forward" not in speed.section(few) and "tiny tensors" in speed.section(few)


def test_readme_section_shows_the_record(small: Record, tmp_path: Path) -> None:
    section = speed.section(small)
    assert "| forward, D=64, full / causal, vs SDPA | 2.25x / 2.25x | 75% / 75% |" in section
    met, bars = count_bars(list(small.rows))
    assert f"{met} of {bars} bars are met; 1 case(s) failed." in section
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{speed.BEGIN}\nold\n{speed.END}\nafter\n")
    report.write(tmp_path, small, readme)
    text = readme.read_text()
    assert text == f"before\n{speed.BEGIN}\n{section}{speed.END}\nafter\n"
    assert speed.updated(text, section) == text
    with pytest.raises(ValueError, match="speed:begin"):
        speed.updated("no markers", section)


def test_readme_is_that_of_the_recorded_run() -> None:
    """`python -m bench report` brings them together again."""
    made = speed.section(record.load(record.RESULTS / "cpu.json"))
    assert speed.recorded(speed.README.read_text()) == made
