"""merge_state and merge_states: meaning, gradients, absent parts, layouts, errors, tracing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnengine as ae
from attnengine import gate, library, merge

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INF = math.inf
Merge = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def poisoned():
    library.host.set_poison(True)
    yield
    library.host.set_poison(False)


def parts(
    count: int,
    *shape: int,
    dtype: torch.dtype = torch.float32,
    dead: float = 0.0,
    seed: int = 0,
    spread: float = 3.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Random parts; a share `dead` of their rows is absent, and holds NaN."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outs, lses = [], []
    for _ in range(count):
        out = torch.randn(*shape, generator=g, dtype=wide)
        lse = spread * torch.randn(shape[:-1], generator=g, dtype=wide)
        absent = torch.rand(shape[:-1], generator=g) < dead
        lses.append(lse.masked_fill(absent, -INF))
        outs.append(out.masked_fill(absent[..., None], math.nan).to(dtype))
    return outs, lses


def dense(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The definition, in float64 and plain autograd."""
    table = torch.stack([x.double() for x in lses])
    live = table != -INF
    some = live.any(0)
    # -inf only where another part is alive, so that no gradient passes through inf - inf.
    table = torch.where(live | ~some, torch.where(some, table, 0.0), -INF)
    lse = torch.logsumexp(table, 0)
    weight = torch.where(live, torch.exp(table - lse), 0.0)
    values = torch.where(live[..., None], torch.stack([x.double() for x in outs]), 0.0)
    return (weight[..., None] * values).sum(0), torch.where(some, lse, -INF)


