"""Hooks of linear attention as graphs, their keys and plans, and the generated units word for word.

After an intended change of the generator, rewrite the golden files and read the diff:
``python tests/unit/test_linear_codegen.py``.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from linear_hooks import (
    DV,
    SHAPES,
    D,
    H,
    L,
    Spec,
    delta_rule,
    feature_map,
    gated,
    hook_case,
    interpret,
    leaf,
    request,
    state_space,
    traced,
)

from attnengine.errors import TraceError
from attnengine.linear import serialize
from attnengine.linear.key import linear_key
from attnengine.linear.plan import LinearPlan, linear_candidates, plan_linear
from attnengine.linear.request import LinearRequest
from attnengine.linear.source import linear_source
from attnengine.linear.trace import TracedLinear, operand_shape, trace_linear
from attnengine.linear.unbroadcast import places_of, unbroadcast

GOLDEN = pathlib.Path(__file__).parent / "golden_linear"
UNITS: dict[str, tuple[Callable[[], tuple[Spec, LinearRequest]], str]] = {
    "feature_map": (feature_map, "avx2"),
    "gated": (gated, "avx512_bf16"),
    "state_space": (state_space, "portable"),
    "delta_rule": (delta_rule, "avx512_bf16"),
}


def unit(t: TracedLinear, kind: str, isa: str = "portable") -> str:
    key = linear_key(kind, t)
    return linear_source(t, plan_linear(key, t, isa), key)


@functools.cache
def units() -> dict[str, str]:
    texts = {}
    for name, (make, isa) in UNITS.items():
        t = trace_linear(*make(), SHAPES)
        for kind in ("forward", "backward"):
            texts[f"{name}.{kind}.cpp"] = unit(t, kind, isa)
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
    program = (
        "import hashlib, runpy; m = runpy.run_path(__import__('sys').argv[1]);"
        "print(hashlib.sha256(repr(sorted(m['units']().items())).encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, __file__],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    here = hashlib.sha256(repr(sorted(units().items())).encode()).hexdigest()
    assert done.stdout.strip() == here


ALLOWED = re.compile(r'[\w\s(){}\[\]<>:;,.&|!=+*/%?~^-]|#include "cpu/\w+\.h"|"[0-9a-f]{64}"|""|\'')
HOSTILE = 'zq*/ "};\n#include "/etc/passwd"\nint zq = system("id"); // ??/\n\\'


def test_no_text_of_the_users() -> None:
    zq_table = leaf(H, 1, 1)

    def zq_hook(zq_x):  # type: ignore[no-untyped-def]
        zq_local = zq_x * 1.5
        return zq_local + zq_table

    zq_hook.__code__ = zq_hook.__code__.replace(co_name=HOSTILE, co_filename=HOSTILE)
    t = traced(v_mod=zq_hook)
    for kind in ("forward", "backward"):
        source = re.sub(r"//[^\n]*", "", unit(t, kind))
        assert "zq" not in source and "passwd" not in source
        assert ALLOWED.sub("", source) == ""


# -- what hooks mean -------------------------------------------------------------------------------

gate, columns = leaf(*SHAPES[:1], H, L, DV), leaf(DV)
heads, scalar, half = leaf(H), leaf(), leaf(H, 1, 1, dtype=torch.bfloat16)
swapped, wide = leaf(DV, H), leaf(H, 2 * DV)
count = torch.arange(H)[:, None, None]
fixed_table, ids = torch.randn(10, DV), torch.arange(2 * L).view(2, 1, L) % 10

VALUE_HOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "clamp": lambda x: x.clamp(-0.5, 1.0) + x.clamp(min=0),
    "silu": F.silu,
    "elu": lambda x: F.elu(x, 0.7) + F.selu(x) + F.celu(x, 0.5),
    "gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "softplus": lambda x: F.softplus(x) + F.softplus(x, 2.0, 1.0),
    "mish": F.mish,
    "power": lambda x: x**2 + x.abs() ** 1.5,
    "where": lambda x: torch.where(x > 0.2, x, x * scalar),
    "gate": lambda x: x * torch.sigmoid(gate) + gate,
    "columns": lambda x: x * columns,
    "heads by view": lambda x: x * heads.view(H, 1, 1),
    "heads by index": lambda x: x + heads[:, None, None] * heads[None, :, None, None],
    "heads by unsqueeze": lambda x: x * heads.unsqueeze(-1).unsqueeze(-1),
    "expanded": lambda x: x * heads.view(1, H, 1, 1).expand(2, H, L, 1) + columns.expand_as(x),
    "rank": lambda x: x * half,
    "scalar": lambda x: x * scalar + scalar**2,
    "transposed": lambda x: x * swapped.t()[:, None],
    "permuted": lambda x: x + gate.permute(1, 0, 2, 3).transpose(0, 1),
    "slice": lambda x: x * wide[:, None, :DV],
    "row of a table": lambda x: x * wide[2, :DV] + gate[0],
    "integers": lambda x: x * count + (count % 2 == 0),
    "twice": lambda x: torch.exp(columns) * (x + gate) / (columns**2 + 1),
    "made inside": lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]) + torch.ones_like(x),
    "sizes": lambda x: x / x.shape[2] + torch.arange(x.shape[2])[:, None],
    "detached": lambda x: x * x.detach() * gate.detach(),
    "double": lambda x: (x.double() * 0.1).float(),
    "constant": lambda x: torch.zeros_like(x) + columns,
    "module": torch.nn.SiLU(),
    "module with a parameter": torch.nn.PReLU(),
    "table": lambda x: x * fixed_table[ids],
}


@pytest.mark.parametrize("name", VALUE_HOOKS)
def test_hook(name: str) -> None:
    """Values and all gradients, element by element, are those of torch."""
    check_hook(traced(v_mod=VALUE_HOOKS[name]), "v_mod", VALUE_HOOKS[name])


DECAY_HOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "logsigmoid": F.logsigmoid,
    "state space": lambda x: -torch.exp(heads)[:, None] * F.softplus(x + heads.view(H, 1)),
    "tokens": lambda x: x * gate[..., 0] + gate.sum(-1).detach()[..., None].squeeze(-1),
}


@pytest.mark.parametrize("name", DECAY_HOOKS)
def test_decay_hook(name: str) -> None:
    """Of a scalar decay: lanes run through tokens."""
    hook = DECAY_HOOKS[name]
    check_hook(traced(request(decay="scalar"), decay_mod=hook), "decay_mod", hook)


def test_channel_decay_hook() -> None:
    channels = leaf(H, 1, D)
    t = traced(request("bf16", "channel"), decay_mod=lambda x: F.logsigmoid(x + channels) / 16)
    check_hook(t, "decay_mod", lambda x: F.logsigmoid(x + channels) / 16)


def test_key_heads() -> None:
    """q_mod and k_mod see the heads of q and k."""
    own = leaf(2, 1, D)
    t = traced(q_mod=lambda x: x * own, k_mod=lambda x: x * own + 1)
    check_hook(t, "q_mod", lambda x: x * own)
    check_hook(t, "k_mod", lambda x: x * own + 1)
    assert [(g.hook, g.capture) for g in t.hook_grads] == [("q_mod", 0), ("k_mod", 0)]


def test_double_precision() -> None:
    t = traced(request("f64"), out_mod=lambda x: x * gate)
    assert t.dtype == "f64"
    check_hook(t, "out_mod", lambda x: x * gate)


def check_hook(t: TracedLinear, name: str, hook: Callable[[Tensor], Tensor]) -> None:
    x, g = hook_case(t, name)
    shape = tuple(x.shape)
    close = torch.testing.assert_close
    tight = {"rtol": 1e-12, "atol": 1e-12} if t.dtype == "f64" else {"rtol": 3e-6, "atol": 3e-6}
    a = x.clone().requires_grad_()
    want = hook(a)
    (got,) = interpret(t, [t.hooks[name]], shape, x=x)
    close(got, want.to(got.dtype), **tight)
    leaves = [c for c in t.captures if c.requires_grad]
    grads = torch.autograd.grad(want, [a, *leaves], g.to(want.dtype), allow_unused=True)
    pullback = t.gradients()[name]
    roots = [pullback.dx, *(p.value for p in pullback.grads)]
    dx, *values = interpret(t, roots, shape, x=x, g=g)
    close(dx, torch.zeros_like(x) if grads[0] is None else grads[0].to(x.dtype), **tight)
    for c, wanted in zip(leaves, grads[1:], strict=True):
        if wanted is None:
            continue
        total = torch.zeros(c.shape, dtype=x.dtype)
        for p, value in zip(pullback.grads, values, strict=True):
            if t.captures[p.capture] is c:
                total += unbroadcast(value.contiguous(), places_of(p), c)
        close(total.to(c.dtype), wanted, **(tight if c.dtype == x.dtype else {}))


def test_gradients_at_the_edges() -> None:
    """At a bound torch's derivative, and none where the branch that is not taken overflows."""
    edges = torch.tensor([0.0, 1.0, -1.0, 20.0, 21.0, 100.0, -100.0, 1e30]).expand(2, 4, 1, 8)
    for hook in (
        torch.relu, F.softplus, F.elu, F.silu, F.logsigmoid, F.relu6, F.hardswish,
        lambda x: x.clamp(min=0), lambda x: x.clamp(-1, 1),
    ):  # fmt: skip
        r = LinearRequest("f32", 1, 8)
        t = trace_linear(Spec(v_mod=hook), r, (2, 4, 4, 1))
        a = edges.clone().requires_grad_()
        (want,) = torch.autograd.grad(hook(a).sum(), a)
        (got,) = interpret(
            t, [t.gradients()["v_mod"].dx], (2, 4, 1, 8), x=edges, g=torch.ones_like(edges)
        )
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-30)


