"""The GPU benchmark without a GPU: its lists, counts, clocks, processes, tables and refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_agreement, gpu_cases, gpu_peers, gpu_report, gpu_suite, gpu_timing
from bench import gpu_worker as worker
from bench.gpu_cases import FAMILIES, TimedCase, by_name, timed_cases
from bench.gpu_clock import HostStopwatch, take_turns
from bench.gpu_crew import Crew
from bench.gpu_deadline import Deadline
from bench.gpu_report import Results

ROOT = Path(__file__).resolve().parents[2]


def small(variant: str, **sizes: int) -> TimedCase:
    """A case that a CPU does in no time."""
    given = {"B": 2, "Hq": 4, "Hkv": 2, "L": 40, "S": 40, "D": 32, "Dv": 16, **sizes}
    return TimedCase("small", variant, "none", **given, dtype=torch.float16, rank=0)


# -- cases -----------------------------------------------------------------------------------------


def test_names_are_unique_and_important_shapes_come_first() -> None:
    cases = timed_cases()
    assert len({c.name for c in cases}) == len(cases) == sum(len(f) for f in FAMILIES)
    assert [c.family for c in cases[: len(FAMILIES)]] == [f[0].family for f in FAMILIES]
    assert {c.family for c in timed_cases(("llama/B8", "relu"))} == {"llama", "relu"}
    assert timed_cases(("none",)) == []


@pytest.mark.parametrize(
    "name, flops, moved",
    [
        # 2*B*H*S*S*(D+Dv)/2: 2 * 32 * 4096^2 * 256 / 2; q, k, v, out of 4096 x 32 x 128 fp16
        ("llama/B1/S4096", 137438953472.0, 4 * 4096 * 32 * 128 * 2),
        # D 192, Dv 128: 2 * 8 * 16 * 2048^2 * 320 / 2
        ("deepseek/B8/S2048", 171798691840.0, 2 * 8 * 16 * 2048 * (192 + 128) * 2),
        # ReLU has no mask, and nothing is halved: 2 * 64 * 6 * 1024^2 * 128
        ("relu/B64/S1024", 103079215104.0, 4 * 64 * 6 * 1024 * 64 * 2),
        # decode: 2 * 8 * 16 * 8192 * 320; the cache and one row of q and out
        ("decode/B8/S8192", 671088640.0, 8 * 16 * (8192 + 1) * 320 * 2),
        # 20 % of 256 blocks of 32 keys is 51.2: 52 blocks, 1664 keys of each cache
        ("sparse-decode/B8/S8192", 2.0 * 8 * 32 * 1664 * 256, 8 * (8 * 1664 + 32) * 256 * 2),
        # a window of 256: the first 255 rows meet fewer keys
        ("window/B4/S2048", 2.0 * 4 * 32 * (256 * 257 / 2 + 1792 * 256) * 256, None),
        ("mla-decode/B8/S4096", 2.0 * 8 * 128 * 4096 * 1088, 2 * 8 * (4096 + 128) * 1088),
    ],
)
def test_work_is_counted_as_by_hand(name: str, flops: float, moved: int | None) -> None:
    case = by_name(name)
    assert case.flops == flops
    assert moved is None or case.bytes == moved


def test_one_kernel_serves_all_sizes_of_a_family() -> None:
    kernels = list(gpu_cases.one_per_kernel(timed_cases()))
    # gqa is bf16, gqa-decode fp16 without a mask: kernels of their own
    assert [c.family for c in kernels] == [f[0].family for f in FAMILIES]


def test_sparse_cache_keeps_what_is_counted() -> None:
    case = by_name("sparse-decode/B8/S2048")
    live = gpu_cases.dense_mask(case, "cpu")
    assert live.shape == (8, 32, 1, 2048)
    assert set(live.sum(-1).flatten().tolist()) == {case.kept_keys}
    assert torch.equal(live[:, 0], live[:, 3]) and not torch.equal(live[:, 0], live[:, 4])


def test_operands_are_grouped_and_the_same_every_time() -> None:
    case = small("causal")
    q, k, v = case.operands("cpu")
    assert (q.shape, k.shape, v.shape) == ((2, 4, 40, 32), (2, 2, 40, 32), (2, 2, 40, 16))
    assert torch.equal(q, case.operands("cpu")[0])


# -- agreement -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", ["full", "causal", "window", "relu", "sigmoid", "retention", "sparse"]
)
def test_expected_rows_are_what_attnengine_means(variant: str) -> None:
    import attnengine as ae

    case = small(variant, L=1, S=96) if variant == "sparse" else small(variant, Dv=32)
    operands = case.operands("cpu")
    golden = ae.reference(*operands, gpu_peers.spec(case, "cpu"), dtype=torch.float64)
    rows = slice(0, case.L)
    mine = gpu_agreement.expected_rows(case, *operands, 1, 3, rows)
    assert gpu_agreement.difference(mine, golden[1, 3]) < 1e-6  # fp32 captures, of the bias


def test_wrong_outputs_are_named_and_not_timed() -> None:
    case = small("causal", L=600, S=600)
    operands = case.operands("cpu")
    heads = [
        [gpu_agreement.expected_rows(case, *operands, b, h, slice(0, case.L)) for h in range(4)]
        for b in range(2)
    ]
    right = torch.stack([torch.stack(row) for row in heads]).half()
    assert gpu_agreement.distance(case, operands, right) < 1e-3
    wrong = right.clone()
    wrong[1, 3, 599] = 0
    with pytest.raises(AssertionError, match=r"rows 472:600 of batch 1, head 3"):
        gpu_agreement.distance(case, operands, wrong)
    elsewhere = right.clone()
    elsewhere[0, 1] *= 1.1  # a head that the bands do not see
    gpu_agreement.distance(case, operands, elsewhere)
    with pytest.raises(AssertionError, match="another contestant"):
        gpu_agreement.distance(case, operands, elsewhere, right)
    with pytest.raises(AssertionError, match="differ by inf"):
        gpu_agreement.distance(case, operands, right * float("nan"))
    with pytest.raises(AssertionError, match="expected"):
        gpu_agreement.distance(case, operands, right[..., :8])


# -- peers -----------------------------------------------------------------------------------------


def test_installed_peers_are_found_without_importing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "flashinfer" not in gpu_peers.installed()
    (tmp_path / "flashinfer").mkdir()
    (tmp_path / "flashinfer" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    info = tmp_path / "flashinfer_python-9.8.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flashinfer-python\nVersion: 9.8\n")
    (info / "top_level.txt").write_text("flashinfer\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert gpu_peers.installed()["flashinfer"] == "9.8"
    assert "flashinfer" in gpu_peers.contestants(by_name("llama/B1/S4096"), False)
    assert "flashinfer" not in gpu_peers.contestants(by_name("window/B4/S2048"), False)


def test_who_can_mean_a_case() -> None:
    llama, relu = by_name("llama/B1/S4096"), by_name("relu/B64/S1024")
    assert gpu_peers.contestants(llama, False)[:3] == list(gpu_peers.BACKENDS)
    assert gpu_peers.contestants(llama, True) == ["flex"]
    assert gpu_peers.contestants(relu, False) == []
    assert gpu_peers.contestants(relu, True) == ["dense"]


def test_padding_serves_who_needs_one_head_dim() -> None:
    case = small("causal", Hkv=4)
    operands = case.operands("cpu")

    def run_with(q: Any, k: Any, v: Any) -> Any:
        def run() -> torch.Tensor:
            if q.shape != v.shape:
                raise RuntimeError("one head dim, please")
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=case.scale
            )
            return out[..., : case.Dv]

        return run

    run = gpu_peers.first_that_runs(run_with, case, operands)
    assert gpu_agreement.distance(case, operands, run()) < 2e-3
    with pytest.raises(RuntimeError, match="never"):
        gpu_peers.first_that_runs(lambda *_: refuse, case, operands)


def refuse() -> None:
    raise RuntimeError("never")


# -- time ------------------------------------------------------------------------------------------


class FakeClock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_deadline_counts_down() -> None:
    clock = FakeClock()
    whole = Deadline(480.0, clock)
    part = whole.part(0.5)
    clock.now += 200.0
    assert (whole.spent, whole.left, part.left) == (200.0, 280.0, 40.0)
    assert whole.allows(280.0) and not whole.allows(281.0)
    assert whole.part(0.9).left == 280.0  # never later than the whole
    clock.now += 300.0
    assert whole.left == -20.0 and whole.part(0.5).left == 0.0


class CountingStopwatch(HostStopwatch):
    """A device on which every call of anything takes a second."""

    def __init__(self) -> None:
        self.now, self.flushed, self.held = 0.0, 0, 0

    def mark(self) -> float:
        return self.now

    def flush(self) -> None:
        self.flushed += 1
        self.now += 1000.0

    def hold(self, seconds: float) -> None:
        self.held += 1
        self.now += 1000.0


def test_flushes_and_waits_are_outside_the_timed_interval() -> None:
    watch, order = CountingStopwatch(), []

    def contestant(name: str, seconds: float) -> Any:
        def run() -> None:
            order.append(name)
            watch.now += seconds

        return run

    runs = {"a": contestant("a", 1e-4), "b": contestant("b", 2e-4)}
    times = take_turns(runs, watch, 0.0, flush=True, min_rounds=3)
    assert times["a"].median == pytest.approx(1e-4) and times["b"].median == pytest.approx(2e-4)
    assert watch.flushed == len(times["a"].seconds) + len(times["b"].seconds) == 2 * 3 * 8
    assert watch.held == 3
    order.clear()
    times = take_turns(runs, watch, 0.0, flush=False, min_rounds=2)
    assert times["a"].median == pytest.approx(1e-4) and len(times["a"].seconds) == 2
    # three calls to warm up; then a millisecond of each, in turns: a b, b a
    assert order[6:] == ["a"] * 10 + ["b"] * 5 + ["b"] * 5 + ["a"] * 10


# -- processes -------------------------------------------------------------------------------------

WORKER = """
import json, sys, time, os
for line in sys.stdin:
    job = json.loads(line)
    what = job.get("name", job["do"])
    if what == "dies":
        print("no such luck", file=sys.stderr)
        os._exit(9)
    if what == "hangs":
        time.sleep(600)
    if what == "long":
        time.sleep(job.get("seconds", 1.0))
    fatal = what == "faults" and not job.get("skip")
    rows = {"sdpa-flash": {"status": "ok"}, "attnengine": {"status": "ok"}}
    if fatal:
        rows["attnengine"] = {"status": "AcceleratorError: illegal access"}
    else:
        for row in rows.values():
            row |= {"ms": 2.0, "spread": 0.01, "distance": 1e-4}
    for skipped in job.get("skip", ()):
        rows.pop(skipped, None)
    answer = {"ok": True, "rows": rows, "build_s": 1.0, "calls": 3, "used": 0.5, "failures": []}
    answer |= {"fatal": fatal, "ceilings": {"matmul fp16": 8e14, "read": 4e12}, "pid": os.getpid()}
    print(json.dumps(answer), flush=True)
    if fatal:
        sys.exit(1)
