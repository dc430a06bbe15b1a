"""When a call traces, when it does not, and which kernels are shared."""

from __future__ import annotations

import copy
import functools
import operator
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import attnengine as ae
from attnengine import dispatch
from attnengine.capture import captures_of, captures_of_spec

TENSORS = (torch.randn(1, 2, 9, 8), torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, 8))


class Counter:
    """How many programs were traced, read from disk and found in memory since it was made."""

    def __init__(self) -> None:
        self.start = vars(dispatch.statistics).copy()

    def __getattr__(self, name: str) -> int:
        return int(getattr(dispatch.statistics, name) - self.start[name])

    @property
    def made(self) -> int:
        return int(self.traced + self.from_disk)


@pytest.fixture
def count() -> Iterator[Counter]:
    yield Counter()


def call(spec: ae.AttentionSpec) -> Tensor:
    return ae.attention(*TENSORS, spec)


def slopes(bias: Tensor) -> ae.AttentionSpec:
    return ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s + bias[h] * (q - k))


def reference(spec: ae.AttentionSpec) -> Tensor:
    return ae.reference(*TENSORS, spec)


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# -- in one process --------------------------------------------------------------------------------


@pytest.mark.compiles
def test_fresh_lambda_is_not_traced_again(count: Counter) -> None:
    call(slopes(torch.ones(2)))
    traced = count.made
    for i in range(5):
        bias = torch.full((2,), float(i))
        near(call(slopes(bias)), reference(slopes(bias)))  # rebound, not remembered
    assert count.made == traced and count.from_memory >= 5


@pytest.mark.compiles
def test_same_spec_asks_nobody(count: Counter) -> None:
    spec = slopes(torch.ones(2))
    call(spec)
    before = vars(dispatch.statistics).copy()
    for _ in range(3):
        call(spec)
    assert vars(dispatch.statistics) == before


@pytest.mark.compiles
def test_captured_tensor_changed_in_place() -> None:
    bias = torch.zeros(2)
    spec = slopes(bias)
    first = call(spec)
    bias.fill_(0.5)
    near(call(spec), reference(spec))
    assert (call(spec) - first).abs().max() > 1e-2


def signature(*callables: Callable) -> tuple:
    return captures_of(*callables).signature


def test_signature_follows_meaning() -> None:
    def made(c: object) -> Callable:
        return lambda s, b, h, q, k: s * c

    assert signature(made(2)) == signature(made(2))
    for a, b in [(2, 3), (2, 2.0), (1, True), (0.0, -0.0), ("a", "b"), ((1, 2), (2, 1))]:
        assert signature(made(a)) != signature(made(b)), (a, b)
    assert signature(made(float("nan"))) == signature(made(float("nan")))
    assert signature(lambda s: s + 1) != signature(lambda s: s + 2)


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(3),
        torch.zeros(2, 1),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, requires_grad=True),
    ],
    ids=["size", "rank", "dtype", "integer", "requires_grad"],
)
def test_signature_follows_the_kind_of_a_captured_tensor(other: Tensor) -> None:
    def made(t: Tensor) -> Callable:
        return lambda s, b, h, q, k: s + t[h]

    assert signature(made(torch.zeros(2))) == signature(made(torch.ones(2)))
    assert signature(made(torch.zeros(2))) != signature(made(other))


def test_same_tensor_twice_is_not_two_tensors() -> None:
    def made(x: Tensor, y: Tensor) -> Callable:
        return lambda s, b, h, q, k: s + x[h] * y[h]

    one, two = torch.zeros(2), torch.zeros(2)
    assert signature(made(one, one)) != signature(made(one, two))
    assert captures_of(made(one, one)).tensors == (one,)


WINDOW = 3
SCALES = {0: 1.0, 1: 2.0}
CONFIG = types.SimpleNamespace(window=3)


class Constants:
    window = 3

    @staticmethod
    def bounded(x: Tensor) -> Tensor:
        return x * WINDOW


SETTINGS = types.ModuleType("settings_of_the_test")
SETTINGS.window = 3  # type: ignore[attr-defined]
SETTINGS.bias = torch.zeros(2)  # type: ignore[attr-defined]


def test_signature_follows_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_name(s, b, h, q, k):
        return s * WINDOW

    def by_dict(s, b, h, q, k):
        return s * SCALES[0]

    def by_module(s, b, h, q, k):
        return s * SETTINGS.window

    def by_class(s, b, h, q, k):
        return s * Constants.window

    def by_static_method(s, b, h, q, k):
        return Constants.bounded(s)

    def nested(s, b, h, q, k):
        def inner(x):
            return x * WINDOW

        return inner(s)

    def through_helper(s, b, h, q, k):
        return helper(s)

    for f in (by_name, by_dict, by_module, by_class, by_static_method, nested, through_helper):
        before = signature(f)
        with monkeypatch.context() as m:
            m.setitem(globals(), "WINDOW", 5)
            m.setitem(SCALES, 0, 7.0)
            m.setattr(SETTINGS, "window", 5)
            m.setattr(Constants, "window", 5)
            assert signature(f) != before, f.__name__
        assert signature(f) == before