def test_absent_hooks() -> None:
    """Identities are no hooks, and leave no trace."""
    plain, same = traced(), traced(q_mod=lambda x: x, v_mod=lambda x: x * 1, out_mod=lambda x: x)
    assert not plain.hooks and not same.hooks and not same.captures and not same.pins
    assert linear_key("forward", plain) == linear_key("forward", same)
    assert linear_key("forward", plain) != linear_key("backward", plain)


def test_unused_gradients() -> None:
    """Gradients are those of tensors that require one."""
    fixed, wanted = torch.randn(DV), leaf(DV)
    t = traced(v_mod=lambda x: x * fixed + wanted)
    assert [t.captures[g.capture] is wanted for g in t.hook_grads] == [True]


# -- errors ----------------------------------------------------------------------------------------

NOT_ELEMENTWISE: list[Callable] = [
    lambda x: x.softmax(-1),
    lambda x: F.normalize(x, dim=-1),
    lambda x: x @ torch.eye(DV),
    lambda x: x.sum(-1),
    lambda x: x - x.mean(-1, keepdim=True),
    lambda x: x.cumsum(2),
    lambda x: F.layer_norm(x, (DV,)),
    lambda x: x[..., :2],
    lambda x: x.flip(-1),
    lambda x: x.roll(1, 2),
    lambda x: x.transpose(0, 1),
    lambda x: x[:, :1],
    lambda x: gate,
    lambda x: heads,
    lambda x: (x, x),
    lambda x: 2.0,
]


