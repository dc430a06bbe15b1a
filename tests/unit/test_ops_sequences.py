"""The operators on sequences by themselves, and inside torch.compile and torch.export."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import attnengine as ae
from attnengine import flash_args, ops_sequences

pytestmark = pytest.mark.compiles
HQ, HKV, D, DV = 4, 2, 40, 24  # head dims of tests/numerics, whose kernels these calls share
bare = torch.ops.attnengine


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return torch.randn(shape, generator=g).to(dtype)


@pytest.fixture(scope="module")
def plain() -> ae.Handle:
    return ae.compile(ae.AttentionSpec(), *packed(), backward=False)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def packed(total: int = 12, keys: int = 14) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of packed sequences, as the operators take them."""
    return (
        normal(1, HQ, total, D),
        normal(1, HKV, keys, D, seed=1),
        normal(1, HKV, keys, DV, seed=2),
    )


def cached(B: int = 3, L: int = 2, S: int = 32) -> list[Tensor]:
    """q, k_cache, v_cache, k, v, cache_seqlens as attention_with_kvcache takes them."""
    return [
        normal(B, L, HQ, D), normal(B, S, HKV, D), normal(B, S, HKV, DV),
        normal(B, L, HKV, D, seed=5), normal(B, L, HKV, DV, seed=6), ints(*[0, 17, 30, 9][:B]),
    ]  # fmt: skip


# -- forward_sequences -----------------------------------------------------------------------------


