"""Builds that fail: compilers, caches and entries that let one down, and what serves then."""

from __future__ import annotations

import os
import re
import time
import warnings
from pathlib import Path

import pytest
from build_work import Work, answer, needs_compiler, tiny

from attnengine import build, cache, cache_upkeep, compiler, staging
from attnengine.errors import BuildError, KernelUnavailable

pytestmark = [pytest.mark.compiles, needs_compiler]


def test_slow_compile_is_stopped(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    work.mood.write_text("slow")
    monkeypatch.setenv("ATTNENGINE_BUILD_TIMEOUT_S", "0.5")
    started = time.monotonic()
    with pytest.raises(BuildError, match="stopped after 0.5 s; set ATTNENGINE_BUILD_TIMEOUT_S"):
        build.module(tiny(), "portable", "slow")
    assert time.monotonic() - started < 10
    monkeypatch.delenv("ATTNENGINE_BUILD_TIMEOUT_S")
    work.mood.write_text("")
    assert answer(build.module(tiny(), "portable", "slow")) == 7  # not remembered as a failure


def test_rejected_source_shows_command_and_log_and_is_kept(work: Work) -> None:
    lines = "".join(f"#warning line {number}\n" for number in range(60))
    source = lines + "int broken = nonsense;\n"
    with pytest.raises(BuildError) as caught:
        build.module(source, "portable", "broken kernel")
    text = str(caught.value)
    assert "compiling 'broken kernel' for portable failed" in text
    assert f"command: {work.cxx} -std=c++20 -O3" in text
    assert len(text.split("last lines of the log:\n")[1].splitlines()) == 40
    kept = Path(re.search(r"kept: +(\S+)", text)[1])  # type: ignore[index]
    assert (kept / "kernel.cpp").read_text() == source
    assert "nonsense" in (kept / "build.log").read_text()
    assert not list(kept.glob("*.o"))
    with pytest.raises(BuildError, match="broken kernel"):
        build.module(source, "portable", "broken kernel")
    assert work.compiles == 1  # remembered in this process, and only there
    build.forget()
    with pytest.raises(BuildError):
        build.module(source, "portable", "broken kernel")
    assert work.compiles == 2
    assert not (work.store.entries / "text" / "failed").exists()


def test_failed_builds_kept_are_few(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_KEPT", 2)
    for number in range(3):
        with pytest.raises(BuildError):
            build.module(f"#error {number}", "portable", "x")
    assert len(list((work.cache / "failed").iterdir())) == 2


def test_killed_compiler_is_an_error_that_may_be_tried_again(work: Work) -> None:
    work.mood.write_text("killed")
    with pytest.raises(BuildError, match="last lines of the log"):
        build.module(tiny(), "portable", "killed")
    work.mood.write_text("")
    assert answer(build.module(tiny(), "portable", "killed")) == 7


@pytest.mark.parametrize(
    "source, message",
    [
        (tiny(abi="99"), "has ABI 99, expected 2"),
        ("int nothing;", "ae_info"),
        (tiny() + "extern int missing(); __attribute__((used)) int x = missing();", "missing"),
    ],
    ids=["abi", "symbols", "undefined"],
)
def test_module_that_cannot_be_used_is_not_published(work: Work, source: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        build.module(source, "portable", "bad")
    assert cache_upkeep.modules(work.store) == []


def test_no_compiler_says_where_it_was_looked_for(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNENGINE_CXX", "/nowhere/g++")
    with pytest.raises(KernelUnavailable, match="ATTNENGINE_CXX='/nowhere/g\\+\\+' is not"):
        build.module(tiny(), "portable", "x")
    monkeypatch.delenv("ATTNENGINE_CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("ATTNENGINE_AOT_PATH", str(tmp_path / "aot"))
    with pytest.raises(KernelUnavailable) as caught:
        build.module(tiny(), "portable", "my kernel")
    text = str(caught.value)
    digest = staging.name_unit(tiny(), "portable", "x").content
    for part in (
        "'my kernel'", digest, "c++, g++, clang++", str(tmp_path / "empty"),
        str(tmp_path / "aot"), str(work.cache), "attnengine prebuild",
    ):  # fmt: skip
        assert part in text


def test_cxx_with_words_finds_the_program(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNENGINE_CXX")
    monkeypatch.setenv("CXX", f"ccache {work.cxx} -m64")
    found = compiler.find_compiler()
    assert isinstance(found, compiler.Compiler) and found.command == str(work.cxx)
    assert answer(build.module(tiny(), "portable", "x")) == 7
    assert os.environ["CXX"] == f"ccache {work.cxx} -m64" and work.compiles == 1


def test_disabled_jit_uses_the_cache_only(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.module(tiny(), "portable", "x")
    build.forget()
    monkeypatch.setenv("ATTNENGINE_DISABLE_JIT", "1")
    assert build.module(tiny(), "portable", "x") == path
    with pytest.raises(KernelUnavailable, match="ATTNENGINE_DISABLE_JIT is set"):
        build.module(tiny(8), "portable", "x")


@pytest.mark.parametrize("damage", ["truncated", "manifest"])
def test_damaged_entry_is_built_again(work: Work, damage: str) -> None:
    path = build.module(tiny(), "portable", "x")
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        manifest = path.with_name("manifest.json")
        manifest.write_text(manifest.read_text().replace('"x"', '"y"'))
    build.forget()
    with pytest.warns(RuntimeWarning, match="built again"):
        again = build.module(tiny(), "portable", "x")
    assert again == path and answer(again) == 7 and work.compiles == 2


@pytest.mark.parametrize("name", ["with space", "$HOME;touch x", "a:b", "quote'\"", "ünï"])
def test_hostile_cache_folder(work: Work, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    root = work.root / "inside" / name
    monkeypatch.setenv("ATTNENGINE_CACHE_DIR", str(root))
    monkeypatch.chdir(work.root)
    label = 'l"; touch injected #\n$(touch injected)`touch injected`'
    path = build.module(tiny(), "portable", label)
    assert root in path.parents and answer(path) == 7
    with pytest.raises(BuildError, match="kept: "):
        build.module("#error on purpose", "portable", label)
    assert len(list((root / "failed").iterdir())) == 1
    left = {path.name for path in work.root.rglob("*") if "touch" in path.name or path.name == "x"}
    assert left <= {name} and not list(work.root.rglob("injected"))


def test_unusable_cache_builds_in_a_private_folder(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work.root / "file").write_text("")
    monkeypatch.setenv("ATTNENGINE_CACHE_DIR", str(work.root / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="cannot be used") as caught:
        path = build.module(tiny(), "portable", "x")
    assert answer(path) == 7 and len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.module(tiny(), "portable", "x") == path
        assert answer(build.module(tiny(8), "portable", "x")) == 8
    assert work.compiles == 2


def test_full_disk_builds_in_a_private_folder(work: Work) -> None:
    work.mood.write_text("full")
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        path = build.module(tiny(), "portable", "x")
    assert answer(path) == 7 and work.cache not in path.parents


def test_size_limit_spares_the_new_module(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNENGINE_CACHE_LIMIT_MB", "0")
    first = build.module(tiny(1), "portable", "x")
    then = time.time() - 3600
    os.utime(first.parent, (then, then))
    second = build.module(tiny(2), "portable", "x")
    assert not first.exists() and answer(second) == 2
    assert answer(build.module(tiny(1), "portable", "x")) == 1  # its path was remembered, yet gone


def test_prebuilt_modules_need_no_compiler(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    out = work.root / "aot"
    with build.collecting() as used:
        build.module(tiny(), "portable", "x")
        build.module(tiny(), "portable", "x")
    assert build.export(used, out) == 1 and build.export(used, out) == 0
    build.forget()
    monkeypatch.setenv("ATTNENGINE_AOT_PATH", f"{work.root / 'absent'}{os.pathsep}{out}")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("ATTNENGINE_CXX")
    path = build.module(tiny(), "portable", "x")
    assert out in path.parents and answer(path) == 7
    assert path.stat().st_mode & 0o044 == 0o044
    with pytest.raises(KernelUnavailable):
        build.module(tiny(8), "portable", "x")


def test_damaged_prebuilt_module_is_not_used(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    out = work.root / "aot"
    with build.collecting() as used:
        path = build.module(tiny(), "portable", "x")
    build.export(used, out)
    build.forget()
    monkeypatch.setenv("ATTNENGINE_AOT_PATH", str(out))
    (prebuilt,) = out.glob("1/*/*/kernel.so")
    os.truncate(prebuilt, 100)
    with pytest.warns(RuntimeWarning, match="prebuilt module not used"):
        assert build.module(tiny(), "portable", "x") == path
    assert prebuilt.exists() and work.compiles == 1
