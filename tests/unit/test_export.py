"""torch.export: the program in the graph, read where nothing else of the exporter is left."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import pathlib
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import attnengine as ae
from attnengine import clean_thread, dispatch, exported, serialize, variants
from attnengine.capture import captures_of_spec

D = 8


def operands(B: int = 2, L: int = 9, S: int = 11, dtype: torch.dtype = torch.float32) -> tuple:
    g = torch.Generator().manual_seed(B * 10000 + L * 100 + S)
    sizes = ((B, 4, L, D), (B, 2, S, D), (B, 2, S, D))
    return tuple(torch.randn(s, generator=g).to(dtype) for s in sizes)


def spec_of(bias: Tensor) -> ae.AttentionSpec:
    """As in test_torch_integration.py, whose kernels these tests share."""
    return ae.AttentionSpec(
        score_mod=lambda s, b, h, q, k: s + bias[h] * (q - k),
        mask_mod=lambda b, h, q, k: q + 2 >= k,
    )


BIAS = torch.tensor([0.1, 0.2, -0.1, 0.0])
BATCH, LENGTH, KEYS = Dim("batch", min=1, max=64), Dim("length", max=4096), Dim("keys", max=4096)
SHAPES = ({0: BATCH, 2: LENGTH}, {0: BATCH, 2: KEYS}, {0: BATCH, 2: KEYS})
SIZES = ((2, 9, 11), (1, 20, 5), (3, 1, 40))


class Prepared(torch.nn.Module):
    """Calls a handle that was made with the Parameter of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(4 * D, 8 * D)
        self.bias = torch.nn.Parameter(BIAS.clone())
        self.attn = ae.compile(spec_of(self.bias), *operands())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.proj(x).view(*x.shape[:2], 8, D).transpose(1, 2).split([4, 2, 2], 1)
        return self.attn(q, k, v).transpose(1, 2).flatten(2)


class Direct(torch.nn.Module):
    """Calls attention with a spec that is written in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(BIAS.clone())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, aux = ae.attention(q, k, v, spec_of(self.bias), return_aux=True)
        return out + aux.lse[..., None]


class Computed(torch.nn.Module):
    """Captures a tensor that forward computes, with a scale whose sign goes into q."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(BIAS / 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spec = dataclasses.replace(spec_of(self.slope * 2), scale=-0.5)
        return ae.attention(q, k, v, spec)


def attention_node(program: torch.export.ExportedProgram) -> torch.fx.Node:
    target = torch.ops.attnengine.attention.default
    (node,) = (n for n in program.graph.nodes if n.target is target)
    return node


def kinds(program: torch.export.ExportedProgram) -> dict[str, str]:
    return {s.arg.name: s.kind.name for s in program.graph_signature.input_specs}


def gradients(f: Callable, module: torch.nn.Module, *x: Tensor) -> list[Tensor]:
    parameters = [p for _, p in sorted(module.named_parameters())]
    inputs = [t.clone().requires_grad_() for t in x]
    out = f(*inputs)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    return [out, *torch.autograd.grad(out, [*inputs, *parameters], g)]


def same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


# -- in one process --------------------------------------------------------------------------------


@pytest.mark.compiles
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "training"])
def test_handle(strict: bool, grad: bool) -> None:
    """The Parameter in the closure is the program's own: states and optimizers reach it."""
    layer, x = Prepared(), torch.randn(2, 9, 4 * D)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(
            layer, (x,), dynamic_shapes=({0: BATCH, 1: LENGTH},), strict=strict
        )
    if not strict:  # as before a lowering to another runtime
        assert (
            attention_node(program.run_decompositions()).args[4:]
            == attention_node(program).args[4:]
        )
    node = attention_node(program)
    assert serialize.is_program(str(node.args[4])) and len(str(node.args[4])) < 4000
    (captured,) = node.args[3]  # type: ignore[misc]
    assert kinds(program)[captured.name] == "PARAMETER" and not program.constants
    loaded = program.module()
    loaded.load_state_dict({n: p * 1.5 for n, p in layer.state_dict().items()})
    layer.load_state_dict({n: p * 1.5 for n, p in layer.state_dict().items()})
    for B, L in ((2, 9), (1, 30), (5, 3)):
        x = torch.randn(B, L, 4 * D)
        with torch.no_grad():
            assert torch.equal(loaded(x), layer(x))
        same(gradients(loaded, loaded, x), gradients(layer, layer, x))


@pytest.mark.compiles
@pytest.mark.parametrize("module", [Direct, Computed])
def test_spec_written_in_forward(module: type[torch.nn.Module]) -> None:
    layer = module()
    program = torch.export.export(layer, operands(), dynamic_shapes=SHAPES)
    assert "PARAMETER" in kinds(program).values() and not program.constants
    loaded = program.module()
    for size in SIZES:
        x = operands(*size)
        same(gradients(loaded, loaded, *x), gradients(layer, layer, *x))