"""
COMMAND = (sys.executable, "-c", WORKER)


@pytest.fixture
def crew() -> Iterator[Crew]:
    with Crew(2, command=COMMAND) as made:
        yield made


def test_a_dead_process_costs_one_job(crew: Crew) -> None:
    found: dict[str, Any] = {}
    jobs = [{"do": "suite", "name": n} for n in ("a", "dies", "hangs", "b", "c")]
    left = crew.run(
        jobs, Deadline(60.0), 1.5, lambda job, answer: found.update({job["name"]: answer})
    )
    assert left == [] and set(found) == {"a", "dies", "hangs", "b", "c"}
    assert all(found[name]["ok"] for name in "abc")
    assert "the process ended (exit status 9)\nno such luck" in found["dies"]["error"]
    assert "over its time limit" in found["hangs"]["error"] and not found["hangs"]["cut_off"]


def test_jobs_after_the_deadline_are_given_back(crew: Crew) -> None:
    found: dict[str, Any] = {}
    jobs = [{"do": "suite", "name": "long", "seconds": 60.0, "at": n} for n in range(4)]
    left = crew.run(
        jobs, Deadline(1.0), 60.0, lambda job, answer: found.update({job["at"]: answer})
    )
    assert [job["at"] for job in left] == [2, 3]
    assert all(answer["cut_off"] for answer in found.values()) and len(found) == 2
    assert gpu_report.verdict(found[0]) == "cut off"


# -- whole runs ------------------------------------------------------------------------------------


def options(out: Path, **changed: Any) -> Any:
    """What the command line would give."""
    import argparse

    given = {"out": out, "minutes": 1.0, "suite": "none", "only": ["llama"], "jobs": 2,
             "budget": 0.1}  # fmt: skip
    return argparse.Namespace(**{**given, **changed})


def run(out: Path, deadline: Deadline, **changed: Any) -> gpu.Run:
    """A run whose processes are the ones above."""
    results = Results("python -m bench.gpu --out x", "today")
    made = functools.partial(Crew, command=COMMAND)
    return gpu.Run(options(out, **changed), results, deadline, made, lambda text: None)


def test_a_run_times_every_case_twice_and_writes(tmp_path: Path) -> None:
    one = run(tmp_path, Deadline(60.0))
    assert one.go() == 0 and one.results.state == "complete"
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert set(data["timed"]) == {c.name for c in timed_cases(("llama",))}
    assert set(data["timed"]["llama/B1/S4096"]) == {"peers", "compiled"}
    page = (tmp_path / "gpu.md").read_text()
    # 137 GFLOP in 2 ms is 68.72 TFLOP/s, of 800
    assert "| 2 ms ±1% | 68.72 TFLOP/s | 9% | sdpa-flash 2 ms | 1.00x |" in page
    assert not list(tmp_path.glob(".*part"))


def test_a_run_stops_at_its_time_limit(tmp_path: Path) -> None:
    clock = FakeClock()
    one = run(tmp_path, Deadline(100.0, clock))
    save = one.save

    def slow() -> None:  # every answer takes 20 s
        clock.now += 20.0
        save()

    one.save = slow  # type: ignore[method-assign]
    assert one.go() == 0 and one.results.state == "stopped at its time limit"
    page = (tmp_path / "gpu.md").read_text()
    assert "stopped at its time limit" in page and "Not reached: time llama/" in page
    assert 0 < len(one.results.timed) < 6


def test_a_kernel_that_breaks_the_device_is_blamed_and_the_others_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = dataclasses.replace(by_name("llama/B1/S4096"), family="faults")
    monkeypatch.setattr(gpu, "timed_cases", lambda only: [case])
    monkeypatch.setattr(TimedCase, "name", property(lambda self: "faults"))
    monkeypatch.setattr(gpu, "by_name", lambda name: case)
    monkeypatch.setattr(gpu_report, "by_name", lambda name: case)
    one = run(tmp_path, Deadline(60.0))
    assert one.go() == 1 and one.results.wrong == ["faults"]
    rows = one.results.timed["faults"]["peers"]["rows"]
    assert rows["sdpa-flash"]["ms"] == 2.0
    assert rows["attnengine"] == {"status": "AcceleratorError: illegal access", "broke": True}
    assert "cannot run this yet" in (tmp_path / "gpu.md").read_text()


def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert found.returncode == 2, found.stderr
    said = found.stdout.strip()
    assert said == "bench.gpu needs an NVIDIA GPU that torch can use, and torch sees none here."


def test_baselines_do_not_need_attnengine() -> None:
    """A machine on which it cannot be built or imported still times the others."""
    code = (
        "import sys, json; sys.modules['attnengine'] = None\n"
        "from bench import gpu, gpu_machine, gpu_worker\n"
        "job = {'do': 'time', 'name': 'decode/B1/S2048', 'budget_s': 0.01, 'device': 'cpu'}\n"
        "print(json.dumps([gpu_machine.facts()['attnengine'], gpu_worker.answer(job)['rows']]))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    version, rows = json.loads(found.stdout)
    assert version.startswith("cannot be imported")
    assert rows["sdpa-flash"]["status"] == "ok" and rows["sdpa-flash"]["ms"] > 0
    assert rows["attnengine"]["status"].startswith("ModuleNotFoundError")


def test_session_script_says_how_to_call_it() -> None:
    found = subprocess.run(["bench/gpu_session.sh"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 64 and "usage: bench/gpu_session.sh OUT" in found.stderr


# -- report ----------------------------------------------------------------------------------------


def test_page_says_what_is_missing_and_why(tmp_path: Path) -> None:
    results = Results("command", "today", ceilings={"matmul fp16": 8e14, "exp2": "no jiterator"})
    results.timed["llama/B1/S4096"] = {
        "peers": {"ok": True, "rows": {
            "sdpa-flash": {"status": "ok", "ms": 1.0, "spread": 0.01},
            "sdpa-cudnn": {"status": "RuntimeError: no kernel"},
            "attnengine": {"status": "NotImplementedError: not in this version"},
        }},
        "compiled": {"ok": True, "rows": {"flex": {"status": "ok", "ms": 3.0, "spread": 0.1}}},
    }  # fmt: skip
    results.suite = {
        "a": {"ok": True, "failures": [], "calls": 20, "used": 0.5, "build_s": 14.0},
        "b": {"ok": True, "failures": ["wrap: (a) L2 error"], "calls": 20, "used": 9.0,
              "build_s": 11.0},
        "c": {"ok": False, "error": "BuildError: no nvcc\nat all"},
    }  # fmt: skip
    page = gpu_report.markdown(results)
    line = next(x for x in page.splitlines() if x.startswith("| llama"))
    assert "| cannot run this yet |  |  | sdpa-flash 1 ms |  | flex 3 |" in line
    assert "- sdpa-cudnn: RuntimeError: no kernel (llama/B1/S4096)" in page
    assert "3 kernels: 1 FAILED, 1 not built, 1 passed." in page
    assert "- FAILED: wrap: (a) L2 error (b)" in page
    assert "- not built: BuildError: no nvcc (c)" in page
    assert "- matmul fp16: 800 TFLOP/s" in page and "- exp2: no jiterator" in page
    assert results.wrong == ["b"]


def test_decode_is_rated_in_bytes() -> None:
    case = by_name("decode/B8/S8192")
    rate, share = gpu_report.rates(case, case.bytes / 2e12, {"read": 4e12})
    assert (rate, share) == ("2 TB/s", "50%")


# -- what workers do, on the CPU -------------------------------------------------------------------


def test_a_case_is_checked_and_timed() -> None:
    found = gpu_timing.measure_case(small("causal", Hkv=4), False, 0.01, (), "cpu")
    rows = found["rows"]
    assert rows["sdpa-flash"]["status"] == "ok" and rows["sdpa-flash"]["ms"] > 0
    assert rows["sdpa-cudnn"]["status"].startswith("RuntimeError")
    assert rows["attnengine"]["status"] == "ok" and rows["attnengine"]["distance"] < 2e-3
    skipped = gpu_timing.measure_case(small("relu"), False, 0.01, ("attnengine",), "cpu")
    assert skipped["rows"] == {}


def test_a_kernel_goes_through_the_gate() -> None:
    found = gpu_suite.check("sigmoid-window-plain-d8-fp16", seeds=(0,), device="cpu")
    assert found["failures"] == [] and found["calls"] >= 9 and 0 < found["used"] <= 1


def test_an_error_is_an_answer() -> None:
    found = worker.answer({"do": "suite", "name": "no-such-kernel"})
    assert not found["ok"] and not found["fatal"] and "KeyError" in found["error"]
