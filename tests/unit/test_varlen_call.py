"""attention_varlen as a call: shapes, errors, torch.compile, torch.export, refusals. What it
computes is in tests/numerics/test_varlen.py."""

from __future__ import annotations

import inspect
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_torch_integration import D, gradients, near, spec_of
from torch import Tensor

import attnengine as ae

pytestmark = pytest.mark.compiles
LENGTHS = [3, 0, 9, 1], [4, 2, 11, 0]
varlen = torch.ops.attnengine.attention_sequences


def starts(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)


def operands(
    lengths: Any = LENGTHS, grad: bool = False, d: int = D, dv: int | None = None
) -> tuple[Tensor, ...]:
    """q [total, 4, d], k [total, 2, d], v [total, 2, dv or d]."""
    g = torch.Generator().manual_seed(sum(map(sum, lengths)))
    rows, keys = map(sum, lengths)
    sizes = (rows, 4, d), (keys, 2, d), (keys, 2, dv or d)
    return tuple(torch.randn(s, generator=g).requires_grad_(grad) for s in sizes)


CU = starts(LENGTHS[0]), starts(LENGTHS[1])


@pytest.fixture
def bias() -> Tensor:
    return torch.tensor([0.1, -0.2, 0.3, 0.4], requires_grad=True)


@pytest.fixture
def spec(bias: Tensor) -> ae.AttentionSpec:
    return spec_of(bias)


@pytest.fixture
def attn(spec: ae.AttentionSpec) -> ae.Handle:
    """What the operators need: the spec's kernels."""
    return ae.compile(spec, *(x.transpose(0, 1)[None] for x in operands()), backward=True)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def bare(cu: tuple[Tensor, Tensor] = CU) -> tuple[Any, ...]:
    """The tables of attention_sequences."""
    q, k = cu
    return q[:-1], q[1:], k[:-1], k[1:], None, None, 9, 11, 0, False


# -- the call --------------------------------------------------------------------------------------


def test_order_of_arguments_is_that_of_flash_attention() -> None:
    names = list(inspect.signature(ae.attention_varlen).parameters)
    assert names[:7] == [
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
    ]  # fmt: skip


def test_shapes(spec: ae.AttentionSpec) -> None:
    q, k, v = operands()
    out, lse = ae.attention_varlen(q, k, v, *CU, spec=spec, return_lse=True)
    assert out.shape == (13, 4, D) and out.is_contiguous() and out.dtype == q.dtype
    assert lse.shape == (4, 13) and lse.dtype == torch.float32
    assert torch.equal(out, ae.attention_varlen(q, k, v, *CU, spec=spec))
    assert not out[12].any() and lse[:, 12].isneginf().all()  # the row without keys


@pytest.mark.parametrize("how", ["int64", "bounds", "wide bounds", "tensor bounds", "inference"])
def test_the_same_result(spec: ae.AttentionSpec, how: str) -> None:
    q, k, v = operands()
    want = ae.attention_varlen(q, k, v, *CU, spec=spec)
    wide = [x.long() for x in CU]
    bounds: tuple[Any, ...] = {
        "bounds": (9, 11), "wide bounds": (500, 700),
        "tensor bounds": (torch.tensor(9), torch.tensor(11)),
    }.get(how, ())  # fmt: skip
    with torch.inference_mode(how == "inference"):
        cu = wide if how == "int64" else CU
        assert torch.equal(ae.attention_varlen(q, k, v, *cu, *bounds, spec=spec), want)


@pytest.mark.parametrize("lengths", [([], []), ([0], [0]), ([0, 0], [3, 0]), ([2, 0], [0, 0])])
def test_nothing_to_do(spec: ae.AttentionSpec, bias: Tensor, lengths: Any) -> None:
    q, k, v = operands(lengths, grad=True)
    cu = starts(lengths[0]), starts(lengths[1])
    out, lse = ae.attention_varlen(q, k, v, *cu, spec=spec, return_lse=True)
    assert out.shape == q.shape and not out.any() and lse.isneginf().all()
    for x in torch.autograd.grad([out, lse], [q, k, v, bias], [out + 1, torch.zeros_like(lse)]):
        assert not x.any()


def test_autocast(spec: ae.AttentionSpec) -> None:
    q, k, v = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ae.attention_varlen(q, k, v, *CU, spec=spec)
    assert got.dtype == torch.bfloat16


