"""A run of the GPU benchmark without a GPU: clocks, processes, time limits, refusals."""

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

from bench import gpu, gpu_report
from bench.gpu_cases import TimedCase, by_name, timed_cases
from bench.gpu_clock import HostStopwatch, take_turns
from bench.gpu_crew import Crew
from bench.gpu_deadline import Deadline
from bench.gpu_report import Results

ROOT = Path(__file__).resolve().parents[2]


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
    assert "| BROKE THE DEVICE |" in (tmp_path / "gpu.md").read_text()


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