def both_directions(
    f: Merge, outs: Sequence[Tensor], lses: Sequence[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Results, and the gradients of all parts; the results' own gradients are random numbers of
    `dtype`, or outs' type."""
    outs, lses = ([x.detach().requires_grad_() for x in xs] for xs in (outs, lses))
    out, lse = f(outs, lses)
    g = torch.Generator().manual_seed(5)
    dout = torch.randn(out.shape, generator=g).to(dtype or outs[0].dtype)
    dlse = torch.randn(lse.shape, generator=g)
    grads = torch.autograd.grad(
        (out, lse), (*outs, *lses), (dout.to(out.dtype), dlse.to(lse.dtype)), materialize_grads=True
    )
    return [out.detach(), lse.detach(), *grads]


def near(
    got: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype, spread: float = 1.0
) -> None:
    """Within the roundings of each result: that of its own dtype, and of sums in the wider one.
    spread: of the lse, whose roundings are relative errors of the weights."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        unit = torch.finfo(a.dtype).eps
        b = b.double()
        assert torch.equal(a.isfinite(), b.isfinite())
        assert torch.equal(a[~a.isfinite()].double(), b[~b.isfinite()])
        size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 1.0
        fine = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        a, b = (x[b.isfinite()].double() for x in (a, b))
        assert (
            (a - b).abs() <= 0.5001 * unit * b.abs() + 16 * fine * spread * max(size, 1.0)
        ).all()


# -- meaning ---------------------------------------------------------------------------------------


def test_operator_has_the_gradients_of_the_function():
    outs, lses = parts(3, 4, 5, dead=0.3)
    got = both_directions(torch.ops.attnengine.merge_states, outs, lses)
    want = both_directions(ae.merge_states, outs, lses)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 17])
@pytest.mark.parametrize("depth", [1, 5, 16, 40])
def test_matches_the_definition(dtype, count, depth):
    outs, lses = parts(count, 3, 4, depth, dtype=dtype, dead=0.3)
    want = both_directions(dense, [x.double() for x in outs], [x.double() for x in lses], dtype)
    near(both_directions(ae.merge_states, outs, lses), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_composite_for_cuda_means_the_same(dtype):
    outs, lses = parts(3, 7, 2, 24, dtype=dtype, dead=0.4)
    out, lse = ae.merge_states(outs, lses)
    near(merge._composite(outs, lses), (out, lse), dtype)
    dout, dlse = torch.randn(out.shape).to(dtype), torch.randn_like(lse)
    got = merge._composite_backward(outs, lses, dout, dlse)
    want = torch.ops.attnengine.merge_states_backward(outs, lses, dout, dlse)
    for a, b in zip(got, want, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.stride() == y.stride() and x.dtype == y.dtype
            torch.testing.assert_close(x, y)


def test_gradcheck():
    outs, lses = parts(3, 2, 3, 5, dtype=torch.float64, dead=0.2)
    outs = [x.nan_to_num(0.5).requires_grad_() for x in outs]
    alive = [x.isfinite() for x in lses]
    values = [x.nan_to_num(neginf=0.0).requires_grad_() for x in lses]

    def f(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        lses = [x.masked_fill(~a, -INF) for x, a in zip(tensors[3:], alive, strict=True)]
        out, lse = ae.merge_states(tensors[:3], lses)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(f, (*outs, *values))


def test_two_parts():
    (a, b), (x, y) = parts(2, 4, 8)
    got, want = ae.merge_state(a, x, b, y), ae.merge_states([a, b], [x, y])
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    got = ae.merge_state(o_a=a, lse_a=x, o_b=b, lse_b=y)
    assert torch.equal(got[0], want[0])


def test_parts_may_be_stacked():
    outs, lses = parts(3, 4, 8)
    a, b = torch.stack(outs).requires_grad_(), torch.stack(lses).requires_grad_()
    got, want = ae.merge_states(a, b), ae.merge_states(outs, lses)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    got[0].sum().backward()
    assert a.grad is not None and a.grad.shape == a.shape and b.grad is not None


def test_one_part_is_itself():
    (out,), (lse,) = parts(1, 3, 4, 40, dead=0.3)
    dead = lse == -INF
    got_out, got_lse = ae.merge_states([out], [lse])
    assert torch.equal(got_out[~dead], out[~dead]) and torch.equal(got_lse, lse)
    assert not got_out[dead].any()


@given(
    count=st.integers(2, 6),
    dead=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.1, 3.0, 60.0]),
)
@settings(max_examples=60, deadline=None)
def test_associative_and_commutative(count, dead, seed, spread):
    outs, lses = parts(count, 5, 6, dtype=torch.float64, dead=dead, seed=seed, spread=spread)
    want = ae.merge_states(outs, lses)
    g = torch.Generator().manual_seed(seed)
    tree = [(outs[i], lses[i]) for i in torch.randperm(count, generator=g)]
    while len(tree) > 1:
        at = int(torch.randint(len(tree) - 1, (), generator=g))
        tree[at : at + 2] = [ae.merge_state(*tree[at], *tree[at + 1])]
    near(tree[0], want, torch.float64, max(spread, 1.0))
    near(want, dense(outs, lses), torch.float64, max(spread, 1.0))


@given(
    rows=st.lists(
        st.lists(st.sampled_from([-INF, -1e4, -80.0, 0.0, 3.5, 80.0, 1e4]), min_size=3, max_size=3),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=80, deadline=None)
def test_extreme_and_absent_parts(rows):
    lses = list(torch.tensor(rows).mT.contiguous())
    outs = [torch.randn(len(rows), 4).masked_fill((x == -INF)[:, None], math.nan) for x in lses]
    want = both_directions(dense, [x.double() for x in outs], [x.double() for x in lses])
    got = both_directions(ae.merge_states, outs, lses)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("f", [ae.merge_states, merge._composite], ids=["cpu", "composite"])
def test_lse_that_is_no_logarithm_of_a_sum(bad, f):
    outs, lses = parts(3, 2, 4)
    lses[0][0], lses[1][0] = -INF, bad
    out, lse = f(outs, lses)
    assert out[0].isnan().all() and out[1].isfinite().all()
    assert lse[0].isnan() if math.isnan(bad) else lse[0] == INF
    backward = torch.ops.attnengine.merge_states_backward
    for g in (backward, merge._composite_backward):
        douts, dlses = g(outs, lses, torch.ones(2, 4), torch.ones(2))
        assert not douts[0][0].any() and not dlses[0][0].any()  # the absent part
        assert all(x[0].isnan().all() for x in (*douts[1:], *dlses[1:]))
        assert all(x[1].isfinite().all() for x in (*douts, *dlses))


# -- attention in parts ----------------------------------------------------------------------------


@pytest.mark.compiles
@pytest.mark.parametrize("cuts", [[7], [0, 1, 20], [5, 5, 11, 30]])
def test_keys_in_parts_are_attention(cuts):
    """Attention over parts of the keys, merged, is attention, and so are its gradients: judged as
    a kernel is. Head dims of the numerics tests, whose module this shares."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(2, h, n, d, generator=g) for h, n, d in ((4, 9, 40), (2, 31, 40), (2, 31, 24))
    )
    spec = ae.AttentionSpec()
    bounds = [0, *cuts, k.shape[2]]

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        results = [
            ae.attention(q, k[:, :, a:b], v[:, :, a:b], spec, return_aux=True)
            for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        out, lse = ae.merge_states([out for out, _ in results], [aux.lse for _, aux in results])
        return out, {"lse": lse}

    reports = gate.compare(run, spec, q, k, v)
    assert {r.name for r in reports} == {"out", "lse", "dq", "dk", "dv"}


@pytest.mark.compiles
def test_cache_in_parts():
    """A cache that lies in two places, as a shared prefix does: [B, Lq, Hq, Dv] and [B, Hq, Lq].
    Of the head dims above, to share the module."""
    g = torch.Generator().manual_seed(4)
    shapes = (2, 1, 4, 40), (2, 48, 2, 40), (2, 48, 2, 24)
    q, k, v = (torch.randn(shape, generator=g) for shape in shapes)
    lengths = torch.tensor([16, 48])  # the second part of the first sequence is empty

    def attend(begin: int, end: int) -> tuple[Tensor, Tensor]:
        filled = (lengths.clamp(max=end) - begin).int()
        caches = k[:, begin:end], v[:, begin:end]
        out, lse = ae.attention_with_kvcache(q, *caches, cache_seqlens=filled, return_lse=True)
        return out, lse.transpose(1, 2)

    whole, parts = attend(0, 48), [attend(0, 16), attend(16, 48)]
    out, lse = ae.merge_states(*zip(*parts, strict=True))
    assert parts[1][1][0].eq(-INF).all()
    torch.testing.assert_close((out, lse), whole)


# -- layouts ---------------------------------------------------------------------------------------


def test_strided_parts():
    outs, lses = parts(3, 2, 3, 5, 20, dead=0.2)
    want = both_directions(ae.merge_states, outs, lses)
    moved = [
        outs[0].transpose(1, 2).contiguous().transpose(1, 2),
        outs[1].mT.contiguous().mT,
        torch.stack([outs[2], outs[2]], -2)[..., 0, :],
    ]
    turned = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in lses]
    got = both_directions(ae.merge_states, moved, turned)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    out, lse = ae.merge_states(moved, turned)
    assert out.stride() == moved[0].stride() and lse.is_contiguous()


def test_expanded_gradients_and_parts():
    outs, lses = parts(2, 4, 3, 6)
    outs = [x[:1].expand(4, 3, 6) for x in outs]
    copies = [x.contiguous() for x in outs]
    assert torch.equal(ae.merge_states(outs, lses)[0], ae.merge_states(copies, lses)[0])
    a = [x.clone().requires_grad_() for x in copies]
    ae.merge_states(a, lses)[0].sum().backward()
    douts, _ = torch.ops.attnengine.merge_states_backward(
        copies, lses, torch.ones(4, 3, 6), torch.zeros(4, 3)
    )
    assert all(torch.equal(x.grad, y) for x, y in zip(a, douts, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0), (0,), (3,), (2, 1, 1, 1, 1, 1, 2, 3)])
