"""The operators over a small hand-written kernel module: layouts, registry, errors."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from naive_kernels import BUCKETS, DV, ELEM, SCALE, D, Kernels, compiled, dense, forward, operands
from torch import Tensor

from attnengine import library, ops

pytestmark = pytest.mark.compiles


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return compiled(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(autouse=True)
def poisoned():
    library.host.set_poison(True)
    yield
    library.host.set_poison(False)


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance(dtype) * scale)


def backward(kernels, q, k, v, captures, out, stats, dout, dstats=None):
    kernel = kernels[q.dtype, "backward"]
    return ops.backward(q, k, v, captures, out, stats, dout, dstats, kernel, SCALE)


def check_both_directions(kernels, q, k, v, captures) -> None:
    dtype = q.dtype
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, captures[0])]
    want_out, want_lse = dense(*leaves, captures[1])
    out, stats = forward(kernels, q, k, v, captures)
    assert_near(out, want_out.detach(), dtype)
    assert_near(stats[0], want_lse.detach(), torch.float32 if dtype != torch.float64 else dtype)
    g = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=g).to(dtype)
    dstats = torch.randn((1, *out.shape[:3]), generator=g).to(stats.dtype)
    want = torch.autograd.grad(
        (want_out, want_lse), leaves, (dout.double(), dstats[0].double()), allow_unused=True
    )
    dq, dk, dv, (dtable,) = backward(kernels, q, k, v, captures, out, stats, dout, dstats)
    assert dtable.dtype == captures[0].dtype
    for got, reference in zip((dq, dk, dv, dtable), want, strict=True):
        assert_near(got, reference, dtype)


@pytest.mark.parametrize("dtype", ELEM, ids=str)
def test_matches_dense_attention(kernels, dtype):
    check_both_directions(kernels, *operands(dtype))


@pytest.mark.parametrize("dtype", ELEM, ids=str)
@pytest.mark.parametrize("Hkv", [1, 4])
def test_keys_shared_by_the_batch(kernels, dtype, Hkv):
    check_both_directions(kernels, *operands(dtype, B=3, Hkv=Hkv, Bkv=1))


def test_only_the_values_shared_by_the_batch(kernels):
    q, k, v, captures = operands(B=3)
    check_both_directions(kernels, q, k, v[:1], captures)


def test_expanded_and_transposed_operands(kernels):
    q, k, v, captures = operands(B=3, Bkv=1)
    check_both_directions(kernels, q, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), captures)
    q, k, v, captures = operands()
    q, k, v = (x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in (q, k, v))
    check_both_directions(kernels, q, k, v, [captures[0].mT.contiguous().mT, captures[1]])
    q, k, v, captures = operands(Hkv=1)
    check_both_directions(kernels, q[:, ::2], k[:, :, ::2], v[:, :, ::2], strided(captures))


def strided(captures: list[Tensor]) -> list[Tensor]:
    table, bucket = captures
    return [table[::2], torch.stack([bucket, bucket - 100], 1)[::2, 0]]


def test_scratch_beyond_the_cached_buffer(kernels):
    q, k, v, captures = operands(B=1, Hq=1, Hkv=1, L=1, S=300_000)
    out, stats = forward(kernels, q, k, v, captures)
    want_out, want_lse = dense(q, k, v, *captures)
    torch.testing.assert_close(out.double(), want_out, rtol=0, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_at_every_thread_count(kernels, threads):
    q, k, v, captures = operands(L=64, S=128)
    before = torch.get_num_threads()
    want, _ = forward(kernels, q, k, v, captures)
    try:
        torch.set_num_threads(threads)
        got, _ = forward(kernels, q, k, v, captures)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, want)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 0, 2)])
def test_results_follow_the_layout_of_their_input(kernels, order):
    inverse = [order.index(d) for d in range(3)]

    def laid_out(x: Tensor) -> Tensor:
        return x.permute(*order, 3).contiguous().permute(*inverse, 3)

    q, k, v, captures = operands()
    q, k, v = laid_out(q), laid_out(k), laid_out(v)
    out, stats = forward(kernels, q, k, v, captures)
    assert out.stride() == laid_out(torch.empty(out.shape)).stride()
    assert stats.is_contiguous() and stats.dtype == torch.float32
    dq, dk, dv, _ = backward(kernels, q, k, v, captures, out, stats, torch.ones_like(out))
    assert (dq.stride(), dk.stride(), dv.stride()) == (q.stride(), k.stride(), v.stride())


def test_statistics_on_request_only(kernels):
    q, k, v, captures = operands()
    with_stats, stats = forward(kernels, q, k, v, captures, stats=True)
    without, none = forward(kernels, q, k, v, captures, stats=False)
    assert stats.shape == (2, 2, 4, 7) and none is None
    assert torch.equal(with_stats, without)


@pytest.mark.parametrize("sizes", [dict(B=0), dict(L=0), dict(Hq=0, Hkv=0), dict(Hq=0), dict(S=0)])
@pytest.mark.parametrize("Bkv", [None, 1])
def test_empty_operands(kernels, sizes, Bkv):
    q, k, v, captures = operands(**sizes, Bkv=Bkv)
    out, stats = forward(kernels, q, k, v, captures)
    assert out.shape == (*q.shape[:3], DV)
    assert not out.isnan().any() and not out.any()
    if q.shape[2] and k.shape[2] == 0 and q.shape[0]:
        assert (stats[0] == -math.inf).all()
    grads = backward(kernels, q, k, v, captures, out, stats, torch.ones_like(out))
    for grad, x in zip((*grads[:3], *grads[3]), (q, k, v, captures[0]), strict=True):
        assert grad.shape == x.shape and not grad.any()


def test_gradient_statistics_may_be_expanded(kernels):
    q, k, v, captures = operands()
    out, stats = forward(kernels, q, k, v, captures)
    dout = torch.ones(()).expand(out.shape)
    dstats = torch.ones(()).expand(1, *out.shape[:3])
    got = backward(kernels, q, k, v, captures, out, stats.mT.contiguous().mT, dout, dstats)
    want = backward(kernels, q, k, v, captures, out, stats, dout.contiguous(), dstats.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))


def test_live_gather_out_of_range(kernels):
    q, k, v, captures = operands()
    captures[1][3] = BUCKETS
    with pytest.raises(IndexError, match=r"captures\[0\] of shape \[4, 3\].*out of range"):
        forward(kernels, q, k, v, captures)


def test_kernel_registry(kernels, tmp_path):
    info = library.kernel_info(kernels[torch.bfloat16, "backward"])
    assert (info.kind, info.dtype, info.D, info.Dv) == ("backward", torch.bfloat16, D, DV)
    assert (info.stats, info.user_stats, info.grad_mask, info.key) == (2, 1, 1, "naive")
    assert library.load_kernel(info.path) == kernels[torch.bfloat16, "backward"]
    with pytest.raises(ValueError, match="kernel=12345"):
        library.kernel_info(12345)
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        library.load_kernel(tmp_path / "absent.so")
    (tmp_path / "empty.so").write_bytes(b"")
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        library.load_kernel(tmp_path / "empty.so")
    with pytest.raises(RuntimeError, match="symbol ae_info is missing"):
        library.load_kernel(library.OPS_LIBRARY)
    other = shutil.copy(library.kernel_info(kernels[torch.float32, "forward"]).path, tmp_path)
    with pytest.raises(RuntimeError, match="captures 2 tensors, 1 were declared"):
        library.load_kernel(other, [(2, torch.float32)])


def test_tile_classes(kernels):
    _, _, _, captures = operands(S=40)
    kernel = kernels[torch.float32, "forward"]
    assert library.classify(kernel, (2, 4, 2, 7, 40), captures).tolist() == [[0, 0, 3, 2]]
    with pytest.raises(ValueError, match="no tile classifier"):
        library.classify(kernels[torch.float32, "backward"], (2, 4, 2, 7, 40), captures)
    with pytest.raises(ValueError, match="captures has 0 tensors"):
        library.classify(kernel, (2, 4, 2, 7, 40), [])


def test_library_facts():
    assert library.cpu_isa() in ("portable", "avx2", "avx512", "avx512_bf16")
    assert (library.templates_dir() / "common" / "abi.h").exists()
    assert library.versions()["torch"] == torch.__version__


# ----------------------------------------------------------------------------------- bad arguments


def bad_arguments():
    def case(name, change, error, match):
        return pytest.param(change, error, match, id=name)

    yield case("rank", lambda a: {**a, "q": a["q"][0]}, ValueError, r"q must be 4-D.*\[4, 7, 8\]")
    yield case(
        "mixed dtypes",
        lambda a: {**a, "k": a["k"].double()},
        TypeError,
        "q, k and v must share one dtype, got float32, float64, float32",
    )
    yield case(
        "wrong dtype",
        lambda a: {**a, **{n: a[n].half() for n in "qkv"}},
        TypeError,
        "q has float16, expected float32",
    )
    yield case(
        "integers",
        lambda a: {**a, **{n: a[n].int() for n in "qkv"}},
        TypeError,
        "q has int32, expected float32",
    )
    yield case(
        "complex",
        lambda a: {**a, **{n: a[n].to(torch.complex64) for n in "qkv"}},
        TypeError,
        "q has an unsupported dtype",
    )
    yield case(
        "head dim",
        lambda a: {**a, "k": a["k"][..., :4]},
        ValueError,
        r"k has head_dim 4 but q has 8 \(q \[2, 4, 7, 8\], k \[2, 2, 9, 4\]\)",
    )
    yield case(
        "head dim of the kernel",
        lambda a: {**a, "q": a["q"][..., :4], "k": a["k"][..., :4]},
        ValueError,
        "head_dim=4, value head_dim=5: this kernel was compiled for 8 and 5",
    )
    yield case(
        "batch", lambda a: {**a, "q": a["q"].repeat(2, 1, 1, 1)}, ValueError, "k has batch 2 but q"
    )
    yield case(
        "lengths",
        lambda a: {**a, "v": a["v"][:, :, 1:]},
        ValueError,
        r"k and v must have the same heads and length, got k \[2, 2, 9, 8\] and v \[2, 2, 8, 5\]",
    )
    yield case(
        "head groups",
        lambda a: {**a, "q": a["q"][:, :3]},
        ValueError,
        "q has 3 heads, which is not a multiple of the 2 heads",
    )
    yield case(
        "capture count",
        lambda a: {**a, "captures": a["captures"][:1]},
        ValueError,
        "captures has 1 tensors, this kernel reads 2",
    )
    yield case(
        "capture dtype",
        lambda a: {**a, "captures": [a["captures"][0], a["captures"][1].int()]},
        ValueError,
        r"captures\[1\] is int32 of rank 1, the kernel was compiled for int64 of rank 1",
    )
    yield case(
        "capture rank",
        lambda a: {**a, "captures": [a["captures"][0][0], a["captures"][1]]},
        ValueError,
        r"captures\[0\] is float32 of rank 1, the kernel was compiled for float32 of rank 2",
    )
    yield case(
        "complex capture",
        lambda a: {**a, "captures": [a["captures"][0].to(torch.complex64), a["captures"][1]]},
        TypeError,
        r"captures\[0\] has a dtype that kernels cannot read",
    )


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("change, error, match", list(bad_arguments()))
def test_bad_arguments_have_one_text_on_real_and_fake_tensors(kernels, change, error, match, fake):
    q, k, v, captures = operands()
    kernel = kernels[torch.float32, "forward"]
    a = change(dict(q=q, k=k, v=v, captures=captures))

    def call(q, k, v, captures):
        try:
            return ops.forward(q, k, v, captures, kernel, SCALE, False)
        except ValueError as e:
            raise ops.translate(e) from None

    if not fake:
        with pytest.raises(error, match=match):
            call(**a)
        return
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        a = {
            n: [mode.from_tensor(t) for t in x] if n == "captures" else mode.from_tensor(x)
            for n, x in a.items()
        }
        with pytest.raises(error, match=match):
            call(**a)


def test_meta_tensors_mixed_with_real_ones(kernels):
    q, k, v, captures = operands()
    with pytest.raises(ValueError, match="k is on meta but q is on cpu"):
        forward(kernels, q, k.to("meta"), v, captures)


def test_wrong_kernel_ids(kernels):
    q, k, v, captures = operands()
    for kernel in (-1, 10**6, 10**12):
        with pytest.raises(ValueError, match=f"kernel={kernel}: no such kernel"):
            ops.forward(q, k, v, captures, kernel, SCALE, False)
    with pytest.raises(ValueError, match="is a backward kernel, this operator needs a forward"):
        ops.forward(q, k, v, captures, kernels[torch.float32, "backward"], SCALE, False)


def test_bad_backward_arguments(kernels):
    q, k, v, captures = operands()
    out, stats = forward(kernels, q, k, v, captures)
    dout = torch.ones_like(out)
    with pytest.raises(ValueError, match=r"dout must have the output's shape \[2, 4, 7, 5\]"):
        backward(kernels, q, k, v, captures, out, stats, dout[..., :3])
    with pytest.raises(ValueError, match="TypeError: out has float64"):
        backward(kernels, q, k, v, captures, out.double(), stats, dout)
    with pytest.raises(ValueError, match=r"stats must have shape \[2, 2, 4, 7\], got \[0\]"):
        backward(kernels, q, k, v, captures, out, stats.new_empty(0), dout)
    with pytest.raises(ValueError, match="dstats must have shape"):
        backward(kernels, q, k, v, captures, out, stats, dout, stats[:, :1])
