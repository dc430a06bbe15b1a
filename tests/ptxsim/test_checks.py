"""That each check of the simulator fires, on every seed, with the right kind and at the right
place, and that it lets the corrected twin of each broken kernel pass."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import ptxsim
from tests.ptxsim import library_build
from tests.ptxsim.sources import needs_nvcc, ptx_of

HERE = Path(__file__).parent
BROKEN = HERE / "broken"
SEEDS = range(4)
THREADS = {"barriers": 128, "copies": 64, "accesses": 64, "lanes": 64}
ELEMENTS = 256  # of the input and the output

# The kind of each broken kernel's report; where two are given, the order in which warps run decides
# which is met first. The places are marked in the sources.
KINDS = {
    "barriers": {
        "store_then_load": "race",
        "refill": "race",
        "double_buffer": "race",
        "ring": "race",
        "divergent_barrier": "divergence",
        "divergent_number": "divergence",
        "count_mismatch": "barrier",
        "count_not_of_warps": "barrier",
        "count_too_large": "barrier",
        "no_such_barrier": "barrier",
        "nobody_comes": "deadlock",
        "deadlock": "deadlock",
        "arrive_twice": "barrier",
        "mixed_forms": "barrier",
        "exit_orders_nothing": "race",
    },
    "copies": {
        "read_early": "cp.async",
        "wait_count": "cp.async",
        "not_committed": "cp.async",
        "no_barrier": "race",
        "barrier_before_wait": "race or cp.async",
        "slot_too_early": "race or cp.async",
        "store_meanwhile": "cp.async",
        "exit_with_copies": "cp.async",
        "copy_misaligned": "misaligned",
        "copy_out_of_bounds": "out-of-bounds",
    },
    "accesses": {
        "read_beyond": "out-of-bounds",
        "write_beyond": "out-of-bounds",
        "write_read_only": "read-only",
        "misaligned_vector": "misaligned",
        "shared_beyond": "out-of-bounds",
        "uninitialized": "uninitialized",
        "uninitialized_half": "uninitialized",
    },
    "lanes": {
        "missing_syncwarp": "race",
        "syncwarp_before_write": "race",
        "shuffle_orders_nothing": "race",
        "half_syncwarp": "race",
        "one_address": "race",
        "one_address_half": "race",
        "shuffle_without_lane": "divergence",
        "matrix_load": "race",
        "atomics": "race",
        "flag": "race",
    },
}
CASES = [(file, name) for file, kinds in KINDS.items() for name in kinds]


def ptx(file: str, folder: Path) -> str:
    return ptx_of(f"broken/{file}.cu", folder, "-lineinfo")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("broken")


def marked(file: str, name: str) -> set[int]:
    """The lines of a source that carry a mark."""
    lines = (BROKEN / f"{file}.cu").read_text().splitlines()
    return {i for i, line in enumerate(lines, 1) if re.search(rf"@{name}(?![\w-])", line)}


Array = NDArray[np.float32]


def launch(file: str, name: str, folder: Path, seed: int) -> tuple[Array, Array]:
    given = np.arange(ELEMENTS, dtype=np.float32) + 1
    out = np.zeros(ELEMENTS, np.float32)
    arguments = [ptxsim.ReadOnly(given), out, ELEMENTS, 48]
    text = ptx(file, folder)
    ptxsim.run(text, name, 1, THREADS[file], arguments, shared=256, seed=seed)
    return given, out


def places(report: str) -> list[set[int]]:
    """The source lines of each place that a report names: a line and where it is inlined."""
    found = re.findall(r"\(([\w.]+:\d+.*?)\)", report)
    return [{int(n) for n in re.findall(r"\.cu:(\d+)", place)} for place in found]


@needs_nvcc
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("file", "name"), CASES)
def test_broken_kernels_are_reported(file: str, name: str, seed: int, folder: Path) -> None:
    with pytest.raises(ptxsim.Fault) as error:
        launch(file, f"{name}_broken", folder, seed)
    report = str(error.value)
    assert error.value.kind in KINDS[file][name].split(" or "), report
    found = places(report)
    here, other = marked(file, name), marked(file, f"{name}-other")
    if here:
        assert found and found[-1] & here, report
    if other:
        assert any(place & other for place in found[:-1]), report


@needs_nvcc
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("file", "name"), CASES)
def test_their_fixed_twins_are_not(file: str, name: str, seed: int, folder: Path) -> None:
    launch(file, f"{name}_fixed", folder, seed)


def _gather(source: Array, index: NDArray[np.intp]) -> Array:
    out = np.zeros(ELEMENTS, np.float32)
    out[: len(index)] = source[index]
    return out


T128, T64 = np.arange(128), np.arange(64)
GIVEN = np.arange(ELEMENTS, dtype=np.float32) + 1
RESULTS = {
    ("barriers", "store_then_load_fixed"): _gather(GIVEN, T128 ^ 32),
    ("barriers", "refill_fixed"): 6 * _gather(GIVEN, T128 ^ 64),
    ("barriers", "double_buffer_fixed"): 15 * _gather(GIVEN, T128 ^ 32),
    ("barriers", "ring_fixed"): _gather(8 * GIVEN + 28, 31 - np.arange(32)),
    ("barriers", "mixed_forms_fixed"): _gather(np.float32([127]), np.zeros(128, np.intp)),
    ("barriers", "unaligned_fixed"): _gather(GIVEN, 127 - T128),
    ("barriers", "reductions_fixed"): _gather(np.float32([6040]), np.zeros(128, np.intp)),
    ("barriers", "early_exit_fixed"): _gather(GIVEN, 69 - np.arange(70)),
    ("copies", "no_barrier_fixed"): _gather(GIVEN, T64 ^ 33),
    ("copies", "slot_too_early_fixed"): 7 * _gather(GIVEN, 4 * (63 - T64)),
    ("accesses", "uninitialized_fixed"): _gather(GIVEN, T64 ^ 1),
    ("lanes", "missing_syncwarp_fixed"): _gather(GIVEN, T64 ^ 1),
    ("lanes", "atomics_fixed"): _gather(np.float32([64 * 65 / 2]), np.zeros(64, np.intp)),
    ("lanes", "flag_fixed"): _gather(GIVEN, np.zeros(1, np.intp)),
}


@needs_nvcc
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("file", "name"), RESULTS)
def test_what_is_synchronised_computes_the_right_values(
    file: str, name: str, seed: int, folder: Path
) -> None:
    _, out = launch(file, name, folder, seed)
    np.testing.assert_array_equal(out, RESULTS[file, name])


@needs_nvcc
def test_a_long_run_is_checked_to_its_end(folder: Path) -> None:
    _, out = launch("accesses", "long_run_fixed", folder, 0)
    np.testing.assert_array_equal(out[:64], 70000 + (T64 ^ 32))
    with pytest.raises(ptxsim.Fault) as error:
        launch("accesses", "long_run_broken", folder, 0)
    found = places(str(error.value))
    assert error.value.kind == "race" and all(p & marked("accesses", "long_run") for p in found)


@needs_nvcc
@pytest.mark.parametrize("seed", SEEDS)
def test_copies_fill_up_with_zeros(seed: int, folder: Path) -> None:
    given, out = launch("copies", "zero_fill_fixed", folder, seed)
    thread, element = np.divmod(np.arange(ELEMENTS), 4)
    has = np.where(thread < 32, element < thread % 5, True) & (thread // 8 % 2 == 0)
    np.testing.assert_array_equal(out, np.where(has, given, 0))


@needs_nvcc
def test_copies_land_at_any_moment_before_their_wait(folder: Path) -> None:
    seen = [launch("copies", "source_changes_fixed", folder, seed)[1][:64] for seed in range(8)]
    assert set(np.concatenate(seen)) == {1.0, 2.0}
    again = launch("copies", "source_changes_fixed", folder, 3)[1][:64]
    np.testing.assert_array_equal(again, seen[3])  # a seed decides


@needs_nvcc
@pytest.mark.parametrize("seed", SEEDS)
def test_parts_of_a_word_belong_to_different_threads(seed: int, folder: Path) -> None:
    launch("accesses", "parts_of_words_fixed", folder, seed)


@needs_nvcc
def test_a_deadlock_says_where_every_warp_waits(folder: Path) -> None:
    with pytest.raises(ptxsim.Fault) as error:
        launch("barriers", "deadlock_broken", folder, 0)
    lines = str(error.value).splitlines()
    waits = [line for line in lines if "32 of 64 threads have arrived; waiting are warps" in line]
    assert len(waits) == 2, lines
    assert (
        "warp 0" in waits[0] and "barrier 1: " in waits[0] and "bar.sync (barriers.cu:" in waits[0]
    )
    assert (
        "warp 1" in waits[1] and "barrier 2: " in waits[1] and "bar.sync (barriers.cu:" in waits[1]
    )


def test_the_shadow_memory_agrees_with_a_model_that_forgets_nothing(tmp_path: Path) -> None:
    library = library_build.library_path()
    program = tmp_path / "shadow_test"
    build = ["g++", "-std=c++20", "-O2", f"-I{HERE}", str(HERE / "model" / "shadow_test.cpp")]
    link = [str(library), f"-Wl,-rpath,{library.parent}", "-o", str(program)]
    subprocess.run([*build, *link], check=True)
    done = subprocess.run([program, "600"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
