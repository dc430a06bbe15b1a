"""From a kernel key to a plan: legal candidates, the cost of each by resource, the cheapest.

A plan is every decision that the generated code needs, in one frozen value. It depends on the key
and the target, never on lengths, so one kernel serves every shape.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from . import diagonal
from .arch import CPU, CpuArch
from .derive import Derived
from .ir import Node
from .key import KernelKey
from .trace import Traced

# Work is cut for this many workers whatever the machine has, so results do not depend on threads.
VIRTUAL_WORKERS = 32
MICRO_ROWS = 6  # rows of the register tile in templates/cpu/gemm.h
PANEL_VECTORS = 4  # its columns, in vectors
MAX_HEAD_DIM = 576
_BYTES = {"f32": 4, "f64": 8, "bf16": 2}


@dataclass(frozen=True)
class Tensor:
    """Where one intermediate tensor of the kernel lives: tile shape, memory level, stages."""

    name: str
    rows: int
    columns: int
    level: str
    bytes: int
    stages: int = 1


@dataclass(frozen=True)
class Cost:
    """Predicted cycles per 1000 scores of one core, by resource."""

    multiply: float
    pointwise: float
    cache: float
    overhead: float

    @property
    def total(self) -> float:
        return self.multiply + self.pointwise + self.cache + self.overhead


@dataclass(frozen=True)
class DeviceCost:
    """Predicted cycles per 1000 scores of one SM: of each resource alone, and of all together."""

    tensor: float
    exp: float
    pointwise: float
    shared: float
    memory: float
    overhead: float
    total: float


@dataclass(frozen=True)
class Plan:
    """Every decision of one kernel. C++ receives the same fields as a trait struct."""

    kind: str
    target: str
    element: str
    accumulator: str
    multiply: str
    head_dim: int
    value_dim: int
    block_m: int
    block_n: int
    pack_group: bool
    split_kv: bool
    partition: str
    virtual_workers: int
    scratch_bytes: int
    tensors: tuple[Tensor, ...]
    cost: Cost | DeviceCost
    reasons: tuple[str, ...]
    warps: int = 0  # of a CUDA thread block, which split its rows
    stages: int = 0  # tiles of keys and values in its ring
    shared_bytes: int = 0  # its dynamic shared memory
    hold_q: bool = False  # its warps keep Q as operands in registers
    column_warps: int = 1  # so many warps share rows, and split the columns of K and V
    shared_kv: bool = False  # V is the first columns of K
    sequences: bool = False  # rows and keys are those of ae_params.sequences
    slot_bytes: int = 0  # of a partial result; 0: an output's keys are never split
    tile_cycles: int = 0  # of one tile of keys, for the choice of the schedule at each launch
    crowded: int = 0  # outputs per worker from which none is split
    blocks: int = 0  # thread blocks of an SM at a time, estimated

    @property
    def bf16_dot(self) -> bool:
        return self.multiply == "bf16"

    @property
    def lanes(self) -> int:
        """Values of the accumulator type in one register."""
        isa = self.target.partition(":")[2]
        return CPU[isa].register_bytes // _BYTES[self.accumulator]

    def as_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict) -> Plan:
        data = dict(data)
        data["tensors"] = tuple(Tensor(**t) for t in data["tensors"])
        cost = data["cost"]
        data["cost"] = DeviceCost(**cost) if "tensor" in cost else Cost(**cost)
        data["reasons"] = tuple(data["reasons"])
        return Plan(**{f.name: data[f.name] for f in fields(Plan)})


def plan(key: KernelKey, traced: Traced, derived: Derived | None, isa: str) -> Plan:
    """The cheapest candidate for ``key`` on ``isa``."""
    return candidates(key, traced, derived, isa)[0]


def candidates(key: KernelKey, traced: Traced, derived: Derived | None, isa: str) -> list[Plan]:
    """Every legal candidate, cheapest first."""
    if not 1 <= key.head_dim <= MAX_HEAD_DIM or not 1 <= key.value_dim <= MAX_HEAD_DIM:
        name = "head_dim" if not 1 <= key.head_dim <= MAX_HEAD_DIM else "value_dim"
        value = key.head_dim if name == "head_dim" else key.value_dim
        raise NotImplementedError(
            f"{name}={value}: cpu templates support 1 <= D, Dv <= {MAX_HEAD_DIM}; "
            "split the heads or pad the tensors"
        )
    arch = CPU[isa]
    work = _pointwise(key, traced, derived, arch)
    out = []
    for block_m in (24, 48, 96):
        # The mask is evaluated on whole tiles: 512 keys lose 1 to 3 % there, and win 2 % elsewhere.
        for block_n in (64, 128, 256) if traced.mask is not None else (64, 128, 256, 512):
            out.append(_candidate(key, traced, derived, arch, block_m, block_n, work))
    return sorted(out, key=lambda p: (p.cost.total, p.scratch_bytes))


def _pointwise(key: KernelKey, traced: Traced, derived: Derived | None, arch: CpuArch) -> float:
    """Vector instructions per vector of scores."""
    lanes = arch.register_bytes // (8 if key.element == "f64" else 4)
    row = traced.row
    roots: list[Node] = [traced.score] if traced.score is not None else []
    if derived is None:
        roots += [row.weights_online, *row.new_state.values()]
    else:
        roots += [derived.weights, derived.dscore, *(s.value for s in derived.scatters)]
    kept = diagonal.find(traced, derived, lanes)
    return diagonal.instructions(roots, lanes, kept) + 6  # load, scale, liveness, store


def _candidate(
    key: KernelKey,
    traced: Traced,
    derived: Derived | None,
    arch: CpuArch,
    block_m: int,
    block_n: int,
    work: float,
) -> Plan:
    d, dv = key.head_dim, key.value_dim
    accumulator = "f64" if key.element == "f64" else "f32"
    dot = key.element == "bf16" and arch.isa == "avx512_bf16"
    multiply = "bf16" if dot else accumulator
    acc, mul = _BYTES[accumulator], _BYTES[multiply]
    lanes = arch.register_bytes // acc
    backward = key.kind == "backward"
    products = 3 * d + 2 * dv if backward else d + dv
    scores = block_m * block_n

    full = math.ceil(block_m / MICRO_ROWS) * MICRO_ROWS
    columns = _round(d, lanes) + _round(dv, lanes)
    flops = 2.0 * scores * products * (full / block_m) * (columns / (d + dv))
    multiply_cycles = flops / arch.flops_per_cycle(multiply) * 1.15  # loop ends, C tile traffic
    pointwise_cycles = work * scores / lanes / arch.vector_ops
    # The score tile is written by one product, swept by the row function, read by the next.
    tile_bytes = scores * (acc + (mul if dot else 0)) * (2 if backward else 1)
    panel_bytes = 4 * lanes * mul * max(d, dv)
    sweeps = 6 if backward else 4
    spill = max(0.0, 1.0 - (arch.l1_bytes - panel_bytes) / tile_bytes)
    operand_bytes = block_n * (d + dv) * mul
    if backward:  # K in two layouts, V, and the accumulators of dK and dV
        operand_bytes = block_n * ((2 * d + dv) * mul + (d + dv) * acc)
    out_bytes = block_m * dv * acc * 2
    if backward:  # Q and dO in two layouts, and dQ read and written
        out_bytes = block_m * ((2 * d + 2 * dv) * mul + 2 * d * acc)
    resident = operand_bytes + tile_bytes + out_bytes
    operand_rate = arch.l2_bytes_per_cycle
    if resident > arch.l2_bytes / 2:
        operand_rate = arch.l3_bytes_per_cycle
    cache_cycles = (
        sweeps * tile_bytes * spill / arch.l2_bytes_per_cycle
        + operand_bytes / operand_rate
        + out_bytes / arch.l2_bytes_per_cycle
    )
    # Horizontal reductions and row scalars of every row; calls, packing loops and ends of products
    # of every tile (measured: the time that is left when the other terms are taken away).
    overhead = block_m * 60.0 + (4000.0 if backward else 2500.0)
    # Where a mask's edge crosses a tile, panels of columns are computed that are half empty; rows
    # have 1024 live keys in this estimate.
    edge = 0.0
    if traced.mask is not None:
        edge = (block_m + PANEL_VECTORS * lanes) / 2 / 1024 * (multiply_cycles + pointwise_cycles)
    unit = 1000.0 / scores
    cost = Cost(
        multiply_cycles * unit, pointwise_cycles * unit, cache_cycles * unit,
        (overhead + edge) * unit,
    )  # fmt: skip
    merge = traced.row.merged is not None
    kept = diagonal.find(traced, derived, lanes)
    tensors = (
        Tensor("Q", block_m, d, "L2", block_m * _round(d, lanes) * mul),
        Tensor("K", block_n, d, "L2", block_n * _round(d, 2 if dot else 1) * mul),
        Tensor("V", block_n, dv, "L2", block_n * _round(dv, lanes) * mul),
        Tensor("scores", block_m, block_n, "L1" if spill <= 0 else "L1+L2", scores * acc),
        Tensor("weights", block_m, block_n, "L1" if spill <= 0 else "L1+L2", scores * mul),
        Tensor("output", block_m, dv, "L2", block_m * _round(dv, lanes) * acc),
        Tensor("state", block_m, max(1, len(traced.row.init)), "L1", block_m * 8 * acc),
    )
    reasons = (
        f"scores of {block_m} x {block_n} take {tile_bytes} bytes of {arch.l1_bytes} in L1",
        f"K and V tiles take {operand_bytes} bytes, shared by {block_m} rows",
        f"{multiply} products, {block_m // MICRO_ROWS} blocks of {MICRO_ROWS} rows",
        "rows of a group share tiles" if not key.group_varies else
        "the mask depends on the head: a tile has rows of one head",
        (f"few or uneven outputs: {VIRTUAL_WORKERS} virtual workers share their keys and the parts "
         "are merged; each call chooses the policy (handle.schedule prints it)"
         if merge else "no merge(): an output's keys are never split") if not backward else
        "KV chunks rotate over row chunks; sums have one order",
        f"{len(kept.tables)} values and {len(kept.sums)} gradients depend on kv_idx - q_idx alone: "
        "once per diagonal, not per pair" if kept.tables or kept.sums else
        "no value costs enough to be kept per diagonal",
    )  # fmt: skip
    return Plan(
        key.kind, f"cpu:{arch.isa}", key.element, accumulator, multiply, d, dv, block_m, block_n,
        pack_group=not key.group_varies,
        split_kv=merge and not backward,
        partition="segments" if merge and not backward else "tiles",
        virtual_workers=VIRTUAL_WORKERS,
        scratch_bytes=scratch_bytes(key.kind, d, dv, block_m, block_n, acc, lanes, dot),
        tensors=tensors, cost=cost, reasons=reasons,
    )  # fmt: skip


def _round(x: int, to: int) -> int:
    return -(-x // to) * to


def scratch_bytes(
    kind: str, d: int, dv: int, m: int, n: int, acc: int, lanes: int, dot: bool
) -> int:
    """Bytes of one worker's scratch; the templates static_assert the same total."""
    if kind == "backward":
        return m * n * (2 * acc + (6 if dot else 0))
    mul = 2 if dot else acc
    parts = [
        m * _round(d, lanes) * mul,
        m * n * acc,
        m * n * 2 if dot else 0,
        m * _round(dv, lanes) * acc,
        n * _round(d, 2 if dot else 1) * mul,
        n * _round(dv, lanes) * mul,
    ]
    return sum(_round(p, 64) for p in parts)
