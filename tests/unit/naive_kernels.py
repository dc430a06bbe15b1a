"""A small hand-written kernel module under the operators, and the same attention in float64."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest
import torch
from torch import Tensor

from attnengine import library, ops

HERE = pathlib.Path(__file__).parent
ELEM = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
D, DV, BUCKETS = 8, 5, 3


def operands(
    dtype: torch.dtype = torch.float32,
    B: int = 2,
    Hq: int = 4,
    Hkv: int = 2,
    L: int = 7,
    S: int = 9,
    Bkv: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    kv = B if Bkv is None else Bkv
    q = torch.randn(B, Hq, L, D, generator=g, dtype=acc).to(dtype)
    k = torch.randn(kv, Hkv, S, D, generator=g, dtype=acc).to(dtype)
    v = torch.randn(kv, Hkv, S, DV, generator=g, dtype=acc).to(dtype)
    table = torch.randn(Hq, BUCKETS, generator=g, dtype=acc)
    bucket = torch.randint(0, BUCKETS, (S,), generator=g)
    return q, k, v, [table, bucket]


SCALE = 0.3


def dense(q: Tensor, k: Tensor, v: Tensor, table: Tensor, bucket: Tensor) -> tuple[Tensor, Tensor]:
    """The same attention in float64 autograd: (out, lse)."""
    group = q.shape[1] // k.shape[1]
    q, k, v, table = (x.double() for x in (q, k, v, table))
    k, v = (x.expand(q.shape[0], *x.shape[1:]).repeat_interleave(group, 1) for x in (k, v))
    score = q @ k.mT * SCALE + table[:, bucket][:, None, :]
    return score.softmax(-1) @ v, score.logsumexp(-1)


Kernels = dict[tuple[torch.dtype, str], int]


def compiled(folder: pathlib.Path) -> Kernels:
    """The ids of naive_kernel.cpp for each dtype and direction. Skips without a compiler."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    jobs, loaded = [], {}
    for dtype, elem in ELEM.items():
        for kind in ("forward", "backward"):
            path = folder / f"{kind}{elem}.so"
            flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{library.templates_dir()}"]
            defines = [f"-DELEM={elem}", f"-DBACKWARD={int(kind == 'backward')}"]
            defines += [f"-DHEAD_DIM={D}", f"-DVALUE_DIM={DV}"]
            source = str(HERE / "naive_kernel.cpp")
            jobs.append((dtype, kind, path, [compiler, *flags, *defines, source, "-o", str(path)]))
    for job in [subprocess.Popen(j[3]) for j in jobs]:
        assert job.wait() == 0
    for dtype, kind, path, _ in jobs:
        table = torch.float64 if dtype == torch.float64 else torch.float32
        loaded[dtype, kind] = library.load_kernel(path, [(2, table), (1, torch.int64)])
    return loaded


def forward(kernels, q, k, v, captures, stats=True):
    return ops.forward(q, k, v, captures, kernels[q.dtype, "forward"], SCALE, stats)
