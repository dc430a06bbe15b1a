"""Token statistics attention as a call: arguments, layouts, errors, torch.compile, torch.export,
refusals. What it computes is in tests/numerics/test_token_statistics.py."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attnengine as ae
from attnengine import library, statistics_ops

pytestmark = pytest.mark.compiles
D = 40  # of the numerics tests, whose modules these share
OPS = torch.ops.attnengine
attend, step = ae.token_statistics_attention, ae.token_statistics_attention_step


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch._dynamo.reset()
    library.host.set_poison(True)
    yield
    library.host.set_poison(False)


def operands(
    B: int = 2, h: int = 3, N: int = 70, *, grad: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """w [B, h, N, D], temp [h], denom_bias [h, N]."""
    g = torch.Generator().manual_seed(7)
    w = torch.randn(B, h, N, D, generator=g).to(dtype)
    temp = 1 + 0.3 * torch.rand(h, generator=g)
    bias = 0.01 * torch.randn(h, N, generator=g)
    return tuple(x.requires_grad_(grad) for x in (w, temp, bias))  # type: ignore[return-value]


def gradients(f: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
    """y and the gradients of what is given."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    y = f(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def causal(w: Tensor, temp: Tensor, bias: Tensor) -> Tensor:
    return attend(w, temp, True, bias)


# -- arguments -------------------------------------------------------------------------------------


def test_shapes_of_the_published_modules() -> None:
    """temp [h, 1] and denom_bias [h, block, 1] of parameters, whose gradients have those shapes."""
    w, temp, bias = operands()
    want = gradients(causal, w, temp, bias)
    got = gradients(causal, w, temp[:, None], bias[..., None])
    assert got[2].shape == (3, 1) and got[3].shape == (3, 70, 1)
    same([x.reshape(y.shape) for x, y in zip(got, want, strict=True)], want)
    longer = torch.cat([bias, torch.full((3, 9), 5.0)], 1)
    got = gradients(causal, w, temp, longer)
    assert not got[3][:, 70:].any()
    same([*got[:3], got[3][:, :70]], want)


def test_parameters_of_other_types() -> None:
    w, temp, bias = operands()
    temp, bias = temp.bfloat16(), bias.half()
    got = gradients(causal, w, temp, bias)
    assert got[2].dtype == torch.bfloat16 and got[3].dtype == torch.float16
    want = gradients(causal, w, temp.float(), bias.float())
    same(got, [*want[:2], want[2].bfloat16(), want[3].half()])


def test_layouts() -> None:
    w, temp, bias = operands()
    want = gradients(causal, w, temp, bias)
    y = attend(w.transpose(1, 2).contiguous().transpose(1, 2), temp, True, bias)
    assert torch.equal(y, want[0])
    assert y.transpose(1, 2).is_contiguous()  # so that the heads concatenate for nothing
    assert attend(w, temp).is_contiguous()
    wide = torch.randn(2, 3, 70, 2 * D)
    wide[..., ::2] = w
    padded = torch.zeros(2, 3, 71, D + 3)
    padded[:, :, :70, :D] = w
    shared = torch.ones(()).expand(3), bias.mT.contiguous().mT
    for x in (
        wide[..., ::2],
        padded[:, :, :70, :D],
        w.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    ):
        same(gradients(lambda a, t, b, x=x: causal(x + 0 * a, t, b), w, temp, bias)[2:], want[2:])
        assert torch.equal(causal(x, temp, bias), want[0])
    assert torch.equal(causal(w, *shared), causal(w, torch.ones(3), bias))
    assert torch.equal(attend(w[:, :1].expand(2, 3, 70, D), temp),
                       attend(w[:, :1].expand(2, 3, 70, D).contiguous(), temp))  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_empty_and_single(shape: tuple[int, int, int], is_causal: bool) -> None:
    w, temp, bias = operands(*shape)
    given = (w, temp, bias) if is_causal else (w, temp)
    y, *grads = gradients(lambda w, t, b=None: attend(w, t, is_causal, b), *given)
    assert y.shape == w.shape and [x.shape for x in grads] == [x.shape for x in given]
    if w.numel() == 0:
        assert not any(x.any() for x in grads)


