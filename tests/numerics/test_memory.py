"""Extra memory of forward + backward: at most twice the bytes of q, k and v, never L x S.

Kernels tell their workspace from sizes, so lengths that are too long to run are tested too; one
real run at 32k tokens shows that the formulas tell the truth.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from problems import BF16, DV, F32, D, operands
from test_row_functions import CASES as ROW_FUNCTIONS
from test_row_functions import mask
from test_variants import BUILD, CASES, FORWARD_ONLY

import attnengine as ae
from attnengine.memory import Memory, memory_of

LIMIT = 2.0  # bytes beyond q, k and v, per byte of q, k and v
LENGTHS = (1024, 8192, 32768, 131072)
WORKER = 2**19  # bytes of tiles that each thread may add: what its second-level cache holds
THREADS = (1, 2, 8)


def meta(
    dtype: torch.dtype, L: int, B: int = 1, H: int = 8, Hkv: int = 8, kv_batch: int | None = None,
    d: int = D, dv: int = DV,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    shapes = (B, H, L, d), (kv_batch or B, Hkv, L, d), (kv_batch or B, Hkv, L, dv)
    return tuple(torch.empty(s, dtype=dtype, device="meta") for s in shapes)


def within(memory: Memory, threads: int, share: float = LIMIT) -> None:
    assert memory.scratch <= share * memory.operands + threads * WORKER, (
        f"{memory.scratch / memory.operands:.2f} times q + k + v with {threads} threads: {memory}"
    )


def check(handle: ae.Handle, captures: Callable | None = None, **shape: int) -> None:
    """All lengths and threads. ``captures(length)``: those whose size grows with the length."""
    program = handle.program
    backward = program.backward_id if program.backward_id >= 0 else None
    for length in LENGTHS:
        tensors = captures(length) if captures is not None else handle.tensors
        for threads in THREADS:
            q, k, v = meta(program.element, length, **shape)
            within(memory_of(handle.id, backward, q, k, v, tensors, threads), threads)


@pytest.mark.parametrize("name, dtype", CASES)
def test_every_variant(name: str, dtype: torch.dtype) -> None:
    spec, _ = BUILD[name](dtype)
    handle = ae.compile(spec, *operands(dtype), backward=(name, dtype) not in FORWARD_ONLY)
    if name == "learned_bias":  # as large as the scores themselves, and so is its gradient
        if dtype == F32:
            return check(handle, lambda n: [torch.empty(8, n, n, device="meta")])
        return check(handle, lambda n: [torch.empty(1, 8, 1, n, dtype=BF16, device="meta")])
    check(handle)
    check(handle, B=4, H=16, Hkv=4)


@pytest.mark.parametrize("make, dtype", ROW_FUNCTIONS)
def test_row_functions(make: Callable, dtype: torch.dtype) -> None:
    """Some have statistics of their own, and passes that need no more memory."""
    spec = ae.AttentionSpec(row_func=make()[0], mask_mod=mask)
    check(ae.compile(spec, *operands(dtype), backward=True))


def test_large_captured_tensor_with_gradient() -> None:
    """As many elements as a relative bias [H, 2 S]: private copies of its gradient count too."""
    spec, _ = BUILD["alibi"](BF16)
    handle = ae.compile(spec, *operands(BF16), backward=True)
    check(handle, lambda n: [torch.empty(16 * n, device="meta")])


WINDOW = ae.variants.sliding_window(256)
RUN = """
import torch, attnengine as ae
def kib(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(x for x in lines if x.startswith(name)).split()[1])
def operands(length):
    return [torch.randn(1, 8, length, 64).to(torch.bfloat16).requires_grad_() for _ in range(4)]
torch.set_num_threads(2)
spec = ae.variants.sliding_window(256)
q, k, v, dout = operands(64)
ae.attention(q, k, v, spec).backward(dout.detach())
q, k, v, dout = operands(32768)
dout = dout.detach()
before = kib("VmRSS")
ae.attention(q, k, v, spec).backward(dout)
print(1024 * (kib("VmHWM") - before))
"""


def test_a_real_run_at_32k_tokens() -> None:
    """Results included. The window makes it short; the workspace does not depend on the mask."""
    sizes = (torch.empty(1, 8, 64, 64, dtype=BF16) for _ in range(3))
    handle = ae.compile(WINDOW, *sizes, backward=True)
    told = handle.memory(*meta(BF16, 32768, d=64, dv=64), threads=2)
    assert told.extra <= LIMIT * told.operands
    run = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    measured = int(run.stdout)
    assert measured <= LIMIT * told.operands
    assert measured == pytest.approx(told.extra, rel=0.1)  # the formulas are those of the kernels