def test_gradient_of_some_operands(spec: ae.AttentionSpec, bias: Tensor) -> None:
    q, k, v = operands()
    want = gradients(lambda *x: ae.attention_varlen(*x, *CU, spec=spec), *operands(grad=True), bias)
    k.requires_grad_()
    out = ae.attention_varlen(q, k, v, *CU, spec=spec)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.autograd.grad(out, k, g)[0], want[2])


def test_tables_that_change_before_backward(spec: ae.AttentionSpec) -> None:
    q, k, v = operands(grad=True)
    cu = CU[0].clone(), CU[1].clone()
    out = ae.attention_varlen(q, k, v, *cu, spec=spec)
    cu[0][1] = 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# -- errors ----------------------------------------------------------------------------------------


def bad(name: str, message: str, kind: type[Exception] = ValueError, **changes: Any) -> Any:
    return pytest.param(changes, message, kind, id=name)


def cu(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "changes, message, kind",
    [
        bad("start", r"cu_seqlens_q\[0\]=1 must be 0", cu_seqlens_q=cu(1, 3, 12, 12, 13)),
        bad("decreasing", r"cu_seqlens_q\[2\]=2 is below.*=3", cu_seqlens_q=cu(0, 3, 2, 12, 13)),
        bad("keys decrease", r"cu_seqlens_k\[4\]=5 is below", cu_seqlens_k=cu(0, 4, 6, 17, 5)),
        bad("end", r"cu_seqlens_q\[4\]=14 is beyond the 13 rows", cu_seqlens_q=cu(0, 3, 3, 12, 14)),
        bad("end of keys", r"cu_seqlens_k.*=18 is beyond the 17", cu_seqlens_k=cu(0, 4, 6, 17, 18)),
        bad("int64", r"cu_seqlens_q\[4\]=2147483647 is beyond",
            cu_seqlens_q=torch.tensor([0, 3, 3, 12, 2**33])),
        bad("rows", r"max_seqlen_q=8 is below the 9 rows of sequence 2", max_seqlen_q=8),
        bad("keys", r"max_seqlen_k=10 is below the 11 keys of sequence 2", max_seqlen_k=10),
        bad("negative", r"max_seqlen_q=-1 must not be negative", max_seqlen_q=-1),
        bad("kind of bound", "max_seqlen_q must be an int", TypeError, max_seqlen_q=2.5),
        bad("number", "cu_seqlens_q describes 3 sequences and cu_seqlens_k 4",
            cu_seqlens_q=cu(0, 3, 3, 12)),
        bad("float", "cu_seqlens_q has dtype torch.float32", TypeError, cu_seqlens_q=CU[0].float()),
        bad("list", "cu_seqlens_k must be an int32 tensor", TypeError, cu_seqlens_k=[0, 4]),
        bad("shape", r"cu_seqlens_q must have shape \[B \+ 1\]", cu_seqlens_q=CU[0][None]),
        bad("empty", r"cu_seqlens_q must have shape \[B \+ 1\]", cu_seqlens_q=cu()),
        bad("device", "cu_seqlens_q is on meta but q is on cpu", cu_seqlens_q=CU[0].to("meta")),
        bad("padded q", r"q must be \[total, H, D\], got.*attnengine.attention takes",
            q=torch.zeros(1, 4, 13, D)),
        bad("no tensor", "q must be a torch.Tensor, got list", TypeError, q=[1.0]),
        bad("dtypes", "share one dtype", TypeError, q=torch.zeros(13, 4, D).double()),
        bad("head dim", "k has head_dim 9 but q has 8", k=torch.zeros(17, 2, 9)),
        bad("heads", "q has 4 heads.*multiple of the 3",
            k=torch.zeros(17, 3, D), v=torch.zeros(17, 3, D)),
        bad("k and v", "k and v must have the same heads and length", v=torch.zeros(16, 2, D)),
        bad("both", "spec and causal are both given", causal=True),
        bad("block_table", "block_table must be int32", block_table=cu(1, 2),
            k=torch.zeros(9, 16, 2, D), v=torch.zeros(9, 16, 2, D)),
        bad("pages", r"k must be \[pages, page_size, H, D\]", block_table=cu(1, 2)[None]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_errors(
    spec: ae.AttentionSpec, changes: dict[str, Any], message: str, kind: Any, grad: bool
) -> None:
    q, k, v = operands()
    given: dict[str, Any] = dict(q=q, k=k, v=v, cu_seqlens_q=CU[0], cu_seqlens_k=CU[1], spec=spec)
    given |= changes
    if grad and isinstance(given["q"], Tensor):
        given["q"] = given["q"].clone().requires_grad_()
    with torch.set_grad_enabled(grad), pytest.raises(kind, match=message):
        ae.attention_varlen(**given)


def test_no_lse() -> None:
    x = [x.bfloat16() for x in operands(d=40, dv=24)]
    with pytest.raises(ValueError, match=r"return_lse=True: .*ReLU saves \[\] and no lse"):
        ae.attention_varlen(*x, *CU, spec=ae.variants.relu(causal=True), return_lse=True)


def test_pages_have_no_gradient(spec: ae.AttentionSpec) -> None:
    q, _, _ = operands(grad=True)
    cache = torch.zeros(4, 16, 2, D)
    table = torch.arange(4, dtype=torch.int32)[:, None]
    with pytest.raises(NotImplementedError, match="block_table.*no gradient.*attention_varlen"):
        ae.attention_varlen(q, cache, cache, *CU, block_table=table, spec=spec)


@pytest.mark.parametrize("door", ["call", "op"])
def test_double_backward(attn: ae.Handle, door: str) -> None:
    q, k, v = operands(grad=True)
    if door == "call":
        out = ae.attention_varlen(q, k, v, *CU, spec=attn.spec)
    else:
        inputs = (x.transpose(0, 1)[None] for x in (q, k, v))
        out, _ = varlen(*inputs, attn.tensors, attn.key, attn.scale, *bare())
    with pytest.raises(RuntimeError, match="double backward"):
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        torch.autograd.grad(dq.sum(), q)


def test_transforms_are_refused(spec: ae.AttentionSpec) -> None:
    q, k, v = operands()
    ae.attention_varlen(q, k, v, *CU, spec=spec)
    loss = lambda q: ae.attention_varlen(q, k, v, *CU, spec=spec).square().sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="torch.func.*torch.autograd"):
        torch.func.grad(loss)(q)
    with pytest.raises(NotImplementedError, match="torch.func.*torch.autograd"):
        torch.func.jvp(loss, (q,), (torch.ones_like(q),))
    with pytest.raises(NotImplementedError, match="vmap"), torch.no_grad():
        torch.vmap(loss)(torch.stack([q, q]))


# -- torch -----------------------------------------------------------------------------------------


def test_opcheck_of_the_bare_operators(attn: ae.Handle) -> None:
    q, k, v = (x.transpose(0, 1)[None] for x in operands())
    tensors = [t.detach() for t in attn.tensors]
    forward = (q, k, v, tensors, attn.id, attn.scale)
    for stats in (False, True):
        torch.library.opcheck(
            torch.ops.attnengine.forward_sequences.default, (*forward, stats, *bare())
        )
    out, saved = torch.ops.attnengine.forward_sequences(*forward, True, *bare())
    tables = (*bare()[:4], *bare()[6:])
    for dstats in (None, torch.randn(1, *out.shape[:3])):
        given = (q, k, v, tensors, out, saved, torch.randn_like(out), dstats)
        args = (*given, attn.program.backward(), attn.scale, *tables)
        torch.library.opcheck(torch.ops.attnengine.backward_sequences.default, args)


@pytest.mark.parametrize("portable", [False, True], ids=["key", "program"])
def test_opcheck_of_the_traceable_operators(attn: ae.Handle, portable: bool) -> None:
    q, k, v = (x.transpose(0, 1)[None].detach().requires_grad_() for x in operands())
    key = attn.portable if portable else attn.key
    torch.library.opcheck(varlen.default, (q, k, v, attn.tensors, key, attn.scale, *bare()))
    with torch.no_grad():
        out, saved = varlen(q, k, v, attn.tensors, key, attn.scale, *bare())
        tensors = [t.detach() for t in attn.tensors]
        args = (q.detach(), k.detach(), v.detach(), tensors, out, saved, torch.randn_like(out))
        tables = (*bare()[:4], *bare()[6:])
        torch.library.opcheck(
            torch.ops.attnengine.attention_sequences_backward.default,
            (*args, None, key, attn.scale, *tables),
        )


def test_padded_keys(attn: ae.Handle, bias: Tensor) -> None:
    """The operators take q [B, H, L, D] and a length of each batch row's keys as well."""
    g = torch.Generator().manual_seed(0)
    sizes = (3, 4, 5, D), (3, 2, 11, D), (3, 2, 11, D)
    x = [torch.randn(s, generator=g).requires_grad_() for s in sizes]
    lengths = [11, 0, 4]
    tables = (None, None, None, torch.tensor(lengths, dtype=torch.int32), None, None, 5, 11, 0)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen(q, k, v, attn.tensors, attn.key, attn.scale, *tables, False)[0]

    def each(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            ae.attention(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], attn.spec)
            for b, n in enumerate(lengths)
        ]
        return torch.cat(parts)

    near(gradients(run, *x, bias), gradients(each, *x, bias))
    shared = [x[0], *(y[:1] for y in x[1:])]
    with pytest.raises(ValueError, match="shared by 3 sequences.*expand"):
        run(*shared).sum().backward()


def both(f: Callable, cu: Any, *x: Tensor, more: Any = ()) -> list[Tensor]:
    return gradients(lambda q, k, v: f(q, k, v, *cu), *x, *more)


@pytest.mark.parametrize("bounds", [(), (16, 16)], ids=["no bounds", "bounds"])
def test_compiled_at_any_lengths(spec: ae.AttentionSpec, bias: Tensor, bounds: Any) -> None:
    """Other totals and another number of sequences take no other graph."""

    def block(q: Tensor, k: Tensor, v: Tensor, *cu: Tensor) -> Tensor:
        out, lse = ae.attention_varlen(q * 2, k, v, *cu, *bounds, spec=spec, return_lse=True)
        return out.sigmoid() + torch.where(lse.isfinite(), lse, 0.0).T[..., None]

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for lengths in (LENGTHS, ([5, 6], [7, 3]), ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1])):
        cu = starts(lengths[0]), starts(lengths[1])
        x = operands(lengths, grad=True)
        want = both(block, cu, *x, more=[bias])
        near(both(compiled, cu, *x, more=[bias]), want, 1e-4)
        with torch.no_grad():
            near([compiled(*x, *cu)], [block(*x, *cu)])


