"""attention_varlen through the numerics gate: packed sequences of any lengths mean one dense call
in which a row meets the keys of its own sequence, and mods see that sequence's indices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from problems import (
    BF16,
    DV,
    F16,
    F32,
    F64,
    HEADS,
    Captures,
    D,
    alibi,
    gathers,
    generator,
    leaf,
    sink,
)  # fmt: skip
from test_gradcheck import DIM, VALUE_DIM, everything
from torch import Tensor

import attnengine as ae
from attnengine import gate, variants
from attnengine.flash_args import flash_spec
from attnengine.ops_sequences_backward import Ranges, apply

Lengths = list[tuple[int, int]]  # rows and keys of each sequence
ALIBI, SLOPES = alibi()
PLAIN = ae.AttentionSpec()
# Several tiles, single tiles, none: of rows, of keys, of both.
LENGTHS: Lengths = [(5, 7), (0, 9), (70, 90), (9, 0), (0, 0), (33, 40), (1, 20), (17, 3)]


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def tables(lengths: Lengths) -> tuple[Tensor, Tensor]:
    return starts([n for n, _ in lengths]), starts([n for _, n in lengths])


def packed(
    lengths: Lengths,
    dtype: torch.dtype,
    H: int = HEADS,
    Hkv: int = 2,
    d: int = D,
    dv: int = DV,
    seed: int = 0,
) -> list[Tensor]:
    """q [1, H, total, d], k, v: the operands of the dense call that means the same."""
    g = generator(seed)
    rows, keys = (sum(n) for n in zip(*lengths, strict=True))
    shapes = (1, H, rows, d), (1, Hkv, keys, d), (1, Hkv, keys, dv)
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def heads_last(x: Tensor) -> Tensor:
    """[1, H, total, D] as [total, H, D]."""
    return x[0].transpose(0, 1)


def dense(spec: ae.AttentionSpec, lengths: Lengths, align_end: bool = False) -> ae.AttentionSpec:
    """The same meaning as one call over everything, for the reference."""
    number, index = [], []
    for side in (0, 1):
        each = torch.tensor([n[side] for n in lengths])
        local = [torch.arange(n) for n in each.tolist()]
        if align_end and side == 0:
            local = [x + keys - rows for x, (rows, keys) in zip(local, lengths, strict=True)]
        number.append(torch.repeat_interleave(torch.arange(len(lengths)), each))
        index.append(torch.cat(local) if local else torch.zeros(0, dtype=torch.int64))

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = number[0][q] == number[1][k]
        if spec.mask_mod is None:
            return same
        return same & spec.mask_mod(number[0][q], h, index[0][q], index[1][k])

    def score_mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return spec.score_mod(s, number[0][q], h, index[0][q], index[1][k])  # type: ignore[misc]

    return replace(spec, mask_mod=mask_mod, score_mod=None if spec.score_mod is None else score_mod)


def varlen(lengths: Lengths, **more: Any) -> Callable[..., Any]:
    """attention_varlen on the operands of the dense call, in the gate's terms."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        got = ae.attention_varlen(*map(heads_last, (q, k, v)), *tables(lengths), **more)
        if not more.get("return_lse"):
            return got.transpose(0, 1)[None]
        return got[0].transpose(0, 1)[None], {"lse": got[1][None]}

    return run


def verify(
    spec: ae.AttentionSpec,
    lengths: Lengths,
    inputs: Sequence[Tensor],
    captures: Captures | None = None,
    **more: Any,
) -> None:
    lse = "lse" in _saved(spec)
    run = varlen(lengths, spec=spec, return_lse=lse, **more)
    gate.compare(run, dense(spec, lengths), *inputs, captures=captures)


def _saved(spec: ae.AttentionSpec) -> Any:
    return ("lse",) if isinstance(spec.row_func, ae.Softmax | ae.SoftmaxSink) else ()


# -- meaning ---------------------------------------------------------------------------------------

length = st.sampled_from([0, 1, 2, 15, 16, 17, 31, 33, 48, 64, 65]) | st.integers(0, 40)
batches = st.lists(st.tuples(length, length), min_size=1, max_size=4)
groups = st.sampled_from([(1, 1), (1, 4), (2, 2), (4, 1)])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@settings(max_examples=12)  # the gate evaluates each dense, many times
@given(lengths=batches, group=groups)
@example(lengths=[(0, 0)], group=(2, 2))
@example(lengths=[(3, 0), (0, 3)], group=(2, 2))
@example(lengths=[(1, 200)] * 4, group=(1, 4))
def test_any_lengths(dtype: torch.dtype, lengths: Lengths, group: tuple[int, int]) -> None:
    """Causal ALiBi: every sequence is by itself."""
    hkv, per = group
    verify(ALIBI, lengths, packed(lengths, dtype, hkv * per, hkv), SLOPES)


def learned_bias() -> tuple[ae.AttentionSpec, Captures]:
    """A table for each sequence, read by b."""
    bias = leaf(len(LENGTHS), HEADS, 1, 150, seed=3, dtype=BF16)
    return variants.learned_bias(bias), {"bias": bias}


