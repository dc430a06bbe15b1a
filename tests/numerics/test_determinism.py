"""The same bits at every run and every thread count: forward, backward, captured gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from problems import BF16, F32, Captures, alibi, gathers, operand_mods, operands, results, sink
from torch import Tensor

import attnengine as ae

THREADS = (1, 2, 3)
# One dtype each, those of the modules that other tests use: the order of sums is the same code.
WIDE = pytest.mark.parametrize("dtype", [F32], ids=["f32"])
HALF = pytest.mark.parametrize("dtype", [BF16], ids=["bf16"])


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same_bits(spec: ae.AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captures: Captures) -> None:
    first = results(spec, q, k, v, captures)
    for threads in (*THREADS, 2, 2):
        torch.set_num_threads(threads)
        for name, got in results(spec, q, k, v, captures).items():
            assert torch.equal(got, first[name]), f"{name} with {threads} threads"


SHAPES = {
    "many tasks": dict(B=3, L=130, S=200),
    "one head": dict(B=1, H=1, Hkv=1, L=300, S=310),
    "decode": dict(B=1, L=1, S=4000),
    "decode, one head": dict(B=1, H=1, Hkv=1, L=1, S=3001),
    "one group": dict(B=1, H=4, Hkv=1, L=70, S=260),
    "shared keys": dict(B=7, kv_batch=1, L=33, S=150),
    "tiny": dict(B=1, L=2, S=3),
}


@HALF
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_per_head_slopes(shape: dict, dtype: torch.dtype) -> None:
    spec, captures = alibi()
    same_bits(spec, *operands(dtype, **shape), captures)


@WIDE
def test_many_gathers(dtype: torch.dtype) -> None:
    """One element gathers from the pairs of many tasks."""
    spec, captures = gathers(200, 300, stored=BF16)
    same_bits(spec, *operands(dtype, B=2, L=200, S=300), captures)


@HALF
def test_captured_scalars(dtype: torch.dtype) -> None:
    """Every pair adds to one number."""
    spec, captures = operand_mods()
    same_bits(spec, *operands(dtype, B=2, L=200, S=300), captures)


@HALF
def test_gradient_of_the_row_function(dtype: torch.dtype) -> None:
    spec, captures = sink()
    same_bits(spec, *operands(dtype, B=3, L=130, S=200), captures)


@HALF
def test_the_same_output_on_every_path(dtype: torch.dtype) -> None:
    """Without gradients, with them, with statistics, by a handle: one kernel, one result."""
    spec, _ = alibi()
    q, k, v = operands(dtype, B=2)
    plain = ae.attention(q, k, v, spec)
    with torch.no_grad():
        assert torch.equal(ae.attention(q, k, v, spec), plain)
        assert torch.equal(ae.compile(spec, q, k, v)(q, k, v), plain)
    assert torch.equal(ae.attention(q, k, v, spec, return_aux=True)[0], plain)
    q.requires_grad_()
    assert torch.equal(ae.attention(q, k, v, spec), plain)


@WIDE
def test_batch_and_heads_are_independent(dtype: torch.dtype) -> None:
    """A part of the batch gives the same rows, up to how the work was cut."""
    spec = ae.AttentionSpec()
    q, k, v = operands(dtype, B=4, L=130, S=200)
    whole = ae.attention(q, k, v, spec)
    part = ae.attention(q[1:3, 2:], k[1:3, 1:], v[1:3, 1:], spec)
    limit = 1e-6 if dtype == F32 else 2.0**-7
    torch.testing.assert_close(part, whole[1:3, 2:], rtol=limit, atol=limit)