def helper(x: Tensor) -> Tensor:
    return x * WINDOW


def test_tensor_in_a_module_is_rebound() -> None:
    def mod(s, b, h, q, k):
        return s + SETTINGS.bias[h]

    assert captures_of(mod).tensors == (SETTINGS.bias,)


def test_module_that_names_itself() -> None:
    SETTINGS.itself = SETTINGS  # type: ignore[attr-defined]

    def mod(s, b, h, q, k):
        return s * SETTINGS.itself.itself.window

    assert not captures_of(mod, mod).opaque


def test_objects_are_opaque() -> None:
    """What cannot be compared is traced anew: never a kernel of another meaning."""

    def made(c: object) -> Callable:
        return lambda s, b, h, q, k: s * c.window  # type: ignore[attr-defined]

    assert captures_of(made(CONFIG)).opaque
    assert not captures_of(made(torch.ones(()))).opaque
    assert not captures_of(lambda s, b, h, q, k: torch.where(q > k, s, 0.0)).opaque
    assert captures_of(operator.methodcaller("tanh")).opaque


@pytest.mark.parametrize(
    "made",
    [
        lambda c: torch.nn.LeakyReLU(c),
        lambda c: torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Softplus(c)),
        lambda c: (lambda m: lambda x: m(x))(torch.nn.Hardtanh(-c, c)),
        lambda c: functools.partial(torch.nn.functional.leaky_relu, negative_slope=c),
        lambda c: (torch.relu, torch.tanh)[c > 1],
        lambda c: (torch.ops.aten.relu, torch.ops.aten.tanh)[c > 1],
        lambda c: (torch.ops.aten.relu.default, torch.ops.aten.tanh.default)[c > 1],
    ],
    ids=["module", "modules", "captured module", "partial", "function", "packet", "overload"],
)
def test_signature_follows_what_torch_made(made: Callable) -> None:
    """Objects of torch's own classes are what their attributes say, not only their class."""
    assert signature(made(1.0)) == signature(made(1.0)) != signature(made(2.0))
    assert not captures_of(made(1.0)).opaque


def test_tensors_of_objects_are_rebound() -> None:
    gate, module = torch.ones(2), torch.nn.PReLU()
    assert captures_of(gate.mul).tensors == (gate,)
    assert captures_of(module, module).tensors == (module.weight,)
    assert signature(gate.mul) == signature(torch.zeros(2).mul) != signature(gate.add)


@pytest.mark.compiles
def test_a_spec_is_copied_without_its_kernels() -> None:
    """A model that holds a spec is copied and pickled after it ran, too."""
    spec = ae.AttentionSpec(q_mod=torch.tanh)
    want = call(spec)
    for other in (copy.copy(spec), copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))):
        assert not any(name.startswith("_") for name in vars(other))
        assert torch.equal(call(other), want)


GATE = torch.ones(())