@pytest.mark.compiles
def test_flex_attention() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, aux = ae.flex_attention(
                *(q, k, v), enable_gqa=True, return_aux=ae.AuxRequest(lse=True)
            )
            return out * aux.lse[..., None]

    program = torch.export.export(Model(), operands(), dynamic_shapes=SHAPES)
    for size in SIZES:
        assert torch.equal(program.module()(*operands(*size)), Model()(*operands(*size)))


@pytest.mark.compiles
def test_captured_constant() -> None:
    """Carried as a constant; a gradient that it did not ask for when exported is not dropped."""
    fixed = torch.tensor([0.5, -0.5, 0.25, 0.0])
    attn = ae.compile(spec_of(fixed), *operands())

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attn(q, k, v)

    program = torch.export.export(Model(), operands(), dynamic_shapes=SHAPES)
    (carried,) = program.constants.values()
    assert torch.equal(carried, fixed)
    for size in SIZES:
        assert torch.equal(program.module()(*operands(*size)), attn(*operands(*size)))
    learned, key = carried.clone().requires_grad_(), attention_node(program).args[4]
    with pytest.raises(ValueError, match=r"captured tensor 0 \(4,\) requires grad.*export"):
        torch.ops.attnengine.attention(*operands(), [learned], key, attn.scale)


@pytest.mark.compiles
def test_opcheck_of_a_carried_program() -> None:
    bias = BIAS.clone().requires_grad_()
    attn = ae.compile(spec_of(bias), *operands())
    q, k, v = (x.requires_grad_() for x in operands())
    args = (q, k, v, [bias], attn.portable, attn.scale)
    torch.library.opcheck(torch.ops.attnengine.attention.default, args)


def test_an_instruction_set_that_was_asked_for_is_carried() -> None:
    spec = spec_of(BIAS)
    captures = captures_of_spec(spec)

    def made(isa: str) -> dispatch.Program:
        return dispatch.program(spec, captures, torch.float32, D, D, isa)

    best = made(dispatch.default_isa())
    assert serialize.load(best.portable).isa is None
    assert exported.program_of(best.portable).isa == dispatch.default_isa()
    weak = "portable" if dispatch.default_isa() != "portable" else "avx2"
    assert serialize.load(made(weak).portable).isa == weak
    assert exported.program_of(serialize.with_isa(best.portable, "portable")).isa == "portable"
    with pytest.raises(ValueError, match="isa='sse'"):
        torch.ops.attnengine.attention(
            *operands(), [BIAS], serialize.with_isa(best.portable, "sse"), 1.0
        )


# -- another process -------------------------------------------------------------------------------

FRESH = """
import json, sys, torch
import attnengine  # the only thing that the file needs
loaded = torch.export.load("model.pt2").module()
data = torch.load("data.pt")
errors = []
for case in data["forward"]:
    with torch.no_grad():
        errors.append((loaded(*case["x"]) - case["out"]).abs().max().item())
inputs = [t.requires_grad_() for t in data["x"]]
grads = torch.autograd.grad(loaded(*inputs), [*inputs, *loaded.parameters()], data["g"])
errors += [(a - b).abs().max().item() for a, b in zip(grads, data["grads"], strict=True)]
from attnengine import dispatch
print(json.dumps([max(errors), dispatch.statistics.traced, dispatch.statistics.from_disk]))
"""


def fresh(folder: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(pathlib.Path(ae.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", FRESH], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": root, **environment},
    )  # fmt: skip


@pytest.mark.compiles
def test_fresh_process(tmp_path: pathlib.Path) -> None:
    """Saved, loaded in another folder by a process that never saw the spec; then a third process
    that may not compile, and one that has no kernel at all."""
    layer = Direct()
    program = torch.export.export(layer, operands(), dynamic_shapes=SHAPES)
    torch.export.save(program, tmp_path / "model.pt2")
    with torch.no_grad():
        forward = [{"x": operands(*s), "out": layer(*operands(*s))} for s in SIZES]
    x = [t.requires_grad_() for t in operands()]
    out = layer(*x)
    g = torch.ones_like(out)
    grads = torch.autograd.grad(out, [*x, layer.bias], g)
    data = {"forward": forward, "x": [t.detach() for t in x], "g": g, "grads": list(grads)}
    torch.save(data, tmp_path / "data.pt")

    done = fresh(tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])[:2] == [0.0, 0]
    done = fresh(tmp_path, ATTNENGINE_DISABLE_JIT="1", PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0.0, 0, 1]  # its sources are remembered
    nothing = str(tmp_path / "empty")
    done = fresh(tmp_path, ATTNENGINE_DISABLE_JIT="1", ATTNENGINE_CACHE_DIR=nothing)
    assert done.returncode != 0
    for words in (
        "KernelUnavailable",
        "exported f32 D8x8",
        "attnengine prebuild",
        "digest ",
        "kernels.py:run",
    ):
        assert words in done.stderr


