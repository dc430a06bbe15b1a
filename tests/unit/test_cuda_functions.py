"""CUDA kernels of single calls in the simulator: the device's functions, special scores, spills."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_codegen_golden import sink
from torch import Tensor

import attnengine as ae
from attnengine import dispatch, gate, library, nvcc, plan_cuda, program
from tests import ptxsim

FOUND = nvcc.find_device_compiler()
compiles = [
    pytest.mark.compiles,
    pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND)),
]


def qkv(dtype: torch.dtype = torch.bfloat16, d: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.zeros(1, 1, 8, d, dtype=dtype) for _ in "qkv")  # type: ignore[return-value]


@pytest.fixture
def simulator() -> Iterator[None]:
    ptxsim.install()
    yield
    library.install_driver(None)


class TestGradients:
    pytestmark = compiles

    def test_calls_that_need_a_gradient_are_refused(self, simulator: None) -> None:
        q, k, v = qkv()
        spec = ae.AttentionSpec()
        attn = ae.compile(spec, q, k, v, target="sm_80")
        attn(q, k, v)
        wanted = "CUDA kernels have no gradient in this version, and q, k, v or a captured tensor"
        with pytest.raises(NotImplementedError, match=wanted):
            attn(q.requires_grad_(), k, v)
        with pytest.raises(NotImplementedError, match=wanted):
            ae.compile(spec, q, k, v, target="sm_80")
        with torch.no_grad():
            attn(q, k, v)

    def test_so_are_captured_tensors_that_want_one(self, simulator: None) -> None:
        q, k, v = qkv()
        attn = ae.compile(sink(), q, k, v, target="sm_80", backward=False)
        with pytest.raises(NotImplementedError, match="a captured tensor requires grad"):
            attn(q, k, v)
        with torch.no_grad():
            attn(q, k, v)


class TestSpills:
    pytestmark = compiles

    def test_a_candidate_without_spills_is_taken_and_remembered(
        self, simulator: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # As if nothing but scores and sums took registers: the first choice is a tile that spills.
        monkeypatch.setattr(plan_cuda, "OTHER_REGISTERS", 0)
        q, k, v = qkv(d=128)
        spec = ae.AttentionSpec(mask_mod=lambda b, h, q, k: (q >= k) & (k % 7 != 3))
        attn = ae.compile(spec, q, k, v, target="sm_80")
        assert attn.module is not None and attn.module.spill_bytes == 0
        number = attn.program.sources.candidate
        assert number > 0 and attn.plan == attn.pipeline.forward_plans[number]
        assert f"kBlockN = {attn.plan.block_n}" in attn.source
        assert "because cheaper ones spill registers" in attn.explain()
        program._programs.clear()
        again = dispatch.resolve(spec, q, k, v, "sm_80")[0]
        assert again.sources == attn.program.sources

    def test_a_kernel_that_spills_is_no_secret(
        self, simulator: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plan_cuda, "OTHER_REGISTERS", 0)
        monkeypatch.setattr(program, "MOST_CANDIDATES", 1)
        q, k, v = qkv(d=128)
        spec = ae.AttentionSpec(mask_mod=lambda b, h, q, k: (q >= k) & (k % 7 != 4))
        with pytest.warns(RuntimeWarning, match=r"spills \d+ bytes of registers.*slow"):
            attn = ae.compile(spec, q, k, v, target="sm_80")
        assert attn.module is not None and attn.module.spill_bytes > 0


X = [0.75, -0.3, 0.01, 0.99, -0.6, 0.5, -0.125, 0.9]  # in every domain, with abs or an offset
FUNCTIONS: dict[str, list[Callable[[Tensor, Tensor], Any]]] = {
    "float": [
        lambda x, n: torch.exp(x * 8), lambda x, n: torch.exp2(x * 8),
        lambda x, n: torch.expm1(x), lambda x, n: torch.log(x.abs()),
        lambda x, n: torch.log2(x.abs()), lambda x, n: torch.log10(x.abs()),
        lambda x, n: torch.log1p(x), lambda x, n: torch.sqrt(x.abs()),
        lambda x, n: torch.rsqrt(x.abs()), lambda x, n: torch.reciprocal(x),
        lambda x, n: torch.tanh(3 * x), lambda x, n: torch.sigmoid(6 * x),
        lambda x, n: torch.erf(x), lambda x, n: torch.erfc(x),
        lambda x, n: torch.lgamma(x.abs() + 1),
    ],
    "angles": [
        lambda x, n: torch.sin(9 * x), lambda x, n: torch.cos(9 * x), lambda x, n: torch.tan(x),
        lambda x, n: torch.asin(x), lambda x, n: torch.acos(x), lambda x, n: torch.atan(x),
        lambda x, n: torch.sinh(x), lambda x, n: torch.cosh(x), lambda x, n: torch.asinh(x),
        lambda x, n: torch.acosh(x.abs() + 1), lambda x, n: torch.atanh(x),
        lambda x, n: torch.atan2(x, x - 1), lambda x, n: torch.hypot(x, x + 1),
        lambda x, n: torch.pow(x.abs(), 1.7), lambda x, n: torch.copysign(x, x - 0.5),
    ],
    "rounding": [
        lambda x, n: torch.floor(5 * x), lambda x, n: torch.ceil(5 * x),
        lambda x, n: torch.trunc(5 * x), lambda x, n: torch.round(5 * x), lambda x, n: x.sign(),
        lambda x, n: torch.remainder(x, 0.3), lambda x, n: torch.fmod(x, 0.3),
        lambda x, n: torch.div(x, -0.3, rounding_mode="floor"),
        lambda x, n: torch.div(x, 0.3, rounding_mode="trunc"), lambda x, n: x / 0.3,
        lambda x, n: torch.maximum(x, 0.25 * x), lambda x, n: torch.minimum(x, 0.25 * x),
        lambda x, n: torch.where(torch.isnan(x / 0 * 0), 2.0, 3.0),
        lambda x, n: torch.where(torch.isinf(x / 0), x, -x),
        lambda x, n: (x * 1.001).to(torch.bfloat16).to(torch.float32),
        lambda x, n: (x * 1.001).to(torch.float16).to(torch.float32),
    ],
    "integers": [
        lambda x, n: n // 3, lambda x, n: n // -3, lambda x, n: n % 3, lambda x, n: n % -3,
        lambda x, n: torch.fmod(n, 3), lambda x, n: torch.div(n, 3, rounding_mode="trunc"),
        lambda x, n: n // (n - 2), lambda x, n: n.abs(), lambda x, n: -n, lambda x, n: n & 6,
        lambda x, n: n | 9, lambda x, n: n ^ 5, lambda x, n: ~n, lambda x, n: n << 2,
        lambda x, n: n >> 1, lambda x, n: (n > 2) ^ (n < 5), lambda x, n: (n * n * 1000003) % 97,
    ],
}  # fmt: skip
INTEGERS = [7, -7, 0, 5, -1, 3, -12, 11]


class TestFunctions:
    """Key i of row j gets function i of number j as its weight, and V picks the keys apart."""

    pytestmark = compiles

    @pytest.mark.parametrize("group", FUNCTIONS)
    def test_functions_mean_what_torch_means(self, group: str, simulator: None) -> None:
        functions, x, n = FUNCTIONS[group], torch.tensor(X), torch.tensor(INTEGERS)

        def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            out = s
            for i, f in enumerate(functions):
                out = torch.where(k == i, f(x[q], n[q]), out)
            return out

        spec = ae.AttentionSpec(score_mod=mod, row_func=ae.Identity())
        q = torch.zeros(1, 1, len(X), 8, dtype=torch.float16)
        k = torch.zeros(1, 1, len(functions), 8, dtype=torch.float16)
        v = torch.eye(len(functions), dtype=torch.float16)[None, None]
        attn = ae.compile(spec, q, k, v, target="sm_80")
        got = attn(q, k, v)[0, 0].float()
        for i, f in enumerate(functions):
            want = _on_numbers(f, x, n).float()
            close = torch.isclose(got[:, i], want.half().float(), rtol=2**-9, atol=1e-6)
            assert bool(close.all()), (i, got[:, i], want)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_captured_tensors_of_every_dtype(self, dtype: torch.dtype, simulator: None) -> None:
        kinds = (
            torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
            torch.int16, torch.int8, torch.uint8, torch.bool,
        )  # fmt: skip
        tables = [(torch.arange(12).reshape(3, 4) % 5 * (i + 1)).to(t) for i, t in enumerate(kinds)]
        tables[4] = tables[4].t().contiguous().t()  # strides of its own

        def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            out = s
            for i, t in enumerate(tables):  # the last index is negative, and wraps
                out = torch.where(k == i, t[q, q - 4].to(torch.float32), out)
            return out

        spec = ae.AttentionSpec(score_mod=mod, row_func=ae.Identity())
        q = torch.zeros(1, 1, 3, 8, dtype=dtype)
        k = torch.zeros(1, 1, len(kinds), 8, dtype=dtype)
        v = torch.eye(len(kinds), dtype=dtype)[None, None]
        got = ae.compile(spec, q, k, v, target="sm_80")(q, k, v)[0, 0].float()
        want = torch.stack([t.diagonal().float() for t in tables], 1)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


INF = float("inf")


class Counted(ae.OnlineFunc):
    """Weights without a maximum, and a running number: dead rows keep theirs."""

    state = {"n": 0.0}

    def update(self, scores: Tensor, state: dict) -> tuple[Tensor, dict, Any]:
        w = torch.relu(scores)
        return w, {"n": state["n"] + w.sum()}, 1.0

    def finalize(self, out: Tensor, state: dict) -> tuple[Tensor, dict]:
        return out / (1 + state["n"]), {"n": state["n"]}

    def weights(self, scores: Tensor, saved: dict) -> Tensor:
        return torch.relu(scores) / (1 + saved["n"])


class TestSpecialScores:
    """NaN and +inf of live keys reach their row and no other; -inf is a dead key."""

    pytestmark = compiles

    @pytest.mark.parametrize("row", ["softmax", "counted", "sigmoid"])
    @pytest.mark.parametrize("causal", [False, True])
    def test_rows(self, row: str, causal: bool, simulator: None) -> None:
        g = torch.Generator().manual_seed(0)
        table = torch.zeros(8, 150)
        table[1, 3], table[2], table[3], table[4, 3] = float("nan"), float("nan"), -INF, INF
        table[5, :130] = -INF  # its first live key is in a later tile
        table[6, 130:], table[7, ::2] = -INF, -INF
        spec = ae.AttentionSpec(
            score_mod=lambda s, b, h, q, k: s + table[q, k],
            mask_mod=(lambda b, h, q, k: k <= q + 142) if causal else None,
            row_func={"softmax": ae.Softmax(), "counted": Counted(), "sigmoid": ae.Sigmoid()}[row],
        )
        q = torch.randn(1, 1, 8, 16, generator=g).half()
        k, v = (torch.randn(1, 1, 150, 16, generator=g).half() for _ in "kv")
        attn = ae.compile(spec, q, k, v, target="sm_80")
        expected = gate.Expectation(spec, q, k, v, grads=False)
        expected.check(lambda q, k, v: attn(q, k, v, return_aux=True))


def _on_numbers(f: Callable[[Tensor, Tensor], Any], x: Tensor, n: Tensor) -> Tensor:
    """Each element by itself: torch refuses an integer division by zero, which is 0 in a kernel."""
    out = []
    for a, b in zip(x, n, strict=True):
        try:
            out.append(f(a, b).double())
        except RuntimeError:
            out.append(torch.zeros((), dtype=torch.float64))
    return torch.stack(out)
