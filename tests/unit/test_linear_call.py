"""linear_attention as a call: results, what is traced, captured tensors. What it computes is in
tests/numerics/test_linear.py, with whose modules these tests make do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from linear_calls import DV, D, gated, handle_of, near, operands, with_grad

import attnengine as ae
from attnengine.linear import api, dispatch
from attnengine.linear.unbroadcast import unbroadcast

pytestmark = pytest.mark.compiles


@pytest.fixture
def spec() -> ae.LinearAttentionSpec:
    return ae.LinearAttentionSpec()


# -- results ---------------------------------------------------------------------------------------


def test_shapes_and_dtypes(spec: ae.LinearAttentionSpec) -> None:
    x = operands()
    out = ae.linear_attention(spec=spec, **x)
    assert out.shape == (2, 4, 9, DV) and out.dtype == torch.float32
    out, state = ae.linear_attention(spec=spec, output_final_state=True, **x)
    assert state.shape == (2, 4, D, DV) and state.is_contiguous()
    near(out, ae.reference(x["q"], x["k"], x["v"], spec, decay=x["decay"]))


def test_the_output_lies_as_v_does() -> None:
    x = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in operands().items()}
    out = ae.linear_attention(**x)
    assert out.stride() == x["v"].stride()
    near(out, ae.linear_attention(**{n: t.contiguous() for n, t in x.items()}))


def test_a_call_without_gradient_loads_no_backward_kernel() -> None:
    dispatch._programs.clear()
    spec = ae.LinearAttentionSpec()
    x = operands()
    ae.linear_attention(spec=spec, **x)
    with torch.no_grad():
        ae.linear_attention(spec=spec, **with_grad(x))
    program = handle_of(spec).program
    assert program.forward_id >= 0 and program.backward_id < 0
    ae.linear_attention(spec=spec, **with_grad(x)).sum().backward()
    assert program.backward_id >= 0


def test_gradients_are_like_their_tensors(
    spec: ae.LinearAttentionSpec,
) -> None:
    x = with_grad(operands())
    x["decay"] = torch.full((4,), -0.1, requires_grad=True)
    state = torch.randn(2, 4, D, DV, requires_grad=True)
    out, final = ae.linear_attention(spec=spec, initial_state=state, output_final_state=True, **x)
    (out.sum() + final.square().sum()).backward()
    for t in (*x.values(), state):
        assert t.grad is not None and t.grad.shape == t.shape and t.grad.dtype == t.dtype
        assert t.grad.isfinite().all() and t.grad.abs().sum() > 0


def test_only_the_final_state_has_a_gradient(spec: ae.LinearAttentionSpec) -> None:
    x = with_grad(operands())
    _, final = ae.linear_attention(spec=spec, output_final_state=True, **x)
    final.sum().backward()
    assert x["q"].grad is None or not x["q"].grad.any()
    assert x["k"].grad is not None and x["k"].grad.any()


@pytest.mark.parametrize("L", [0, 3])
def test_empty(spec: ae.LinearAttentionSpec, L: int) -> None:
    x = with_grad(operands(B=2 if L == 0 else 0, L=L))
    state = torch.randn(x["q"].shape[0], 4, D, DV, requires_grad=True)
    out, final = ae.linear_attention(spec=spec, initial_state=state, output_final_state=True, **x)
    assert out.shape == x["v"].shape and torch.equal(final, state)
    (out.sum() + (3 * final).sum()).backward()
    assert torch.equal(state.grad, torch.full_like(state, 3.0))
    assert x["q"].grad is None or x["q"].grad.shape == x["q"].shape


def test_a_step_is_a_call_of_one_token(spec: ae.LinearAttentionSpec) -> None:
    x = operands(L=1)
    state = torch.randn(2, 4, D, DV)
    before = state.clone()
    decay = x.pop("decay")
    got = ae.linear_attention_step(*x.values(), spec, state, decay=decay)
    want = ae.linear_attention(
        *x.values(), spec, decay=decay, initial_state=state, output_final_state=True
    )
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert torch.equal(state, before)
    assert ae.linear_attention_step(*x.values(), None, None, decay=decay)[0].isfinite().all()


def test_a_state_without_z_starts_z_at_zero() -> None:
    features = {
        "q_mod": lambda x: F.elu(x) + 1.0,
        "k_mod": lambda x: (F.elu(x) + 1.0) * (2.0 * D) ** -0.5,
    }
    spec = ae.LinearAttentionSpec(normalizer="sum", **features)
    x = operands()
    del x["decay"]
    state = torch.rand(2, 4, D, DV, requires_grad=True)
    out, final = ae.linear_attention(spec=spec, initial_state=state, output_final_state=True, **x)
    assert final.shape == (2, 4, D, DV + 1)
    padded = F.pad(state.detach(), (0, 1)).requires_grad_()
    same = ae.linear_attention(spec=spec, initial_state=padded, **x)
    assert torch.equal(out, same)
    (got,) = torch.autograd.grad(out.sum(), state)
    (want,) = torch.autograd.grad(same.sum(), padded)
    assert torch.equal(got, want[..., :DV])


def test_autocast_casts_q_k_and_v() -> None:
    x = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = api._cast(x["q"], x["k"].double(), x["v"])
    assert q.dtype == v.dtype == torch.bfloat16 and k.dtype == torch.float64


# -- what is traced --------------------------------------------------------------------------------


def judged(spec: ae.LinearAttentionSpec) -> None:
    x = operands()
    near(ae.linear_attention(spec=spec, **x), ae.reference(spec=spec, **x))


def test_hooks_that_are_objects_of_torch() -> None:
    """Two of one class share no program unless they mean the same; their tensors are rebound."""
    for slope in (0.1, 0.9):
        judged(ae.LinearAttentionSpec(v_mod=torch.nn.LeakyReLU(slope)))
        judged(ae.LinearAttentionSpec(v_mod=torch.nn.PReLU(init=slope)))
        judged(ae.LinearAttentionSpec(v_mod=torch.full((DV,), slope).mul))


GATE = torch.ones(())


def test_a_tensor_out_of_the_fingerprints_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> ae.LinearAttentionSpec:
        return ae.LinearAttentionSpec(out_mod=lambda x: x * globals()["GATE"])

    judged(made())
    monkeypatch.setitem(globals(), "GATE", torch.full((), 3.0))
    judged(made())


def test_a_spec_is_copied_without_its_kernels() -> None:
    """A model that holds a spec is copied and pickled after it ran, too."""
    x, spec = operands(), ae.LinearAttentionSpec(q_mod=torch.tanh)
    want = ae.linear_attention(spec=spec, **x)
    for other in (copy.copy(spec), copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))):
        assert other == spec and "_linear" not in vars(other)
        assert torch.equal(ae.linear_attention(spec=other, **x), want)


def test_a_fresh_lambda_is_not_traced_again() -> None:
    def spec() -> ae.LinearAttentionSpec:
        return ae.LinearAttentionSpec(q_mod=lambda x: x * 1.0)

    x = operands()
    ae.linear_attention(spec=spec(), **x)
    traced = dispatch.statistics.traced
    ae.linear_attention(spec=spec(), **x)
    ae.linear_attention(spec=spec(), **operands(B=1, L=5))
    assert dispatch.statistics.traced == traced


def test_a_new_process_traces_nothing() -> None:
    x = operands()
    spec = ae.LinearAttentionSpec(q_mod=lambda x: x * 1.0)
    ae.linear_attention(spec=spec, **x)
    dispatch._programs.clear()  # as a new process starts
    spec.__dict__.pop("_linear")
    before = dispatch.statistics.traced, dispatch.statistics.from_disk
    ae.linear_attention(spec=spec, **x)
    assert (dispatch.statistics.traced, dispatch.statistics.from_disk) == (before[0], before[1] + 1)


def test_explain(spec: ae.LinearAttentionSpec) -> None:
    x = operands()
    text = ae.explain(spec, x["q"], x["k"], x["v"], decay=x["decay"])
    for part in (
        "scalar decay",
        "chunk",
        "== forward source ==",
        "cpu/linear_forward.h",
        "module:",
    ):
        assert part in text
    with pytest.raises(TypeError, match="decay"):
        ae.explain(ae.AttentionSpec(), x["q"], x["k"], x["v"], decay=x["decay"])


def test_a_handle_made_by_compile() -> None:
    spec, x = ae.LinearAttentionSpec(), operands()
    q, k, v, decay = x.values()
    attn = ae.compile(spec, q, k, v, decay=decay, backward=True)
    assert attn.ready and "cpu/linear_backward.h" in attn.backward_source
    want = ae.linear_attention(spec=spec, output_final_state=True, **x)
    assert handle_of(spec) is attn
    for got, w in zip(attn(q, k, v, decay=decay, output_final_state=True), want, strict=True):
        assert torch.equal(got, w)
    f = torch.compile(lambda *a: attn(*a, decay=decay), fullgraph=True, backend="aot_eager")
    near(f(q, k, v), want[0])
    for wrong in ({"decay": None}, {"decay": decay.double()}, {"decay": decay, "beta": decay}):
        with pytest.raises(ValueError, match="not of the kind"):
            attn(q, k, v, **wrong)
    for bad in ((q[0], k[0], v[0]), (3, k, v), (q, k, None)):
        with pytest.raises((TypeError, ValueError), match="4-D|expected a tensor"):
            attn(*bad, decay=decay)
    with pytest.raises(TypeError, match="decay=-0.5: expected a tensor"):
        attn(q, k, v, decay=-0.5)
    with pytest.raises(ValueError, match="isa"):
        ae.compile(spec, q, k, v, decay=decay, isa="mmx")
    with pytest.raises(TypeError, match="decay"):
        ae.compile(ae.AttentionSpec(), q, k, k, decay=decay)


# -- captured tensors ------------------------------------------------------------------------------


def test_a_captured_tensor_gets_a_gradient() -> None:
    x = with_grad(operands())
    gate = torch.randn(4, 1, 1, requires_grad=True)
    out = ae.linear_attention(spec=gated(gate), **x)
    want = ae.reference(x["q"], x["k"], x["v"], gated(gate), decay=x["decay"])
    near(out, want)
    (got,) = torch.autograd.grad(out.sum(), gate, retain_graph=True)
    (expected,) = torch.autograd.grad(want.sum(), gate)
    near(got, expected, 1e-4)


@pytest.mark.parametrize(
    "shape, places",
    [
        ((2, 4, 9, 5), "bhqk"), ((4, 1, 1), "hqk"), ((4, 9, 1), "hqk"), ((5,), "k"), ((), ""),
        ((1, 1, 1, 1), "bhqk"), ((4,), "h"), ((9, 4), "qh"), ((5, 2), "kb"),
    ],
)  # fmt: skip
def test_gradients_are_summed_to_the_shape_that_was_read(shape: tuple, places: str) -> None:
    grad = torch.randn(2, 4, 9, 5, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    order = [i for i, p in enumerate("bhqk") if p in places]
    read = x.permute([places.index("bhqk"[i]) for i in order])
    whole = read.reshape([read.shape[order.index(i)] if i in order else 1 for i in range(4)])
    (want,) = torch.autograd.grad(whole.expand(grad.shape), x, grad)
    near(unbroadcast(grad, tuple(places), x.detach()), want, 1e-12)


def test_the_gradient_of_what_is_not_read_is_zero() -> None:
    grad = torch.randn(2, 4, 9)  # of a scalar decay
    got = unbroadcast(grad, ("h", 2), torch.randn(4, 5))
    near(got[:, 2], grad.sum((0, 2)))
    assert not got[:, [0, 1, 3, 4]].any()


def test_a_captured_tensor_that_comes_to_require_grad(spec: ae.LinearAttentionSpec) -> None:
    gate = torch.randn(4, 1, 1)
    spec, x = gated(gate), operands()
    before = ae.linear_attention(spec=spec, **x)
    assert not before.requires_grad
    gate.requires_grad_()
    after = ae.linear_attention(spec=spec, **x)
    after.sum().backward()
    assert torch.equal(before, after) and gate.grad is not None and gate.grad.any()


def test_a_captured_tensor_that_gets_another_shape() -> None:
    """A dimension that was 1 is read at 0 alone."""
    gate = torch.randn(4, 1, 1)
    spec = ae.LinearAttentionSpec(out_mod=lambda x: x * gate)
    for shape in ((4, 1, 1), (4, 9, DV), (1, 1, 1), (DV,)):
        gate.data = torch.randn(shape)
        judged(spec)
    gate.data = torch.randn(5, 1, 1)
    with pytest.raises(ae.TraceError, match="out_mod"):
        judged(spec)


def test_a_captured_tensor_that_has_no_gradient() -> None:
    """Read at computed indices: a call that wants its gradient is refused, none is lost."""
    table, index = torch.randn(7, requires_grad=True), torch.tensor([3, 1, 0, 6])
    spec = ae.LinearAttentionSpec(out_mod=lambda x: x * table[index][:, None, None])
    with pytest.raises(RuntimeError, match="index it before the call"):
        ae.linear_attention(spec=spec, **operands())


def test_a_captured_tensor_must_fit_every_call() -> None:
    spec = gated(torch.randn(4, 1, 1))
    ae.linear_attention(spec=spec, **operands())
    ae.linear_attention(spec=spec, **operands(B=1, L=10))
    with pytest.raises(ae.TraceError, match="out_mod"):
        ae.linear_attention(spec=spec, **operands(H=6))


def test_hooks_must_be_elementwise() -> None:
    with pytest.raises(ae.TraceError, match="elementwise"):
        ae.linear_attention(
            spec=ae.LinearAttentionSpec(q_mod=lambda x: x.softmax(-1)), **operands()
        )