def test_packed_sequences_each_by_itself(plain: ae.Handle) -> None:
    """Rows of no sequence give 0, in the output and the statistics."""
    q, k, v = packed()
    starts, ends = ints(0, 3, 3, 6), ints(3, 3, 5, 10)  # a gap before row 6, and rows 10 and 11
    key_starts, key_ends = ints(0, 4, 4, 14), ints(4, 4, 14, 14)
    out, stats = ops_sequences.forward_sequences(
        q, k, v, [], plain.id, plain.scale, True, starts, ends, key_starts, key_ends, None, None,
        5, 10, 0, False,
    )  # fmt: skip
    for a, b, c, e in zip(starts, ends, key_starts, key_ends, strict=True):
        rows, keys = slice(int(a), int(b)), slice(int(c), int(e))
        want = ae.reference(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], plain.spec, return_aux=True
        )
        torch.testing.assert_close(out[:, :, rows], want[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats[0][:, :, rows], want[1]["lse"], rtol=1e-5, atol=1e-6)
    for rows in (slice(5, 6), slice(10, 12)):
        assert (out[:, :, rows] == 0).all() and (stats[..., rows] == 0).all()


@pytest.mark.parametrize(
    "change, match",
    [
        ({"q_start": ints(1, 3)}, r"cu_seqlens_q\[0\]=1 must be 0"),
        ({"q_end": ints(5, 3)}, r"cu_seqlens_q\[1\]=3 is below cu_seqlens_q\[0\]=5"),
        ({"q_end": ints(3, 13)}, r"cu_seqlens_q\[2\]=13 is beyond the 12 rows of q"),
        ({"key_end": ints(4, 15)}, r"cu_seqlens_k\[2\]=15 is beyond the 14 rows of k"),
        ({"key_end": ints(-4, 14)}, r"cu_seqlens_k\[1\]=-4 is below cu_seqlens_k\[0\]=0"),
        ({"max_rows": 8}, "max_seqlen_q=8 is below the 9 rows of sequence 1"),
        ({"max_keys": 9}, "max_seqlen_k=9 is below the 10 keys of sequence 1"),
        ({"max_rows": -1}, "max_seqlen_q=-1 must lie in"),
        ({"q_end": None}, "q_start and q_end must be given together"),
        ({"q_end": ints(3)}, r"cu_seqlens_q has shape \[1\]; it needs 2 elements"),
        ({"key_end": torch.tensor([4, 14])}, "cu_seqlens_k has int64, expected int32"),
        ({"key_more": 1, "key_start": None, "key_end": None}, "appended tokens need cache_seqlens"),
        ({"key_end": torch.zeros(4, dtype=torch.int32)[::2]}, "cu_seqlens_k .* has stride 2"),
    ],
)
def test_bad_tables(plain: ae.Handle, change: dict[str, Any], match: str) -> None:
    tables: dict[str, Any] = {
        "q_start": ints(0, 3), "q_end": ints(3, 12), "key_start": ints(0, 4),
        "key_end": ints(4, 14), "kv_row": None, "pages": None, "max_rows": 12,
        "max_keys": 14, "key_more": 0, "align_end": True,
    }  # fmt: skip
    tables |= change
    with pytest.raises(ValueError, match=match):
        bare.forward_sequences(*packed(), [], plain.id, plain.scale, False, *tables.values())


def test_nothing_at_all(plain: ae.Handle) -> None:
    q, k, v = packed(total=3)
    none = torch.zeros(0, dtype=torch.int32)
    out, _ = bare.forward_sequences(
        q, k, v, [], plain.id, 0.5, True, none, none, none, none, None, None, 0, 0, 0, False
    )
    assert (out == 0).all()
    empty = ae.attention_with_kvcache(*[x[:0] for x in cached()[:3]])
    assert empty.shape == (0, 2, HQ, DV)
    assert ae.attention_with_kvcache(*[x[:, :0] for x in cached()[:3]]).shape == (3, 0, HQ, DV)


# -- append_kv -------------------------------------------------------------------------------------


TYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.complex128]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("layout", ["dense", "heads outside", "every other element", "transposed"])
def test_append_of_any_type_and_strides(dtype: torch.dtype, layout: str) -> None:
    def laid_out(x: Tensor) -> Tensor:
        if layout == "heads outside":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "every other element":
            return torch.stack([x, x], -1).flatten(-2)[..., ::2]
        return x.mT.contiguous().mT if layout == "transposed" else x

    def tensor(*shape: int) -> Tensor:
        return laid_out((torch.arange(torch.Size(shape).numel()) % 100).view(shape).to(dtype))

    k_cache, v_cache = tensor(6, 16, HKV, 8), tensor(6, 16, HKV, 4)
    k, v = -tensor(2, 3, HKV, 8).to(torch.complex128), tensor(2, 3, HKV, 4)
    k = laid_out(k.real.to(dtype))
    pages = ints(3, 0, 1, 5).view(2, 2)
    wants = []
    for cache, new in ((k_cache, k), (v_cache, v)):
        want = cache.clone()
        want[3, 14:], want[0, 0] = new[0, :2], new[0, 2]
        want[1, 0:3] = new[1]
        wants.append(want)
    bare.append_kv(k_cache, v_cache, k, v, ints(14, 0), None, pages)
    for cache, want in zip((k_cache, v_cache), wants, strict=True):
        assert torch.equal(cache.to(torch.complex128), want.to(torch.complex128))


@pytest.mark.parametrize("where", ["rows", "cache_batch_idx", "pages"])
def test_append_on_a_device_is_the_same(where: str) -> None:
    """What CUDA tensors take, here on the CPU."""
    _, k_cache, v_cache, k, v, _ = cached(B=2, L=5)
    tables = {"rows": (None, None), "cache_batch_idx": (ints(1, 0), None)}.get(where)
    if tables is None:
        k_cache, v_cache = (x.view(4, 16, HKV, -1) for x in (k_cache, v_cache))
        tables = None, ints(3, 0, 2, 1).view(2, 2)
    here, there = [[x.clone() for x in (k_cache, v_cache)] for _ in range(2)]
    bare.append_kv(*here, k, v, ints(14, 3), *tables)
    ops_sequences._append_on_device(*there, k, v, ints(14, 3), *tables)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert not torch.equal(here[0], k_cache)


