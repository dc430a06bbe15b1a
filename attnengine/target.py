"""What a call is compiled for: this CPU's instruction set, or its CUDA device's architecture."""

from __future__ import annotations

import functools

import torch

from . import library, settings
from .arch import CUDA, ISAS, cuda_target


def default_isa() -> str:
    return settings.isa_override() or library.cpu_isa()


@functools.cache
def device_isa(index: int) -> str:
    """What kernels of CUDA device ``index`` are planned for. Raises NotImplementedError."""
    return cuda_target(library.device_capability(index))


def isa_of(q: torch.Tensor) -> str:
    """The target of a call on ``q``: that of its CUDA device, else this CPU's instruction set."""
    return device_isa(q.device.index) if q.device.type == "cuda" else default_isa()


def check_target(target: str, q: torch.Tensor) -> None:
    """Raises ValueError unless ``target`` is known and q is where its kernels run."""
    if target not in CUDA:
        raise ValueError(
            f"target={target!r}: CUDA targets are {', '.join(map(repr, CUDA))}; target=None takes "
            "that of the tensors' device"
        )
    if q.device.type == "cuda":
        found = device_isa(q.device.index)
        if CUDA[target].shared_bytes_of_block > CUDA[found].shared_bytes_of_block:
            raise ValueError(
                f"target={target!r}: its kernels may take more shared memory than {q.device} has; "
                f"use target={found!r} or target=None"
            )
    elif library.driver_name() != "simulator":
        raise ValueError(
            f"target={target!r}: q is on {q.device}, and no simulator of CUDA kernels is "
            "installed; move q, k and v to a GPU (.cuda()), or use target=None"
        )


def check_isa(isa: str) -> None:
    """Raises ValueError unless ``isa`` is known and this CPU runs it. A CUDA target is taken as it
    is: the call's device tells."""
    if isa in CUDA:
        return
    best = ISAS.index(library.cpu_isa())
    if isa not in ISAS or ISAS.index(isa) < best:
        raise ValueError(
            f"isa={isa!r}: this CPU runs {', '.join(repr(i) for i in ISAS[best:])}; "
            "isa=None chooses the best"
        )
