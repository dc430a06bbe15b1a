"""CUDA units: compiled for real by nvcc and ptxas, verified, kept, shipped, and refused clearly."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import struct
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attnengine import (
    AttentionSpec,
    build,
    cache_upkeep,
    cli,
    dispatch,
    kernel_wheel,
    nvcc,
    staging,
)
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


def fake_cutlass(root: Path, major: int, minor: int) -> Path:
    place = root / "include" / "cutlass" / "version.h"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(
        f"#define CUTLASS_MAJOR {major}\n#define CUTLASS_MINOR {minor}\n#define CUTLASS_PATCH 1\n"
    )
    return root


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

    def test_prebuild_command(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A builtin variant for CUDA beside a CPU, made without a GPU and found without nvcc."""
        words = ["--specs", "builtin:full", "--dtypes", "bf16", "--head-dims", "128"]
        out = tmp_path / "kernels"
        command = ["prebuild", *words, "--forward-only", "--target", "cpu,sm80", "--out", str(out)]
        assert cli.main(command) == 0
        assert "2 kernels, 2 new in " in capsys.readouterr().out
        (kernel,) = out.rglob("kernel.cubin")
        facts = json.loads(kernel.with_name("cuda.json").read_text())
        assert (facts["kind"], facts["dtype"], facts["head_dim"]) == ("forward", "bf16", 128)
        assert facts["entries"]["ae_forward"]["spill_bytes"] == 0
        monkeypatch.setenv("ATTNENGINE_AOT_PATH", str(out))
        monkeypatch.setenv("ATTNENGINE_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("CUDA_HOME", "/nowhere")
        build.forget()
        spec = AttentionSpec()
        captures = dispatch.captures_for(spec)
        program = dispatch.program(spec, captures, torch.bfloat16, 128, 128, "sm_80")
        assert program.device_module().folder == kernel.parent
        with pytest.raises(KernelUnavailable, match="'/nowhere' has no bin/nvcc"):
            dispatch.program(spec, captures, torch.bfloat16, 8, 8, "sm_80").device_module()
        build.forget()

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
