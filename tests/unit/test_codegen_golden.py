"""Generated source: three units word for word, and nothing of the user's text in any.

After an intended change of the generator, rewrite the golden files and read the diff:
``python tests/unit/test_codegen_golden.py``.
"""

from __future__ import annotations

import math
import pathlib
import re
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnengine as ae
from attnengine import dispatch, emit
from attnengine.capture import captures_of_spec

GOLDEN = pathlib.Path(__file__).parent / "golden"


class Sink(ae.OnlineFunc):
    """Softmax whose sum starts from a learnable sink."""

    def __init__(self, sink: Tensor) -> None:
        self.sink = sink

    def init(self, b: Tensor, h: Tensor, q_idx: Tensor) -> dict:
        return {"m": self.sink[h].detach(), "r": torch.exp(self.sink[h] - self.sink[h].detach())}

    def update(self, scores: Tensor, state: dict) -> tuple[Tensor, dict, Any]:
        m = torch.maximum(state["m"], scores.amax().detach())
        alpha, p = torch.exp(state["m"] - m), torch.exp(scores - m)
        return p, {"m": m, "r": state["r"] * alpha + p.sum()}, alpha

    def finalize(self, out: Tensor, state: dict) -> tuple[Tensor, dict]:
        return out / state["r"], {"lse": state["m"] + torch.log(state["r"])}

    def weights(self, scores: Tensor, saved: dict) -> Tensor:
        return torch.exp(scores - saved["lse"])


def alibi() -> ae.AttentionSpec:
    slopes = torch.zeros(4, requires_grad=True)
    return ae.AttentionSpec(
        score_mod=lambda s, b, h, q, k: s + slopes[h] * (k - q),
        mask_mod=lambda b, h, q, k: q >= k,
    )


def sink() -> ae.AttentionSpec:
    return ae.AttentionSpec(
        mask_mod=lambda b, h, q, k: (q >= k) & (q - k < 128),
        row_func=Sink(torch.zeros(4, requires_grad=True)),
    )


def documents() -> ae.AttentionSpec:
    ids, table = torch.zeros(2, 64, dtype=torch.int32), torch.zeros(4, 32)
    return ae.AttentionSpec(
        score_mod=lambda s, b, h, q, k: 30 * torch.tanh((s + table[h, (q - k).clamp(0, 31)]) / 30),
        mask_mod=lambda b, h, q, k: ids[b, q] == ids[b, k],
        k_mod=lambda x: x * 0.5,
    )


UNITS: dict[str, tuple[Callable[[], ae.AttentionSpec], torch.dtype, int, int, str]] = {
    "alibi": (alibi, torch.float32, 64, 64, "avx512"),
    "sink": (sink, torch.bfloat16, 64, 128, "avx512_bf16"),
    "documents": (documents, torch.float64, 24, 17, "avx2"),
}


def pipeline(
    spec: ae.AttentionSpec,
    dtype: torch.dtype = torch.float32,
    d: int = 8,
    dv: int = 8,
    isa: str = "portable",
) -> dispatch.Pipeline:
    return dispatch.pipeline(spec, captures_of_spec(spec), dtype, d, dv, isa)


def units() -> dict[str, str]:
    texts = {}
    for name, (make, dtype, d, dv, isa) in UNITS.items():
        sources = pipeline(make(), dtype, d, dv, isa).sources
        assert sources.backward is not None
        texts |= {f"{name}.forward.cpp": sources.forward, f"{name}.backward.cpp": sources.backward}
    return texts


@pytest.mark.parametrize("name", [f"{n}.{k}.cpp" for n in UNITS for k in ("forward", "backward")])
def test_golden(name: str) -> None:
    want, got = (GOLDEN / name).read_text(), units()[name]
    command = f"python {pathlib.Path(__file__).relative_to(GOLDEN.parents[2])}"
    assert got == want, f"{name} changed; if intended, run `{command}` and read the diff"


def test_golden_folder_has_nothing_else() -> None:
    assert sorted(p.name for p in GOLDEN.iterdir()) == sorted(units())


def test_source_is_a_function_of_the_meaning() -> None:
    """The same text in every process and for every order of dict and set iteration."""
    import subprocess

    program = (
        "import hashlib, runpy; m = runpy.run_path(__import__('sys').argv[1]);"
        "print(hashlib.sha256(repr(sorted(m['units']().items())).encode()).hexdigest())"
    )
    digests = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program, __file__],
            env=__import__("os").environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        digests.add(done.stdout)
    assert len(digests) == 1


# -- no user text ----------------------------------------------------------------------------------

HOSTILE = 'zq*/ "};\n#include "/etc/passwd"\nint zq = system("id"); // ??/\n\\'


def hostile_function() -> Callable:
    def f(score, b, h, q_idx, kv_idx):
        zq_local = score * 1.5
        return zq_local + zq_table[h]  # type: ignore[name-defined]  # noqa: F821

    code = f.__code__.replace(
        co_name=HOSTILE, co_filename=HOSTILE, co_varnames=tuple(f"{n} {HOSTILE}" for n in
        f.__code__.co_varnames),
    )  # fmt: skip
    g = types.FunctionType(code, {"zq_table": torch.tensor([0.5, -0.5])}, HOSTILE)
    g.__qualname__ = HOSTILE
    g.__doc__ = HOSTILE
    g.__module__ = HOSTILE
    return g


