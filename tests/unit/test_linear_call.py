"""linear_attention as a call: what is refused, what is traced, torch.compile and torch.export.
What it computes is in tests/numerics/test_linear.py, with whose modules these tests make do."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import attnengine as ae
from attnengine.linear import api, dispatch, ops
from attnengine.linear.handle import LinearHandle
from attnengine.linear.unbroadcast import unbroadcast

pytestmark = pytest.mark.compiles
D, DV = 40, 24
bare = torch.ops.attnengine.linear_forward
bare_backward = torch.ops.attnengine.linear_backward
keyed = torch.ops.attnengine.linear_attention


def operands(
    B: int = 2, Hk: int = 2, H: int = 4, L: int = 9, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(B * 1000 + L)
    q, k = (torch.randn(B, Hk, L, D, generator=g).to(dtype) for _ in range(2))
    v = torch.randn(B, H, L, DV, generator=g).to(dtype)
    return {"q": q, "k": k, "v": v, "decay": F.logsigmoid(torch.randn(B, H, L, generator=g))}


def with_grad(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_() for name, t in x.items()}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield


@pytest.fixture
def spec() -> ae.LinearAttentionSpec:
    return ae.LinearAttentionSpec()


def handle_of(spec: ae.LinearAttentionSpec) -> LinearHandle:
    (handle,) = spec.__dict__["_linear"].values()
    return handle


@pytest.fixture
def handle(spec: ae.LinearAttentionSpec) -> LinearHandle:
    """What the operators need: the kernels of scalar decays."""
    x = with_grad(operands())
    ae.linear_attention(spec=spec, **x).sum().backward()
    return handle_of(spec)


def gated(gate: Tensor) -> ae.LinearAttentionSpec:
    return ae.LinearAttentionSpec(out_mod=lambda x: x * torch.sigmoid(gate))


def near(got: Any, want: Any, tol: float = 2e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


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


# -- refusals --------------------------------------------------------------------------------------

CU = torch.tensor([0, 4, 9])


def packed() -> dict[str, Tensor]:
    return operands(B=1)


WRONG: dict[str, tuple[type[Exception], str, Callable[[], dict]]] = {
    "no tensor": (TypeError, "q", lambda: operands() | {"q": 3}),
    "3-D": (ValueError, "4-D", lambda: operands() | {"v": torch.randn(4, 9, DV)}),
    "dtypes": (ValueError, "dtype", lambda: operands() | {"k": operands()["k"].double()}),
    "integers": (ValueError, "int64", lambda: {n: t.long() for n, t in operands().items()}),
    "head groups": (ValueError, "multiple", lambda: operands(Hk=3)),
    "q and k": (ValueError, "q and k", lambda: operands() | {"k": operands(L=8)["k"]}),
    "length of v": (ValueError, "length", lambda: operands() | {"v": operands(L=8)["v"]}),
    "decay's shape": (ValueError, "decay", lambda: operands() | {"decay": torch.zeros(3)}),
    "decay's dtype": (ValueError, "decay", lambda: operands() | {"decay": torch.zeros(4).int()}),
    "beta's shape": (ValueError, "beta", lambda: operands() | {"beta": torch.zeros(2, 2, 9)}),
    "positive decay": (
        ValueError, "decay is positive.*logsigmoid", lambda: operands() | {"decay": torch.ones(4)},
    ),
    "NaN decay": (
        ValueError, "decay is positive.*NaN",
        lambda: operands() | {"decay": torch.full((2, 4, 9), torch.nan)},
    ),
    "state's shape": (
        ValueError, "initial_state", lambda: operands() | {"initial_state": torch.zeros(2, 4, D, 3)}
    ),
    "state of integers": (
        ValueError, "initial_state",
        lambda: operands() | {"initial_state": torch.zeros(2, 4, D, DV, dtype=torch.int32)},
    ),
    "narrow state": (
        ValueError, "initial_state: dtype torch.bfloat16.*float32",
        lambda: operands() | {"initial_state": torch.zeros(2, 4, D, DV, dtype=torch.bfloat16)},
    ),
    "falling starts": (
        ValueError, "cu_seqlens", lambda: packed() | {"cu_seqlens": CU[[0, 2, 1, 2]]}
    ),
    "first start": (ValueError, "cu_seqlens", lambda: packed() | {"cu_seqlens": CU[1:]}),
    "last start": (ValueError, "cu_seqlens", lambda: packed() | {"cu_seqlens": CU[:2]}),
    "float starts": (ValueError, "cu_seqlens", lambda: packed() | {"cu_seqlens": CU.float()}),
    "starts of a batch": (ValueError, "cu_seqlens", lambda: operands() | {"cu_seqlens": CU}),
    "states of a batch": (
        ValueError, "initial_state",
        lambda: packed() | {"cu_seqlens": CU, "initial_state": torch.zeros(1, 4, D, DV)},
    ),
    "wide heads": (
        NotImplementedError, "1024",
        lambda: {"q": torch.zeros(1, 1, 2, 1025), "k": torch.zeros(1, 1, 2, 1025),
                 "v": torch.zeros(1, 1, 2, 8)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("known", [False, True], ids=["first call", "known kernel"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str, known: bool, spec: ae.LinearAttentionSpec) -> None:
    kind, text, make = WRONG[case]
    if known:
        ae.linear_attention(spec=spec, **operands())
    with pytest.raises(kind, match=f"(?s){text}"):
        ae.linear_attention(spec=spec, **make())


def test_another_device(spec: ae.LinearAttentionSpec) -> None:
    with FakeTensorMode(), pytest.raises(NotImplementedError, match=r"cuda:0.*\.cpu\(\)"):
        ae.linear_attention(spec=spec, **{n: torch.empty(t.shape, device="cuda")
                                          for n, t in operands().items()})  # fmt: skip


def test_wrong_spec() -> None:
    with pytest.raises(TypeError, match="LinearAttentionSpec"):
        ae.linear_attention(spec=ae.AttentionSpec(), **operands())


def test_a_step_of_two_tokens(spec: ae.LinearAttentionSpec) -> None:
    x = operands(L=2)
    with pytest.raises(ValueError, match="L = 1"):
        ae.linear_attention_step(x["q"], x["k"], x["v"], spec, None, decay=x["decay"])


def test_the_operator_checks_for_itself(handle: LinearHandle) -> None:
    q, k, v, g = operands().values()
    state = torch.zeros(2, 4, D, DV)

    def call(q=q, k=k, v=v, decay=g, beta=None, state=None, cu=None, captures=(), id=handle.id):
        return bare(q, k, v, decay, beta, state, cu, list(captures), id, 1.0, False)

    call(state=state)
    for text, wrong in (
        ("no such kernel", {"id": 4095}),
        ("backward kernel", {"id": handle.program.backward_id}),
        ("k has shape", {"k": k[:, :1]}),
        ("v has shape", {"v": v[:, :, :3]}),
        ("with decay", {"decay": None}),
        ("compiled for \\[H\\] or \\[B, H, L\\]", {"decay": g[..., None].expand(2, 4, 9, D)}),
        ("decay has float64", {"decay": g.double()}),
        ("without beta", {"beta": g}),
        ("initial_state has float64", {"state": state.double()}),
        ("initial_state has shape", {"state": state[:1]}),
        ("captures has 1", {"captures": [g]}),
        ("packed operands of batch 1", {"cu": CU}),
        ("less than the 9 before", {"q": q[:1], "k": k[:1], "v": v[:1], "decay": g[:1],
                                    "cu": CU[[0, 2, 1, 2]]}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            call(**wrong)


def test_transforms_are_refused(spec: ae.LinearAttentionSpec) -> None:
    x = operands()
    decay = x.pop("decay")

    def f(q: Tensor) -> Tensor:
        return ae.linear_attention(q, x["k"], x["v"], spec, decay=decay)

    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(f)(torch.stack([x["q"], x["q"]]))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(f, (x["q"],), (x["q"],))
    with pytest.raises(NotImplementedError, match="torch.func"):
        torch.func.grad(lambda q: f(q).sum())(x["q"])
    q = x["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(f(q).sum(), q, create_graph=True)


# -- inside torch ----------------------------------------------------------------------------------


def test_opcheck(handle: LinearHandle) -> None:
    q, k, v, g = operands().values()
    state = torch.randn(2, 4, D, DV)
    some = (q, k, v, g, None, state, None, [])
    check = torch.library.opcheck
    check(bare.default, (*some, handle.id, 1.0, True))
    grads = torch.randn_like(v), torch.randn_like(state)
    check(bare_backward.default, (*some, *grads, handle.program.backward_id, 1.0, 63))
    wanted = tuple(x.requires_grad_() if isinstance(x, Tensor) else x for x in some)
    check(keyed.default, (*wanted, handle.key, 1.0, True))
    one = (q[:1], k[:1], v[:1], g[:1].detach(), None, None, CU, [])
    check(
        keyed.default,
        (*(x.detach() if isinstance(x, Tensor) else x for x in one), handle.key, 1.0, False),
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    gate = torch.randn(4, 1, 1, requires_grad=True)
    spec, x = gated(gate), with_grad(operands())
    state = torch.randn(2, 4, D, DV, requires_grad=True)

    def f(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return ae.linear_attention(
            q * 2.0, k, v, spec, decay=decay, initial_state=state, output_final_state=True
        )

    leaves = [*x.values(), state, gate]

    def results(f: Callable) -> list[Tensor]:
        out, final = f(*x.values(), state)
        grads = torch.autograd.grad((out.square().sum() + final.sum()), leaves)
        return [out, final, *grads]

    want = results(f)
    near(results(torch.compile(f, fullgraph=True, backend=backend)), want)


def test_compile_of_other_lengths(spec: ae.LinearAttentionSpec) -> None:
    ae.linear_attention(spec=spec, **operands())

    def f(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        return ae.linear_attention(q, k, v, spec, decay=decay)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for L in (9, 5, 17):
        x = operands(L=L).values()
        near(compiled(*x), f(*x))


def test_compile_of_a_cold_spec_says_what_to_do() -> None:
    spec = ae.LinearAttentionSpec()
    x = operands()
    f = torch.compile(lambda: ae.linear_attention(spec=spec, **x), fullgraph=True)
    with pytest.raises(Exception, match="call it once"):
        f()


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.randn(4, 1, 1))
        self.spec = gated(self.gate)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        return ae.linear_attention(q, k, v, self.spec, decay=decay, output_final_state=True)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(strict: bool, tmp_path: pathlib.Path) -> None:
    model, x = Model(), tuple(operands().values())
    want = model(*x)
    exported = torch.export.export(model, x, strict=strict)
    torch.export.save(exported, tmp_path / "linear.pt2")
    read = torch.export.load(tmp_path / "linear.pt2")
    ops._programs.clear()  # as a process that made no such program
    near(read.module()(*x), want)
    assert [n for n, _ in read.module().named_parameters()] == ["gate"]
    other = {n: 2 * p for n, p in model.named_parameters()}
    read.module().load_state_dict(other)


def test_a_damaged_program_is_refused(handle: LinearHandle) -> None:
    q, k, v, g = operands().values()
    damaged = handle.portable.replace('"normalizer":false', '"normalizer":3')
    assert damaged != handle.portable
    for key, text in ((damaged, "damaged"), ("nothing", "not registered")):
        with pytest.raises((ValueError, RuntimeError), match=text):
            keyed(q, k, v, g, None, None, None, [], key, 1.0, True)