def test_no_sequences() -> None:
    w, temp, _ = operands(1, 3, 0)
    for is_causal in (False, True):
        y = attend(w, temp, is_causal, None, torch.zeros(1, dtype=torch.int64))
        assert y.shape == w.shape


def test_gradients_that_are_not_asked_for() -> None:
    w, temp, bias = operands()
    want = gradients(causal, w, temp, bias)
    for i, name in enumerate(("w", "temp", "bias")):
        given = [x.clone().requires_grad_(i == j) for j, x in enumerate((w, temp, bias))]
        y = causal(*given)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        (grad,) = torch.autograd.grad(y, given[i], dy)
        assert torch.equal(grad, want[1 + i]), name
    assert not attend(w, temp).requires_grad


def test_expanded_gradient() -> None:
    w, temp, bias = operands(grad=True)
    causal(w, temp, bias).sum().backward()
    want = torch.autograd.grad(causal(w, temp, bias), w, torch.ones(w.shape))[0]
    assert torch.equal(w.grad, want)  # type: ignore[arg-type]


# -- errors ----------------------------------------------------------------------------------------


def bad_arguments() -> Iterator[Any]:
    w, temp, bias = operands()
    packed, starts = w[:1], torch.tensor([0, 30, 70])

    def case(name: str, error: type[Exception], match: str, *args: Any) -> Any:
        return pytest.param(args, error, match, id=name)

    yield case("no tensor", TypeError, "w must be a torch.Tensor, got list", [1.0], temp)
    yield case(
        "rank", ValueError, r"w must be 4-D \[B, h, N, d\], got shape \[3, 70, 40\]", w[0], temp
    )
    yield case("integers", TypeError, "w has int32; supported are float32", w.int(), temp)
    yield case("no channels", ValueError, "head dim 0 must be 1 to 1024", w[..., :0], temp)
    yield case(
        "temp's shape", ValueError, r"temp has shape \[2\], expected \[3\] or \[3, 1\]", w, temp[:2]
    )
    yield case("temp's place", ValueError, "temp is on meta, w on cpu", w, temp.to("meta"))
    yield case("starts' place", ValueError, "cu_seqlens is on meta, w on cpu", packed, temp, False,
               None, starts.to("meta"))  # fmt: skip
    yield case("sparse", ValueError, r"w: layout torch.sparse_coo.*to_dense", w.to_sparse(), temp)
    nested = torch.nested.nested_tensor([torch.zeros(3, D)], layout=torch.jagged)
    yield case("nested", ValueError, "w: a nested tensor.*pass cu_seqlens", nested, temp)
    yield case("temp's type", TypeError, "temp has int64, expected a floating type", w, temp.long())
    yield case("bias", ValueError, "denom_bias is given with causal=False", w, temp, False, bias)
    yield case(
        "short bias", ValueError,
        r"denom_bias has shape \[3, 69\], expected \[3, 70\] or more positions",
        w, temp, True, bias[:, :69],
    )  # fmt: skip
    yield case(
        "bias's heads", ValueError, r"denom_bias has shape \[70, 3\]", w, temp, True, bias.mT
    )
    yield case("bias's type", TypeError, "denom_bias has bool", w, temp, True, bias > 0)
    yield case(
        "bias of the longest", ValueError, r"denom_bias has shape \[3, 39\], expected \[3, 40\]",
        packed, temp, True, bias[:, :39], starts,
    )  # fmt: skip

    def cuts(name: str, error: type[Exception], match: str, values: Any, x: Tensor = packed) -> Any:
        return case(name, error, match, x, temp, False, None, torch.as_tensor(values))

    yield cuts(
        "starts' batch", ValueError, r"cu_seqlens needs packed tokens of batch 1", [0, 70], w
    )
    yield cuts("starts' type", TypeError, "cu_seqlens has float32, expected int32", [0.0, 70.0])
    yield cuts(
        "starts' rank",
        ValueError,
        r"cu_seqlens must have shape \[sequences \+ 1\], got \[1, 2\]",
        [[0, 70]],
    )
    yield cuts(
        "no start", ValueError, r"cu_seqlens must have shape", torch.zeros(0, dtype=torch.int32)
    )
    yield cuts("first", ValueError, r"cu_seqlens\[0\]=1 must be 0", [1, 70])
    yield cuts(
        "falling", ValueError, r"cu_seqlens\[2\]=20 is less than the 30 before it", [0, 30, 20, 70]
    )
    yield cuts("last", ValueError, r"cu_seqlens\[-1\]=60 must be the length of w, 70", [0, 60])


