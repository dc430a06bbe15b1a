"""Plans of CUDA kernels: tiles of rows and keys, warps and stages for ``templates/sm80``.

A candidate is legal where its registers and shared memory fit a block. Its price is the time of an
SM for 1000 scores: that of the busiest resource, and of the others what its warps cannot hide.
Where few rows meet many keys (a decode form) the busiest is the memory, and what counts is how many
bytes are on their way.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from .arch import CUDA, CUDA_OP_COST, SHARED_RESERVED, CudaArch
from .ir import REDUCTIONS, walk
from .key import KernelKey
from .plan import DeviceCost, Plan, Tensor
from .trace import Traced

MAX_HEAD_DIM = 576
WIDE = 256  # beyond, warps share rows and split the columns
HEAD_DIMS = f"head dims up to {MAX_HEAD_DIM} (beyond {WIDE} the values' a multiple of 32)"
ELEMENTS = ("f16", "bf16")
REGISTERS_OF_THREAD = 255
# What an estimate may reach. Addresses, operands on their way to a product and counters take about
# OTHER_REGISTERS beside sums, scores, Q and the states of rows; ptxas of CUDA 13.0 then spills
# nothing in nearly all kernels of the test suite, and where it does the next candidate is taken.
MOST_REGISTERS = 240
OTHER_REGISTERS = 56
# Addresses and values of reads that are on their way together, for each key of a row that a thread
# has: the compiler starts all of them before it uses one.
GATHER_REGISTERS = 4
FUNCTION_REGISTERS = 20  # constants and steps of a function that takes many instructions
LONG_FUNCTION = 10  # instructions
STATIC_SHARED = 3 << 10  # bytes of a block besides: classes of tiles, factors of rows, rounded up
MOST_HELD = 32  # registers of Q as operands: beyond, shared memory is read as fast as it is used
LIVE_KEYS = 1024  # of a row, for estimates
DECODE_KEYS = 8192  # of a row in a cache
# Outputs per worker from which keys are not split: kCrowded of common/policy.h. Tiles of many rows
# come longest first under a causal mask, which balances them as soon as there is one per worker.
CROWDED, CROWDED_ROWS = 32, 1
LATENCY = 900.0  # cycles from the start of a copy to its end
# What reading operands costs beyond its bytes: FlashAttention-2 loses 18 to 28 % with 8 warps of 16
# rows where 4 warps of 32 fit.
LDMATRIX = 1.2
MOST_TOGETHER = 3.0  # warps of a scheduler that still hide each other's waiting
# Bytes that the copies of an SM must have on their way to keep its share of the memory busy: an
# H200's 36 GB/s for about 1.5 us under load. Smaller GPUs need less.
IN_FLIGHT = 55 << 10
TILE_OVERHEAD = 250.0  # cycles: where its keys lie, a barrier, the start of the next copies


def candidates(key: KernelKey, traced: Traced, isa: str) -> list[Plan]:
    """Every legal candidate, cheapest first. Raises NotImplementedError where there is none."""
    arch = CUDA[isa]
    _check(key)
    keys = (16, 32, 64, 128)
    tiles = list(itertools.product((64, 128), keys, (4, 8), (1,), (2, 3, 4)))
    few = key.form.decode_rows
    if is_wide(key):  # 64 rows spill
        tiles = list(itertools.product((16 if few == 16 else 32,), keys, (4, 8), (2, 4), (2, 3, 4)))
    elif few:
        tiles = list(itertools.product((few,), keys, (1, 2, 4), (1,), (2, 3, 4, 5)))
    out: list[Plan] = []
    # The estimate is on the safe side: where it leaves nothing, the smallest excess may do.
    for most in (MOST_REGISTERS, 255, 275, 300, 350, 400):
        found = [_candidate(key, traced, arch, *tile, most) for tile in tiles]
        out = [p for p in found if p is not None]
        if out:
            break
    if not out:
        raise NotImplementedError(
            f"head_dim={key.head_dim}, value_dim={key.value_dim}: no tile fits the "
            f"{arch.shared_bytes_of_block} bytes of shared memory of {arch.name}; split the heads"
        )
    return sorted(out, key=lambda p: (p.cost.total, p.shared_bytes))


def is_wide(key: KernelKey) -> bool:
    return max(key.head_dim, key.value_dim) > WIDE


def is_decode(key: KernelKey) -> bool:
    """Whether tiles have few rows and work is split along the keys: of wide heads always, for their
    tiles have few rows anyway (one batch row is then one sequence)."""
    return key.form.decode_rows > 0 or is_wide(key)


def _check(key: KernelKey) -> None:
    if key.element not in ELEMENTS:
        raise NotImplementedError(
            f"dtype={key.element}: sm_80 templates support float16 and bfloat16; cast q, k and v "
            "with .half() or .bfloat16(), or use CPU tensors (.cpu())"
        )
    for name, value in (("head_dim", key.head_dim), ("value_dim", key.value_dim)):
        if not 1 <= value <= MAX_HEAD_DIM:
            raise NotImplementedError(
                f"{name}={value}: sm_80 templates support 1 <= D, Dv <= {MAX_HEAD_DIM}; "
                "use CPU tensors (.cpu()) or split the heads"
            )
    if is_wide(key) and key.value_dim % 32:
        raise NotImplementedError(
            f"value_dim={key.value_dim}: with head_dim={key.head_dim} sm_80 templates need a "
            "multiple of 32; pad v, use CPU tensors (.cpu()) or split the heads"
        )


def serves_dims(d: int, dv: int) -> bool:
    """Whether CUDA kernels of these head dims exist: HEAD_DIMS says which."""
    return 1 <= min(d, dv) and max(d, dv) <= MAX_HEAD_DIM and (max(d, dv) <= WIDE or dv % 32 == 0)


def pitch(width: int) -> int:
    """Elements from one row of a shared tile to the next (SharedTile in sm80/tile.cuh): where rows
    are no multiple of 128 bytes, an odd number of 16-byte chunks."""
    chunks = _round(width, 16) // 8
    return 8 * (chunks if chunks % 8 == 0 else chunks + 1)


def shared_bytes(
    d: int,
    dv: int,
    block_m: int,
    block_n: int,
    stages: int,
    column_warps: int = 1,
    shared_kv: bool = False,
) -> int:
    """Dynamic shared memory of a block; the template static_asserts the same total."""
    ring = stages * block_n * (pitch(d) + (0 if shared_kv else pitch(dv)))
    exchanged = 4 * column_warps * block_m * block_n if column_warps > 1 else 0
    return 2 * (block_m * pitch(d) + ring) + exchanged


def registers(
    d: int,
    dv: int,
    block_m: int,
    block_n: int,
    warps: int,
    hold_q: bool,
    needs: Needs | None = None,
    column_warps: int = 1,
) -> int:
    """An estimate of a thread's registers; ptxas decides."""
    needs = needs or Needs(3, False, False)
    blocks = block_m * column_warps // warps // 16  # of 16 rows
    sums, scores = blocks * _round(dv, 16) // 2 // column_warps, blocks * block_n // 2
    held = held_registers(d, block_m, warps, column_warps) if hold_q else 4 * blocks
    extra = GATHER_REGISTERS * block_n // 4 if needs.gathers else 0
    extra += FUNCTION_REGISTERS if needs.functions else 0
    return sums + scores + held + 2 * blocks * needs.row_values + OTHER_REGISTERS + extra


