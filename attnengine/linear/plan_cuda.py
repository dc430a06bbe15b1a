"""Plans of CUDA kernels of linear attention (``templates/linear``).

Chunks have 64 tokens, as the fragments of four warps have rows. What is left to choose is how many
value columns a thread block of the output pass has: scores are computed again for each block of
columns, and its share of the state lies in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..arch import CUDA, SHARED_RESERVED, CudaArch
from ..plan import Tensor
from .key import LinearKey
from .plan import LinearCost, LinearPlan
from .trace import TracedLinear

MAX_DIM = 256  # of k and of v
ELEMENTS = ("f16", "bf16")
CHUNK = 64
THREADS = 128
VALUE_BLOCKS = (128, 64, 32)
STATE_TILE, SPLIT_TILE = 64, 32  # rows and columns of S that a block of the state pass has
STATIC_SHARED = 2 << 10  # bytes of a block besides
SOLVE_SHARED = 18 << 10  # and of the pass that solves
STEP_TOKENS = 8  # up to here the recurrence itself is cheaper than two passes over chunks

NO_GRADIENT = (
    "CUDA kernels of linear attention have no gradient in this version: call under "
    "torch.no_grad(), detach() what requires grad, or use CPU tensors (.cpu())"
)


@dataclass(frozen=True)
class LinearCudaPlan(LinearPlan):
    """A plan of CUDA kernels: the state pass, in large and in small tiles, the outputs of chunks,
    and the step for few tokens. The delta rule has a pass that solves in place of the small tiles.
    """

    value_block: int = 32
    output_bytes: int = 0  # dynamic shared memory of each pass
    state_bytes: int = 0
    split_bytes: int = 0


def linear_cuda_candidates(key: LinearKey, traced: TracedLinear, isa: str) -> list[LinearCudaPlan]:
    """Every legal candidate, cheapest first, for ``isa``, a name of :data:`attnengine.arch.CUDA`.

    Raises NotImplementedError for what CUDA kernels do not have: backward, fp32 and fp64 operands,
    head dims above MAX_DIM.
    """
    arch, r = CUDA[isa], key.request
    if key.kind != "forward":
        raise NotImplementedError(NO_GRADIENT)
    if r.element not in ELEMENTS:
        raise NotImplementedError(
            f"dtype={r.element}: CUDA kernels of linear attention support float16 and bfloat16; "
            "cast q, k and v with .half() or .bfloat16(), or use CPU tensors (.cpu())"
        )
    for name, value in (("D", r.d), ("Dv", r.dv)):
        if value > MAX_DIM:
            raise NotImplementedError(
                f"{name}={value}: CUDA kernels of linear attention support 1 <= D, Dv <= "
                f"{MAX_DIM}; use CPU tensors (.cpu()), or split the heads: columns of v are "
                "independent, and sums over parts of D add up"
            )
    plans = [p for block in VALUE_BLOCKS if (p := _candidate(key, arch, block)) is not None]
    if not plans:
        raise NotImplementedError(
            f"D={r.d}, Dv={r.dv}: with {r.decay_kind} decay no chunk fits the "
            f"{arch.shared_bytes_of_block} bytes of shared memory of {arch.name}; use CPU tensors "
            "(.cpu()), or split the heads"
        )
    return sorted(plans, key=lambda p: (p.cost.total, p.output_bytes))


def tile_bytes(rows: int, width: int) -> int:
    """A tile in shared memory (SharedTile in sm80/tile.cuh)."""
    chunks = _round(width) // 8
    return 16 * rows * (chunks if chunks % 8 == 0 else chunks + 1)


def decay_bytes(d: int) -> int:
    """The factors of a chunk by channel (ChannelDecay in linear/channel.cuh)."""
    width = _round(d)
    pitch = width + (8 if width % 32 == 0 else 24)
    return 4 * (CHUNK * pitch + CHUNK // 16 * width)


def _round(x: int) -> int:
    return -(-x // 16) * 16


def _plan(
    key: LinearKey,
    arch: CudaArch,
    cost: LinearCost,
    tensors: tuple[Tensor, ...],
    reasons: tuple[str, ...],
    value_block: int,
    shared: tuple[int, int, int],
) -> LinearCudaPlan:
    r = key.request
    return LinearCudaPlan(
        "forward", f"cuda:{arch.name}", r.element, "f32", r.element, r.decay_dtype or "f32",
        r.beta_dtype or "f32", r.d, r.dv, CHUNK, r.decay_kind, r.delta,
        r.normalizer, 0, 0, 0, 0, tensors, cost, reasons, value_block, *shared,
    )  # fmt: skip


def _candidate(key: LinearKey, arch: CudaArch, block: int) -> LinearCudaPlan | None:
    r = key.request
    d, dv, channel = _round(r.d), _round(r.dv), r.decay_kind == "channel"
    # A block of columns is not wider than twice what there is.
    if block > VALUE_BLOCKS[-1] and block // 2 >= dv:
        return None
    sizes = (tile_bytes(CHUNK, r.d), tile_bytes(CHUNK, block), tile_bytes(d, block))
    output = 2 * sizes[0] + sizes[1] + sizes[2] + (decay_bytes(r.d) if channel else 0)
    states, split = (4 * tile_bytes(CHUNK, t) for t in (STATE_TILE, SPLIT_TILE))
    most = max(output, states, split) + STATIC_SHARED
    if r.delta:
        copies = 2 if channel else 1
        split = copies * sizes[0] + (decay_bytes(r.d) if channel else 0)
        states = copies * sizes[0] + 3 * tile_bytes(CHUNK, SPLIT_TILE)
        states += 2 * tile_bytes(CHUNK, CHUNK) + tile_bytes(d, SPLIT_TILE)
        most = max(max(output, states) + STATIC_SHARED, split + SOLVE_SHARED)
    if most > arch.shared_bytes_of_block:
        return None
    blocks = arch.shared_bytes // (output + STATIC_SHARED + SHARED_RESERVED)
    tiles = -(-dv // block)
    # Of a chunk of one head, in cycles of an SM. Scores are wanted in 10 of 16 blocks.
    scores = CHUNK * CHUNK * d * 10 / 16
    multiply = tiles * (scores + CHUNK * d * block + CHUNK * CHUNK * block * 10 / 16)
    multiply = (multiply + CHUNK * d * dv) / arch.tensor_fma
    # Channel decays: about 30 instructions for each channel of a token, in every block of columns.
    pointwise = tiles * (CHUNK * d * 30 if channel else CHUNK * CHUNK * 4) / arch.fma
    state = (2 if r.element == "bf16" else 4) * d * dv
    operands = 2 * CHUNK * (tiles * 2 * d + dv) + 2 * CHUNK * (d + dv)
    cache = (2.0 * state + operands) / arch.l2_bytes_per_cycle
    overhead = 2000.0 * tiles / max(1, blocks)
    solve = 0.0
    if r.delta:  # scores of keys, their inverse, and its products with values, in three parts each
        solve = (scores + CHUNK * d * dv + 3 * CHUNK * CHUNK * dv * 10 / 16) / arch.tensor_fma
        solve += CHUNK**3 / 2 / arch.fma
    unit = 1000.0 / CHUNK
    cost = LinearCost(
        multiply * unit, solve * unit, pointwise * unit, cache * unit, overhead * unit
    )
    tensors = (
        Tensor("Q", CHUNK, r.d, "shared", sizes[0]),
        Tensor("K", CHUNK, r.d, "shared", sizes[0]),
        Tensor("V", CHUNK, block, "shared", sizes[1]),
        Tensor("state", d, block, "shared", sizes[2]),
        Tensor("scores", CHUNK, CHUNK, "registers", 4 * CHUNK * CHUNK),
        Tensor("output", CHUNK, block, "registers", 4 * CHUNK * block),
    )
    reasons = (
        f"{tiles} block{'s' if tiles > 1 else ''} of {block} value columns: each computes the "
        "scores of its chunk",
        f"{output} of {arch.shared_bytes_of_block} bytes of shared memory: {blocks} "
        f"block{'s' if blocks > 1 else ''} of an SM at a time",
        f"states of all chunks in global memory: {state} bytes for each chunk of a head",
        f"up to {STEP_TOKENS} tokens one after the other, the state in registers",
    )
    return _plan(key, arch, cost, tensors, reasons, block, (output, states, split))