def t5_bias() -> tuple[ae.AttentionSpec, Captures]:
    """Kept per diagonal of each sequence."""
    table = leaf(32, HEADS, seed=2, dtype=BF16)
    return variants.t5_bias(table, causal=True), {"table": table}


def sigmoid() -> tuple[ae.AttentionSpec, Captures]:
    bias = leaf(HEADS, seed=4)
    return variants.sigmoid(bias), {"bias": bias}


def retention() -> tuple[ae.AttentionSpec, Captures]:
    decay = (torch.rand(HEADS, generator=generator(5)) * 0.1 + 0.9).requires_grad_()
    return variants.retention(decay), {"decay": decay}


def prefix_lm() -> tuple[ae.AttentionSpec, Captures]:
    """A captured length for each sequence."""
    return variants.prefix_lm(torch.arange(len(LENGTHS)) * 7), {}


def many_gathers() -> tuple[ae.AttentionSpec, Captures]:
    return gathers(70, 150, stored=BF16)


BUILD: dict[str, tuple[Callable[[], tuple[ae.AttentionSpec, Captures]], torch.dtype]] = {
    "plain": (lambda: (PLAIN, {}), BF16),
    "causal": (lambda: (variants.causal(), {}), F32),
    "learned bias": (learned_bias, BF16),
    "t5 bias": (t5_bias, BF16),
    "sink": (sink, BF16),
    "sigmoid": (sigmoid, F32),
    "retention": (retention, F32),
    "prefix": (prefix_lm, F32),
}


@pytest.mark.parametrize("name", BUILD)
def test_specs(name: str) -> None:
    """Mods, masks and row functions see the sequence's number and its own indices; gradients of
    captured tensors are sums over all sequences. A sink has a gradient without any key."""
    build, dtype = BUILD[name]
    spec, captures = build()
    verify(spec, LENGTHS, packed(LENGTHS, dtype), captures)


def test_many_gathers() -> None:
    spec, captures = many_gathers()
    lengths = [(70, 150), (0, 4), (33, 20), (5, 61)]
    verify(spec, lengths, packed(lengths, F32), captures)


def aligned(spec: ae.AttentionSpec, lengths: Lengths) -> Callable[..., Any]:
    """What flash-attn's arguments use: the last row has the index of the last key."""
    cu_q, cu_k = tables(lengths)
    rows, keys = (max(n) for n in zip(*lengths, strict=True))
    ranges = Ranges(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], rows, keys, True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        handle = ae.compile(spec, q, k, v, backward=True)
        out, stats = apply(q, k, v, handle.program, handle.scale, ranges, handle.tensors)
        return out, dict(handle.aux(stats))

    return run


@pytest.mark.parametrize("name", ["t5 bias", "learned bias"])
def test_specs_aligned_at_the_end(name: str) -> None:
    build, dtype = BUILD[name]
    spec, captures = build()
    run = aligned(spec, LENGTHS)
    gate.compare(run, dense(spec, LENGTHS, True), *packed(LENGTHS, dtype), captures=captures)


def test_negative_query_indices() -> None:
    """More rows than keys: the first rows' indices are below 0 and count from a table's end, where
    they meet those of the last rows."""
    spec, captures = many_gathers()
    lengths = [(70, 10), (33, 20), (69, 70)]
    run = aligned(spec, lengths)
    gate.compare(run, dense(spec, lengths, True), *packed(lengths, F32), captures=captures)


def test_flash_attention_arguments() -> None:
    """Window, softcap and ALiBi slopes per sequence and head, aligned at the end."""
    slopes = leaf(len(LENGTHS), HEADS, seed=6)
    flags: dict[str, Any] = dict(window_size=(40, 3), softcap=3.0, alibi_slopes=slopes)
    run = varlen(LENGTHS, return_lse=True, **flags)
    want = dense(flash_spec(**flags), LENGTHS, True)
    gate.compare(run, want, *packed(LENGTHS, BF16), captures={"slopes": slopes})


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_causal_argument(dtype: torch.dtype) -> None:
    run = varlen(LENGTHS, causal=True, return_lse=True)
    gate.compare(run, dense(variants.causal(), LENGTHS, True), *packed(LENGTHS, dtype))


@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0])
def test_any_scale(scale: float) -> None:
    lengths = [(9, 30), (17, 4)]
    run = varlen(lengths, softmax_scale=scale)
    gate.compare(run, dense(replace(PLAIN, scale=scale), lengths), *packed(lengths, BF16))


def test_one_call_with_a_document_mask() -> None:
    """The same expectation for both, and the same module as any document mask."""
    sizes = [40, 1, 65, 7, 90]
    lengths = [(n, n) for n in sizes]
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None]
    document = variants.document(ids)
    expected = gate.Expectation(document, *packed(lengths, BF16))
    expected.check(lambda q, k, v: ae.attention(q, k, v, document))
    expected.check(varlen(lengths, spec=variants.causal()))


