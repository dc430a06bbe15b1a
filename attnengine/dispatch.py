"""From a spec to a loaded kernel, once per meaning: the memory and the disk know it afterwards.

What operands must be, and which program and which captured tensors a call on them has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .capture import Captures
from .program import SEQUENCES, Program, generator, program, statistics
from .spec import AttentionSpec
from .stages import DENSE, Pipeline, Sources, captures_for, pipeline, regenerated
from .target import default_isa, isa_of

SUPPORTED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CUDA_SUPPORTED = (torch.bfloat16, torch.float16)


def shares_keys(k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether v is the first columns of k in memory."""
    return (
        v.shape[3] <= k.shape[3]
        and k.stride() == v.stride()
        and k.numel() > 0
        and k.data_ptr() == v.data_ptr()
    )


def bound_tensors(made: Program, captures: Captures) -> list[torch.Tensor]:
    """The captured tensors of a spec in the order in which its kernels number them."""
    known = len(captures.tensors)
    return [
        captures.tensors[at] if at < known else made.extra[at - known]
        for at in made.sources.positions
    ]


def check_operands(q: Any, k: Any, v: Any) -> None:
    """What must hold before a kernel can be chosen. Raises TypeError, ValueError,
    NotImplementedError."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} must be 4-D [B, H, L, D], got shape {tuple(x.shape)}; add or merge "
                "dimensions with unsqueeze/reshape"
            )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}; "
            "move them with .to()"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in SUPPORTED:
        raise TypeError(
            f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; supported are "
            "torch.float32, torch.float64, torch.bfloat16 and torch.float16: cast with .to()"
        )
    if q.device.type == "cuda" and q.dtype not in CUDA_SUPPORTED:
        raise NotImplementedError(
            f"q is {q.dtype} on {q.device}; CUDA kernels support torch.float16 and torch.bfloat16: "
            "cast q, k and v with .half() or .bfloat16(), or use CPU tensors (.cpu())"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(
            f"k has head_dim {k.shape[3]} but q has {q.shape[3]} (q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}); the last dimension of q and k must agree"
        )


def resolve(
    spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, isa: str | None = None
) -> tuple[Program, list[torch.Tensor]]:
    """The program of ``spec`` for these operands, and its captured tensors in kernel order."""
    check_operands(q, k, v)
    captures = captures_for(spec)
    made = program(spec, captures, q.dtype, q.shape[3], v.shape[3], isa or isa_of(q))
    return made, bound_tensors(made, captures)


def tensors_require_grad(tensors: Sequence[torch.Tensor]) -> bool:
    return any(t.requires_grad for t in tensors)


__all__ = [
    "CUDA_SUPPORTED", "DENSE", "SEQUENCES", "SUPPORTED", "Pipeline", "Program", "Sources",
    "bound_tensors", "captures_for", "check_operands", "default_isa", "generator", "pipeline",
    "program", "regenerated", "resolve", "shares_keys", "statistics", "tensors_require_grad",
]  # fmt: skip