def held_registers(d: int, block_m: int, warps: int, column_warps: int = 1) -> int:
    steps = -(-_round(d, 16) // 16 // column_warps)
    return 4 * (block_m * column_warps // warps // 16) * steps


@dataclass(frozen=True)
class Needs:
    """What functors need registers for."""

    row_values: int  # of each row: states, the factor, and what mask and score read of the row
    gathers: bool  # reads of captured tensors for a key
    functions: bool  # a long function of a score


def needs_of(traced: Traced) -> Needs:
    masked, row = [n for n in (traced.mask, traced.score) if n is not None], traced.row
    nodes = list(walk(masked))
    fixed = {
        a.id for n in nodes if n.vec for a in n.args if not a.vec and a.op not in ("const", "splat")
    }
    scored = [n for n in (traced.score, row.weights_online) if n is not None]
    long = any(n.vec and CUDA_OP_COST.get(n.op, (0, 0))[0] >= LONG_FUNCTION and n.op != "gather"
               for n in walk(scored))  # fmt: skip
    gathers = any(n.vec and n.op == "gather" for n in nodes)
    return Needs(1 + len(row.init) + len(fixed), gathers, long)


def static_shared(block_n: int, warps: int, sequences: bool) -> int:
    """Bytes of a block's static shared memory, at most: with sequences each warp has a table of
    where the keys of a tile lie."""
    return STATIC_SHARED + (8 * block_n * warps + 256 if sequences else 0)


def slot_bytes(dv: int, block_m: int, states: int) -> int:
    """A partial result (PartialSlot in cuda/combine.cuh): fp32 sums, states, a flag per row."""
    return 4 * block_m * (_round(dv, 8) + states + 1)


def _candidate(
    key: KernelKey,
    traced: Traced,
    arch: CudaArch,
    block_m: int,
    block_n: int,
    warps: int,
    columns: int,
    stages: int,
    most_registers: int,
) -> Plan | None:
    d, dv = key.head_dim, key.value_dim
    rows = block_m * columns // warps
    if rows not in (16, 32) or block_m * columns % warps or (columns > 1 and dv % (16 * columns)):
        return None
    mods = {"k", "v"} & set(traced.operands)
    shared_kv = key.form.shared_kv and columns > 1 and dv <= d and not mods
    bytes_of_block = shared_bytes(d, dv, block_m, block_n, stages, columns, shared_kv)
    needs = needs_of(traced)
    size = (d, dv, block_m, block_n, warps)
    hold_q = held_registers(d, block_m, warps, columns) <= MOST_HELD
    hold_q = hold_q and registers(*size, True, needs, columns) <= MOST_REGISTERS
    estimate = registers(*size, hold_q, needs, columns)
    decode = is_decode(key)
    sequences = key.form.sequences or decode
    fixed = static_shared(block_n, warps, sequences)
    if bytes_of_block + fixed > arch.shared_bytes_of_block or estimate > most_registers:
        return None
    threads = 32 * warps
    # ptxas gives the small blocks of a decode kernel all registers that a thread can have.
    taken = REGISTERS_OF_THREAD if decode else min(estimate, REGISTERS_OF_THREAD)
    blocks = min(
        arch.registers // (_round(taken, 8) * threads),
        arch.shared_bytes // (bytes_of_block + fixed + SHARED_RESERVED),
        arch.threads // threads,
    )
    shape = (block_m, block_n, warps, stages, blocks, hold_q)
    if decode:
        cost = _decode_cost(key, traced, arch, *shape, shared_kv)
    else:
        cost = _cost(key, traced, arch, *shape)
    merges = traced.row.merged is not None
    slot = slot_bytes(dv, block_m, len(traced.row.init)) if sequences and merges else 0
    dp, dvp = _round(d, 16), _round(dv, 16)
    tensors = (
        Tensor("Q", block_m, d, "shared", 2 * block_m * pitch(d)),
        Tensor("K", block_n, d, "shared", 2 * block_n * pitch(d), stages),
        Tensor(
            "V", block_n, dv, "K's" if shared_kv else "shared",
            0 if shared_kv else 2 * block_n * pitch(dv), stages,
        ),
        Tensor("scores", block_m, block_n, "registers", 4 * block_m * block_n),
        Tensor("output", block_m, dv, "registers", 4 * block_m * dvp),
        Tensor(
            "state", block_m, max(1, len(traced.row.init)), "registers",
            4 * block_m * max(1, len(traced.row.init)),
        ),
    )  # fmt: skip
    reasons: tuple[str, ...] = (
        f"{warps} warps of {rows} rows: each reads a tile of K and V of "
        f"{2 * block_n * (dp + dvp)} bytes for itself",
        f"about {estimate} of {REGISTERS_OF_THREAD} registers of a thread, "
        f"{'Q among them' if hold_q else 'Q read from shared memory for each tile of keys'}",
        f"{bytes_of_block} of {arch.shared_bytes_of_block} bytes of shared memory: {blocks} "
        f"block{'s' if blocks > 1 else ''} of an SM at a time",
        "rows of a group share tiles" if not key.group_varies else
        "the mask depends on the head: a tile has rows of one head",
    )  # fmt: skip
    if columns > 1:
        reasons += (f"{columns} warps share rows: each {dv // columns} columns of the output",)
    if shared_kv:
        reasons += ("V is read with K, whose first columns it is",)
    if decode:
        flying = blocks * (stages - 1) * 2 * block_n * (dp + (0 if shared_kv else dvp))
        reasons += (
            f"{flying} bytes of K and V on their way to an SM, {IN_FLIGHT} keep the memory busy",
        )
    if sequences:
        few = "few outputs or ragged lengths" if decode else "fewer outputs than thread blocks"
        reasons += (
            f"{few}: keys are split and merged, as each launch finds cheaper"
            if merges else "no merge(): an output's keys are never split",
        )  # fmt: skip
    return Plan(
        key.kind, f"cuda:{arch.name}", key.element, "f32", key.element, d, dv, block_m, block_n,
        pack_group=not key.group_varies, split_kv=slot > 0,
        partition="segments" if slot else "tiles", virtual_workers=0,
        scratch_bytes=0, tensors=tensors, cost=cost, reasons=reasons,
        warps=warps, stages=stages, shared_bytes=bytes_of_block, hold_q=hold_q,
        column_warps=columns, shared_kv=shared_kv,
        sequences=sequences, slot_bytes=slot,
        # A block has its share of the SM: the price is of all of them together.
        tile_cycles=math.ceil(cost.total * block_m * block_n / 1000 * blocks) if slot else 0,
        crowded=(CROWDED if decode else CROWDED_ROWS) if slot else 0, blocks=blocks,
    )  # fmt: skip


def pointwise(traced: Traced) -> tuple[float, float]:
    """Instructions of one score: on the arithmetic units, and on that of exp2."""
    row = traced.row
    roots = [row.weights_online, row.factor, *row.new_state.values()]
    if traced.score is not None:
        roots.append(traced.score)
    plain, special = 1.5, 0.0  # the scale, and half of the rounding of two weights
    for n in walk(roots):
        if n.op in REDUCTIONS:
            plain += 1.0
        elif n.vec and n.op not in ("input", "const", "cast", "detach", "splat"):
            more, exps = CUDA_OP_COST.get(n.op, (1.0, 0.0))
            plain, special = plain + more, special + exps
    return plain, special


def _cost(
    key: KernelKey,
    traced: Traced,
    arch: CudaArch,
    block_m: int,
    block_n: int,
    warps: int,
    stages: int,
    blocks: int,
    hold_q: bool,
) -> DeviceCost:
    d, dv = _round(key.head_dim, 16), _round(key.value_dim, 16)
    scores = block_m * block_n
    plain, special = pointwise(traced)
    reductions = sum(n.op in REDUCTIONS for n in walk(list(traced.row.new_state.values())))

    tensor = scores * (d + dv) / arch.tensor_fma
    exp = scores * special / arch.exp
    # Sums are scaled once a tile; a reduction of a row takes two exchanges, 8 rows at a time.
    alu = (scores * plain + block_m * dv) / arch.fma + block_m / 8 * 2 * reductions
    tile = 2.0 * block_n * (d + dv)
    shared = (tile * (1 + warps) + (0 if hold_q else 2 * block_m * d)) / arch.shared_bytes_per_cycle
    shared *= LDMATRIX
    memory = (tile + 2 * block_m * (d + dv) * block_n / LIVE_KEYS) / arch.l2_bytes_per_cycle
    # The warps of a scheduler overlap one's products with another's functions, up to a point;
    # copies from the L2 cache run beside both.
    parts = (tensor, exp, alu, shared)
    together = min(MOST_TOGETHER, blocks * warps / arch.schedulers)
    busy = max(memory, max(parts) + (sum(parts) - max(parts)) / (1 + together))
    # Every tile: a barrier and the start of the next copies, hidden by other blocks; and what the
    # copies need beyond the tiles that are computed meanwhile.
    exposed = max(0.0, LATENCY - (stages - 1) * blocks * busy)
    overhead = (150.0 + exposed) / blocks
    # Where a mask's edge crosses a tile, half of it is computed for nothing.
    if traced.mask is not None:
        overhead += (block_m + block_n) / 2 / LIVE_KEYS * busy
    unit = 1000.0 / scores
    return DeviceCost(
        tensor * unit, exp * unit, alu * unit, shared * unit, memory * unit, overhead * unit,
        (busy + overhead) * unit,
    )  # fmt: skip


def _decode_cost(
    key: KernelKey,
    traced: Traced,
    arch: CudaArch,
    block_m: int,
    block_n: int,
    warps: int,
    stages: int,
    blocks: int,
    hold_q: bool,
    shared_kv: bool,
) -> DeviceCost:
    d, dv = _round(key.head_dim, 16), _round(key.value_dim, 16)
    scores = block_m * block_n
    plain, special = pointwise(traced)
    # Units of schedulers without a warp stand idle.
    idle = max(1.0, arch.schedulers / (blocks * warps))
    tensor = idle * scores * (d + dv) / arch.tensor_fma
    exp = idle * scores * special / arch.exp
    alu = idle * (scores * plain + block_m * dv) / arch.fma
    tile = 2.0 * block_n * (d + dv)
    shared = (tile * (1 + warps) + (0 if hold_q else 2 * block_m * d)) / arch.shared_bytes_per_cycle
    shared *= LDMATRIX
    read = tile if not shared_kv else 2.0 * block_n * d
    flying = min(1.0, blocks * (stages - 1) * read / IN_FLIGHT)
    memory = read / (arch.dram_bytes_per_cycle * flying)
    parts = (tensor, exp, alu, shared)
    together = min(MOST_TOGETHER, blocks * warps / arch.schedulers)
    busy = max(parts) + (sum(parts) - max(parts)) / (1 + together)
    overhead = TILE_OVERHEAD / blocks
    # A sequence's last tile is half empty on the average.
    total = (max(memory, busy) + overhead) * (1 + block_n / 2 / DECODE_KEYS)
    unit = 1000.0 / scores
    return DeviceCost(
        tensor * unit, exp * unit, alu * unit, shared * unit, memory * unit, overhead * unit,
        total * unit,
    )  # fmt: skip


def _round(x: int, to: int) -> int:
    return -(-x // to) * to