@pytest.mark.parametrize("args, error, match", list(bad_arguments()))
def test_bad_arguments(args: tuple[Any, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        attend(*args)


def test_bad_states() -> None:
    w, temp, bias = operands(N=1)
    _, state = step(w, temp)
    with pytest.raises(TypeError, match="state must be a TokenStatisticsState, got int"):
        step(w, temp, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"state.c has shape \[1, 3, 40\], expected \[2, 3, 40\]"):
        step(w, temp, state._replace(c=state.c[:1]))
    with pytest.raises(TypeError, match="state.c must be a torch.Tensor, got NoneType"):
        step(w, temp, state._replace(c=None))
    with pytest.raises(ValueError, match="state.A is on meta, w on cpu"):
        step(w, temp, state._replace(A=state.A.to("meta")))
    with pytest.raises(TypeError, match="state.D has float64, expected float32"):
        step(w, temp, state._replace(D=state.D.double()))
    with pytest.raises(TypeError, match="state.position has int32, expected int64"):
        step(w, temp, state._replace(position=state.position.int()))
    with pytest.raises(ValueError, match=r"state.position\[0\]=1 with 1 tokens leaves the 1 pos"):
        step(w, temp, state, bias)
    with pytest.raises(
        ValueError, match=r"denom_bias has shape \[2, 1\], expected \[3, positions\]"
    ):
        step(w, temp, None, bias[:2])
    with pytest.raises(RuntimeError, match="token_statistics_attention_step has no gradient"):
        step(w.requires_grad_(), temp)


def test_other_devices() -> None:
    w, temp, _ = operands()
    with torch._subclasses.FakeTensorMode():
        with pytest.raises(NotImplementedError, match="w is on cuda:0; token statistics.*use .cpu"):
            attend(torch.empty(2, 3, 4, D, device="cuda"), torch.empty(3, device="cuda"))
        with pytest.raises(NotImplementedError, match="temp is on cuda:0"):
            attend(torch.empty(2, 3, 4, D), torch.empty(3, device="cuda"))
    assert attend(w.to("meta"), temp.to("meta")).shape == w.shape


def test_operators_check_what_they_are_given() -> None:
    w, temp, bias = operands()
    kernel = statistics_ops.kernel_of("forward", w.dtype, D)
    with pytest.raises(ValueError, match="TypeError: temp has float64, expected float32"):
        OPS.statistics_forward(w, temp.double(), None, None, kernel, False, False)
    with pytest.raises(ValueError, match="head_dim=8: this kernel was compiled for 40"):
        OPS.statistics_forward(w[..., :8], temp, None, None, kernel, False, False)
    with pytest.raises(
        ValueError, match="is a statistics forward kernel, this operator needs a st"
    ):
        y, r, s = OPS.statistics_forward(w, temp, None, None, kernel, False, True)
        OPS.statistics_backward(w, temp, None, None, r, s, y, kernel, False)
    with pytest.raises(ValueError, match="denom_bias needs causal=True"):
        OPS.statistics_forward(w, temp, bias, None, kernel, False, False)


def test_refused_derivatives() -> None:
    w, temp, _ = operands(grad=True)
    for f in (attend, lambda *a: OPS.token_statistics(*a, None, None, False)[0]):
        with pytest.raises(RuntimeError, match="double backward.*token_statistics_reference"):
            (g,) = torch.autograd.grad(f(w, temp).square().sum(), w, create_graph=True)
            g.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(w.detach(), torch.ones_like(w))
        with pytest.raises(NotImplementedError, match="forward-mode gradients"):
            attend(dual, temp)
    with pytest.raises(NotImplementedError, match="vmap over token statistics.*fold"):
        torch.vmap(attend, (0, None))(torch.randn(2, 1, 3, 4, D), temp)


# -- inside torch ----------------------------------------------------------------------------------


def test_opcheck() -> None:
    w, temp, bias = operands(N=20)
    moved = w.transpose(1, 2).contiguous().transpose(1, 2)
    cuts = torch.tensor([0, 7, 20])
    for args in (
        (w, temp, None, None, False),
        (moved, temp, bias, None, True),
        (w[:1], temp, bias, cuts, True),
    ):
        leaves = [x.detach().clone().requires_grad_() if x is not None and x.is_floating_point()
                  else x for x in args[:4]]  # fmt: skip
        torch.library.opcheck(OPS.token_statistics.default, (*leaves, args[4]))
        y, r, s = OPS.token_statistics(*args)
        more = (*args[:4], r, s, y, args[4])
        torch.library.opcheck(OPS.token_statistics_backward.default, more)
        forward, backward = (
            statistics_ops.kernel_of(k, w.dtype, D) for k in ("forward", "backward")
        )
        for save in (False, True):
            bare = (*args[:4], forward, args[4], save)
            torch.library.opcheck(OPS.statistics_forward.default, bare)
        torch.library.opcheck(OPS.statistics_backward.default, (*more[:7], backward, args[4]))
    _, state = step(w, temp, None, bias)
    args = (w[:, :, :1], temp, None, *state)
    torch.library.opcheck(OPS.token_statistics_step.default, args)
    torch.library.opcheck(OPS.statistics_step.default, (*args, forward))


def test_compiled() -> None:
    def f(w: Tensor, temp: Tensor, bias: Tensor) -> Tensor:
        y = attend(2 * w, temp[:, None], True, bias[..., None])
        return y.transpose(1, 2).flatten(2) + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for n in (70, 33):
        w, temp, bias = operands(N=n)
        same(gradients(compiled, w, temp, bias), gradients(f, w, temp, bias))
    packed = torch.compile(attend, fullgraph=True)
    w, temp, _ = operands(1)
    cuts = torch.tensor([0, 7, 70], dtype=torch.int32)
    assert torch.equal(packed(w, temp, False, None, cuts), attend(w, temp, False, None, cuts))


def test_compiled_steps() -> None:
    w, temp, bias = operands(N=12)
    compiled = torch.compile(step, fullgraph=True)
    one = other = None
    for n in range(12):
        y, one = step(w[:, :, n : n + 1], temp, one, bias)
        z, other = compiled(w[:, :, n : n + 1], temp, other, bias)
        assert torch.equal(y, z) and all(map(torch.equal, one, other))
    assert isinstance(other, ae.TokenStatisticsState)


class Block(torch.nn.Module):
    """As the published attention modules use it."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.temp = torch.nn.Parameter(1 + 0.1 * torch.arange(3.0)[:, None])
        self.is_causal = is_causal

    def forward(self, x: Tensor) -> Tensor:
        w = x.unflatten(-1, (3, D)).transpose(1, 2)
        return attend(w, self.temp, self.is_causal).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_exported(strict: bool, is_causal: bool, tmp_path: pathlib.Path) -> None:
    block, x = Block(is_causal), torch.randn(2, 20, 3 * D)
    shapes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
    program = torch.export.export(block, (x,), dynamic_shapes=shapes, strict=strict)
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    x = torch.randn(3, 77, 3 * D)
    assert torch.equal(loaded(x), block(x))