@pytest.mark.parametrize("hook", NOT_ELEMENTWISE[:-4])
def test_not_elementwise(hook: Callable) -> None:
    with pytest.raises(TraceError, match="v_mod .*elementwise"):
        traced(v_mod=hook)


def test_other_errors() -> None:
    three, five = leaf(3, L, DV), leaf(3, *SHAPES[:1], H, L, DV)
    for hook, text in (
        (lambda x: x * three, "v_mod .*broadcast"),
        (lambda x: x * five, r"v_mod .*returned shape \[3, 2"),
        (lambda x: (x, x), "v_mod .*returned tuple"),
        (lambda x: 2.0, "v_mod .*returned float"),
        (lambda x: x > 0, "v_mod .*returned dtype bool"),
        (lambda x: heads, r"v_mod .*returned shape \[4\]"),
        (lambda x: x * torch.rand_like(x), "v_mod .*random"),
        (lambda x: x * torch.randn(5, generator=torch.Generator()), "v_mod .*Generator"),
        (lambda x: x if x.sum() > 0 else -x, "v_mod .*data-dependent"),
        (lambda x: x.mul_(2), "v_mod .*read-only"),
        (lambda x: heads.mul_(2)[:, None, None] + x, "v_mod .*read-only"),
    ):
        with pytest.raises(TraceError, match=text):
            traced(v_mod=hook)
    with pytest.raises(ValueError, match="decay_mod.*decay="):
        traced(decay_mod=lambda x: x)