def test_a_large_append_uses_all_threads() -> None:
    k_cache, k = torch.zeros(2, 700, 4, 64), normal(2, 600, 4, 64)
    bare.append_kv(k_cache, k_cache.clone(), k, k, ints(100, 7), None, None)
    assert torch.equal(k_cache[0, 100:], k[0]) and torch.equal(k_cache[1, 7:607], k[1])
    assert (k_cache[0, :100] == 0).all() and (k_cache[1, 607:] == 0).all()


def test_a_saved_cache_is_known_to_have_changed() -> None:
    q, k_cache, v_cache, k, v, lengths = cached()
    weight = torch.ones(D, requires_grad=True)
    product = (k_cache * weight).sum()
    with torch.no_grad():
        ae.attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        x = cached()
        ae.attention_with_kvcache(*x[:5], cache_seqlens=x[5])


def test_append_of_nothing() -> None:
    _, k_cache, v_cache, k, v, lengths = cached()
    before = k_cache.clone()
    bare.append_kv(k_cache, v_cache, k[:, :0], v[:, :0], lengths, None, None)
    bare.append_kv(k_cache, v_cache, k[:0], v[:0], lengths[:0], None, None)
    assert torch.equal(k_cache, before)


# -- torch -----------------------------------------------------------------------------------------


def test_opcheck(plain: ae.Handle) -> None:
    q, k_cache, v_cache, k, v, lengths = cached()
    views = [x.transpose(1, 2) for x in (q, k_cache, v_cache)]
    pages = ints(0, 1, 2).view(3, 1)
    whole = ints(2, 17, 30)
    for tables in (
        (None, None, None, whole, None, None, 2, 32, 0, True),
        (None, None, ints(0, 1, 30), lengths, None, pages, 2, 32, 2, True),
        (None, None, None, None, ints(2, 2, 0), None, 2, 32, 0, False),
    ):
        for stats in (False, True):
            args = (*views, [], plain.id, plain.scale, stats, *tables)
            torch.library.opcheck(bare.forward_sequences.default, args)
        args = (*views, [], plain.key, plain.scale, *tables)
        torch.library.opcheck(bare.attention_sequences.default, args)
    cu, cu_k = ints(0, 3, 12), ints(0, 4, 14)
    tables = (cu[:-1], cu[1:], cu_k[:-1], cu_k[1:], None, None, 9, 10, 0, True)
    torch.library.opcheck(
        bare.attention_sequences.default, (*packed(), [], plain.key, plain.scale, *tables)
    )
    torch.library.opcheck(
        bare.append_kv.default, (k_cache, v_cache, k, v, lengths, None, None, None, 2)
    )


def test_vmap_is_refused(plain: ae.Handle) -> None:
    q, k, v = packed()
    tables = (None, None, None, None, None, None, 12, 14, 0, True)
    with pytest.raises(NotImplementedError, match="vmap over attention"):
        torch.vmap(lambda x: bare.attention_sequences(x, k, v, [], plain.key, 0.5, *tables)[0])(
            q[None]
        )


def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Any:
    """A layer's decode step, whose cache is read afterwards."""
    out, lse = ae.attention_with_kvcache(
        q * 2, k_cache, v_cache, k, v, cache_seqlens=n, causal=True, return_lse=True
    )
    return out.sin(), lse, k_cache.sum()


def latent_step(q: Tensor, k_cache: Tensor, v: Tensor, k: Tensor, _: Tensor, n: Tensor) -> Any:
    """Values are a view of the keys."""
    return ae.attention_with_kvcache(
        q, k_cache, k_cache[..., :DV], k, k[..., :DV], cache_seqlens=n, causal=True
    )


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("call", [step, latent_step])
def test_compiled_step_appends_in_place(call: Callable, dynamic: bool) -> None:
    call(*cached())
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    for B, L in ((3, 2), (2, 1), (4, 2)) if dynamic else ((3, 2),):
        mine, theirs = cached(B, L), cached(B, L)
        with torch.no_grad():
            same(compiled(*mine), call(*theirs))
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)


