"""CUDA kernels as the operators and the library see them, where there is no GPU."""

from __future__ import annotations

import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attnengine import library, ops

HERE = pathlib.Path(__file__).parent
D, DV, BUCKETS, SCALE = 8, 5, 3, 0.3  # as in naive_driver.cpp
CAPTURES = [(2, torch.float32), (1, torch.int64)]
MANIFEST: dict[str, Any] = {
    "kind": "forward",
    "dtype": "bf16",
    "head_dim": D,
    "value_dim": DV,
    "capture_count": 2,
    "user_stats": 1,
    "stats": 2,
    "mask_captures": 0,
    "block_m": 64,
    "block_n": 32,
    "pack_group": True,
    "threads": 128,
    "shared_bytes": 50000,
    "key": "abc123",
    "target": "sm_80",
}
requires_no_gpu = pytest.mark.skipif(
    library.driver_name() == "cuda", reason="what a machine without a GPU says"
)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> int:
    ptx = tmp_path_factory.mktemp("cuda") / "kernel.ptx"
    ptx.write_text(".version 8.0\n")
    return library.load_cuda_kernel(ptx, None, MANIFEST, CAPTURES)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("driver") / "naive_driver.so"
    folders = [library.templates_dir(), HERE.parents[1] / "csrc", HERE.parent / "cpp"]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-DHEAD_DIM={D}", f"-DVALUE_DIM={DV}"]
    includes = [f"-I{folder}" for folder in folders]
    source = str(HERE / "naive_driver.cpp")
    subprocess.run([compiler, *flags, *includes, source, "-o", str(path)], check=True)
    return path


@pytest.fixture
def simulator(driver: pathlib.Path):
    library.install_driver(driver, "simulator")
    library.host.set_poison(True)
    yield
    library.host.set_poison(False)
    library.install_driver(None)


def operands(
    B: int = 2, Hq: int = 4, Hkv: int = 2, L: int = 7, S: int = 9, Bkv: int | None = None
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, Hq, L, D, generator=g).bfloat16()
    k = torch.randn(Bkv or B, Hkv, S, D, generator=g).bfloat16()
    v = torch.randn(Bkv or B, Hkv, S, DV, generator=g).bfloat16()
    table = torch.randn(Hq, BUCKETS, generator=g)
    return q, k, v, [table, torch.randint(0, BUCKETS, (S,), generator=g)]


def forward(kernel: int, q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor], **options: Any):
    try:
        scale, stats = options.get("scale", SCALE), options.get("stats", True)
        return ops.forward(q, k, v, captures, kernel, scale, stats)
    except ValueError as error:
        raise ops.translate(error) from None


def check(kernel: int, q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor]) -> Tensor:
    out, stats = forward(kernel, q, k, v, captures)
    group, (table, bucket) = q.shape[1] // k.shape[1], captures
    k, v = (x.double().expand(len(q), -1, -1, -1).repeat_interleave(group, 1) for x in (k, v))
    score = q.double() @ k.mT * SCALE + table.double()[:, bucket][:, None, :]
    torch.testing.assert_close(out.double(), score.softmax(-1) @ v, rtol=0, atol=2e-2)
    torch.testing.assert_close(stats[0].double(), score.logsumexp(-1), rtol=0, atol=1e-5)
    return out


# ------------------------------------------------------------------------------------ the registry


def test_description(kernel):
    info = library.kernel_info(kernel)
    assert (info.kind, info.dtype, info.D, info.Dv) == ("forward", torch.bfloat16, D, DV)
    assert (info.isa, info.key, info.stats, info.user_stats) == ("sm_80", "abc123", 2, 1)
    assert (info.grad_mask, info.capture_count, info.captures) == (0, 2, tuple(CAPTURES))
    assert info.cuda == library.CudaLaunch(128, 50000, 64, 32, True, 0)
    assert info.path.endswith("kernel.ptx")
    assert library.load_cuda_kernel(info.path, None, MANIFEST) == kernel
    assert library.workspace_bytes(kernel, (2, 4, 2, 7, 9), operands()[3]) == 0


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"threads": None}, ValueError, "its manifest has no 'threads'"),
        ({"key": None}, ValueError, "its manifest has no 'key'"),
        ({"kind": "backward"}, ValueError, "kind='backward'; CUDA kernels are 'forward'"),
        ({"dtype": "f8"}, ValueError, "dtype='f8'; expected f32, f64, bf16, f16"),
        ({"target": "avx2"}, ValueError, "target='avx2'; expected sm_80"),
        ({"threads": 96 + 1}, RuntimeError, "threads = 97, which must be a multiple of 32"),
        ({"block_m": 0}, RuntimeError, "block_m = 0, which must be 1 or more"),
    ],
)
def test_bad_manifests(tmp_path, change, error, match):
    (tmp_path / "kernel.ptx").write_text("text")
    manifest = {k: v for k, v in {**MANIFEST, **change}.items() if v is not None}
    with pytest.raises(error, match=match):
        library.load_cuda_kernel(tmp_path / "kernel.ptx", None, manifest)


