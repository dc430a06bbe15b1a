"""Group memory: what forward and backward need beyond operands, output and gradients.

Each sample is a process of its own, since the kernel's high-water mark of a process only rises.
"""

from __future__ import annotations

import torch

from . import child
from .cases import DTYPES
from .rows import Row
from .session import Session

HEADS, DIM, LENGTH, QUICK_LENGTH = 8, 64, 32 << 10, 4 << 10
BAR = 2.0  # times the bytes of q, k and v
MIB = 1 << 20

# Argument: heads, length, dim, dtype, threads. A short problem first: kernels are loaded, threads
# and torch's caches exist. Output and gradients are what any implementation returns, so their bytes
# are not extra; statistics, packed operands, partial results and scratch are. All in causal.
PROGRAM = """
import ctypes, gc, json, sys, torch
import attnengine as ae

heads, length, dim, name, threads = sys.argv[1:]
dtype = getattr(torch, name)
torch.set_num_threads(int(threads))
spec = ae.AttentionSpec(mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)

def kib(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

def operands(n):
    made = []
    for _ in range(4):
        x = torch.empty(1, int(heads), n, int(dim), dtype=dtype)
        for head in x[0]:  # no full-size fp32 draft of a 16-bit tensor
            head.copy_(torch.randn(n, int(dim)))
        made.append(x)
    return [x.requires_grad_() for x in made[:3]], made[3]

def both(leaves, grad):
    out = ae.attention(*leaves, spec)
    return [out, *torch.autograd.grad(out, leaves, grad)]

both(*operands(256))
leaves, grad = operands(int(length))
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
with open("/proc/self/clear_refs", "w") as marks:
    marks.write("5")  # VmHWM starts anew from what is resident now
before = kib("VmRSS") * 1024
results = both(leaves, grad)
peak = kib("VmHWM") * 1024
assert all(bool(x.isfinite().all()) for x in results)
kept = sum(x.nbytes for x in results)
given = sum(x.nbytes for x in leaves)
print(json.dumps({"extra": peak - before - kept, "operands": given}))
"""


def extra_bytes(dtype: torch.dtype, length: int, threads: int) -> dict[str, int]:
    """{"extra", "operands"} in bytes: peak beyond inputs, output and gradients; q + k + v."""
    name = str(dtype).removeprefix("torch.")
    return child.run(PROGRAM, HEADS, length, DIM, name, threads, threads=threads)


def row(name: str, extra: int, operands: int) -> Row:
    """Extra memory as a multiple of the bytes of q + k + v."""
    return Row(
        name=name,
        unit="MiB",
        ours=extra / MIB,
        spread=0.0,
        peer="bytes of q + k + v",
        peer_value=operands / MIB,
        ratio=extra / operands,
        bar=BAR,
        at_least=False,
    )


def measure(session: Session) -> None:
    """Causal forward and backward at 32k tokens, H=8, D=64."""
    length = QUICK_LENGTH if session.quick else LENGTH
    for dtype in (torch.bfloat16, torch.float32):
        name = f"memory/{DTYPES[dtype]}/d{DIM}/s{length}"

        def one(name: str = name, dtype: torch.dtype = dtype) -> list[Row]:
            return [row(name, **extra_bytes(dtype, length, session.threads))]

        session.attempt(name, one)
