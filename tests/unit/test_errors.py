"""Bad input: a clear error that names the argument, before anything runs, at every door."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnengine as ae

pytestmark = pytest.mark.compiles
D = 8


def zeros(*shape: int, **more: Any) -> Tensor:
    return torch.zeros(shape, **more)


def good() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {n: torch.randn(2, 4, 5, D, generator=g) for n in ("q", "k", "v")}


def operands(**changes: Any) -> tuple[Any, Any, Any]:
    x = good() | changes
    return x["q"], x["k"], x["v"]


_PLAIN = ae.AttentionSpec()


@pytest.fixture(scope="module")
def handle() -> ae.Handle:
    return ae.compile(_PLAIN, *operands())


def _through_handle(q: Any, k: Any, v: Any) -> Any:
    return ae.compile(_PLAIN, *operands())(q, k, v)


def _through_warm_spec(q: Any, k: Any, v: Any) -> Any:
    ae.attention(*operands(), _PLAIN)
    return ae.attention(q, k, v, _PLAIN)


DOORS: dict[str, Callable] = {
    "attention": lambda q, k, v: ae.attention(q, k, v, ae.AttentionSpec()),
    "attention again": _through_warm_spec,
    "handle": _through_handle,
    "compile": lambda q, k, v: ae.compile(ae.AttentionSpec(), q, k, v),
    "flex_attention": lambda q, k, v: ae.flex_attention(q, k, v),
    "flex_attention gqa": lambda q, k, v: ae.flex_attention(q, k, v, enable_gqa=True),
}
WHEN_CALLED = [d for d in DOORS if d != "compile"]  # compile reads dtypes and head dims only


def each(name: str, make: Callable[[], Tensor]) -> dict[str, Tensor]:
    return {n: make() for n in name}


def of(dtype: torch.dtype) -> dict[str, Tensor]:
    return each("qkv", lambda: zeros(2, 4, 5, D).to(dtype))


# what: changed operands, error, words that the message must have, doors
BAD: dict[str, tuple[dict[str, Any], type[Exception], str, list[str]]] = {
    "a list": ({"q": [[1.0]]}, TypeError, "q must be .*Tensor.*list", [*DOORS]),
    "None": ({"v": None}, TypeError, "v must be .*Tensor.*NoneType", [*DOORS]),
    "3-D": ({"q": zeros(2, 5, D)}, ValueError, r"q must be 4-D.*\(2, 5, 8\)", [*DOORS]),
    "5-D": ({"k": zeros(1, 2, 4, 5, D)}, ValueError, r"k must be 4-D.*\(1, 2, 4, 5, 8\)", [*DOORS]),
    "mixed dtypes": ({"k": zeros(2, 4, 5, D).double()}, TypeError, "float32.*float64", [*DOORS]),
    "mixed halves": ({"v": zeros(2, 4, 5, D).bfloat16()}, TypeError, "bfloat16", [*DOORS]),
    "integers": (of(torch.int32), TypeError, "int32.*supported", [*DOORS]),
    "complex": (of(torch.complex64), TypeError, "complex64.*supported", [*DOORS]),
    "float8": (of(torch.float8_e4m3fn), TypeError, "float8.*supported", [*DOORS]),
    "devices": ({"k": zeros(2, 4, 5, D, device="meta")}, ValueError, "cpu.*meta", [*DOORS]),
    "D of k": ({"k": zeros(2, 4, 5, 9)}, ValueError, "head_dim 9.*8|8.*9", [*DOORS]),
    "S of v": ({"v": zeros(2, 4, 6, D)}, ValueError, "5.*6|6.*5", WHEN_CALLED),
    "heads of v": ({"v": zeros(2, 2, 5, D)}, ValueError, "heads?.*(4.*2|2.*4)", WHEN_CALLED),
    "batch of k": ({"k": zeros(3, 4, 5, D)}, ValueError, "batch.*(2.*3|3.*2)", WHEN_CALLED),
    "batch of v": ({"v": zeros(3, 4, 5, D)}, ValueError, "batch.*(2.*3|3.*2)", WHEN_CALLED),
    "head groups": (
        each("kv", lambda: zeros(2, 3, 5, D)), ValueError, "multiple|enable_gqa", WHEN_CALLED),
    "more KV heads": (
        each("kv", lambda: zeros(2, 8, 5, D)), ValueError, "multiple|enable_gqa", WHEN_CALLED),
    "no KV heads": (each("kv", lambda: zeros(2, 0, 5, D)), ValueError, "0", WHEN_CALLED),
}  # fmt: skip


@pytest.mark.parametrize(("case", "door"), [(c, d) for c, row in BAD.items() for d in row[3]])
def test_bad_operand(case: str, door: str) -> None:
    changes, error, words, _ = BAD[case]
    with pytest.raises(error, match=words) as caught:
        DOORS[door](*operands(**changes))
    assert "aten" not in str(caught.value) and "0x" not in str(caught.value)


@pytest.mark.parametrize("case", [c for c, row in BAD.items() if "handle" in row[3]])
def test_bad_operand_with_gradient(case: str) -> None:
    changes, error, words, _ = BAD[case]
    q, k, v = operands(**changes)
    for x in (q, k, v):
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    try:
        for door in ("attention", "attention again", "handle"):
            with pytest.raises(error, match=words):
                DOORS[door](q, k, v)
    finally:
        for x in (q, k, v):
            if isinstance(x, Tensor) and x.is_floating_point():
                x.requires_grad_(False)


@pytest.mark.parametrize("name", ["q and k", "v"])
@pytest.mark.parametrize("size", [0, 577, 4096])
def test_head_dim_out_of_range(name: str, size: int) -> None:
    wide = zeros(1, 1, 2, size)
    some = zeros(1, 1, 2, D)
    q, k, v = (wide, wide, some) if name == "q and k" else (some, some, wide)
    with pytest.raises((NotImplementedError, ValueError), match=f"{size}.*(576|1)"):
        ae.attention(q, k, v)


def test_head_dim_of_a_handle(handle: ae.Handle) -> None:
    with pytest.raises(ValueError, match="16.*8"):
        handle(zeros(2, 4, 5, 16), zeros(2, 4, 5, 16), zeros(2, 4, 5, D))
    with pytest.raises(ValueError, match="16.*8"):
        handle(zeros(2, 4, 5, D), zeros(2, 4, 5, D), zeros(2, 4, 5, 16))
    with pytest.raises(TypeError, match="float64.*float32|float32.*float64"):
        handle(*(x.double() for x in operands()))


def test_spec_of_wrong_type() -> None:
    for spec in (None, lambda s, b, h, q, k: s, "causal"):
        with pytest.raises(TypeError, match="spec must be an attnengine.AttentionSpec"):
            ae.attention(*operands(), spec)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scale_not_finite(scale: float) -> None:
    with pytest.raises(ValueError, match="scale=.*finite"):
        ae.flex_attention(*operands(), scale=scale)
    with pytest.raises(ValueError, match="scale=.*finite"):
        ae.AttentionSpec(scale=scale)


def test_scale_not_a_number() -> None:
    for scale in ("1", True, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="scale="):
            ae.flex_attention(*operands(), scale=scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scale_may_be_zero_or_negative(scale: float) -> None:
    q, k, v = (x.requires_grad_() for x in operands())
    spec = ae.AttentionSpec(scale=scale)
    out, want = ae.attention(q, k, v, spec), ae.reference(q, k, v, spec)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    g = torch.ones_like(out)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_special_values_are_data(handle: ae.Handle, bad: float) -> None:
    q, k, v = operands()
    v[0, 1, 2, 3] = bad
    want = ae.reference(q, k, v, _PLAIN)
    torch.testing.assert_close(handle(q, k, v), want, equal_nan=True, rtol=1e-5, atol=1e-5)
    q, k, v = operands()
    q[1, 0, 4, 0] = bad
    out = handle(q, k, v)
    assert bool(out[1, 0, 4].isnan().all())
    out[1, 0, 4] = 0
    assert bool(out.isfinite().all())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "last dimension strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "last dimension first": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "batch expanded": lambda x: x[:1].expand(x.shape),
    "heads expanded": lambda x: x[:, :1].expand(x.shape),
    "rows expanded": lambda x: x[:, :, :1].expand(x.shape),
    "row of one number": lambda x: x[..., :1].expand(x.shape),
    "overlapping rows": lambda x: x.flatten().as_strided(x.shape, (40, 8, 3, 1)),
    "negated view": lambda x: torch.complex(x, x).conj().imag,
    "reversed": lambda x: x.flip(2).flip(2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_right_answer(handle: ae.Handle, layout: str) -> None:
    q, k, v = (LAYOUTS[layout](x) for x in operands())
    want = ae.reference(q.clone(), k.clone(), v.clone(), _PLAIN)
    torch.testing.assert_close(handle(q, k, v), want, rtol=1e-5, atol=1e-5)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = ae.attention(*leaves, _PLAIN)
    copies = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad(out, leaves, g)
    expected = torch.autograd.grad(ae.reference(*copies, _PLAIN), copies, g)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_more_keys_than_indices() -> None:
    q = zeros(1, 1, 0, D)
    huge = zeros(1, 1, 1, D).expand(1, 1, 2**31, D)
    with pytest.raises(ValueError, match="2147483648"):
        ae.attention(q, huge, huge)


# -- captured tensors ------------------------------------------------------------------------------


def biased(bias: Tensor) -> ae.AttentionSpec:
    return ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s + bias[k])


def near_reference(spec: ae.AttentionSpec) -> None:
    got, want = ae.attention(*operands(), spec), ae.reference(*operands(), spec)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_captured_tensor_that_grew() -> None:
    bias = torch.randn(7)
    spec = biased(bias)
    near_reference(spec)
    bias.data = torch.randn(9)
    near_reference(spec)


def test_captured_tensor_that_shrank() -> None:
    bias = torch.randn(7)
    spec = biased(bias)
    near_reference(spec)
    bias.data = torch.randn(3)
    with pytest.raises(IndexError, match=r"\[3\].*out of range"):
        ae.attention(*operands(), spec)


@pytest.mark.parametrize(
    "new", [torch.arange(7.0).double(), torch.arange(7), torch.ones(7, 2)], ids=["f64", "i64", "2d"]
)
def test_captured_tensor_of_another_kind(new: Tensor) -> None:
    """An error, or the new meaning: never the old kernel on new bytes."""
    bias = torch.randn(7)
    spec = biased(bias)
    near_reference(spec)
    try:
        bias.data = new
    except RuntimeError:
        pytest.skip("torch refuses this change")
    try:
        got = ae.attention(*operands(), spec)
    except (ValueError, TypeError) as e:
        assert "captur" in str(e)
    else:
        torch.testing.assert_close(got, ae.reference(*operands(), spec), rtol=1e-5, atol=1e-5)


def test_captured_tensor_that_comes_to_require_grad() -> None:
    bias = torch.randn(7)
    spec = biased(bias)
    near_reference(spec)
    bias.requires_grad_()
    try:
        out = ae.attention(*operands(), spec)
    except ValueError as e:
        assert "require" in str(e)
    else:
        (got,) = torch.autograd.grad(out.sum() + out[..., 0].square().sum(), bias)
        want = ae.reference(*operands(), spec)
        (expected,) = torch.autograd.grad(want.sum() + want[..., 0].square().sum(), bias)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_live_index_out_of_range() -> None:
    q, k, v = operands()
    with pytest.raises(IndexError, match=r"shape \[3\].*out of range.*mask"):
        ae.attention(q, k, v, biased(torch.zeros(3)))


# -- gradients -------------------------------------------------------------------------------------


def test_double_backward() -> None:
    q, k, v = (x.requires_grad_() for x in operands())
    out = ae.attention(q, k, v, _PLAIN)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_backward_twice_without_retain_graph() -> None:
    q, k, v = (x.requires_grad_() for x in operands())
    out = ae.attention(q, k, v, _PLAIN)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="retain_graph|second time"):
        out.sum().backward()


def test_operand_changed_between_forward_and_backward() -> None:
    q, k, v = (x.requires_grad_() for x in operands())
    out = ae.attention(q, k, v, _PLAIN)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_unknown_statistic_names_those_that_exist() -> None:
    _, aux = ae.attention(*operands(), _PLAIN, return_aux=True)
    with pytest.raises(AttributeError, match=r"max_scores.*\['lse'\]"):
        aux.max_scores  # noqa: B018


# -- empty sizes are not errors --------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"L": 0}, {"S": 0}, {"B": 0}, {"H": 0}])
def test_empty(handle: ae.Handle, sizes: dict[str, int]) -> None:
    n = {"B": 2, "H": 4, "L": 5, "S": 6} | sizes
    q = torch.randn(n["B"], n["H"], n["L"], D, requires_grad=True)
    k = torch.randn(n["B"], n["H"], n["S"], D, requires_grad=True)
    v = torch.randn(n["B"], n["H"], n["S"], D, requires_grad=True)
    out, aux = ae.attention(q, k, v, _PLAIN, return_aux=True)
    assert out.shape == q.shape and not out.any()
    assert aux.lse.shape == q.shape[:3] and bool((aux.lse == -math.inf).all())
    for g in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not g.any()
