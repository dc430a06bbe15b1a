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
    "exp": 14, "exp2": 11, "expm1": 18, "tanh": 24, "sigmoid": 20, "log": 22, "div": 6,
    "sqrt": 8, "rsqrt": 14, "reciprocal": 6, "select": 1, "maximum": 3, "minimum": 3,
    "gather": 24, "floor_div": 24, "remainder": 24, "trunc_div": 20, "fmod": 24,
}  # fmt: skip
LANE_LOOP = 20.0
LANE_LOOP_OPS = frozenset(
    "log2 log10 log1p sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc lgamma pow "
    "atan2 hypot".split()
)
