"""What linear_attention refuses: one text at every door."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from linear_calls import CU, DV, D, operands, prepared
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import attnengine as ae
from attnengine.linear.handle import LinearHandle

pytestmark = pytest.mark.compiles
bare = torch.ops.attnengine.linear_forward


@pytest.fixture
def spec() -> ae.LinearAttentionSpec:
    return ae.LinearAttentionSpec()


@pytest.fixture
def handle(spec: ae.LinearAttentionSpec) -> LinearHandle:
    return prepared(spec)


def packed() -> dict[str, Tensor]:
    return operands(B=1)


WRONG: dict[str, tuple[type[Exception], str, Callable[[], dict]]] = {
    "no tensor": (TypeError, "q", lambda: operands() | {"q": 3}),
    "much that is no tensor": (
        TypeError, r"^q=\[.{,60}\]: expected", lambda: operands() | {"q": [0.0] * 999},
    ),
    "3-D": (ValueError, "4-D", lambda: operands() | {"v": torch.randn(4, 9, DV)}),
    "dtypes": (ValueError, "dtype", lambda: operands() | {"k": operands()["k"].double()}),
    "integers": (ValueError, "int64", lambda: {n: t.long() for n, t in operands().items()}),
    "head groups": (ValueError, "multiple", lambda: operands(Hk=3)),
    "q and k": (ValueError, "q and k", lambda: operands() | {"k": operands(L=8)["k"]}),
    "length of v": (ValueError, "length", lambda: operands() | {"v": operands(L=8)["v"]}),
    "decay's shape": (ValueError, "decay", lambda: operands() | {"decay": torch.zeros(3)}),
    "decay's dtype": (ValueError, "decay", lambda: operands() | {"decay": torch.zeros(4).int()}),
    "decay of 8 bits": (
        ValueError, "decay: dtype torch.float8_e4m3fn, expected a floating dtype, float32",
        lambda: operands() | {"decay": (-torch.ones(4)).to(torch.float8_e4m3fn)},
    ),
    "beta of 8 bits": (
        ValueError, "beta: dtype torch.float8_e4m3fn, expected a floating dtype, float32",
        lambda: operands() | {"beta": torch.ones(2, 4, 9).to(torch.float8_e4m3fn)},
    ),
    "a sparse tensor": (
        ValueError, r"v: layout torch.sparse_coo.*use \.to_dense\(\)",
        lambda: operands() | {"v": operands()["v"].to_sparse()},
    ),
    "a nested tensor": (
        ValueError, "q: a nested tensor.*pass cu_seqlens",
        lambda: operands() | {"q": torch.nested.nested_tensor([torch.zeros(2, 3, D)])},
    ),
    "a meta tensor among others": (
        ValueError, "cu_seqlens: on meta, but q is on cpu",
        lambda: packed() | {"cu_seqlens": CU.to("meta")},
    ),
    "beta's shape": (ValueError, "beta", lambda: operands() | {"beta": torch.zeros(2, 2, 9)}),
    "positive decay": (
        ValueError, "decay: largest log-decay .* is 1, .*logsigmoid",
        lambda: operands() | {"decay": torch.ones(4)},
    ),
    "NaN decay": (
        ValueError, "decay: largest log-decay .* is nan, limit 0",
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
