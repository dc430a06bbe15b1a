"""The command line, called in this process; kernels come from a store filled by hand."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from attnengine import build, cache, cache_entry, cli, prebuilt, staging
from attnengine.cache import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        if name.startswith("ATTNENGINE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ATTNENGINE_CACHE_DIR", str(tmp_path / "cache"))
    cache.forget()
    yield Store(tmp_path / "cache")
    cache.forget()


def fill(store: Store, count: int = 2) -> list[Path]:
    store.prepare()
    made = []
    for number in range(count):
        with store.stage() as stage:
            entry = stage / "entry"
            entry.mkdir(mode=0o700)
            cache_entry.write_file(entry / "kernel.so", b"x" * 3000)
            digest = cache_entry.sha256(str(number).encode())
            facts = {"isa": "avx2", "abi": 1, "cflags": [], "content": digest}
            made.append(store.publish(entry, digest, f"kernel {number}", facts))
            os.utime(made[-1].parent, (time.time() - 7200, time.time() - 7200 + number))
    return made


def test_ls_of_nothing(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", "ls"]) == 0
    assert capsys.readouterr().out == f"0 modules, 0 B in {store.root}\n"
    assert not store.root.exists()


def test_ls_lists_and_marks_broken(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = fill(store)
    second.with_name("manifest.json").unlink()
    assert cli.main(["cache", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(first.parent.name[:12]) and lines[0].endswith("kernel 0")
    assert " avx2 " in lines[0] and "3.4 KiB" in lines[0] and "2 h ago" in lines[0]
    assert "BROKEN" in lines[1] and "manifest.json is missing" in lines[1]
    assert lines[2].startswith("2 modules, ")


def test_verify_and_repair(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    _, second = fill(store)
    assert cli.main(["cache", "verify"]) == 0
    os.truncate(second, 10)
    assert cli.main(["cache", "verify"]) == 1
    out = capsys.readouterr().out
    assert "has 10 bytes, its manifest says 3000" in out and "1 modules good, 1 broken" in out
    assert cli.main(["cache", "verify", "--repair"]) == 0
    assert not second.parent.exists()
    assert "1 modules good, 1 broken and removed" in capsys.readouterr().out
    assert cli.main(["cache", "verify"]) == 0


def test_prune_and_clear(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = fill(store)
    assert cli.main(["cache", "prune"]) == 0
    assert "freed 0 B" in capsys.readouterr().out
    assert cli.main(["cache", "prune", "--limit-mb", "0.004"]) == 0
    assert not first.exists() and second.exists()
    assert cli.main(["cache", "clear"]) == 0
    assert not second.exists()
    assert cli.main(["cache", "ls"]) == 0
    assert "0 modules, 0 B" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["cache", "prune", "--limit-mb", "-1"], "--limit-mb=-1.0: expected a number >= 0"),
        (["prebuild", "--specs", "nothing", "--out", "x"], "expected FILE.py:NAME or MODULE:NAME"),
        (["prebuild", "--specs", "/nowhere.py:run", "--out", "x"], "is not a Python file"),
        (["prebuild", "--specs", "no_such_module_here:run", "--out", "x"], "cannot be imported"),
        (["prebuild", "--specs", "json:nothing", "--out", "x"], "'json' has no 'nothing'"),
        (["prebuild", "--specs", "sys:path", "--out", "x"], "item 0 is a str, not a Request"),
        (["prebuild", "--specs", "os:sep", "--out", "x"], "is a str, not a function"),
        (["prebuild", "--specs", "os:getcwd", "--out", "x"], "without using any kernel"),
    ],
)
def test_wrong_arguments_are_explained(
    store: Store, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(words) == 1
    assert message in capsys.readouterr().err


def test_wrong_setting_is_explained(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNENGINE_CACHE_LIMIT_MB", "lots")
    assert cli.main(["cache", "prune"]) == 1
    assert "ATTNENGINE_CACHE_LIMIT_MB='lots'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["cache"], ["cache", "ls", "--wide"], ["frobnicate"]])
def test_bad_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert "usage: attnengine" in capsys.readouterr().err


def test_demo_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    demo = types.SimpleNamespace(main=lambda words: seen.append(words))
    monkeypatch.setitem(sys.modules, "attnengine.demo", demo)  # type: ignore[arg-type]
    assert cli.main(["demo", "--quick", "--out", "there"]) == 0
    assert seen == [["--quick", "--out", "there"]]


def test_explain_makes_the_spec_and_the_tensors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import attnengine

    file = tmp_path / "mine.py"
    file.write_text(
        "class Spec:\n    row_func = None\n    def __init__(self, w): self.w = w\n"
        "def window(w): return Spec(w)\nready = Spec(5)\n"
    )

    def explain(spec, q, k, v) -> str:
        return f"w={spec.w} {tuple(q.shape)} {tuple(k.shape)} {v.dtype}"

    monkeypatch.setattr(attnengine, "explain", explain, raising=False)
    sizes = ["--heads", "4", "--kv-heads", "2", "--length", "8", "--kv-length", "16", "--dim", "4"]
    for dtype, name in (("fp32", "float32"), ("fp16", "float16")):
        assert cli.main(["explain", f"{file}:window", "w=3", *sizes, "--dtype", dtype]) == 0
        assert capsys.readouterr().out == f"w=3 (1, 4, 8, 4) (1, 2, 16, 4) torch.{name}\n"
    assert cli.main(["explain", f"{file}:ready", *sizes]) == 0
    assert capsys.readouterr().out.startswith("w=5 ")
    for words, message in (
        ([f"{file}:window"], "give arguments as KEY=VALUE"),
        ([f"{file}:window", "w=import os"], "must be a Python literal"),
        ([f"{file}:window", "oops"], "expected KEY=VALUE"),
    ):
        assert cli.main(["explain", *words, *sizes]) == 1
        assert message in capsys.readouterr().err


def test_plan_compiles_nothing(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNENGINE_CXX", "/nowhere/g++")
    words = ["plan", "softcap", "cap=20.0", "--dim", "32", "--length", "100000", "--heads", "64"]
    assert cli.main([*words, "--isa", "avx2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("attnengine plan for bf16 D32x32 cpu:avx2\n")
    forward, backward = out.split("== backward plan ==")
    for part in (forward, backward):
        assert "rows x keys  multiply  pointwise  cache  overhead  total" in part
        assert part.count("chosen: ") == 1 and part.count("because ") >= 4
        costs = [float(x.split()[-1]) for x in part.splitlines() if x.strip()[0:1].isdigit()]
        assert len(costs) >= 4 and costs == sorted(costs)
    assert not list(store.entries.glob("[0-9a-f][0-9a-f]/*"))


def test_plan_of_caches_prints_their_schedule(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "causal", "--caches", "700,65536", "--heads", "16", "--kv-heads", "2"]
    assert cli.main([*words, "--dim", "128", "--target", "sm80"]) == 0
    out = capsys.readouterr().out
    assert "chosen: 16 x 32, " in out and "segments" in out
    assert "4 outputs of at most 2048 tiles, " in out and "  -> split: " in out
    assert cli.main([*words, "--isa", "avx2"]) == 0
    assert "== schedule ==\na CPU kernel is asked for it" in capsys.readouterr().out
    assert not list(store.entries.glob("[0-9a-f][0-9a-f]/*"))


def test_plan_of_a_spec_without_a_gradient(
    store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import attnengine as ae\nimport torch\n"
        "spec = ae.AttentionSpec(score_mod=lambda s, b, h, q, k: torch.digamma(s))\n"
    )
    assert cli.main(["plan", f"{file}:spec"]) == 1
    assert "digamma" in capsys.readouterr().err
    assert cli.main(["plan", "full", "--dtype", "fp64"]) == 0
    assert "attnengine plan for f64 D64x64 " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "explain"])
@pytest.mark.parametrize(
    "words, message",
    [
        (["nothing"], "variant='nothing': not in attnengine.variants"),
        (["_positive"], "variant='_positive': not in attnengine.variants"),
        (["full", "--kv-heads", "3"], "--kv-heads=3: expected a divisor of --heads=8"),
        (["full", "--dim", "0"], "--dim=0: expected a number above 0"),
        (["softcap", "cup=3"], "give arguments as KEY=VALUE"),
    ],
)
def test_calls_that_make_no_sense(
    store: Store, command: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, *words]) == 1
    assert message in capsys.readouterr().err


def test_prebuild_copies_what_the_function_used(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    kernels = fill(store)
    file = tmp_path / "kernels.py"
    file.write_text("from attnengine import build\ndef run(): build.module('s', 'avx2', 'x')\n")

    def module(source: str, isa: str, label: str) -> Path:
        assert build._collected is not None
        for path in kernels:
            wanted = types.SimpleNamespace(content=path.parent.name)
            build._collected.append((wanted, path))  # type: ignore[arg-type]
        return kernels[0]

    monkeypatch.setattr(build, "module", module)
    out = tmp_path / "aot"
    assert cli.main(["prebuild", "--specs", f"{file}:run", "--out", str(out)]) == 0
    assert "2 kernels, 2 new" in capsys.readouterr().out
    monkeypatch.setenv("ATTNENGINE_AOT_PATH", str(out))
    found = prebuilt.find([kernels[0].parent.name], staging.build_id())
    assert found is not None and out in found.parents


def test_start_up_imports_no_torch() -> None:
    program = (
        "import sys\nfrom attnengine import cli\n"
        "try:\n    cli.main(['cache', '--help'])\nexcept SystemExit:\n    pass\n"
        "before = 'torch' in sys.modules\nfrom attnengine import build\n"
        "assert 'torch.utils.cpp_extension' not in sys.modules\n"
    )
    root = str(Path(cli.__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": root}
    )
