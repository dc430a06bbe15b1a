"""Compiling modules: keys, races, kills, and what may reach the compiler's command."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from build_work import Work, answer, needs_compiler, run_python, tiny

from attnengine import build, compiler, settings, staging
from attnengine.errors import BuildError

pytestmark = [pytest.mark.compiles, needs_compiler]


def test_module_is_built_verified_and_remembered(work: Work) -> None:
    path = build.module(tiny(), "portable", "tiny")
    assert answer(path) == 7
    assert build.module(tiny(), "portable", "another label") == path
    build.forget()
    assert build.module(tiny(), "portable", "tiny") == path
    assert work.compiles == 1
    names = {"kernel.so", "kernel.cpp", "cmd.json", "build.log", "manifest.json"}
    assert {file.name for file in path.parent.iterdir()} == names
    assert (path.parent / "kernel.cpp").read_text() == tiny()
    command = json.loads((path.parent / "cmd.json").read_text())["command"]
    assert "-march=x86-64 " in command or os.uname().machine != "x86_64"
    assert path.parent.stat().st_mode & 0o077 == 0 and path.stat().st_mode & 0o077 == 0
    assert list((work.cache / "tmp").iterdir()) == []
    assert "CXX" not in os.environ


def test_module_depends_on_no_torch_library(work: Work) -> None:
    path = build.module(tiny(), "portable", "tiny")
    data = path.read_bytes()
    assert b"libtorch" not in data and b"libc10" not in data and b"/torch/lib" not in data
    if shutil.which("readelf"):
        text = subprocess.check_output(["readelf", "-d", str(path)], text=True)
        assert not re.search(r"NEEDED.*(torch|c10)", text)
        assert re.search(r"runpath: \[\]", text) or "runpath" not in text


def test_flags_come_from_a_closed_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging.platform, "machine", lambda: "x86_64")
    assert staging.flags("avx512_bf16")[-2:] == ("-march=x86-64-v4", "-mavx512bf16")
    assert staging.flags("avx512")[-1] == "-march=x86-64-v4"
    assert staging.flags("avx2")[-1] == "-march=x86-64-v3"
    assert staging.flags("portable")[-1] == "-march=x86-64"
    assert not any("native" in flag for isa in settings.ISAS for flag in staging.flags(isa))
    with pytest.raises(BuildError, match="expected one of portable, avx2"):
        staging.flags("avx2 -DX; touch x")
    monkeypatch.setattr(staging.platform, "machine", lambda: "aarch64")
    assert not any(flag.startswith("-m") for flag in staging.flags("portable"))
    with pytest.raises(BuildError, match="a aarch64 compiler makes 'portable' only"):
        staging.flags("avx2")


def test_key_covers_what_changes_the_bits(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digests() -> tuple[str, str | None]:
        named = staging.name_unit(tiny(), "portable", "x")
        return named.content, named.digest

    first = digests()
    assert digests() == first
    assert staging.name_unit(tiny(), "portable", "another label").digest == first[1]
    assert staging.name_unit(tiny(8), "portable", "x").content != first[0]
    assert staging.name_unit(tiny(), "avx2", "x").content != first[0]
    monkeypatch.setattr("torch.__version__", "9.9.9")
    assert digests() == first
    # another compiler, or the same one updated: the entry's key changes, the prebuilt name does not
    time.sleep(0.002)
    os.utime(work.cxx)
    assert digests()[0] == first[0] and digests()[1] != first[1]
    monkeypatch.setenv("ATTNENGINE_CXX", str(shutil.which("c++")))
    assert digests()[0] == first[0] and digests()[1] != first[1]
    # a header: both
    copy = tmp_path / "templates"
    shutil.copytree(staging.templates_dir(), copy)
    monkeypatch.setattr(staging, "templates_dir", lambda: copy)
    assert digests()[0] == first[0]  # the same headers elsewhere
    with (copy / "common" / "abi.h").open("a") as file:
        file.write("// changed\n")
    assert digests()[0] != first[0]


def test_sixteen_processes_make_one_build(work: Work) -> None:
    program = (
        "import os, sys, time\nfrom attnengine import build\n"
        f"source = {tiny()!r}\nstart = time.time() + 0.3\nchildren = []\n"
        "for _ in range(16):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        time.sleep(max(0, start - time.time()))\n"
        "        try:\n"
        "            path = build.module(source, 'portable', 'race')\n"
        "            os.write(1, f'{path}\\n'.encode())\n"
        "            os._exit(0)\n"
        "        finally:\n"
        "            os._exit(1)\n"
        "    children.append(child)\n"
        "sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))\n"
    )
    process = run_python(program)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    paths = out.split()
    assert len(paths) == 16 and len(set(paths)) == 1
    assert answer(Path(paths[0])) == 7
    assert work.compiles == 1


def test_threads_share_one_build_and_different_modules_build_together(work: Work) -> None:
    found: list[Path] = []

    def get(number: int) -> None:
        found.append(build.module(tiny(number), "portable", "threads"))

    threads = [threading.Thread(target=get, args=(number % 2,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and {answer(path) for path in found} == {0, 1}
    assert work.compiles == 2


def test_two_modules_compile_at_the_same_time(work: Work) -> None:
    work.mood.write_text("slow")
    threads = [failing(tiny(1)), failing(tiny(2))]
    wait_for(lambda: work.compiles == 2)
    end(work, threads)


def failing(source: str) -> threading.Thread:
    """A thread that builds a module and is told that its compiler was killed."""

    def get() -> None:
        with pytest.raises(BuildError, match="the compiler was killed"):
            build.module(source, "portable", "x")

    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    return thread


def end(work: Work, threads: list[threading.Thread]) -> None:
    """Kills the compilers of the threads, which then end."""
    for staged in (work.cache / "tmp").iterdir():
        compiler._kill_inside(staged / "work")
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def wait_for(condition, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


def test_killed_build_leaves_nothing_harmful(work: Work) -> None:
    work.mood.write_text("slow")
    child = run_python(
        f"from attnengine import build\nbuild.module({tiny()!r}, 'portable', 'killed')"
    )
    try:
        wait_for(lambda: work.compiles == 1)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        work.mood.write_text("")
        assert len(list((work.cache / "tmp").iterdir())) == 1
        started = time.monotonic()
        path = build.module(tiny(), "portable", "again")
        assert time.monotonic() - started < 10 and answer(path) == 7
        assert list((work.cache / "tmp").iterdir()) == []  # cleaned after the new build
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def test_fork_during_a_build_can_build_too(work: Work) -> None:
    work.mood.write_text("slow")
    thread = failing(tiny(1))
    wait_for(lambda: work.compiles == 1)
    work.mood.write_text("")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if answer(build.module(tiny(2), "portable", "child")) == 2 else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    end(work, [thread])


def test_build_inside_an_exported_instruction_set(work: Work) -> None:
    """What `attnengine prebuild FILE.py:NAME` does; the build exports its compiler meanwhile."""
    with settings.exported_isa({"ATTNENGINE_ISA": "portable"}):
        assert answer(build.module(tiny(), "portable", "x")) == 7
        assert os.environ["ATTNENGINE_ISA"] == "portable"
    assert "ATTNENGINE_ISA" not in os.environ


def test_known_module_is_found_without_the_compiler_in_a_new_process(work: Work) -> None:
    build.module(tiny(), "portable", "x")
    process = run_python(
        f"from attnengine import build\nbuild.module({tiny()!r}, 'portable', 'x')\n"
        "import sys\nassert 'torch.utils.cpp_extension' not in sys.modules\n"
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert work.compiles == 1