# -- the text --------------------------------------------------------------------------------------


def everything() -> dict[str, ae.AttentionSpec]:
    def learned(*shape: int) -> Tensor:
        return torch.ones(shape, requires_grad=True)

    return {
        "plain": ae.AttentionSpec(),
        "window": variants.sliding_window(3),
        "dilated": variants.dilated(2, 3),
        "prefix": variants.prefix_lm(torch.tensor([1, 2])),
        "documents": variants.document(torch.zeros(2, 9, dtype=torch.int32)),
        "neighborhood": variants.neighborhood_2d(8, 8, 3),
        "alibi": variants.alibi(learned(4)),
        "softcap": variants.softcap(20.0),
        "t5": variants.t5_bias(learned(32, 4)),
        "bias": variants.learned_bias(learned(4, 9, 9)),
        "sink": variants.sink(learned(4)),
        "sigmoid": variants.sigmoid(torch.tensor(1.0)),
        "relu": variants.relu(),
        "retention": variants.retention(4),
        "operands": ae.AttentionSpec(q_mod=lambda x: x * 2, k_mod=torch.tanh),
        "statistics": ae.AttentionSpec(row_func=ae.Softmax(max_scores=True)),
    }


def pipeline_of(spec: ae.AttentionSpec, element: torch.dtype) -> dispatch.Pipeline:
    return dispatch.pipeline(spec, captures_of_spec(spec), element, D, D, "avx2")


@pytest.mark.parametrize("name", sorted(everything()))
def test_text_gives_the_same_units(name: str) -> None:
    """Byte for byte: what the exporter compiled or prebuilt serves the program that is loaded."""
    for element in (torch.float32, torch.float64, torch.bfloat16):
        made = pipeline_of(everything()[name], element).sources
        meaning = serialize.load(made.meaning)
        assert serialize.dump(meaning.traced, element, D, D) == made.meaning
        again = dispatch.regenerated(meaning, "avx2").sources
        assert (again.forward, again.backward) == (made.forward, made.backward)
        assert (again.grads, again.stored, again.key) == (made.grads, made.stored, made.key)


def test_generating_inside_an_operator() -> None:
    """Its thread skips autograd, which derivatives are traced with: they would all be zero."""
    spec = spec_of(torch.ones(4, requires_grad=True))
    want = pipeline_of(spec, torch.float32).sources
    with torch._C._AutoDispatchBelowAutograd():
        inside = [pipeline_of(spec, torch.float32).sources]
        inside.append(dispatch.regenerated(serialize.load(want.meaning), "avx2").sources)
    with torch.inference_mode():
        inside.append(pipeline_of(spec, torch.float32).sources)
    for made in inside:
        assert (made.forward, made.backward) == (want.forward, want.backward)


FORMAT_1 = (  # ReLU attention as attnengine 0.1 writes it: later versions must read it
    '{"attnengine":1,"element":"f32","D":8,"Dv":8,"captures":[],"nodes":[["input","i64",[],"b"],'
    '["input","i64",[],"h"],["input","i64",[],"q"],["input","i64",[],"k"],["input","f32",[],'
    '"scores"],["const","f32",[],"0000000000000000"],["maximum","f32",[4,5]],["const","f32",[],'
    '"000000000000f03f"],["input","f32",[],"out"]],"mask":null,"score":null,"operands":{},"row":'
    '{"init":{},"weights_online":6,"new_state":{},"factor":7,"out_factor":7,"saved":{},'
    '"weights":6,"merged":{},"merge_factors":[7,7]}}'
)


def test_format_1_is_read() -> None:
    meaning = serialize.load(FORMAT_1)
    row = meaning.traced.row
    assert (meaning.element, meaning.head_dim, meaning.isa) == (torch.float32, 8, None)
    assert row.weights.op == "maximum" and row.weights.vec and not row.factor.vec


