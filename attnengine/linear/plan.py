"""From a linear-attention key to a plan: chunk lengths, the cost of each by resource, the cheapest.

A chunk of C tokens costs products of C x C scores, which grow with C, and one read and one write of
the state, which C tokens share. As in :mod:`attnengine.plan`, a plan depends on the key and the
target, never on lengths, so one kernel serves every shape.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from ..arch import CPU, CpuArch
from ..diagonal import instructions
from ..plan import VIRTUAL_WORKERS, Tensor
from .key import LinearKey
from .scratch import BLOCK, Sizes, scratch_bytes
from .trace import TracedLinear

MAX_DIM = 1024  # of k and of v
CHUNKS = (16, 32, 48, 64, 96, 128, 192, 256)
MAX_TILE_BYTES = 4 << 20  # of a worker's tiles: they must stay near the core
# The walk of a sequence takes one core. Where a call has less work than so many walks, its chunks
# are tasks with their states in memory. On two cores one walk of 64/64 gains a fifth in fp32, a
# tenth in bf16; two or four walks, which fill the cores, would lose two thirds.
SCAN_TASKS = VIRTUAL_WORKERS // 16
_BYTES = {"f32": 4, "f64": 8, "bf16": 2}


@dataclass(frozen=True)
class LinearCost:
    """Predicted cycles per 1000 tokens of one value head on one core, by resource."""

    multiply: float  # matrix products
    solve: float  # the delta rule's triangular system
    pointwise: float  # decays, hooks, packing
    cache: float  # states and operands
    overhead: float  # calls and loop ends of every chunk

    @property
    def total(self) -> float:
        return self.multiply + self.solve + self.pointwise + self.cache + self.overhead


@dataclass(frozen=True)
class LinearPlan:
    """Every decision of one kernel. C++ receives the same fields as a trait struct."""

    kind: str
    target: str
    element: str
    accumulator: str
    multiply: str
    decay: str  # element type of the decay, the accumulator's where there is none
    beta: str  # and of beta
    d: int
    dv: int
    chunk: int
    decay_kind: str
    delta: bool
    normalizer: bool
    virtual_workers: int
    scan_tasks: int  # chunks are tasks where there would be fewer; 0: never
    scan_bytes: int  # states that are then in memory, of each thread
    scratch_bytes: int
    tensors: tuple[Tensor, ...]
    cost: LinearCost
    reasons: tuple[str, ...]

    @property
    def bf16_dot(self) -> bool:
        return self.multiply == "bf16"

    def as_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict) -> LinearPlan:
        data = dict(data)
        data["tensors"] = tuple(Tensor(**t) for t in data["tensors"])
        data["cost"] = LinearCost(**data["cost"])
        data["reasons"] = tuple(data["reasons"])
        return LinearPlan(**{f.name: data[f.name] for f in fields(LinearPlan)})


def plan_linear(key: LinearKey, traced: TracedLinear, isa: str) -> LinearPlan:
    """The cheapest candidate for ``key`` on ``isa``, a name of :data:`attnengine.arch.CPU`.

    Raises NotImplementedError for D or Dv above MAX_DIM.
    """
    return linear_candidates(key, traced, isa)[0]


def linear_candidates(key: LinearKey, traced: TracedLinear, isa: str) -> list[LinearPlan]:
    """Every legal candidate, cheapest first."""
    r = key.request
    for name, value in (("D", r.d), ("Dv", r.dv)):
        if value > MAX_DIM:
            raise NotImplementedError(
                f"{name}={value}: linear attention kernels support 1 <= D, Dv <= {MAX_DIM}; split "
                "the heads: columns of v are independent, and sums over parts of D add up"
            )
    arch = CPU[isa]
    work = _hook_work(key, traced, arch)
    # What a chunk takes from the next, or from the state, keeps chunks in order.
    ordered = r.delta or key.kind == "backward" and (r.normalizer or "out_mod" in traced.hooks)
    scan = 0 if ordered else SCAN_TASKS
    plans = [_candidate(key, arch, chunk, work, scan) for chunk in CHUNKS]
    most = MAX_TILE_BYTES + 2 * _state_bytes(key)  # packed states stand beside the tiles
    legal = [p for p in plans if p.scratch_bytes <= most] or plans[:1]
    return sorted(legal, key=lambda p: (p.cost.total, p.chunk))


def _hook_work(key: LinearKey, traced: TracedLinear, arch: CpuArch) -> float:
    """Vector instructions of the hooks per token."""
    r = key.request
    lanes = arch.register_bytes // _BYTES[r.accumulator]
    width = {"q_mod": r.d, "k_mod": r.d, "v_mod": r.dv, "out_mod": r.dv}
    width["decay_mod"] = r.d if r.decay_kind == "channel" else 1
    total = 0.0
    for name, node in traced.hooks.items():
        roots = [node]
        if key.kind == "backward" and name in traced.gradients():
            pullback = traced.gradients()[name]
            roots += [pullback.dx, *(g.value for g in pullback.grads)]
        total += instructions(roots, lanes) * width[name] / lanes
    return total


def _state_bytes(key: LinearKey) -> int:
    """Bytes of one state."""
    r = key.request
    return r.d * (r.dv + r.normalizer) * _BYTES[r.accumulator]


def _candidate(
    key: LinearKey, arch: CpuArch, chunk: int, hook_work: float, scan_tasks: int
) -> LinearPlan:
    r = key.request
    c, d, dv = chunk, r.d, r.dv
    backward = key.kind == "backward"
    dot = r.element == "bf16" and arch.isa == "avx512_bf16"
    multiply = "bf16" if dot else r.accumulator
    acc, mul = _BYTES[r.accumulator], _BYTES[multiply]
    lanes = arch.register_bytes // acc
    dp, dvp = -(-d // lanes) * lanes, -(-dv // lanes) * lanes
    # A chunk's products. Scores are wanted below the diagonal only: of blocks, half and one more.
    lower = c * (c + BLOCK) / 2
    scores = 2.0 * lower * dp  # q k^T
    apply = 2.0 * lower * dvp  # scores times values
    out = 2.0 * c * d * dvp  # q times the state
    # k times values, into the state: a short product, whose sums are loaded and stored each time.
    into = out * (1 + 2.0 * acc / mul / c)
    if backward:
        flops = 3 * scores + 3 * apply + 3 * out + 2 * into
    else:  # under a scalar decay, heads may share their scores
        flops = scores * (0.75 if r.decay_kind == "scalar" else 1.0) + apply + out + into
    if r.delta:
        flops += (2 * scores + out) * (2 if backward else 1)
    multiply_cycles = flops / arch.flops_per_cycle(multiply) * 1.2  # loop ends, C tile traffic
    # The solve is a recurrence over rows: its products are short, in the accumulator type.
    rate = arch.flops_per_cycle(r.accumulator)
    solve_cycles = apply / rate * 2.0 * (2 if backward else 1) if r.delta else 0.0
    # Vector instructions: packing (each operand twice in backward), decays, hooks.
    vectors = c * (2 * d + 2 * dv) / lanes * (3.0 if backward else 2.0)
    if r.decay_kind == "scalar":
        vectors += 2.0 * lower / lanes
    if r.decay_kind == "channel":  # scores inside a block are sums of products with their decay
        vectors += c * d / lanes * (6.0 + 2.0 * BLOCK) * (3 if backward else 1)
    vectors += c * hook_work + 4.0 * lower / lanes
    # The state decays, and is packed where products round it.
    vectors += d * dvp / lanes * ((10.0 if backward else 3.0) if dot else 2.0 if backward else 1.0)
    pointwise_cycles = vectors / arch.vector_ops
    state = _state_bytes(key)
    if backward:
        near = 2 * state + c * (2 * d + 2 * dv) * mul + 2 * c * c * acc <= arch.l2_bytes / 2
    else:
        rounded = d * dvp * mul if dot else 0
        near = state + rounded + c * (2 * d + 2 * dv) * mul <= arch.l2_bytes * 3 / 4
    cache_rate = arch.l2_bytes_per_cycle if near else arch.l3_bytes_per_cycle
    traffic = float(state * (8 if backward else 3))
    traffic += c * (2 * d + 2 * dv) * mul * (2 if backward else 1)
    if backward:  # forward states of all chunks are written and read back
        traffic += 2 * state * arch.l2_bytes_per_cycle / arch.l3_bytes_per_cycle
    cache_cycles = traffic / cache_rate
    starts = (9600.0 if r.delta else 6000.0) if backward else 4000.0 if r.delta else 500.0
    overhead = starts + c * 20.0
    unit = 1000.0 / c
    cost = LinearCost(
        multiply_cycles * unit, solve_cycles * unit, pointwise_cycles * unit, cache_cycles * unit,
        overhead * unit,
    )  # fmt: skip
    level = "L2" if near else "L3"
    tensors = (
        Tensor("Q", c, d, level, c * d * mul),
        Tensor("K", c, d, level, c * d * mul),
        Tensor("V", c, dv, level, c * dv * mul),
        Tensor("scores", c, c, "L1" if c * c * acc <= arch.l1_bytes else "L2", c * c * acc),
        Tensor("state", d, dv + r.normalizer, "L2" if state * 2 <= arch.l2_bytes else "L3", state),
    )
    reasons = [
        f"the state, {state} bytes in {tensors[-1].level}, is read and written once for {c} tokens",
        f"scores of {c} x {c} below the diagonal, {multiply} products",
    ]
    if r.delta:
        reasons.append(f"the delta rule solves {c} x {c} systems in {r.accumulator}")
    if r.decay_kind == "channel":
        reasons.append(f"channel decays are multiplied up inside blocks of {BLOCK} tokens")
    if backward:
        reasons.append("states are computed again and kept, one for each chunk of a sequence")
    scan_bytes = arch.l2_bytes // 4
    if scan_tasks:
        reasons.append(
            f"of fewer than {scan_tasks} walks (sequences x heads x columns, by length) the chunks "
            f"are tasks, their states in memory, {scan_bytes} bytes for each thread"
        )
    else:
        reasons.append("chunks follow each other: they take more from the state than its decay")
    channel = r.decay_kind == "channel"
    sizes = Sizes(d, dv, c, acc, mul, arch.register_bytes, channel, r.delta, r.normalizer)
    return LinearPlan(
        key.kind, f"cpu:{arch.isa}", r.element, r.accumulator, multiply,
        r.decay_dtype or r.accumulator, r.beta_dtype or r.accumulator, d, dv, c, r.decay_kind,
        r.delta, r.normalizer, VIRTUAL_WORKERS, scan_tasks, scan_bytes,
        scratch_bytes(key.kind, sizes), tensors, cost, tuple(reasons),
    )  # fmt: skip