@pytest.mark.compiles
def test_a_tensor_out_of_the_fingerprints_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program whose tensors only tracing found is not one for the next spec of the same code."""

    def made() -> ae.AttentionSpec:
        return ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s * globals()["GATE"])

    first = call(made())
    monkeypatch.setitem(globals(), "GATE", torch.full((), 3.0))
    near(call(made()), reference(made()))
    assert (call(made()) - first).abs().max() > 1e-2


@pytest.mark.compiles
def test_changed_object_is_traced_anew(count: Counter) -> None:
    class Module:
        bias = torch.tensor([0.5, 1.0])

        def mod(self, s, b, h, q, k):
            return s + self.bias[h] * (q - k)

    m = Module()
    near(call(ae.AttentionSpec(score_mod=m.mod)), reference(ae.AttentionSpec(score_mod=m.mod)))
    m.bias = torch.tensor([1, 2])
    near(call(ae.AttentionSpec(score_mod=m.mod)), reference(ae.AttentionSpec(score_mod=m.mod)))
    assert count.traced == 2


def keys(*specs: ae.AttentionSpec) -> list[tuple[str, str]]:
    """(forward, backward) kernel keys of specs."""
    out = []
    for spec in specs:
        p = dispatch.pipeline(
            spec, captures_of_spec(spec), torch.float32, 8, 8, dispatch.default_isa()
        )
        assert p.backward_key is not None
        out.append((p.forward_key.digest(), p.backward_key.digest()))
    return out


def test_one_meaning_one_kernel() -> None:
    bias, longer = torch.zeros(2), torch.zeros(1, 1, 7)

    def loop(s, b, h, q, k):
        for _ in range(1):
            s = s + (q - k) * bias[h]
        return s

    def named(score, batch, head, row, column):
        distance = row - column
        unused = torch.exp(score)  # noqa: F841
        return score + distance * bias[head] * 1

    written = [
        ae.AttentionSpec(score_mod=f)
        for f in (lambda s, b, h, q, k: s + (q - k) * bias[h], loop, named)
    ]
    assert len(set(keys(*written))) == 1
    masks = [
        ae.AttentionSpec(mask_mod=f)
        for f in (lambda b, h, q, k: q >= k, lambda b, h, i, j: torch.ge(i, j))
    ]
    assert len(set(keys(*masks))) == 1
    sizes = [
        ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s + bias[h]),
        ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s + longer[0, 0][h]),
    ]
    assert len(set(keys(*sizes))) == 2  # another rank


def test_lengths_and_sizes_are_not_in_the_key() -> None:
    def made(n: int) -> ae.AttentionSpec:
        table = torch.zeros(n, n)
        return ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s + table[q, k])

    assert len(set(keys(made(4), made(9)))) == 1


def test_other_meanings_have_other_kernels() -> None:
    bias = torch.zeros(2)
    wide, count_ = bias.double(), bias.long()
    learned = torch.zeros(2, requires_grad=True)
    specs = [
        ae.AttentionSpec(),
        ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s + bias[h]),
        ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s - bias[h]),
        ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s + wide[h]),
        ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s + count_[h]),
        ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s + bias[b]),
        ae.AttentionSpec(mask_mod=lambda b, h, q, k: q >= k),
        ae.AttentionSpec(mask_mod=lambda b, h, q, k: q > k),
        ae.AttentionSpec(row_func=ae.ReLU()),
        ae.AttentionSpec(q_mod=lambda x: x * 2),
        ae.AttentionSpec(k_mod=lambda x: x * 2),
    ]
    found = keys(*specs)
    assert len(set(found)) == len(specs)
    (gradient,) = keys(ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s + learned[h]))
    assert gradient[0] == found[1][0] and gradient[1] != found[1][1]


@pytest.mark.compiles
def test_captured_tensor_of_another_dtype_gets_its_own_kernel() -> None:
    for bias in (torch.tensor([0.5, 1.0]), torch.tensor([1, 2])):
        spec = slopes(bias)
        near(call(spec), reference(spec))


@pytest.mark.compiles
def test_other_dtype_and_head_dim_on_one_spec() -> None:
    spec = slopes(torch.ones(2))
    for _ in range(2):
        for dtype in (torch.float32, torch.float64):
            q, k, v = (x.to(dtype) for x in TENSORS)
            near(ae.attention(q, k, v, spec), ae.reference(q, k, v, spec))


@pytest.mark.compiles
def test_many_threads_and_one_new_spec(count: Counter) -> None:
    """One trace, one compile, the same answer everywhere."""
    start, bias = threading.Barrier(12), torch.tensor([0.25, 0.5])
    results: list[Tensor | BaseException] = []

    def work() -> None:
        spec = ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s + bias[h] * torch.sin(q * k))
        start.wait()
        try:
            with torch.no_grad():
                results.append(ae.attention(*TENSORS, spec))
        except BaseException as e:
            results.append(e)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    want = reference(
        ae.AttentionSpec(score_mod=lambda s, b, h, q, k: s + bias[h] * torch.sin(q * k))
    )
    assert len(results) == 12 and count.made == 1
    for r in results:
        assert isinstance(r, Tensor), r
        near(r, want)


# -- across processes ------------------------------------------------------------------------------

PROGRAM = """
import json, sys, torch, attnengine as ae
from attnengine import dispatch
window, bias = int(sys.argv[1]), torch.arange(2.0)
spec = ae.AttentionSpec(
    score_mod=lambda s, b, h, q, k: s + bias[h],
    mask_mod=lambda b, h, q, k: (q >= k) & (q - k < window),
)
x = torch.ones(1, 2, 5, 8)
out = ae.attention(x, x, x, spec)
print(json.dumps([dispatch.statistics.traced, dispatch.statistics.from_disk, out.sum().item()]))
"""


def run(folder: pathlib.Path, window: int, **more: str) -> list[float]:
    import json

    script = folder / "program.py"
    script.write_text(PROGRAM)
    env = os.environ | {"ATTNENGINE_CACHE_DIR": str(folder / "cache")} | more
    done = subprocess.run(
        [sys.executable, str(script), str(window)],
        env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.compiles
def test_second_process_traces_nothing(tmp_path: pathlib.Path) -> None:
    first = run(tmp_path, 3)
    assert first[:2] == [1, 0]
    second = run(tmp_path, 3, ATTNENGINE_DISABLE_JIT="1", PYTHONHASHSEED="7")
    assert second[:2] == [0, 1] and second[2] == first[2]
    memos = list((tmp_path / "cache").glob("*/text/trace/*"))
    assert memos
    for memo in memos:  # damaged: traced again, the kernel itself is still there
        memo.chmod(0o600)
        memo.write_bytes(memo.read_bytes()[:-9])
    third = run(tmp_path, 3, ATTNENGINE_DISABLE_JIT="1")
    assert third == first
    other = run(tmp_path, 4)
    assert other[:2] == [1, 0]