def test_requests() -> None:
    for fields, text in (
        (("i32", 8, 8), "element"),
        (("f32", 0, 8), "D=0"),
        (("f32", 8, 8, "each"), "decay_kind"),
        (("f32", 8, 8, "scalar"), "decay_dtype"),
        (("f32", 8, 8, "none", "f32"), "decay_dtype"),
        (("f32", 8, 8, "scalar", "i64"), "decay has dtype i64"),
        (("f32", 8, 8, "none", None, "i64"), "beta has dtype i64"),
    ):
        with pytest.raises(ValueError, match=text):
            LinearRequest(*fields)
    with pytest.raises(ValueError, match="kind"):
        linear_key("sideways", traced())


# -- keys ------------------------------------------------------------------------------------------


def key_of(hook: Callable, shapes: tuple[int, int, int, int], name: str = "v_mod") -> str:
    r = request(decay="scalar") if name == "decay_mod" else request()
    t = trace_linear(Spec(**{name: hook}), r, shapes)
    return linear_key("forward", t).digest() + linear_key("backward", t).digest()


def test_sizes_are_not_in_the_key() -> None:
    sizes = [(1, 1, 1), (2, 4, 6), (1, 4, 1), (3, 1, 9)]
    for capture in (
        lambda b, h, n: leaf(b, h, n, DV),
        lambda b, h, n: leaf(h, n, DV),
        lambda b, h, n: leaf(b, h, n, 1),
        lambda b, h, n: leaf(h, 1, 1),
        lambda b, h, n: leaf(1, h, 1, DV),
    ):
        keys = set()
        for b, h, n in sizes:
            w = capture(b, h, n)
            keys.add(key_of(lambda x, w=w: x * w, (b, 1, h, n)))
        assert len(keys) == 1
    few, many = leaf(2, 4, 6), leaf(3, 4, 9)
    one = key_of(lambda x: x * few, (2, 1, 4, 6), "decay_mod")
    assert one == key_of(lambda x: x * many, (3, 1, 4, 9), "decay_mod")


def test_meanings_have_keys() -> None:
    """What differs in the generated code differs in the key, and equal meanings share one."""
    shared, again = leaf(DV), leaf(DV, seed=4)

    def other(y: Tensor) -> Tensor:
        return shared * y

    hooks = [
        lambda x: x * shared, lambda x: x * shared + 1, lambda x: x * heads[:, None, None],
        lambda x: x * half, lambda x: x * shared.detach(),
    ]  # fmt: skip
    assert len({key_of(h, SHAPES) for h in hooks}) == len(hooks)
    assert key_of(hooks[0], SHAPES) == key_of(lambda x: x * again, SHAPES)
    assert key_of(other, SHAPES) != key_of(other, SHAPES, "out_mod")
    requests = [
        request(), request("bf16"), request(normalizer=True), request(beta_dtype="f32"),
        request(decay="scalar"), request(decay="channel"),
        request(decay="scalar", decay_dtype="bf16"),
    ]  # fmt: skip
    assert len({linear_key("forward", traced(r)).digest() for r in requests}) == len(requests)


def test_pins() -> None:
    """A program is used again for calls of other sizes, unless a hook depends on them."""
    assert traced(v_mod=lambda x: x * columns + scalar).pins == {}
    assert traced(v_mod=lambda x: x * heads.view(H, 1, 1)).pins == {"H": H}
    assert traced(v_mod=lambda x: x * gate).pins == {"B": 2, "H": H, "L": L}
    keys = leaf(2, 1, 1)
    assert traced(k_mod=lambda x: x * keys).pins == {"Hk": 2}
    assert traced(v_mod=lambda x: x / x.shape[2]).pins == {"B": 2, "H": H, "L": L}
    t = traced(v_mod=lambda x: x * heads.view(H, 1, 1))
    assert t.fits((7, 1, H, 99)) and not t.fits((2, 2, 8, L))


def test_equal_meanings_are_derived_once() -> None:
    """Of calls whose sizes differ; but not where other tensors require gradients."""
    made = []
    for n in (5, 9):
        w = leaf(n, DV, seed=n)
        t = traced(shapes=(2, 1, 4, n), v_mod=lambda x, w=w: x * torch.sigmoid(w))
        assert t.captures[0] is w and t.pins == {"L": n}
        made.append(t.gradients()["v_mod"].dx)
    assert made[0] is made[1]
    fixed = torch.randn(5, DV)
    t = traced(shapes=(2, 1, 4, 5), v_mod=lambda x: x * torch.sigmoid(fixed))
    assert t.gradients()["v_mod"].dx is not made[0] and not t.hook_grads


