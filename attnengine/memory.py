"""How much memory a call takes beyond its operands, from sizes alone: nothing is allocated. And how
much of it the process keeps for later calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import library


@dataclass(frozen=True)
class Memory:
    """Bytes of one forward and backward call, by what they hold.

    ``out``, ``gradients`` (of q, k, v) and ``captured_gradients`` are results; ``statistics`` are
    kept from forward for backward; each workspace lives while its launch runs. The backward one
    has, beside the kernel's own, per-batch gradients of a K and V that the whole batch shares, and
    the sums of captured 16-bit tensors.
    """

    operands: int
    out: int
    statistics: int
    forward_workspace: int
    gradients: int = 0
    captured_gradients: int = 0
    backward_workspace: int = 0

    @property
    def scratch(self) -> int:
        """The most that is held at one time beside operands and results."""
        return self.statistics + max(self.forward_workspace, self.backward_workspace)

    @property
    def extra(self) -> int:
        """The same with the results: out and the gradients of q, k and v."""
        forward = self.out + self.statistics + self.forward_workspace
        backward = self.out + self.statistics + self.gradients + self.backward_workspace
        return max(forward, backward)


def memory_of(
    forward: int,
    backward: int | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captures: Sequence[torch.Tensor],
    threads: int,
) -> Memory:
    """What a call of two kernels (ids) takes; q, k, v and captures give sizes and may be meta."""
    B, heads, length, _ = q.shape
    sizes = (B, heads, k.shape[1], length, k.shape[2])
    shared = B > 1 and k.shape[0] == 1 and v.shape[0] == 1
    info = library.kernel_info(forward if backward is None else backward)
    accumulator = 8 if q.dtype == torch.float64 else 4
    operands = sum(map(_bytes, (q, k, v)))
    out = B * heads * length * v.shape[3] * q.element_size()
    statistics = info.stats * B * heads * length * accumulator
    ahead = library.workspace_bytes(forward, sizes, captures, shared_keys=shared, threads=threads)
    if backward is None:
        return Memory(operands, out, statistics, ahead)
    behind = library.workspace_bytes(backward, sizes, captures, shared_keys=shared, threads=threads)
    behind += sum(B * _bytes(x) for x in (k, v) if x.shape[0] != B)
    wanted = [t for i, t in enumerate(captures) if info.grad_mask >> i & 1]
    behind += sum(t.numel() * accumulator for t in wanted if t.element_size() != accumulator)
    captured = sum(map(_bytes, wanted))
    return Memory(operands, out, statistics, ahead, operands, captured, behind)


def _bytes(x: torch.Tensor) -> int:
    return math.prod(x.shape) * x.element_size()


def keep_at_most(size: int) -> None:
    """From now on the process keeps no more than so many bytes for later calls: at first a
    thirty-second of the machine's memory, 1 GB at most.

    Large workspaces on the CPU, and results and gradients of linear attention and token statistics,
    from 2 MB on, go back to blocks that are kept, since the first touch of fresh memory takes
    longer than such a call. torch cannot make the storage of such a result larger (``resize_``).
    The newest are kept; blocks of more than ``size`` bytes never are. 0 keeps none, and lets torch
    allocate the results. Raises ValueError for a negative number.
    """
    if size < 0:
        raise ValueError(f"size={size}: the bytes to keep must be at least 0")
    library.host.keep_at_most(size)


def kept() -> int:
    """Bytes that the process keeps at the moment, and that nothing uses."""
    return library.host.kept_bytes()