def test_gradcheck() -> None:
    """Finite differences in fp64 of q, k, v and every captured tensor, through out and lse."""
    spec, captures = everything()
    lengths = [(4, 5), (0, 2), (2, 3), (1, 0)]
    inputs = [heads_last(x).detach() for x in packed(lengths, F64, d=DIM, dv=VALUE_DIM)]

    def run(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        out, lse = ae.attention_varlen(q, k, v, *tables(lengths), spec=spec, return_lse=True)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    leaves = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(run, (*leaves, *captures.values()), atol=1e-6, rtol=1e-5)


def test_pages() -> None:
    """Keys in pages in any order, as a cache has them."""
    lengths = [(5, 40), (1, 16), (17, 33), (3, 0)]
    q, k, v = packed(lengths, BF16)
    page, columns = 16, 3
    order = torch.randperm(len(lengths) * columns, generator=generator(7)).int()
    block_table = order.view(len(lengths), columns)
    cache = [x.new_full((len(order), page, 2, x.shape[3]), float("nan")) for x in (k, v)]
    ends = tables(lengths)[1].tolist()
    for b, (_, keys) in enumerate(lengths):
        for c, x in zip(cache, (k, v), strict=True):
            for i in range(keys):
                row = heads_last(x)[ends[b] + i]
                c[block_table[b, i // page], i % page] = row

    def run(q: Tensor, *_: Tensor) -> Any:
        out, lse = ae.attention_varlen(
            heads_last(q), *cache, *tables(lengths), causal=True, block_table=block_table,
            return_lse=True,
        )  # fmt: skip
        return out.transpose(0, 1)[None], {"lse": lse[None]}

    gate.compare(run, dense(variants.causal(), lengths, True), q, k, v, grads=False)


# -- bits ------------------------------------------------------------------------------------------


def results(
    spec: ae.AttentionSpec, inputs: Sequence[Tensor], lengths: Lengths, captures: Captures
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = ae.attention_varlen(*leaves, *tables(lengths), spec=spec, return_lse=True)
    g = generator(1)
    cotangents = [torch.randn(x.shape, generator=g).to(x.dtype) for x in (out, lse)]
    grads = torch.autograd.grad([out, lse], [*leaves, *captures.values()], cotangents)
    return [out.detach(), lse.detach(), *grads]


@pytest.mark.parametrize("make", [lambda: (PLAIN, {}), alibi, sink], ids=["plain", "alibi", "sink"])
def test_the_same_bits_at_every_thread_count(make: Any) -> None:
    """Short and long sequences; without captured gradients, short ones run side by side."""
    spec, captures = make()
    lengths = [*LENGTHS, (300, 310), *[(20, 25)] * 9]
    inputs = [heads_last(x) for x in packed(lengths, BF16)]
    first = results(spec, inputs, lengths, captures)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        for got, want in zip(results(spec, inputs, lengths, captures), first, strict=True):
            assert torch.equal(got, want), threads


def test_layouts() -> None:
    """The same bits as contiguous operands give: q, k and v of one tensor, and last stride 2."""
    lengths = [(33, 33), (70, 70), (1, 1)]
    q, k, v = (heads_last(x) for x in packed(lengths, BF16, Hkv=HEADS))
    qkv = torch.stack([q, k, torch.nn.functional.pad(v, (0, D - DV))], 1)
    together = [*qkv.unbind(1)[:2], qkv[:, 2, :, :DV]]
    spread = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]
    want = results(PLAIN, [q.contiguous(), k.contiguous(), v.contiguous()], lengths, {})
    for inputs in (together, spread, [q, k, v]):
        for x, y in zip(results(PLAIN, inputs, lengths, {}), want, strict=True):
            assert torch.equal(x, y)


def test_what_belongs_to_no_sequence() -> None:
    """Rows and keys after the last sequence: output and gradients 0, and what is stored there, NaN
    here, reaches nothing. The same for a neighbour's values."""
    lengths = [(20, 30), (0, 5), (7, 0), (33, 40)]
    whole = [*lengths, (5, 6)]
    inputs = [heads_last(x).clone() for x in packed(whole, BF16)]
    rows, keys = (sum(n) for n in zip(*lengths, strict=True))
    want = results(ALIBI, [inputs[0][:rows], *(x[:keys] for x in inputs[1:])], lengths, SLOPES)
    for x, n in zip(inputs, (rows, keys, keys), strict=True):
        x[n:] = float("nan")
    inputs[1][30:35] = inputs[2][30:35] = float("nan")  # the keys that no row meets
    leaves = [x.requires_grad_() for x in inputs]
    out = ae.attention_varlen(*leaves, *tables(lengths), spec=ALIBI)
    g = torch.randn(rows, HEADS, DV, generator=generator(1)).to(BF16)
    g = torch.cat([g, torch.full((5, HEADS, DV), float("nan"), dtype=BF16)])
    dq, dk, dv = torch.autograd.grad(out, leaves, g)
    assert torch.equal(out[:rows], want[0]) and not out[rows:].any()
    assert not dq[rows:].any() and not dq[20:27].any()
    for x in (dk, dv):
        assert not x[keys:].any() and not x[30:35].any() and x.isfinite().all()