def test_tracing_computes_no_data() -> None:
    shapes = (64, 64, 64, 1 << 24)  # 8 TB
    t = trace_linear(Spec(q_mod=lambda x: F.elu(x) + 1), request(), shapes)
    assert linear_key("forward", t) == linear_key("forward", traced(q_mod=lambda x: F.elu(x) + 1))


# -- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNITS)
def test_serialized(name: str) -> None:
    """A program that is read again generates the same unit."""
    make, isa = UNITS[name]
    t = trace_linear(*make(), SHAPES)
    text = serialize.dump(t)
    assert serialize.is_program(text)
    t.gradients()
    assert serialize.dump(t) == text  # derivatives are no part of it
    meaning = serialize.load(text)
    assert meaning.isa is None and serialize.load(serialize.with_isa(text, "avx2")).isa == "avx2"
    assert meaning.traced.pins == t.pins and serialize.dump(meaning.traced) == text
    derived = serialize.load(text).traced
    derived.gradients()  # before its forward unit, which must not number its nodes
    for kind in ("forward", "backward"):
        made = unit(meaning.traced, kind, isa)
        assert made == unit(t, kind, isa) == unit(derived, kind, isa)


def test_damaged_text() -> None:
    text = serialize.dump(trace_linear(*gated(), SHAPES))
    for old, new in (
        ('"attnengine_linear":1', '"attnengine_linear":2'),
        ('"d":128', '"d":"128"'),
        ('"d":128', '"d":0'),
        ('"normalizer":false', '"normalizer":0'),
        ('"decay_kind":"channel"', '"decay_kind":"odd"'),
        ('"pins":{', '"pins":{"odd":1,'),
        ('"hooks":{"decay_mod"', '"hooks":{"mod"'),
        ('["input","f32",[],"x"]', '["input","f32",[],"out"]'),
        ("sigmoid", "system"),
        ("}", ""),
    ):
        assert old in text
        with pytest.raises(ValueError, match="linear_attention: the exported program"):
            serialize.load(text.replace(old, new, 1))


# -- plans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "portable"])
def test_plans(isa: str) -> None:
    for element in ("f32", "f64", "bf16", "f16"):
        for decay in ("none", "scalar", "channel"):
            for more in ({}, {"beta_dtype": "f32"}, {"normalizer": True}):
                t = traced(request(element, decay, **more))
                for kind in ("forward", "backward"):
                    key = linear_key(kind, t)
                    plans = linear_candidates(key, t, isa)
                    assert plans[0] == plan_linear(key, t, isa)
                    totals = [p.cost.total for p in plans]
                    assert totals == sorted(totals) and len({p.chunk for p in plans}) == len(plans)
                    for p in plans:
                        assert p.chunk % 16 == 0 and 16 <= p.chunk <= 256
                        assert p.bf16_dot == (element == "bf16" and isa == "avx512_bf16")
                        assert LinearPlan.from_dict(p.as_dict()) == p and p.reasons


def test_wide_heads() -> None:
    for d, dv, name in ((1025, 8, "D=1025"), (8, 2048, "Dv=2048")):
        t = trace_linear(Spec(), LinearRequest("f32", d, dv), SHAPES)
        with pytest.raises(NotImplementedError, match=f"{name}.*1024.*split"):
            plan_linear(linear_key("forward", t), t, "avx2")
    t = trace_linear(Spec(), LinearRequest("f32", 1024, 1024, beta_dtype="f32"), SHAPES)
    for kind in ("forward", "backward"):
        assert linear_candidates(linear_key(kind, t), t, "avx2")


def test_operand_shapes() -> None:
    r = request(decay="channel")
    assert operand_shape("q_mod", r, SHAPES) == (2, 2, L, D)
    assert operand_shape("decay_mod", r, SHAPES) == (2, H, L, D)
    assert operand_shape("decay_mod", request(decay="scalar"), SHAPES) == (2, H, L)
    assert operand_shape("out_mod", r, SHAPES) == (2, H, L, DV)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for stale in GOLDEN.iterdir():
        stale.unlink()
    for file, text in units().items():
        (GOLDEN / file).write_text(text)
        print(f"wrote {GOLDEN / file}")
