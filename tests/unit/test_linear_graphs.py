"""linear_attention inside torch: opcheck, torch.compile and torch.export."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import pytest
import torch
from linear_calls import CU, DV, D, gated, near, operands, prepared, with_grad
from torch import Tensor

import attnengine as ae
from attnengine.linear import ops, serialize
from attnengine.linear.handle import LinearHandle

pytestmark = pytest.mark.compiles
bare = torch.ops.attnengine.linear_forward
bare_backward = torch.ops.attnengine.linear_backward
keyed = torch.ops.attnengine.linear_attention


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield


@pytest.fixture
def spec() -> ae.LinearAttentionSpec:
    return ae.LinearAttentionSpec()


@pytest.fixture
def handle(spec: ae.LinearAttentionSpec) -> LinearHandle:
    return prepared(spec)


@pytest.mark.parametrize("name", ["k", "v", "decay", "cu_seqlens"])
def test_graphs_refuse_operands_on_two_devices(handle: LinearHandle, name: str) -> None:
    """Calls too: with a meta tensor among its operands, torch runs an operator's fake."""
    x = operands(B=1) | {"beta": None, "state": None, "cu_seqlens": CU}
    x[name] = x[name].to("meta")
    for operator, key in ((bare, handle.id), (keyed, handle.key)):
        with pytest.raises(ValueError, match=f"{name} is on meta, q on cpu"):
            operator(*x.values(), [], key, 1.0, False)
    x[name] = CU if name == "cu_seqlens" else operands(B=1)[name]
    with pytest.raises(ValueError, match=r"captures\[0\] is on meta, q on cpu"):
        bare(*x.values(), [CU.to("meta")], handle.id, 1.0, False)


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


def test_compile_of_a_named_variant() -> None:
    """Its spec is one for all calls, so that an eager call prepares what a graph calls."""
    x = operands()

    def f(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        return ae.linear_attention(**ae.linear_variants.simple_gla(q, k, v, decay))

    want = f(**x)
    near(torch.compile(f, fullgraph=True, backend="aot_eager")(**x), want)


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


def test_a_program_for_another_cpu_is_refused(handle: LinearHandle) -> None:
    q, k, v, g = operands().values()
    key = serialize.with_isa(handle.portable, "sse")
    with pytest.raises(ValueError, match="isa='sse': this CPU runs"):
        keyed(q, k, v, g, None, None, None, [], key, 1.0, True)


def test_a_damaged_program_is_refused(handle: LinearHandle) -> None:
    q, k, v, g = operands().values()
    damaged = handle.portable.replace('"normalizer":false', '"normalizer":3')
    assert damaged != handle.portable
    for key, text in ((damaged, "damaged"), ("nothing", "not registered")):
        with pytest.raises((ValueError, RuntimeError), match=text):
            keyed(q, k, v, g, None, None, None, [], key, 1.0, True)
