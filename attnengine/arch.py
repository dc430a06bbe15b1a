"""What the planner knows of each target: throughputs per cycle of one core, and cache sizes.

Figures are data, not measurements of the machine at hand: a kernel key must not depend on where it
is compiled. Sources: vendor optimisation guides for the FMA and load/store widths; exp costs are
those of ``templates/cpu/math_exp.h`` counted in its disassembly.
"""

from __future__ import annotations

from dataclasses import dataclass

ISAS = ("avx512_bf16", "avx512", "avx2", "portable")  # best first


@dataclass(frozen=True)
class CpuArch:
    """One core. ``flops`` maps a multiply type to FLOPs per cycle."""

    isa: str
    register_bytes: int
    flops: tuple[tuple[str, float], ...]
    vector_ops: float  # pointwise vector instructions per cycle
    l1_bytes: int
    l2_bytes: int
    l2_bytes_per_cycle: float
    l3_bytes_per_cycle: float

    def flops_per_cycle(self, multiply: str) -> float:
        return dict(self.flops)[multiply]


_CACHES = {"l1_bytes": 32 << 10, "l2_bytes": 1 << 20}

CPU: dict[str, CpuArch] = {
    "avx512_bf16": CpuArch(
        "avx512_bf16", 64, (("f32", 32.0), ("f64", 16.0), ("bf16", 64.0)), 2.0,
        l2_bytes_per_cycle=32.0, l3_bytes_per_cycle=10.0, **_CACHES,
    ),
    "avx512": CpuArch(
        "avx512", 64, (("f32", 32.0), ("f64", 16.0)), 2.0,
        l2_bytes_per_cycle=32.0, l3_bytes_per_cycle=10.0, **_CACHES,
    ),
    "avx2": CpuArch(
        "avx2", 32, (("f32", 32.0), ("f64", 16.0)), 2.0,
        l2_bytes_per_cycle=32.0, l3_bytes_per_cycle=10.0, **_CACHES,
    ),
    "portable": CpuArch(
        "portable", 16, (("f32", 8.0), ("f64", 4.0)), 2.0,
        l2_bytes_per_cycle=16.0, l3_bytes_per_cycle=8.0, **_CACHES,
    ),
}  # fmt: skip

# Vector instructions per vector of results, for pricing traced functions. Others cost 1; what loops
# over lanes through libm costs LANE_LOOP per lane.
OP_COST: dict[str, float] = {
    "exp": 14, "exp2": 11, "expm1": 18, "tanh": 24, "sigmoid": 20, "log": 22, "log1p": 30,
    "div": 6, "sqrt": 8, "rsqrt": 14, "reciprocal": 6, "select": 1, "maximum": 3, "minimum": 3,
    "gather": 24, "floor_div": 24, "remainder": 24, "trunc_div": 20, "fmod": 24,
}  # fmt: skip
LANE_LOOP = 20.0
LANE_LOOP_OPS = frozenset(
    "log2 log10 sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc lgamma pow "
    "atan2 hypot".split()
)


@dataclass(frozen=True)
class CudaArch:
    """One streaming multiprocessor (SM) of a GPU; rates are per clock cycle of it."""

    name: str  # what it is planned for
    code: str  # what it is compiled for: runs on every later one
    tensor_fma: float  # 16-bit products with fp32 sums, dense
    fma: float  # fp32 operations
    exp: float  # exp2, reciprocal and their like
    shared_bytes_per_cycle: float
    l2_bytes_per_cycle: float  # its share of what the L2 cache gives
    dram_bytes_per_cycle: float  # its share of what the memory gives
    shared_bytes: int  # of all its blocks
    shared_bytes_of_block: int
    registers: int  # of all its threads
    threads: int
    schedulers: int  # each issues one instruction of a warp per cycle
    multiprocessors: int  # of the GPU that is meant where none is at hand


# Sources: CUDA programming guide, tables of compute capabilities 8.x and of arithmetic throughput;
# the share of the L2 cache is the A100's measured 4.4 TB/s, and the 3090's 2.2 TB/s. Memory: sm_80
# serves 9.0 too, so the H200's 4.8 TB/s (the A100's 2.0 TB/s is 13), and the 3090's 936 GB/s; SMs
# are those two's.
CUDA: dict[str, CudaArch] = {
    "sm_80": CudaArch(
        "sm_80", "sm_80", tensor_fma=1024.0, fma=64.0, exp=16.0, shared_bytes_per_cycle=128.0,
        l2_bytes_per_cycle=29.0, dram_bytes_per_cycle=20.0, shared_bytes=164 << 10,
        shared_bytes_of_block=163 << 10, registers=65536, threads=2048, schedulers=4,
        multiprocessors=132,
    ),
    # 8.6, 8.9 and 12.x: half the tensor rate with fp32 sums, and less shared memory.
    "sm_86": CudaArch(
        "sm_86", "sm_80", tensor_fma=512.0, fma=128.0, exp=16.0, shared_bytes_per_cycle=128.0,
        l2_bytes_per_cycle=15.0, dram_bytes_per_cycle=6.5, shared_bytes=100 << 10,
        shared_bytes_of_block=99 << 10, registers=65536, threads=1536, schedulers=4,
        multiprocessors=82,
    ),
}  # fmt: skip
SHARED_RESERVED = 1 << 10  # bytes of shared memory that the system takes of each block


def is_cuda(isa: str) -> bool:
    return isa in CUDA


def cuda_target(capability: int) -> str:
    """What a device of this compute capability (80 is 8.0) is planned for.

    Raises NotImplementedError below 8.0.
    """
    if capability < 80:
        raise NotImplementedError(
            f"compute capability {capability / 10}: CUDA kernels need 8.0 (Ampere) or later; use a "
            "newer GPU, or CPU tensors (.cpu())"
        )
    return "sm_86" if capability in (86, 89) or capability // 10 == 12 else "sm_80"


# Of one score in a CUDA kernel: instructions on the arithmetic units, and on the one that has exp2
# and reciprocals (counted in the PTX of templates/cuda/math.cuh). Others cost (1, 0).
CUDA_OP_COST: dict[str, tuple[float, float]] = {
    "exp": (1, 1), "exp2": (0, 1), "expm1": (20, 1), "sigmoid": (2, 2), "tanh": (14, 2),
    "log": (20, 0), "log2": (20, 1), "log10": (22, 0), "log1p": (28, 0), "div": (9, 1),
    "reciprocal": (7, 1), "sqrt": (7, 1), "rsqrt": (3, 1), "gather": (16, 0), "floor_div": (14, 0),
    "trunc_div": (10, 0), "remainder": (16, 0), "fmod": (12, 0), "erf": (20, 1), "erfc": (30, 2),
    "sin": (24, 0), "cos": (24, 0), "tan": (32, 1), "asin": (20, 1), "acos": (20, 1),
    "atan": (16, 1), "sinh": (24, 2), "cosh": (12, 2), "asinh": (30, 2), "acosh": (34, 2),
    "atanh": (30, 1), "lgamma": (120, 3), "pow": (80, 3), "atan2": (30, 1), "hypot": (14, 2),
}  # fmt: skip
