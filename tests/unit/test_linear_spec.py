"""LinearAttentionSpec, the checks of arguments, and the named variants: no compiler."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnengine as ae
from attnengine.linear.arguments import check_arguments

B, HK, H, L, D, DV = 2, 2, 4, 6, 5, 3


def operands(**sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    s = {"B": B, "Hk": HK, "H": H, "L": L} | sizes
    q = torch.ones(s["B"], s["Hk"], s["L"], D)
    return q, q.clone(), torch.ones(s["B"], s["H"], s["L"], DV)


# -- the spec --------------------------------------------------------------------------------------


def test_spec_is_frozen_and_compares_by_value() -> None:
    assert ae.LinearAttentionSpec() == ae.LinearAttentionSpec(scale=None)
    assert hash(ae.LinearAttentionSpec(scale=2)) == hash(ae.LinearAttentionSpec(scale=2.0))
    assert isinstance(ae.LinearAttentionSpec(scale=2).scale, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ae.LinearAttentionSpec().scale = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"q_mod": 3}, TypeError, r"q_mod=3: expected a callable q_mod\(x\) or None"),
        ({"decay_mod": lambda x, y: x}, TypeError, "decay_mod takes 1 positional argument"),
        ({"out_mod": lambda: 0}, TypeError, "out_mod takes 1 positional argument"),
        ({"scale": "1"}, TypeError, "scale='1': expected a number"),
        ({"scale": math.inf}, ValueError, "scale=inf: expected a finite number"),
        ({"normalizer": "mean"}, ValueError, "normalizer='mean': expected None or \"sum\""),
    ],
)
def test_spec_refuses(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ae.LinearAttentionSpec(**options)


# -- arguments -------------------------------------------------------------------------------------


def test_arguments_in_order() -> None:
    spec = ae.LinearAttentionSpec(normalizer="sum")
    found = check_arguments(*operands(), spec, decay=-torch.ones(H), beta=torch.ones(B, H, L))
    assert found[:7] == (B, HK, H, L, D, DV, B)
    assert found.decay is not None and found.decay.shape == (B, H, L)
    assert found.decay.stride() == (0, 1, 0)
    assert (found.decay_kind, found.columns, found.acc) == ("scalar", DV + 1, torch.float32)
    assert found.scale == 1.0 / math.sqrt(D)
    channel = check_arguments(*operands(), None, decay=-torch.ones(B, H, L, D))
    assert (channel.decay_kind, channel.columns) == ("channel", DV)
    packed = check_arguments(*operands(B=1), None, cu_seqlens=torch.tensor([0, 0, 2, L]))
    assert (packed.N, packed.decay_kind) == (3, "none")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_states_are_wide(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in operands())
    out, state = ae.reference(q, k, v, ae.LinearAttentionSpec(), output_final_state=True)
    assert out.dtype == dtype
    assert state.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert state.shape == (B, H, D, DV)


def _call(**given: Any) -> Callable[[], Any]:
    """A call of the reference with some operands replaced, or made for other sizes."""
    sizes = {n: given.pop(n) for n in ("B", "Hk", "H", "L") if n in given}
    q, k, v = operands(**sizes)
    named = {"q": q, "k": k, "v": v, "spec": ae.LinearAttentionSpec()} | given
    return lambda: ae.reference(**named)


ONES = torch.ones


@pytest.mark.parametrize(
    "call, text",
    [
        (_call(q=ONES(B, L, D)), "must be 4-D; got q .2, 6, 5., "),
        (_call(q=ONES(B, HK, L, D).int()), "q: dtype torch.int32, expected one of float32, "),
        (_call(k=ONES(B, HK, L, D).half()), "one dtype; got torch.float32, torch.float16"),
        (_call(k=ONES(B, HK, L, D + 1)), "q and k must have one shape"),
        (_call(v=ONES(B, H, L + 1, DV)), "v must have q's batch and length"),
        (_call(H=3), r"v's heads \(3\) must be a multiple of q's and k's \(2\); repeat"),
        (_call(v=ONES(B, H, L, 0)), "D and Dv must be at least 1"),
        (_call(decay=ONES(B, HK, L)), r"decay: shape \[2, 2, 6\], expected .*\[B, H, L\] = \[2, 4"),
        (_call(decay=ONES(H).int()), "decay: dtype torch.int32, expected a floating dtype"),
        (_call(beta=ONES(H)), r"beta: shape \[4\], expected \[B, H, L\] = \[2, 4, 6\]"),
        (_call(beta=ONES(B, H, L).bool()), "beta: dtype torch.bool, expected a floating dtype"),
        (_call(initial_state=ONES(B, H, D, DV + 1)), r"initial_state: shape \[2, 4, 5, 4\], expec"),
        (_call(initial_state=ONES(1, H, D, DV)), "N is the batch"),
        (_call(initial_state=ONES(B, H, D, DV).half()), r"pass initial_state.to\(torch.float32\)"),
        (_call(decay=ONES(H) * 0.31), r"decay: largest log-decay \(after decay_mod\) is 0.31, lim"),
        (_call(cu_seqlens=torch.tensor([0, L])), "lie along L in one batch row, but q has 2"),
        (_call(B=1, cu_seqlens=torch.tensor([0, 4, 3, L])), r"falls from 4 to 3 at \[2\]"),
        (_call(B=1, cu_seqlens=torch.tensor([0, L + 1])), "from 0 to 7, expected from 0 to L = 6"),
        (_call(B=1, cu_seqlens=torch.tensor([1, L])), "from 1 to 6, expected from 0 to L = 6"),
        (_call(B=1, cu_seqlens=torch.tensor([0.0, L])), "expected int32 or int64"),
        (_call(B=1, cu_seqlens=torch.zeros(0).int()), r"shape \[0\], expected \[N \+ 1\]"),
    ],
)  # fmt: skip
def test_bad_arguments(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_bad_kinds_of_arguments() -> None:
    with pytest.raises(TypeError, match=r"beta=0.5: expected a tensor"):
        _call(beta=0.5)()
    with pytest.raises(TypeError, match=r"expected an attnengine.LinearAttentionSpec"):
        check_arguments(*operands(), ae.AttentionSpec())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"reference: decay given, which AttentionSpec does not"):
        _call(spec=ae.AttentionSpec(), decay=ONES(H))()
    with pytest.raises(ae.TraceError, match=r"q_mod: returned torch.float32 \(2, 2, 6\) for an op"):
        _call(spec=ae.LinearAttentionSpec(q_mod=lambda x: x.sum(-1)))()
    with pytest.raises(ae.TraceError, match=r"v_mod: returned float for an operand"):
        _call(spec=ae.LinearAttentionSpec(v_mod=lambda x: 1.0))()


def test_decay_is_judged_after_its_mod() -> None:
    spec = ae.LinearAttentionSpec(decay_mod=lambda x: -x)
    _call(spec=spec, decay=ONES(H))()
    with pytest.raises(ValueError, match=r"after decay_mod\) is 1, limit 0.*logsigmoid"):
        _call(spec=spec, decay=-ONES(H))()
    with pytest.raises(ValueError, match=r"after decay_mod\) is nan, limit 0"):
        _call(decay=ONES(H) * torch.nan)()


# -- variants --------------------------------------------------------------------------------------


def variants() -> dict[str, dict[str, Any]]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    q, k, v = normal(B, HK, L, D), normal(B, HK, L, D), normal(B, H, L, DV)
    log, wide = -normal(B, H, L).abs(), -normal(B, H, L, D).abs()
    beta, V = normal(B, H, L).sigmoid(), ae.linear_variants
    return {
        "retention": V.retention(q, k, v),
        "retention_gamma": V.retention(q, k, v, normal(H).sigmoid()),
        "simple_gla": V.simple_gla(q, k, v, log),
        "gla": V.gla(q, k, v, wide),
        "mamba2": V.mamba2(v, -log, -normal(H).exp(), k, q, normal(H), normal(B, H, L, DV)),
        "mamba2_bare": V.mamba2(v, log, -normal(H).exp(), k, q, dt_bias=ONES(H), dt_softplus=True),
        "elu_linear": V.elu_linear(q, k, v),
        "delta_net": V.delta_net(q, k, v, beta),
        "gated_delta_net": V.gated_delta_net(q, k, v, log, beta),
        "kda": V.kda(q, k, v, wide, beta),
    }


@pytest.mark.parametrize("name", variants())
def test_variants_are_arguments_of_a_call(name: str) -> None:
    call = variants()[name]
    out, state = ae.reference(**call, output_final_state=True)
    assert out.shape == (B, H, L, DV) and out.isfinite().all()
    assert state.shape == (B, H, D, DV + (name == "elu_linear"))


def test_variants_refuse_the_gates_of_others() -> None:
    q, k, v = operands()
    log, wide, V = -ONES(B, H, L), -ONES(B, H, L, D), ae.linear_variants
    for call, error, text in (
        (lambda: V.retention(q, k, v, 0.9), TypeError, r"gamma=0.9: expected a tensor \[H\]"),
        (
            lambda: V.simple_gla(q, k, v, wide),
            ValueError,
            r"g: shape \[2, 4, 6, 5\], expected \[B, H",
        ),
        (
            lambda: V.gla(q, k, v, log),
            ValueError,
            r"gk: shape \[2, 4, 6\], expected \[B, H, L, D\]",
        ),
        (lambda: V.delta_net(q, k, v, None), TypeError, "beta=None: expected a tensor"),
        (lambda: V.gated_delta_net(q, k, v, wide, log), ValueError, "g: shape"),
        (lambda: V.kda(q, k, v, log, -log), ValueError, "g: shape"),
        (lambda: V.mamba2(v, -log, wide[0, :, 0], k, q), ValueError, r"A: shape \[4, 5\], exp"),
        (lambda: V.mamba2(v, -log, -ONES(H), k, q, z=log), ValueError, "z: shape"),
    ):
        with pytest.raises(error, match=text):
            call()


def test_retention_keeps_slow_heads_apart() -> None:
    q, k, v = operands(H=30, Hk=1)
    decay = ae.linear_variants.retention(q, k, v)["decay"].double()
    exact = torch.log1p(-torch.exp2(-5.0 - torch.arange(30).double()))
    assert torch.allclose(decay, exact, rtol=1e-7, atol=0.0)