def test_bad_images(tmp_path):
    with pytest.raises(RuntimeError, match="absent.ptx: cannot be read: No such file"):
        library.load_cuda_kernel(tmp_path / "absent.ptx", None, MANIFEST)
    for name in ("kernel.ptx", "kernel.cubin"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(RuntimeError, match="kernel.ptx: the file is empty"):
        library.load_cuda_kernel(tmp_path / "kernel.ptx", None, MANIFEST)
    (tmp_path / "kernel.ptx").write_text("text")
    with pytest.raises(RuntimeError, match="kernel.cubin: the file is empty"):
        library.load_cuda_kernel(tmp_path / "kernel.ptx", tmp_path / "kernel.cubin", MANIFEST)
    with pytest.raises(RuntimeError, match="captures 2 tensors, 1 were declared"):
        library.load_cuda_kernel(tmp_path / "kernel.ptx", None, MANIFEST, CAPTURES[:1])


# -------------------------------------------------------------------------------------- no device


@requires_no_gpu
def test_a_machine_without_a_driver():
    assert library.driver_name() == "none"
    with pytest.raises(RuntimeError, match="no CUDA driver on this machine.*use CPU tensors"):
        library.device_capability(0)


DRIVER_FUNCTIONS = """
int cuDeviceGetCount(int* n) { return *n = 2, 0; }
int cuDeviceGet(int* device, int i) { return *device = i, 0; }
int cuDeviceGetAttribute(int* x, int which, int i) { return *x = which == 75 ? 9 - i : 0, 0; }
int cuGetErrorString(int code, const char** text) { return *text = "no device", 0; }
"""


@requires_no_gpu
@pytest.mark.compiles
@pytest.mark.parametrize(
    "broken, expected",
    [
        ("", ["cuda", "90", "80", "attnengine: there is no device cuda:2; the driver shows 2"]),
        (
            "cuLaunchKernelEx",
            ["none", "no cuLaunchKernelEx: it is older than CUDA 12.0; update it"],
        ),
        ("cuInit", ["none", "cannot be initialized: no device (CUDA driver error 100)"]),
    ],
)
def test_the_driver_of_the_machine(tmp_path, broken, expected):
    """Every function is found in libcuda.so.1, which here answers as a driver of two GPUs."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    names = set(
        re.findall(r'"(cu[A-Z]\w+)"', (HERE.parents[1] / "csrc/driver_table.cpp").read_text())
    )
    assert len(names) > 20
    rest = {n for n in names if f" {n}(" not in DRIVER_FUNCTIONS and n != broken}
    text = DRIVER_FUNCTIONS + "".join(f"int {n}() {{ return 0; }}\n" for n in sorted(rest))
    if broken == "cuInit":
        text += "int cuInit(int flags) { return 100; }\n"
    (tmp_path / "driver.c").write_text(text)
    library_file = tmp_path / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", tmp_path / "driver.c", "-o", library_file]
    subprocess.run(command, check=True)
    say = """
from attnengine import library
print(library.driver_name())
for i in range(3):
    try:
        print(library.device_capability(i))
    except RuntimeError as error:
        print(error)
"""
    paths = {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(library.PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", say],
        env={**os.environ, **paths},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all(want in got for want, got in zip(expected, lines, strict=False)), done.stdout


def test_cpu_tensors_need_a_simulator(kernel):
    match = "q is on cpu but this kernel was compiled for sm_80; move q, k and v to a CUDA device"
    with pytest.raises(ValueError, match=match):
        forward(kernel, *operands())
    with FakeTensorMode() as mode:
        q, k, v, captures = operands()
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        with pytest.raises(ValueError, match=match):
            forward(kernel, *fakes, [mode.from_tensor(x) for x in captures])


def test_fake_cuda_tensors(kernel):
    q, k, v, captures = operands()
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(x.shape, dtype=x.dtype, device="cuda:0") for x in (q, k, v))
        table, bucket = (torch.empty(x.shape, dtype=x.dtype, device="cuda:0") for x in captures)
        out, stats = forward(kernel, q, k, v, [table, bucket])
        assert out.shape == (2, 4, 7, DV) and out.device == stats.device == q.device
        with pytest.raises(ValueError, match=r"captures\[0\] is on cpu but q is on cuda:0"):
            forward(kernel, q, k, v, [torch.empty(table.shape), bucket])
        with pytest.raises(TypeError, match="got float32, bfloat16, .*take bfloat16 and float16"):
            forward(kernel, q.float(), k, v, [table, bucket])


def test_no_gradient(kernel):
    q, k, v, captures = operands()
    out, stats = torch.empty(2, 4, 7, DV), torch.empty(2, 2, 4, 7)
    with pytest.raises(ValueError, match="CUDA kernels have no gradient in this version") as caught:
        ops.backward(q, k, v, captures, out, stats, out, None, kernel, SCALE)
    assert isinstance(ops.translate(caught.value), NotImplementedError)


def test_no_tile_classes(kernel):
    with pytest.raises(ValueError, match="classifies its tiles on the device; compile the spec"):
        library.classify(kernel, (2, 4, 2, 7, 9), operands()[3])


def test_files_that_are_no_driver(tmp_path):
    with pytest.raises(OSError, match="absent.so"):
        library.install_driver(tmp_path / "absent.so")
    with pytest.raises(RuntimeError, match="has no function ptxsim_driver: it is no driver"):
        library.install_driver(library.OPS_LIBRARY)


# ---------------------------------------------------------------- launches through a driver's table


@pytest.mark.compiles
class TestLaunches:
    def test_names_and_versions(self, driver, simulator):
        assert library.driver_name() == "simulator"
        with pytest.raises(RuntimeError, match="the driver table has version"):
            library.install_driver(driver, "other_version")
        assert library.driver_name() == "simulator"
        library.install_driver(None)
        assert library.driver_name() != "simulator"

    @pytest.mark.parametrize("sizes", [{}, {"B": 3, "Bkv": 1}, {"Hkv": 1, "L": 70}, {"S": 1}])
    def test_results(self, kernel, simulator, sizes):
        check(kernel, *operands(**sizes))

    def test_layouts(self, kernel, simulator):
        q, k, v, (table, bucket) = operands()
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        out = check(kernel, q, k[:, :, ::2], v[:, :, ::2], [table.mT.contiguous().mT, bucket[::2]])
        assert out.transpose(1, 2).is_contiguous()
        check(kernel, q, k[:1].expand(2, -1, -1, -1), v[:1], [table, bucket])

    def test_statistics_on_request_only(self, kernel, simulator):
        with_stats, stats = forward(kernel, *operands())
        without, none = forward(kernel, *operands(), stats=False)
        assert stats.shape == (2, 2, 4, 7) and none is None and torch.equal(with_stats, without)

    @pytest.mark.parametrize("sizes", [{"B": 0}, {"L": 0}, {"Hq": 0, "Hkv": 0}, {"S": 0}])
    def test_empty_operands(self, kernel, simulator, sizes):
        q, k, v, captures = operands(**sizes)
        out, stats = forward(kernel, q, k, v, captures)
        assert out.shape == (*q.shape[:3], DV) and not out.any()
        if k.shape[2] == 0:
            assert (stats[0] == -math.inf).all()

    def test_faults_are_errors(self, kernel, simulator):
        q, k, v, captures = operands()
        captures[1][3] = BUCKETS
        with pytest.raises(IndexError, match=r"captures\[0\] of shape \[4, 3\].*out of range"):
            forward(kernel, q, k, v, captures)
        with pytest.raises(RuntimeError) as caught:
            forward(kernel, *operands(), scale=666)
        assert str(caught.value) == (
            "attnengine: kernel abc123 on the simulator: ae_forward failed: out of bounds: "
            "ld.global at line 12"
        )

    def test_cpu_kernels_and_checks_are_as_ever(self, kernel, simulator):
        q, k, v, captures = operands()
        with pytest.raises(ValueError, match="captures has 1 tensors, this kernel reads 2"):
            forward(kernel, q, k, v, captures[:1])
        with pytest.raises(TypeError, match="q has float16, expected bfloat16"):
            forward(kernel, q.half(), k.half(), v.half(), captures)
        with pytest.raises(ValueError, match="head_dim=4"):
            forward(kernel, q[..., :4], k[..., :4], v, captures)