DAMAGED: list[tuple[str, Callable[[dict], Any], str]] = [
    ("other format", lambda d: d.update(attnengine=2), "has format 2.*reads format 1.*install"),
    ("element", lambda d: d.update(element="int4"), "element='int4'"),
    ("head dim", lambda d: d.update(D=-1), "D, Dv="),
    ("head dim of text", lambda d: d.update(D="8;"), "D, Dv="),
    ("unknown operation", lambda d: d["nodes"][6].__setitem__(0, "system"), "no such operation"),
    ("later argument", lambda d: d["nodes"][6].__setitem__(2, [99, 2]), "node 6 is"),
    ("negative argument", lambda d: d["nodes"][6].__setitem__(2, [-1, 2]), "node 6 is"),
    ("arguments", lambda d: d["nodes"][6].__setitem__(2, [2]), "1 arguments, expected 2"),
    ("types", lambda d: d["nodes"][6].__setitem__(1, "f32"), "gives f32, expected bool"),
    ("dtype", lambda d: d["nodes"][6].__setitem__(1, "quad"), "node 6 is"),
    ("dtype of another kind", lambda d: d["nodes"][6].__setitem__(1, []), "node 6 is"),
    ("capture of another kind", lambda d: d["captures"].__setitem__(0, [{}, 1, True]), "captured"),
    ("constant", lambda d: d["nodes"][4].__setitem__(3, "2);abort("), "constant"),
    ("large constant", lambda d: d["nodes"][4].__setitem__(3, "9" * 20), "constant"),
    ("input", lambda d: d["nodes"][0].__setitem__(3, "getenv"), "no such input 'getenv'"),
    ("capture", lambda d: d["nodes"][8].__setitem__(3, 1), "captured tensor"),
    ("rank", lambda d: d["captures"].__setitem__(0, ["f32", 2, True]), "1 indices.*of rank 2"),
    ("root", lambda d: d["row"].update(weights=10**6), "weights is node 1000000"),
    ("mask", lambda d: d.update(mask=4), "mask has dtype i64"),
    ("states", lambda d: d["row"]["new_state"].pop("m"), "other names"),
    ("no row", lambda d: d.pop("row"), "row is missing"),
    ("operands", lambda d: d["operands"].update(z=4), "operands"),
]


@pytest.mark.parametrize("change, message", [x[1:] for x in DAMAGED], ids=[x[0] for x in DAMAGED])
def test_damaged_text_is_refused(change: Callable[[dict], Any], message: str) -> None:
    data = json.loads(pipeline_of(spec_of(torch.ones(4, requires_grad=True)), torch.float32)
                      .sources.meaning)  # fmt: skip
    change(data)
    text = json.dumps(data, separators=(",", ":"))
    with pytest.raises(ValueError, match=f"(?s)exported program cannot be read.*{message}"):
        torch.ops.attnengine.attention(*operands(), [torch.ones(4)], text, 1.0)


@pytest.mark.parametrize("text", ['{"attnengine":1', '{"attnengine":' + "[" * 50000])
def test_broken_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not JSON"):
        torch.ops.attnengine.attention(*operands(), [], text, 1.0)


def test_names_in_the_text_never_reach_a_unit() -> None:
    """A file from elsewhere can name states as it likes: C++ is made from numbers."""
    text = pipeline_of(spec_of(torch.ones(4)), torch.float32).sources.meaning
    evil = "\\n}; int main() { abort(); } //"
    for name in ("m", "r", "lse"):
        text = text.replace(f'"{name}":', f'"{evil}{name}":').replace(
            f':{name}"', f':{evil}{name}"'
        )
    meaning = serialize.load(text)
    made = dispatch.regenerated(meaning, "avx2").sources
    assert any("abort" in name for name in meaning.traced.row.init)
    assert "abort" not in made.forward and "abort" not in (made.backward or "")


def test_the_clean_thread(tmp_path: pathlib.Path) -> None:
    """It lives as long as the process, serves forked children and callers within, and holds no
    tensor of work that is done."""
    assert clean_thread.run(lambda: clean_thread.run(lambda: 7)) == 7
    with pytest.raises(KeyError, match="mine"):
        clean_thread.run(lambda: {}["mine"])
    threads = {clean_thread.run(threading.current_thread) for _ in range(3)}
    assert len(threads) == 1 and threads.pop() in threading.enumerate()
    with torch.inference_mode():
        assert not clean_thread.run(torch.is_inference_mode_enabled)
    held = torch.ones(3)
    gone = weakref.ref(held)
    assert clean_thread.run(functools.partial(torch.numel, held)) == 3
    del held
    clean_thread.run(lambda: None)
    gc.collect()
    assert gone() is None
    program = (
        "import os\nfrom attnengine import clean_thread\nclean_thread.run(os.getpid)\n"
        "child = os.fork()\n"
        "if child == 0:\n    os._exit(0 if clean_thread.run(os.getpid) == os.getpid() else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    root = str(pathlib.Path(ae.__file__).parents[1])
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120,
                   env={**os.environ, "PYTHONPATH": root})  # fmt: skip