def test_compiled_with_flash_attention_arguments() -> None:
    def block(q: Tensor, k: Tensor, v: Tensor, *cu: Tensor) -> Tensor:
        return ae.attention_varlen(q, k, v, *cu, causal=True).relu()

    x = operands(grad=True, d=40, dv=24)
    want = both(block, CU, *x)
    near(both(torch.compile(block, fullgraph=True), CU, *x), want)


def test_compiled_with_a_cold_spec_says_what_to_do() -> None:
    spec = ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s * 1.0625)
    compiled = torch.compile(lambda *x: ae.attention_varlen(*x, *CU, spec=spec), fullgraph=True)
    with pytest.raises(Exception, match="needs a prepared kernel"):
        compiled(*operands())


class Model(torch.nn.Module):
    """A captured Parameter, or flash-attn's arguments, at the head dims of other tests."""

    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor([0.1, -0.2, 0.3, 0.4]))
        self.spec = None if flash else spec_of(self.bias)
        self.causal = flash

    def forward(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        out = ae.attention_varlen(q, k, v, a, b, spec=self.spec, causal=self.causal)
        return out + self.bias[:, None]


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("flash", [False, True], ids=["spec", "flash"])
def test_export_and_load(tmp_path: pathlib.Path, flash: bool, strict: bool) -> None:
    model = Model(flash)
    dims: dict[str, int] = dict(d=40, dv=24) if flash else {}
    x = operands(**dims)
    model(*x, *CU)
    rows, keys, number = (torch.export.Dim(n, min=3, max=4096) for n in ("rows", "keys", "n"))
    shapes = ({0: rows}, {0: keys}, {0: keys}, {0: number}, {0: number})
    with torch.no_grad():
        program = torch.export.export(model, (*x, *CU), dynamic_shapes=shapes, strict=strict)
    assert varlen.default in {n.target for n in program.graph.nodes}
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for lengths in (LENGTHS, ([5, 6], [7, 3])):
        cu = starts(lengths[0]), starts(lengths[1])
        q, k, v = operands(lengths, grad=True, **dims)
        got = both(loaded, cu, q, k, v, more=[loaded.bias])
        near(got, both(model, cu, q, k, v, more=[model.bias]))
