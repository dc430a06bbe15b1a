"""CUDA units: compiled for real by nvcc and ptxas, verified, kept, shipped, and refused clearly."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import stat
import struct
import subprocess
import threading
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attnengine import build, cache_upkeep, cutlass, kernel_wheel, nvcc, ptx, settings, staging
from attnengine.cache import Store
from attnengine.errors import BuildError, KernelUnavailable

FOUND = nvcc.find_device_compiler()
needs_nvcc = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))
compiled = [needs_nvcc, pytest.mark.compiles]


def unit(body: str = "y[threadIdx.x] = x;", front: str = "", **facts: Any) -> str:
    """A kernel of a few lines."""
    manifest = {"kind": "forward", "threads": 128, "shared_bytes": 0, **facts}
    return (
        f"// manifest: {json.dumps(manifest)}\n{front}\n"
        'extern "C" __global__ void __launch_bounds__(128)\n'
        "    ae_forward(const __grid_constant__ int x, float* y) {\n"
        f"  {body}\n}}\n"
    )


class Work:
    """A fresh cache, and a toolkit that counts its compiles and can be told to misbehave."""

    def __init__(self, root: Path, real: nvcc.DeviceCompiler) -> None:
        self.root, self.cache, self.home = root, root / "cache", root / "toolkit"
        self.log, self.mood = root / "compiles", root / "mood"
        self.mood.write_text("")
        script(self.home / "bin" / "ptxas", f'exec {real.ptxas.command} "$@"')
        script(
            self.home / "bin" / "nvcc",
            'case " $* " in *" -ptx "*)\n'
            f"  echo compile >> '{self.log}'\n"
            f"  case \"$(cat '{self.mood}')\" in\n"
            "    slow) sleep 30 ;;\n"
            "    killed) kill -9 $$ ;;\n"
            '    full) case "$PWD" in *cache*)\n'
            '      echo "fatal error: error writing: No space left on device" >&2; exit 1 ;;\n'
            f'    esac ;;\n  esac ;;\nesac\nexec {real.nvcc.command} "$@"',
        )

    @property
    def compiles(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def work(alone: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    assert not isinstance(FOUND, str)
    made = Work(alone, FOUND)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(made.home))
    return made


def get(source: str, label: str = "x") -> build.DeviceModule:
    return build.device_module(source, "sm_80", label)


class TestCompile:
    pytestmark = compiled

    def test_module_is_built_verified_and_remembered(self, work: Work) -> None:
        source = unit(
            "__shared__ float row[128];\n  row[threadIdx.x] = y[x];\n  __syncthreads();\n"
            "  y[threadIdx.x] = row[threadIdx.x ^ 1];",
            block_m=64,
        )
        made = get(source, "small")
        files = {"kernel.cu", "kernel.ptx", "kernel.cubin", "cuda.json", "cmd.json", "build.log"}
        assert {file.name for file in made.folder.iterdir()} == {*files, "manifest.json"}
        assert made.folder.parents[2] == work.cache
        assert build.module(source, "sm_80", "another label") == made.ptx_path
        build.forget()
        assert get(source) == made and work.compiles == 1
        entry = made.manifest["entries"]["ae_forward"]
        assert entry["static_shared"] == 512 and entry["stack_bytes"] == 0
        assert 4 <= made.registers == entry["registers"] <= 64 and made.spill_bytes == 0
        wanted = {"kind": "forward", "threads": 128, "shared_bytes": 0, "block_m": 64,
                  "target": "sm_80", "abi": staging.abi_version()}  # fmt: skip
        assert {name: made.manifest[name] for name in wanted} == wanted
        assert ".target sm_80" in made.ptx_path.read_text()
        assert made.cubin_path.read_bytes()[:4] == b"\x7fELF"
        record = json.loads((made.folder / "cmd.json").read_text())
        assert record["nvcc_seconds"] + record["ptxas_seconds"] <= record["seconds"]
        assert "-arch=compute_80 " in record["command"] and "-arch=sm_80 " in record["command"]
        assert list((work.cache / "tmp").iterdir()) == []
        (listed,) = cache_upkeep.modules(Store(work.cache), check=True)
        assert (listed.label, listed.isa, listed.problem) == ("small", "sm_80", None)

    def test_two_machines_make_the_same_files(
        self, work: Work, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Other folders for templates, CUTLASS, cache and temporary files: PTX and cubin agree."""
        assert not isinstance(FOUND, str)
        source = unit(
            "y[threadIdx.x] = helper(table[cute::min(x, int(y[0]))]);",
            "#include <cute/numeric/math.hpp>\n"
            "namespace {\n"
            "__device__ int table[4] = {1, 2, 3, 4};\n"
            "__device__ __noinline__ float helper(float x) { return x * x; }\n"
            "}",
        )
        first = get(source)
        templates, headers = work.root / "elsewhere" / "templates", work.root / "cutlass copy"
        shutil.copytree(staging.templates_dir(), templates)
        headers.mkdir()
        (headers / "include").symlink_to(FOUND.cutlass.include)
        monkeypatch.setattr(staging, "templates_dir", lambda: templates)
        monkeypatch.setenv("ATTNENGINE_CUTLASS", str(headers))
        monkeypatch.setenv("ATTNENGINE_CACHE_DIR", str(work.root / "second machine" / "cache"))
        second = get(source)
        assert first.folder != second.folder and work.compiles == 2
        text = first.ptx_path.read_text()
        assert "_INTERNAL_00000000_" in text
        assert text == second.ptx_path.read_text()
        assert first.cubin_path.read_bytes() == second.cubin_path.read_bytes()
        for data in (text.encode(), first.cubin_path.read_bytes()):
            for place in (work.root, Path.home(), FOUND.home, staging.templates_dir().parent):
                assert f"{place}/".encode() not in data
        names = re.findall(r'\.file\s+\d+\s+"(.*)"', text)
        assert "kernel.cu" in names and any(n.startswith("cutlass/cute/") for n in names)
        assert not any(n.startswith(("/", "..")) for n in names)

    def test_lines_do_not_change_the_code(
        self, work: Work, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = unit(
            "float sum = 0;\n  for (int i = 0; i < x; ++i) sum += ae_exp(y[i]) * y[i + 1];\n"
            "  y[threadIdx.x] = sum;",
            "__device__ float ae_exp(float x) { return exp2f(x * 1.44f); }",
        )
        first = get(source)
        short = tuple(flag for flag in staging._NVCC_FLAGS if flag != "-lineinfo")
        monkeypatch.setattr(staging, "_NVCC_FLAGS", short)
        second = get(source)
        assert ".loc" in first.ptx_path.read_text() and ".loc" not in second.ptx_path.read_text()
        name = ".text.ae_forward"
        code = [section(made.cubin_path.read_bytes(), name) for made in (first, second)]
        assert code[0] == code[1] and len(code[0]) > 100

    def test_spills_are_reported(self, work: Work) -> None:
        lines = "\n".join(f"  float a{i} = y[{i} * x];" for i in range(96))
        used = "\n".join(f"  y[{i} * x + 1] = a{i} * a{95 - i};" for i in range(96))
        source = unit(f"{lines}\n  __syncthreads();\n{used}").replace("(128)", "(1024, 2)")
        made = get(source)
        assert made.registers == 32 and made.spill_bytes > 0
        assert made.spill_bytes == made.manifest["entries"]["ae_forward"]["spill_bytes"]

    def test_tables_are_an_entry_of_their_own(self, work: Work) -> None:
        tables = 'extern "C" __global__ void ae_tables(int* y) { y[0] = 1; }'
        made = get(unit(front=tables, mask_captures=1))
        assert set(made.manifest["entries"]) == {"ae_forward", "ae_tables"}
        with pytest.raises(BuildError, match="has the entries ae_forward: its manifest promises "):
            get(unit(mask_captures=1))
        with pytest.raises(BuildError, match="has the entries ae_forward, ae_tables: its manifest"):
            get(unit(front=tables))

    @pytest.mark.parametrize("name", ["kernel.ptx", "kernel.cubin", "cuda.json"])
    def test_damaged_entry_is_built_again(self, work: Work, name: str) -> None:
        made = get(unit())
        data = bytearray((made.folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (made.folder / name).write_bytes(data)
        build.forget()
        with pytest.warns(RuntimeWarning, match=f"{name} differs from the hash .* built again"):
            again = get(unit())
        assert again.manifest == made.manifest and work.compiles == 2

    def test_threads_share_one_build(self, work: Work) -> None:
        found: list[build.DeviceModule] = []
        threads = [threading.Thread(target=lambda: found.append(get(unit()))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4 and len({made.folder for made in found}) == 1
        assert work.compiles == 1

    def test_hostile_cache_folder(self, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
        root = work.root / "$(touch injected); touch injected 'x"
        monkeypatch.setenv("ATTNENGINE_CACHE_DIR", str(root))
        monkeypatch.chdir(work.root)
        assert root in get(unit(), 'l"; touch injected #').folder.parents
        assert not list(work.root.rglob("injected"))

    def test_nvcc_takes_no_flags_from_the_environment(
        self, work: Work, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
            monkeypatch.setenv(name, "-DBROKEN")
        assert get(unit(front="#ifdef BROKEN\n#error broken\n#endif")).registers > 0

    def test_key_covers_what_changes_the_bits(
        self, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def digests() -> tuple[str, str | None]:
            named = staging.name_unit(unit(), "sm_80", "x")
            return named.content, named.digest

        first = digests()
        assert digests() == first
        assert staging.name_unit(unit(threads=64), "sm_80", "x").content != first[0]
        # another toolkit, another C++ compiler, other CUTLASS headers: the prebuilt name stays
        for change in ("nvcc", "ptxas", "c++", "cutlass"):
            if change == "cutlass":
                headers = fake_cutlass(tmp_path / "headers", 9, 9)
                monkeypatch.setenv("ATTNENGINE_CUTLASS", str(headers))
            elif change == "c++":
                own = script(tmp_path / "c++", f'exec {shutil.which("c++")} "$@"')
                monkeypatch.setenv("ATTNENGINE_CXX", str(own))
            else:
                time.sleep(0.002)
                os.utime(work.home / "bin" / change)
            before, now = first, digests()
            assert now[0] == before[0] and now[1] != before[1], change
            first = now
        # a template: both, and the modules of a CPU only where they can include it
        copy = tmp_path / "templates"
        shutil.copytree(staging.templates_dir(), copy)
        monkeypatch.setattr(staging, "templates_dir", lambda: copy)
        cpu, build_id = staging.name_unit("", "portable", "x").content, staging.build_id()
        (copy / "cuda").mkdir(exist_ok=True)
        (copy / "cuda" / "new.cuh").write_text("// new\n")
        assert digests()[0] != first[0] and staging.build_id() != build_id
        assert staging.name_unit("", "portable", "x").content == cpu


def section(cubin: bytes, name: str) -> bytes:
    """A section of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    count, names = struct.unpack_from("<HH", cubin, 60)
    rows = [struct.unpack_from("<IIQQQQ", cubin, table + i * 64) for i in range(count)]
    texts = cubin[rows[names][4] :]
    (found,) = (r for r in rows if texts[r[0] : texts.index(b"\0", r[0])].decode() == name)
    return cubin[found[4] : found[4] + found[5]]


class TestFailures:
    pytestmark = compiled

    def test_rejected_source_shows_command_and_log_and_is_kept(self, work: Work) -> None:
        source = unit(front="".join(f"#warning line {n}\n" for n in range(60)) + "int b = nope;")
        with pytest.raises(BuildError) as caught:
            get(source, "broken kernel")
        text = str(caught.value)
        assert "compiling 'broken kernel' for sm_80 failed" in text
        assert f"command: {work.home}/bin/nvcc -ptx -std=c++20" in text
        assert len(text.split("last lines of the log:\n")[1].splitlines()) == 40
        kept = Path(re.search(r"kept: +(\S+)", text)[1])  # type: ignore[index]
        assert (kept / "kernel.cu").read_text() == source
        assert "nope" in (kept / "build.log").read_text() and not (kept / "tmp").exists()
        with pytest.raises(BuildError, match="broken kernel"):
            get(source)
        assert work.compiles == 1  # remembered

    def test_rejected_ptx(self, work: Work) -> None:
        with pytest.raises(
            BuildError, match="rejected it(.|\n)*command: (.|\n)*instruction: 'mum'"
        ):
            get(unit('asm("mum.f32 %0, %0;" : "+f"(*y));'))
        with pytest.raises(BuildError, match="Unresolved extern function"):
            get(unit("y[0] = other(x);", "extern __device__ float other(int);"))
        assert cache_upkeep.modules(Store(work.cache)) == []

    @pytest.mark.parametrize(
        "source, message",
        [
            ("", "the source has 0 manifest lines, expected 1"),
            (unit() + "// manifest: {}\n", "2 manifest lines"),
            ("// manifest: {x}\n", "the manifest line is not JSON"),
            (unit(threads="128"), "the manifest line has threads='128': expected int"),
            ('// manifest: {"kind": 3}\n', "has kind=3: expected str"),
        ],
    )
    def test_source_without_its_facts(self, work: Work, source: str, message: str) -> None:
        with pytest.raises(BuildError, match=message):
            get(source)
        assert work.compiles == 0

    def test_slow_compile_is_stopped(self, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
        work.mood.write_text("slow")
        monkeypatch.setenv("ATTNENGINE_BUILD_TIMEOUT_S", "0.5")
        started = time.monotonic()
        with pytest.raises(BuildError, match="stopped after 0.5 s; set ATTNENGINE_BUILD_TIMEOUT_S"):
            get(unit())
        assert time.monotonic() - started < 10
        monkeypatch.delenv("ATTNENGINE_BUILD_TIMEOUT_S")
        work.mood.write_text("killed")
        with pytest.raises(BuildError, match="the compiler was killed"):
            get(unit())
        work.mood.write_text("")
        assert get(unit()).registers > 0  # neither is remembered

    def test_full_disk_builds_in_a_private_folder(self, work: Work) -> None:
        work.mood.write_text("full")
        with pytest.warns(RuntimeWarning, match="No space left on device"):
            made = get(unit())
        assert work.cache not in made.folder.parents

    def test_disabled_jit(self, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
        made = get(unit())
        build.forget()
        monkeypatch.setenv("ATTNENGINE_DISABLE_JIT", "1")
        assert get(unit()) == made
        with pytest.raises(KernelUnavailable, match="ATTNENGINE_DISABLE_JIT is set") as caught:
            get(unit(threads=64))
        assert "attnengine prebuild --specs FILE --target sm80 --out DIR" in str(caught.value)


class TestMissing:
    """What is missing is said with its remedy, and compiles nothing."""

    def test_no_nvcc(self, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", "")
        monkeypatch.setattr(nvcc, "_USUAL", alone / "usr" / "local" / "cuda")
        hide(monkeypatch, "nvidia")
        with pytest.raises(KernelUnavailable) as caught:
            get(unit(), "my kernel")
        text = str(caught.value)
        for part in (
            "kernel 'my kernel' (sm_80, digest ", "no CUDA compiler: CUDA_HOME and CUDA_PATH are",
            str(alone / "usr"), "pip install 'attnengine[cuda13]'", "CUDA toolkit 12.4 or newer",
            "attnengine prebuild --specs FILE --target sm80 --out DIR",
        ):  # fmt: skip
            assert part in text
        monkeypatch.setenv("CUDA_PATH", str(alone))
        with pytest.raises(KernelUnavailable, match=f"CUDA_PATH='{alone}' has no bin/nvcc; pip"):
            get(unit())

    @pytest.mark.parametrize(
        "answer, message",
        [
            (
                "echo release 11.8, V11.8.1",
                r"nvcc 11\.8 in .* is too old: .* need 12\.4 or newer \(C",
            ),
            ("echo release 12.4, V12.4.1", "has nvcc but no bin/ptxas: the toolkit is incomplete"),
            ("exit 1", "nvcc --version does not run in "),
        ],
    )
    def test_nvcc_that_cannot_be_used(
        self, alone: Path, monkeypatch: pytest.MonkeyPatch, answer: str, message: str
    ) -> None:
        script(alone / "cuda" / "bin" / "nvcc", answer)
        monkeypatch.setenv("CUDA_HOME", str(alone / "cuda"))
        with pytest.raises(KernelUnavailable, match=message + ".*pip install 'attnengine"):
            get(unit())

    @needs_nvcc
    def test_old_nvcc_on_the_path_is_passed_over(
        self, alone: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert not isinstance(FOUND, str)
        old = script(alone / "old" / "bin" / "nvcc", "echo release 11.8, V11.8.1")
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.delenv("CUDA_PATH", raising=False)
        monkeypatch.setenv("PATH", f"{old.parent}:/usr/bin:/bin")
        monkeypatch.setattr(nvcc, "_USUAL", FOUND.home)
        found = nvcc.find_device_compiler()
        assert not isinstance(found, str) and "old" not in str(found.home)

    @needs_nvcc
    def test_no_host_compiler(self, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ATTNENGINE_CXX", "/nowhere/g++")
        with pytest.raises(KernelUnavailable, match="nvcc needs a C.. compiler: no C.. compiler: "):
            get(unit())

    @needs_nvcc
    def test_no_cutlass(self, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ATTNENGINE_CUTLASS", str(alone))
        text = rf"CUTLASS headers missing: ATTNENGINE_CUTLASS='{alone}' has no include/cutlass/vers"
        with pytest.raises(KernelUnavailable, match=rf"{text}.*pip install 'attnengine\[cuda\]'"):
            get(unit())
        monkeypatch.delenv("ATTNENGINE_CUTLASS")
        hide(monkeypatch, "cutlass_library")
        with pytest.raises(
            KernelUnavailable, match="CUTLASS headers missing: .* not installed; pip"
        ):
            get(unit())

    def test_cutlass_folder_or_its_include(
        self, alone: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = fake_cutlass(alone / "cutlass", 3, 5)
        for place in (root, root / "include"):
            monkeypatch.setenv("ATTNENGINE_CUTLASS", str(place))
            found = cutlass.find_cutlass()
            assert isinstance(found, cutlass.Cutlass)
            assert (found.include, found.version) == (root / "include", "3.5.1")
        fake_cutlass(root, 3, 4)
        found = cutlass.find_cutlass()
        assert isinstance(found, str) and "CUTLASS 3.4.1 in " in found
        assert "is too old: the kernels need 3.5 or newer; pip install" in found
        (root / "include" / "cutlass" / "version.h").write_text("")
        assert "CUTLASS unknown in " in str(cutlass.find_cutlass())

    @pytest.mark.parametrize("target", ["sm_70", "sm_75", "sm_80; touch x", "sm_90a"])
    def test_unsupported_target(self, alone: Path, target: str) -> None:
        with pytest.raises(
            BuildError, match="expected one of sm_80 .* or use CPU tensors"
        ) as found:
            build.device_module(unit(), target, "x")
        assert str(found.value).startswith(f"{target}: no CUDA kernels are compiled for")


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As on a machine where a package is not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else real(name, *rest),
    )


def fake_cutlass(root: Path, major: int, minor: int) -> Path:
    place = root / "include" / "cutlass" / "version.h"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(
        f"#define CUTLASS_MAJOR {major}\n#define CUTLASS_MINOR {minor}\n#define CUTLASS_PATCH 1\n"
    )
    return root


class TestShipped:
    pytestmark = compiled

    def test_prebuilt_modules_need_no_nvcc(
        self, work: Work, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A folder for ATTNENGINE_AOT_PATH, and the same as a wheel."""
        out = work.root / "aot"
        with build.collecting() as used:
            made = get(unit(), "shipped")
        assert build.export(used, out) == 1 and build.export(used, out) == 0
        (manifest,) = out.rglob("manifest.json")
        names = {"kernel.cu", "kernel.ptx", "kernel.cubin", "cuda.json", "manifest.json"}
        assert {file.name for file in manifest.parent.iterdir()} == names
        for file in manifest.parent.iterdir():
            assert str(work.root).encode() not in file.read_bytes()
        build.forget()
        monkeypatch.setenv("ATTNENGINE_AOT_PATH", str(out))
        monkeypatch.setenv("CUDA_HOME", "/nowhere")
        found = get(unit())
        assert found.folder == manifest.parent and found.manifest == made.manifest
        assert found.cubin_path.read_bytes() == made.cubin_path.read_bytes()
        assert found.ptx_path.stat().st_mode & 0o044 == 0o044
        with pytest.raises(KernelUnavailable, match="no CUDA compiler"):
            get(unit(threads=64))
        wheel = kernel_wheel.write_wheel(out, work.root / "dist", "my-gpu", "0.1", "f" * 64)
        with zipfile.ZipFile(wheel) as archive:
            inside = {Path(n).name for n in archive.namelist() if "attnengine_kernels/" in n}
        assert inside == {*names, "prebuilt.json"}

    def test_damaged_prebuilt_module_is_not_used(
        self, work: Work, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with build.collecting() as used:
            made = get(unit())
        build.export(used, work.root / "aot")
        build.forget()
        monkeypatch.setenv("ATTNENGINE_AOT_PATH", str(work.root / "aot"))
        (cubin,) = (work.root / "aot").rglob("kernel.cubin")
        cubin.unlink()
        with pytest.warns(RuntimeWarning, match="prebuilt module not used: .*cubin is missing"):
            assert get(unit()) == made
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            build.forget()


class TestText:
    """PTX and ptxas's report as text; no compiler."""

    def test_report_of_ptxas(self) -> None:
        log = (
            "ptxas info    : 11 bytes gmem\n"
            "ptxas info    : Compiling entry function 'ae_forward' for 'sm_80'\n"
            "ptxas info    : Function properties for ae_forward\n"
            "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
            "ptxas info    : Used 56 registers, used 1 barriers, 4096 bytes smem, 380 bytes cmem\n"
            "ptxas info    : Compiling entry function 'ae_tables' for 'sm_80'\n"
            "ptxas info    : Function properties for ae_tables\n"
            "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
            "ptxas info    : Used 12 registers, 352 bytes cmem[0]\n"
            "ptxas info    : Function properties for helper\n"
            "    0 bytes stack frame, 2 bytes spill stores, 2 bytes spill loads\n"
        )
        found = ptx.resources(log, ["ae_forward", "ae_tables"])
        assert found["ae_forward"] == ptx.Resources(56, 20, 8, 4096)
        assert found["ae_tables"] == ptx.Resources(12, 4, 0, 0)
        with pytest.raises(ptx.CompileFailed, match="reports nothing of ae_other"):
            ptx.resources(log, ["ae_other"])

    def test_portable_names(self, tmp_path: Path) -> None:
        hidden = "_ZN39_INTERNAL_5c3bf668_9_kernel_cu_3da0d2416helperEf"
        numbers = [*hidden.encode(), 0]
        rows = [numbers[i : i + 40] for i in range(0, len(numbers), 40)]
        strings = "".join(f".b8 {','.join(map(str, row))}\n" for row in rows)
        text = (
            f'\t.file\t1 "{tmp_path}/kernel.cu", 17, 23\n\t.file 2 "{tmp_path}/templates/a.h"\n'
            '\t.file\t3 "/opt/cuda/bin/../targets/x/include/b.hpp"\n\t.file\t4 "/usr/include/c.h"\n'
            f"call {hidden};\n\t.section\t.debug_str\n\t{{\n$L__info_string0:\n{strings}\n\t}}\n"
        )
        found = ptx.portable(text, tmp_path, Path("/opt/cuda"))
        for name in ("kernel.cu", "templates/a.h", "cuda/b.hpp", "host/c.h"):
            assert f'"{name}"\n' in found
        plain = hidden.replace("5c3bf668", "00000000")
        assert f"call {plain};" in found and "53,99,51,98" not in found
        assert ",".join(map(str, [*plain.encode(), 0][:40])) in found
        assert ptx.portable(found, tmp_path, Path("/opt/cuda")).count("host/") == 4

    def test_targets(self) -> None:
        assert staging.flags("sm_80")[-1] == "-arch=compute_80"
        assert not set(settings.DEVICE_TARGETS) & set(settings.ISAS)


@needs_nvcc
def test_ptxas_speaks_as_it_did(tmp_path: Path) -> None:
    """The report is read by its words; a toolkit that changed them is noticed here."""
    assert not isinstance(FOUND, str)
    (tmp_path / "a.ptx").write_text(
        ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry a() {\n ret;\n}\n"
    )
    command = [FOUND.ptxas.command, "-arch=sm_80", "-v", "a.ptx", "-o", "a.cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ptx.resources(done.stdout + done.stderr, ["a"])["a"].spill_bytes == 0