def test_compiled_graph_copies_no_cache() -> None:
    from torch._inductor.utils import run_and_get_code

    step(*cached())
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(step, fullgraph=True), *cached())
    assert "append_kv.default(arg" in code  # on the arguments themselves
    assert "= empty_strided_cpu((3, 4, 2, 40)" in code  # twice q
    assert "= empty_strided_cpu((3, 32," not in code


def test_compiled_with_flash_arguments_and_slopes() -> None:
    slopes = torch.rand(HQ)

    def call(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
        return ae.attention_with_kvcache(
            q, k, v, cache_seqlens=n, causal=True, alibi_slopes=slopes, softmax_scale=0.2
        )

    q, k, v, *_ = cached()
    n = ints(3, 20, 32)
    want = call(q, k, v, n)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    same(compiled(q, k, v, n), want)
    flash_args.flash_spec(causal=True, window_size=(3, 3))  # another spec: nothing is traced again
    same(compiled(q, k, v, n), want)
    assert counter.frame_count == 1


def test_compiled_cold_says_what_to_do() -> None:
    for arguments in ({"softcap": 3.0625}, {"spec": ae.AttentionSpec(scale=0.25)}):
        compiled = torch.compile(
            lambda q, k, v, a=arguments: ae.attention_with_kvcache(q, k, v, **a), fullgraph=True
        )
        with pytest.raises(Exception, match="make one call of the same kind"):
            compiled(*cached()[:3])


class Decoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k_cache", normal(3, 32, HKV, D))
        self.register_buffer("v_cache", normal(3, 32, HKV, DV))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
        return ae.attention_with_kvcache(
            q, self.k_cache, self.v_cache, k, v, cache_seqlens=n, causal=True
        )


@pytest.mark.parametrize("strict", [False, True])
def test_exported_decoder_keeps_its_cache(strict: bool, tmp_path: pathlib.Path) -> None:
    q, _, _, k, v, n = cached()
    model = Decoder()
    model(q, k, v, n)
    tokens = Dim("tokens", min=2, max=8)
    shapes = ({1: tokens}, {1: tokens}, {1: tokens}, None)
    with torch.no_grad():
        program = torch.export.export(Decoder(), (q, k, v, n), dynamic_shapes=shapes, strict=strict)
        torch.export.save(program, tmp_path / "decoder.pt2")
        loaded = torch.export.load(tmp_path / "decoder.pt2").module()
        for L in (2, 5):
            q, _, _, k, v, _ = cached(L=L)
            mine = Decoder()
            loaded.k_cache.copy_(mine.k_cache)
            loaded.v_cache.copy_(mine.v_cache)
            same(loaded(q, k, v, n // 2), mine(q, k, v, n // 2))
            assert torch.equal(loaded.k_cache, mine.k_cache)
            assert torch.equal(loaded.v_cache, mine.v_cache)


def test_explain_of_a_call_on_caches(plain: ae.Handle) -> None:
    """Its kernel, and how the work of these lengths is shared, as the handle says it."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, HQ, 1, D, generator=g)
    k, v = (torch.randn(2, 9000, HKV, d, generator=g).transpose(1, 2) for d in (D, DV))
    text = ae.explain(plain.spec, q, k, v, lengths=[9000, 17])
    schedule = plain.schedule([9000, 17], heads=(HQ, HKV))
    assert f"== schedule ==\n{schedule}\n" in text and "an output: " in str(schedule)
    with pytest.raises(ValueError, match=r"lengths\[0\]=9001: k has room for 0 to 9000 keys"):
        ae.explain(plain.spec, q, k, v, lengths=[9001, 17])
    with pytest.raises(ValueError, match="target='sm_70': CUDA targets are 'sm_80', 'sm_86'"):
        ae.explain(plain.spec, q, k, v, target="sm_70")