def hostile_row() -> ae.OnlineFunc:
    state = f"m {HOSTILE}"

    def update(self: Any, scores: Tensor, s: dict) -> tuple[Tensor, dict, Any]:
        return torch.relu(scores), {state: s[state] + torch.relu(scores).sum()}, 1.0

    def finalize(self: Any, out: Tensor, s: dict) -> tuple[Tensor, dict]:
        return out / (1 + s[state]), {f"saved {HOSTILE}": s[state]}

    def weights(self: Any, scores: Tensor, saved: dict) -> Tensor:
        return torch.relu(scores) / (1 + saved[f"saved {HOSTILE}"])

    body = {"state": {state: 0.0}, "update": update, "finalize": finalize, "weights": weights}
    return type(HOSTILE, (ae.OnlineFunc,), body)()


def hostile_spec() -> ae.AttentionSpec:
    return ae.AttentionSpec(score_mod=hostile_function(), row_func=hostile_row())


ALLOWED = re.compile(r'[\w\s(){}\[\]<>:;,.&|!=+*/%?~^-]|#include "cpu/\w+\.h"|"[0-9a-f]{64}"|""|\'')


def code_of(source: str) -> str:
    return re.sub(r"//[^\n]*", "", source)


def test_hostile_names_stay_out() -> None:
    sources = pipeline(hostile_spec()).sources
    for source in (sources.forward, sources.backward):
        assert source is not None
        assert "zq" not in source and "passwd" not in source and "system" not in source
        includes = [line for line in source.splitlines() if "#" in line]
        assert includes and all(re.fullmatch(r'#include "cpu/\w+\.h"', i) for i in includes)
        assert ALLOWED.sub("", code_of(source)) == ""


@pytest.mark.compiles
def test_hostile_names_work() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8, generator=g) for _ in range(3))
    spec = hostile_spec()
    out, aux = ae.attention(q, k, v, spec, return_aux=True)
    want, saved = ae.reference(q, k, v, spec, return_aux=True)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert set(aux) == set(saved) == {f"saved {HOSTILE}"}
    torch.testing.assert_close(*(s[f"saved {HOSTILE}"] for s in (aux, saved)))
    ae.explain(spec, q, k, v)


def test_hostile_strings_as_constants() -> None:
    mode, table = HOSTILE, {HOSTILE: 2.0}

    def mod(s, b, h, q, k):
        return s * table[mode] if mode != "" else s

    source = pipeline(ae.AttentionSpec(score_mod=mod)).sources.forward
    assert "zq" not in source and "0x1.0000000000000p+1" in source


# -- numbers ---------------------------------------------------------------------------------------

FLOATS = [
    0.1, -0.1, 1e-45, -1.1754944e-38, 3.4028234663852886e38, -3.4028234663852886e38, 1e-310,
    1.0000001, math.pi, -0.0, 2.0**-126, 16777217.0, 1 / 3,
]  # fmt: skip
INTS = [2**31 - 1, -(2**31), 2**31, 2**63 - 1, -(2**63), -1, 2**53 + 1]


def test_float_literals_are_bits() -> None:
    for value in [*FLOATS, 5e-324, 1.7976931348623157e308]:
        text = emit.float_literal(value, "f64").strip("()")
        assert struct.pack("<d", float.fromhex(text)) == struct.pack("<d", value)
    assert emit.float_literal(math.nan, "f32") == '__builtin_nanf("")'
    assert emit.float_literal(math.inf, "f64") == "__builtin_inf()"
    assert emit.float_literal(-math.inf, "f32") == "-__builtin_inff()"


def test_no_decimal_fractions_in_a_unit() -> None:
    spec = ae.AttentionSpec(score_mod=lambda s, b, h, q, k: (s * 0.1 + 1e-3) / 1.7 - 1e30)
    source = pipeline(spec).sources.forward
    traced = source[source.index("struct Fn") :]
    assert "0x1.99999a0000000p-4" in traced  # 0.1 rounded to fp32
    for number in re.findall(r"(?<![\w.])\d+\.\d+[^\s,;()]*", code_of(traced)):
        assert number.startswith("0x") or float(number.rstrip("f")) in (0.0, 1.0), number


@pytest.mark.compiles
def test_constants_arrive_bit_for_bit() -> None:
    n = len(FLOATS) + len(INTS)

    def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        out = s
        for i, c in enumerate(FLOATS):
            out = torch.where(k == i, c, out)
            out = torch.where((k == i) & (q == 1), torch.tensor(c, dtype=torch.float32), out)
        for i, c in enumerate(INTS):
            whole = torch.full_like(k, c)
            out = torch.where(k == len(FLOATS) + i, (whole + k * 0) % 100003, out)
        live = torch.where(q < 0, math.nan, out)
        return torch.where(q < 0, -math.inf, live)

    q, k = torch.zeros(1, 1, 2, 1).double(), torch.zeros(1, 1, n, 1).double()
    spec = ae.AttentionSpec(score_mod=mod, row_func=ae.Identity())
    got = ae.attention(q, k, torch.eye(n).double()[None, None], spec)[0, 0]
    wide = [float(c) for c in FLOATS] + [float(c % 100003) for c in INTS]
    narrow = [torch.tensor(c).item() for c in FLOATS] + wide[len(FLOATS) :]
    assert got.tolist() == [wide, narrow]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for stale in GOLDEN.iterdir():
        stale.unlink()
    for file, text in units().items():
        (GOLDEN / file).write_text(text)
        print(f"wrote {GOLDEN / file}")