def test_empty_and_small_shapes(shape):
    outs, lses = parts(2, *shape)
    out, lse = ae.merge_states(outs, lses)
    assert out.shape == shape and lse.shape == shape[:-1]
    near([out, lse], dense(outs, lses), torch.float32)
    douts, dlses = torch.ops.attnengine.merge_states_backward(outs, lses, out, lse)
    assert all(x.shape == shape for x in douts) and all(x.shape == shape[:-1] for x in dlses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_at_every_thread_count(dtype):
    outs, lses = parts(4, 40, 65, 33, dtype=dtype, dead=0.1)
    before = torch.get_num_threads()
    want = both_directions(ae.merge_states, outs, lses)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got = both_directions(ae.merge_states, outs, lses)
            assert all(
                torch.equal(
                    a,
                    b,
                )
                for a, b in zip(got, want, strict=True)
            )
    finally:
        torch.set_num_threads(before)


# -- errors ----------------------------------------------------------------------------------------


def bad_arguments():
    out, lse = torch.randn(2, 3, 4), torch.randn(2, 3)

    def case(name, outs, lses, error, match):
        return pytest.param(outs, lses, error, match, id=name)

    yield case("nothing", [], [], ValueError, "outs is empty; pass at least one part")
    yield case("lists", [out], [lse] * 2, ValueError, "outs has 1 tensors but lses has 2")
    yield case("integers", [out.int()], [lse], TypeError, "outs[0] has int32; supported are")
    yield case("no dimension", [out[0, 0, 0]], [lse], ValueError, "outs[0] has shape []")
    nine = out.reshape(2, 3, 4, *[1] * 6)
    yield case("dimensions", [nine], [lse], ValueError, "outs[0] has 9 dimensions (shape [2, 3, 4")
    yield case(
        "mixed dtypes", [out, out.half()], [lse] * 2, TypeError,
        "outs[1] has float16 but outs[0] has float32",
    )  # fmt: skip
    yield case(
        "lse's dtype", [out.half()] * 2, [lse, lse.half()], TypeError,
        "lses[1] has float16, expected float32 (the accumulator type of outs' float16)",
    )  # fmt: skip
    yield case(
        "lse's dtype in float64", [out.double()], [lse], TypeError,
        "lses[0] has float32, expected float64",
    )  # fmt: skip
    yield case(
        "shapes", [out, out[:1]], [lse, lse[:1]], ValueError,
        "outs[1] has shape [1, 3, 4] but outs[0] has [2, 3, 4]",
    )  # fmt: skip
    yield case(
        "layouts", [out], [lse.mT], ValueError,
        "lses[0] has shape [3, 2], expected [2, 3]: outs[0]'s without its last dimension; for outs "
        "[B, L, H, Dv] or [total, H, Dv] pass lse.transpose(-1, -2)",
    )  # fmt: skip
    yield case("lse's rank", [out], [lse[0]], ValueError, "lses[0] has shape [3], expected [2, 3]")


@pytest.mark.parametrize("outs, lses, error, match", list(bad_arguments()))
def test_bad_arguments(outs, lses, error, match):
    with pytest.raises(error) as native:
        ae.merge_states(outs, lses)
    assert match in str(native.value)
    with pytest.raises(error) as traced:  # fakes and CUDA tensors: the same words
        merge._check(outs, lses)
    assert str(traced.value) == str(native.value)


def test_devices_must_agree():
    outs, lses = parts(2, 2, 4)
    with pytest.raises(ValueError, match=r"outs\[1\] is on meta but outs\[0\] is on cpu; move"):
        ae.merge_states([outs[0], outs[1].to("meta")], lses)
    with pytest.raises(ValueError, match=r"lses\[0\] is on meta but outs\[0\] is on cpu; move"):
        ae.merge_states(outs, [lses[0].to("meta"), lses[1]])


def test_bad_gradients():
    outs, lses = parts(2, 2, 4)
    backward = torch.ops.attnengine.merge_states_backward
    with pytest.raises(ValueError, match=r"dout has shape \[2\].*expected \[2, 4\]"):
        backward(outs, lses, lses[0], lses[0])
    with pytest.raises(ValueError, match=r"dlse has float16, expected float32"):
        backward(outs, lses, outs[0], lses[0].half())


@pytest.mark.parametrize("f", [ae.merge_states, torch.ops.attnengine.merge_states])
def test_double_backward_is_refused(f):
    outs, lses = parts(2, 2, 4)
    outs[0].requires_grad_()
    out, _ = f(outs, lses)
    with pytest.raises(RuntimeError, match="double backward, create_graph=True"):
        (grad,) = torch.autograd.grad(out.square().sum(), outs[0], create_graph=True)
        grad.sum().backward()


def test_forward_gradients_are_refused():
    outs, lses = parts(2, 2, 4)
    with torch.autograd.forward_ad.dual_level():
        outs[0] = torch.autograd.forward_ad.make_dual(outs[0], torch.ones(2, 4))
        with pytest.raises(NotImplementedError, match="forward-mode gradients"):
            ae.merge_states(outs, lses)


# -- inside torch ----------------------------------------------------------------------------------


def test_opcheck():
    outs, lses = parts(3, 2, 3, 5, dead=0.2)
    outs = [x.nan_to_num(1.0) for x in outs]
    turned = [outs[0].transpose(0, 1).contiguous().transpose(0, 1), *outs[1:]]
    for xs in (outs, turned):
        args = tuple([x.detach().requires_grad_() for x in part] for part in (xs, lses))
        torch.library.opcheck(torch.ops.attnengine.merge_states.default, args)
        more = (torch.randn(2, 3, 5), torch.randn(2, 3))
        op = torch.ops.attnengine.merge_states_backward.default
        torch.library.opcheck(op, (xs, lses, *more))


def test_compiled():
    torch._dynamo.reset()

    def f(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        turned = outs[1].transpose(0, 1).contiguous().transpose(0, 1)
        out, lse = ae.merge_state(outs[0] * 2, lses[0], turned, lses[1])
        return out + 1, lse * 2

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for shape in ((3, 4, 8), (5, 2, 8)):
        outs, lses = parts(2, *shape)
        got, want = both_directions(compiled, outs, lses), both_directions(f, outs, lses)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


class Merger(torch.nn.Module):
    def forward(self, a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return ae.merge_state(a, x, b, y)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict):
    (a, b), (x, y) = parts(2, 4, 8)
    dim = torch.export.Dim("rows")
    shapes = dict.fromkeys("axby", {0: dim})
    program = torch.export.export(Merger(), (a, x, b, y), dynamic_shapes=shapes, strict=strict)
    (a, b), (x, y) = parts(2, 7, 8, seed=1)
    got, want = program.module()(a, x, b, y), ae.merge_state(a, x, b, y)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_vmap():
    outs, lses = parts(2, 3, 4, 8)
    got = torch.vmap(ae.merge_state, (0, 0, 1, 1))(
        outs[0], lses[0], outs[1].transpose(0, 1), lses[1].mT
    )
    want = ae.merge_states(outs, lses)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
