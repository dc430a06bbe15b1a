"""The traceable operator over a small hand-written kernel module: autograd, graphs, refusals."""

from __future__ import annotations

import pytest
import torch
from naive_kernels import DV, SCALE, D, Kernels, compiled, forward, operands

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


@pytest.fixture
def key(kernels):
    calls: list[str] = []

    def resolver(kind: str) -> int:
        calls.append(kind)
        return kernels[torch.float64, kind]

    ops.register_key("test", resolver, ops.KeyInfo(stats=2, user_stats=1, grad_mask=1))
    resolver.calls = calls
    yield resolver
    ops._resolvers.pop("test")
    ops._key_infos.pop("test", None)


def attention(q, k, v, captures):
    return torch.ops.attnengine.attention(q, k, v, captures, "test", SCALE)


def flat(q, k, v, captures):
    return q, k, v, *captures


def differentiable(**sizes):
    q, k, v, captures = operands(torch.float64, **sizes)
    for x in (q, k, v, captures[0]):
        x.requires_grad_()
    return q, k, v, captures


def test_opcheck(kernels, key):
    q, k, v, captures = operands(torch.float64)
    fwd = (q, k, v, captures, kernels[torch.float64, "forward"], SCALE)
    bare = torch.ops.attnengine
    torch.library.opcheck(bare.forward.default, (*fwd, True))
    torch.library.opcheck(bare.forward.default, (*fwd, False))
    out, stats = bare.forward(*fwd, True)
    grads = (out, stats, torch.ones_like(out), stats[:1])
    torch.library.opcheck(
        bare.backward.default,
        (q, k, v, captures, *grads, kernels[torch.float64, "backward"], SCALE),
    )
    for Bkv in (None, 1):
        inputs = differentiable(Bkv=Bkv)
        torch.library.opcheck(bare.attention.default, (*inputs, "test", SCALE))
        q, k, v, captures = operands(torch.float64, Bkv=Bkv)
        torch.library.opcheck(
            bare.attention_backward.default,
            (q, k, v, captures, *grads, "test", SCALE),
        )


def test_gradcheck(key):
    inputs = differentiable(B=1, Hq=2, Hkv=1, L=3, S=4)

    def call(q, k, v, table):
        out, stats = attention(q, k, v, [table, inputs[3][1]])
        return out, stats[0]

    assert torch.autograd.gradcheck(call, (*inputs[:3], inputs[3][0]))


def test_compiled_whole_graph(key):
    q, k, v, captures = differentiable()

    def loss(q, k, v, table):
        out, stats = attention(q * 2, k, v, [table, captures[1]])
        return out.sin().sum() + stats[0].cos().sum()

    leaves = (q, k, v, captures[0])
    want = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_fakes_compile_nothing_when_the_key_says_enough(key):
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v, captures = differentiable()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        out, stats = attention(*fakes, [mode.from_tensor(x) for x in captures])
        assert out.shape == (2, 4, 7, DV) and stats.shape == (2, 2, 4, 7)
        out.sum().backward()
    assert key.calls == []


def test_fakes_ask_only_the_kernels_that_they_need(key):
    from torch._subclasses.fake_tensor import FakeTensorMode

    ops.register_key("test", key)
    with FakeTensorMode() as mode:
        q, k, v, table, bucket = (
            mode.from_tensor(x).requires_grad_(x.is_floating_point())
            for x in flat(*operands(torch.float64))
        )
        out, _ = attention(q, k, v, [table, bucket])
        assert set(key.calls) == {"forward"}
        dtable, dq = torch.autograd.grad(out.sum(), (table, q))
        assert set(key.calls) == {"forward", "backward"}
        assert dtable.shape == table.shape and dq.shape == q.shape


def test_exported_program(key):
    q, k, v, captures = operands(torch.float64)

    class Model(torch.nn.Module):
        def forward(self, q, k, v, table, bucket):
            return attention(q, k, v, [table, bucket])[0]

    length = torch.export.Dim("length", min=2, max=64)
    shapes = ({2: length}, None, None, None, None)
    args = (q, k, v, *captures)
    program = torch.export.export(Model(), args, dynamic_shapes=shapes)
    q2 = torch.randn(2, 4, 13, D, dtype=torch.float64)
    torch.testing.assert_close(
        program.module()(q2, k, v, *captures), attention(q2, k, v, captures)[0]
    )


def test_unregistered_key():
    q, k, v, captures = operands(torch.float64)
    with pytest.raises(RuntimeError, match="key 'absent' is not registered in this process"):
        torch.ops.attnengine.attention(q, k, v, captures, "absent", SCALE)


def test_double_backward_is_refused(key):
    q, k, v, captures = differentiable()
    out, _ = attention(q, k, v, captures)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(dq.sum(), k)


def test_vmap_is_refused(kernels, key):
    q, k, v, captures = operands(torch.float64)
    stacked = torch.stack([q, q])
    with pytest.raises(NotImplementedError, match="vmap over attention"):
        torch.vmap(lambda x: attention(x, k, v, captures)[0])(stacked)
    with pytest.raises(NotImplementedError, match="vmap over attention"):
        torch.vmap(lambda x: forward(kernels, x, k, v, captures)[0])(stacked)
