"""The calls inside torch: opcheck, compile, export, autocast, modes, and clear refusals."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attnengine as ae
from attnengine.handle import autocast_operands

pytestmark = pytest.mark.compiles
D = 8


def operands(
    B: int = 2, L: int = 9, S: int = 11, dtype: torch.dtype = torch.float32, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(B * 10000 + L * 100 + S)
    sizes = ((B, 4, L, D), (B, 2, S, D), (B, 2, S, D))
    return tuple(  # type: ignore[return-value]
        torch.randn(s, generator=g).to(dtype).requires_grad_(grad) for s in sizes
    )


def spec_of(bias: Tensor) -> ae.AttentionSpec:
    return ae.AttentionSpec(
        score_mod=lambda s, b, h, q, k: s + bias[h] * (q - k),
        mask_mod=lambda b, h, q, k: q + 2 >= k,
    )


@pytest.fixture
def bias() -> Tensor:
    return torch.tensor([0.1, -0.2, 0.3, 0.4], requires_grad=True)


@pytest.fixture
def attn(bias: Tensor) -> ae.Handle:
    return ae.compile(spec_of(bias), *operands(), backward=True)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def gradients(f: Callable, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> list[Tensor]:
    out = f(q, k, v)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    return [out, *torch.autograd.grad(out, (q, k, v, *more), g)]


def near(got: Any, want: Any, tol: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# -- opcheck ---------------------------------------------------------------------------------------


def test_opcheck_of_the_bare_operators(attn: ae.Handle) -> None:
    q, k, v = operands()
    tensors = [t.detach() for t in attn.tensors]
    for stats in (False, True):
        args = (q, k, v, tensors, attn.id, attn.scale, stats)
        torch.library.opcheck(torch.ops.attnengine.forward.default, args)
    out, saved = torch.ops.attnengine.forward(q, k, v, tensors, attn.id, attn.scale, True)
    backward = attn.program.backward()
    for dstats in (None, torch.randn(1, *out.shape[:3])):
        args = (q, k, v, tensors, out, saved, torch.randn_like(out), dstats, backward, attn.scale)
        torch.library.opcheck(torch.ops.attnengine.backward.default, args)


def test_opcheck_of_the_traceable_operator(attn: ae.Handle) -> None:
    q, k, v = operands(grad=True)
    args = (q, k, v, attn.tensors, attn.key, attn.scale)
    torch.library.opcheck(torch.ops.attnengine.attention.default, args)
    transposed = tuple(
        x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)
    )
    torch.library.opcheck(torch.ops.attnengine.attention.default, (*transposed, *args[3:]))


# -- torch.compile ---------------------------------------------------------------------------------


def test_compiled_call_equals_eager(attn: ae.Handle, bias: Tensor) -> None:
    q, k, v = operands(grad=True)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attn(q * 2, k, v.relu()).sigmoid() + q

    compiled = torch.compile(block, fullgraph=True)
    near(gradients(compiled, q, k, v, bias), gradients(block, q, k, v, bias))
    with torch.no_grad():
        near([compiled(q, k, v)], [block(q, k, v)])


def test_compiled_call_at_other_lengths(attn: ae.Handle, bias: Tensor) -> None:
    compiled = torch.compile(lambda q, k, v: attn(q, k, v) * 2, fullgraph=True, dynamic=True)
    for sizes in ({}, {"L": 33}, {"B": 3, "S": 40}, {"L": 1, "S": 1}):
        x = operands(**sizes, grad=True)
        want = gradients(lambda q, k, v: attn(q, k, v) * 2, *x, bias)
        near(gradients(compiled, *x, bias), want)


def test_compiled_statistics(attn: ae.Handle) -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, aux = attn(q, k, v, return_aux=True)
        return out * aux.lse[..., None]

    x = operands(grad=True)
    near(gradients(torch.compile(both, fullgraph=True), *x), gradients(both, *x), 1e-4)


def test_compiled_with_spec_that_is_warm(bias: Tensor) -> None:
    spec = spec_of(bias)
    x = operands(grad=True)
    want = gradients(lambda q, k, v: ae.attention(q, k, v, spec), *x, bias)
    compiled = torch.compile(lambda q, k, v: ae.attention(q, k, v, spec), fullgraph=True)
    near(gradients(compiled, *x, bias), want)


def test_compiled_with_a_cold_spec_says_what_to_do() -> None:
    spec = ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s * 1.0625)
    compiled = torch.compile(lambda q, k, v: ae.attention(q, k, v, spec), fullgraph=True)
    with pytest.raises(Exception, match=r"attnengine\.compile\(spec, q, k, v\)"):
        compiled(*operands())


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(4 * D, 8 * D)
        self.bias = torch.nn.Parameter(torch.tensor([0.1, 0.2, -0.1, 0.0]))
        self.attn = ae.compile(spec_of(self.bias), *operands())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.proj(x).view(*x.shape[:2], 8, D).transpose(1, 2).split([4, 2, 2], 1)
        return self.attn(q, k, v).transpose(1, 2).flatten(2)


def test_compiled_module_trains_like_eager() -> None:
    torch.manual_seed(0)
    layer = Layer()
    x = torch.randn(2, 9, 4 * D)
    losses: list[list[float]] = []
    start = copy.deepcopy({n: p.data for n, p in layer.named_parameters()})
    for run in (layer, torch.compile(layer, fullgraph=True)):
        for n, p in layer.named_parameters():
            p.data.copy_(start[n])
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        losses.append([])
        for _ in range(4):
            loss = (run(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-5)


# -- torch.export ----------------------------------------------------------------------------------


def test_export_and_load(attn: ae.Handle, tmp_path: pathlib.Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attn(q, k, v) + 1

    x = operands()
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = ({2: length}, {}, {})
    with torch.no_grad():
        program = torch.export.export(Model(), x, dynamic_shapes=shapes)
        names = {str(n.target) for n in program.graph.nodes}
        assert "attnengine.attention.default" in names
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for L in (9, 40):
            q, k, v = operands(L=L, S=11)
            near([loaded(q, k, v)], [attn(q, k, v) + 1])


def test_unknown_key_says_what_to_do() -> None:
    q, k, v = operands()
    with pytest.raises(RuntimeError, match="not registered.*attnengine.compile"):
        torch.ops.attnengine.attention(q, k, v, [], "absent", 1.0)


# -- autocast --------------------------------------------------------------------------------------


def test_autocast_like_sdpa(bias: Tensor) -> None:
    spec = spec_of(bias)
    x = operands(grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ae.attention(*x, spec)
        sdpa = torch.nn.functional.scaled_dot_product_attention(*x, enable_gqa=True)
    assert out.dtype == sdpa.dtype == torch.bfloat16
    near([out.float()], [ae.reference(*x, spec)], 3e-2)
    grads = torch.autograd.grad(out.float().sum(), (*x, bias))
    assert all(g.dtype == torch.float32 for g in grads)
    with torch.autocast("cpu", enabled=False):
        assert ae.attention(*x, spec).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        warm = ae.attention(*x, spec)
        wide = autocast_operands(*operands(dtype=torch.float64))
        assert all(t.dtype == torch.float64 for t in wide)
    assert torch.equal(warm, out)


def test_autocast_and_a_handle_of_its_dtype(bias: Tensor) -> None:
    half = ae.compile(spec_of(bias), *operands(dtype=torch.bfloat16), backward=True)
    q, k, v = operands(grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = half(q, k, v)
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


def test_autocast_and_a_handle_of_another_dtype(attn: ae.Handle) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="bfloat16"):
        attn(*operands())


# -- gradient modes --------------------------------------------------------------------------------

WHICH = ["q", "k", "v", "bias", "q and bias", "none"]


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("door", ["spec", "handle", "op"])
def test_any_part_may_require_grad(which: str, door: str) -> None:
    """Also when the first call of all had no gradient."""
    names = which.split(" and ")
    bias = torch.tensor([0.1, -0.2, 0.3, 0.4], requires_grad="bias" in names)
    q, k, v = operands()
    spec = spec_of(bias)
    attn = ae.compile(spec, q, k, v, backward=False)
    for name, x in (("q", q), ("k", k), ("v", v)):
        x.requires_grad_(name in names)
    calls: dict[str, Callable] = {
        "spec": lambda: ae.attention(q, k, v, spec),
        "handle": lambda: attn(q, k, v),
        "op": lambda: torch.ops.attnengine.attention(q, k, v, attn.tensors, attn.key, attn.scale)[
            0
        ],
    }
    out, want = calls[door](), ae.reference(q, k, v, spec)
    near([out], [want])
    assert out.requires_grad == (which != "none")
    if which != "none":
        leaves = [x for n, x in (("q", q), ("k", k), ("v", v), ("bias", bias)) if n in names]
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        near(torch.autograd.grad(out, leaves, g), torch.autograd.grad(want, leaves, g), 1e-4)


def test_no_grad_and_inference_mode(attn: ae.Handle, bias: Tensor) -> None:
    x = operands(grad=True)
    want = attn(*x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for out in (
                attn(*x),
                ae.attention(*x, spec_of(bias)),
                ae.flex_attention(*x, enable_gqa=True),
            ):
                assert not out.requires_grad
            assert torch.equal(attn(*x), want)
            _, aux = attn(*x, return_aux=True)
            assert not aux.lse.requires_grad
    with torch.inference_mode():
        inside = operands()
        near([attn(*inside)], [want])
    near([ae.attention(*inside, spec_of(bias.detach()))], [want])


def test_spec_first_used_in_inference_mode_then_trained() -> None:
    bias = torch.tensor([0.5, 0.1, 0.2, 0.3], requires_grad=True)
    spec = spec_of(bias)
    x = operands(grad=True)
    with torch.inference_mode():
        ae.attention(*x, spec)
    want = gradients(lambda q, k, v: ae.reference(q, k, v, spec), *x, bias)
    near(gradients(lambda q, k, v: ae.attention(q, k, v, spec), *x, bias), want, 1e-4)


def test_views_and_shared_storage(attn: ae.Handle) -> None:
    packed = torch.randn(2, 9, 8 * D, requires_grad=True)

    def run(f: Callable) -> tuple[Tensor, ...]:
        q, k, v = packed.view(2, 9, 8, D).transpose(1, 2).split([4, 2, 2], 1)
        out = f(q, k, v)
        return out, *torch.autograd.grad(out.square().sum(), packed)

    near(run(attn), run(lambda *x: ae.reference(*x, attn.spec)), 1e-4)
    same = torch.randn(2, 4, 9, D, requires_grad=True)
    spec = ae.AttentionSpec()
    got = torch.autograd.grad(ae.attention(same, same, same, spec).square().sum(), same)
    want = torch.autograd.grad(ae.reference(same, same, same, spec).square().sum(), same)
    near(got, want, 1e-4)


def test_gradient_accumulates_and_hooks_run(attn: ae.Handle, bias: Tensor) -> None:
    q, k, v = operands(grad=True)
    seen: list[Tensor] = []
    q.register_hook(seen.append)
    for _ in range(2):
        attn(q, k, v).sum().backward()
    assert len(seen) == 2 and bias.grad is not None
    assert q.grad is not None and torch.equal(q.grad, seen[0] + seen[1])


def test_checkpointing(attn: ae.Handle, bias: Tensor) -> None:
    from torch.utils.checkpoint import checkpoint

    x = operands(grad=True)
    kept = gradients(lambda *y: checkpoint(attn, *y, use_reentrant=False), *x, bias)
    near(kept, gradients(attn, *x, bias), 0)


def test_statistics_alone_have_a_gradient(attn: ae.Handle) -> None:
    q, k, v = operands(grad=True)
    _, aux = attn(q, k, v, return_aux=True)
    got = torch.autograd.grad(aux.lse.square().sum(), (q, k, v))
    _, saved = ae.reference(q, k, v, attn.spec, return_aux=True)
    want = torch.autograd.grad(saved["lse"].square().sum(), (q, k))
    near(got[:2], want, 1e-4)
    assert not got[2].any()


def test_parameters_and_buffers_move_with_their_module() -> None:
    layer = Layer()
    x = torch.randn(2, 9, 4 * D)
    before = layer(x)
    layer.load_state_dict({n: p * 2 for n, p in layer.state_dict().items()})
    assert (layer(x) - before).abs().max() > 1e-3
    q, k, v = layer.proj(x).view(2, 9, 8, D).transpose(1, 2).split([4, 2, 2], 1)
    want = ae.reference(q, k, v, spec_of(layer.bias)).transpose(1, 2).flatten(2)
    near([layer(x)], [want])


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["spec", "handle", "op"])
def test_vmap(attn: ae.Handle, door: str) -> None:
    x = tuple(torch.stack([t, t]) for t in operands())
    calls: dict[str, Callable] = {
        "spec": lambda q, k, v: ae.attention(q, k, v, attn.spec),
        "handle": attn,
        "op": lambda q, k, v: torch.ops.attnengine.attention(
            q, k, v, attn.tensors, attn.key, attn.scale
        )[0],
    }
    with pytest.raises(NotImplementedError, match="vmap.*fold.*batch"), torch.no_grad():
        torch.vmap(calls[door])(*x)
    with pytest.raises(NotImplementedError, match="vmap.*(fold|batch).*(fold|batch)"):
        torch.vmap(calls[door])(*(t.requires_grad_() for t in x))


@pytest.mark.parametrize("door", ["handle", "op", "compiled"])
def test_double_backward(attn: ae.Handle, door: str) -> None:
    q, k, v = operands(grad=True)
    calls: dict[str, Callable] = {
        "handle": attn,
        "op": lambda q, k, v: torch.ops.attnengine.attention(
            q, k, v, attn.tensors, attn.key, attn.scale
        )[0],
        "compiled": torch.compile(attn, fullgraph=True),
    }
    out = calls[door](q, k, v)
    with pytest.raises(RuntimeError, match="double backward|does not support double"):
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        torch.autograd.grad(dq.sum(), q)


@pytest.mark.parametrize("captured", ["learned", "fixed"])
def test_transforms_of_torch_func(captured: str) -> None:
    """Refused by name: a tangent dropped in silence would be a gradient of zero."""
    bias = torch.tensor([0.1, -0.2, 0.3, 0.4], requires_grad=captured == "learned")
    q, k, v = operands()
    spec = spec_of(bias)
    attn = ae.compile(spec, q, k, v)
    for call in (attn, lambda *x: ae.attention(*x, spec)):
        loss = lambda q: call(q, k, v).square().sum()  # noqa: B023, E731
        with pytest.raises(NotImplementedError, match="torch.func.*torch.autograd"):
            torch.func.grad(loss)(q)
        with pytest.raises(NotImplementedError, match="torch.func.*torch.autograd"):
            torch.func.jvp(loss, (q,), (torch.ones_like(q),))


@pytest.mark.parametrize("which", ["q", "v", "bias"])
def test_forward_mode_gradient(which: str) -> None:
    import torch.autograd.forward_ad as fwd

    q, k, v = operands()
    plain = ae.AttentionSpec()
    x = {"q": q, "k": k, "v": v, "bias": torch.ones(4)}
    with fwd.dual_level():
        near([ae.attention(q, k, v, plain)], [ae.reference(q, k, v, plain)])
        x[which] = fwd.make_dual(x[which], torch.ones_like(x[which]))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            ae.attention(x["q"], x["k"], x["v"], spec_of(x["bias"]))


def test_cuda_tensors() -> None:
    """fp32 on CUDA, and the CPU's kernels there, are refused by name, without a GPU too: a fake
    tensor stands for one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 1, 4, D, device="cuda")
    plain = ae.AttentionSpec()
    warm = ae.compile(plain, *operands())
    calls: list[Callable] = [
        ae.attention,
        ae.flex_attention,
        warm,
        lambda *x: ae.attention(*x, plain),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"float32 on cuda:0; CUDA kernels support"):
            call(x, x, x)
    operators: list[Callable] = [
        lambda *x: torch.ops.attnengine.attention(*x, [], warm.key, 1.0),
        lambda *x: torch.ops.attnengine.forward(*x, [], warm.id, 1.0, False),
    ]
    for call in operators:
        with pytest.raises(ValueError, match=r"q is on cuda:0 but this kernel .* for the CPU"):
            call(x, x, x)


def test_meta_tensors_give_shapes_only(attn: ae.Handle) -> None:
    """As everywhere in torch: all on meta infers shape and strides, and computes nothing."""
    q, k, v = (x.to("meta").transpose(1, 2).contiguous().transpose(1, 2) for x in operands())
    plain = ae.AttentionSpec()
    out = ae.attention(q, k, v, plain)
    real = ae.attention(*(torch.zeros_like(x, device="cpu") for x in (q, k, v)), plain)
    assert out.is_meta and (out.shape, out.dtype) == (real.shape, real.dtype)
    assert out.stride() == real.stride()
    with pytest.raises(ValueError, match="captures.*cpu.*meta|captured.*device|meta"):
        attn(q, k, v)


def test_tensor_subclass_goes_through_its_own_dispatch() -> None:
    calls: list[str] = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            calls.append(getattr(func, "__name__", str(func)))
            return super().__torch_function__(func, types, args, kwargs or {})

    q, k, v = operands()
    spec = ae.AttentionSpec()
    want = ae.attention(q, k, v, spec)
    out = ae.attention(q.as_subclass(Logged), k, v, spec)
    near([out.as_subclass(torch.Tensor)], [want])
