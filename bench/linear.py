"""Linear attention: `ae.linear_attention` and its decode step against the chunk form in PyTorch
(eager, and compiled), a roofline, and itself at twice the length.

Shapes are those of the published comparisons (Mamba2, gated retention, RetNet) at batch 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import attnengine as ae

from . import agreement, baselines, peaks
from .linear_peers import chunk_form
from .rows import Row, share_row
from .runner import interleave
from .session import Session

ROOFLINE_BAR, FORWARD_BAR, TRAINING_BAR = 0.60, 3.0, 2.5
DOUBLE_BAR = 2.1  # time at twice the length
STEP_BAR = 0.70  # of the streaming read, over the state's bytes, read and written
CHUNK = 64  # of the chunk form that is counted, whatever a kernel takes
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """One problem. `kind`: "scalar" or "channel" decay; `delta`: the delta rule."""

    model: str
    heads: int
    key_heads: int
    dim: int
    value_dim: int
    length: int
    dtype: torch.dtype
    kind: str = "scalar"
    delta: bool = False

    @property
    def name(self) -> str:
        size = f"{self.length // 1024}k" if self.length % 1024 == 0 else str(self.length)
        return f"linear/{NAMES[self.dtype]}/{self.model}/s{size}"

    def flops(self, training: bool = False) -> float:
        """Of the chunk form: products with the state, and half of each square of scores. Backward:
        states again, four products with states or their adjoints, five with scores."""
        d, dv = self.dim, self.value_dim
        group = self.heads // self.key_heads if self.kind == "scalar" else 1  # share q k^T
        token = 4 * d * dv + CHUNK * (d / group + dv)
        if self.delta:
            token += 2 * d * dv + CHUNK * (d / group + dv)
        if training:
            token += 10 * d * dv + CHUNK * (3 * d + 2 * dv)
            if self.delta:
                token += 4 * d * dv + CHUNK * (2 * d + 3 * dv)
        return float(token) * self.heads * self.length

    @property
    def bytes(self) -> int:
        """Operands and results, each moved once."""
        rows = 2 * self.key_heads * self.dim + 2 * self.heads * self.value_dim
        return rows * self.length * self.dtype.itemsize

    def roofline_s(self, peak: peaks.Peaks) -> float:
        """Seconds that the chunk form takes at the machine's peaks."""
        return max(self.flops() / peak.flops(self.dtype), self.bytes / peak.read_bytes)


def operands(case: Case, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v, decay, and beta under the delta rule."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=random)

    n, d = case.length, case.dim
    q = normal(case.key_heads, n, d).to(case.dtype)
    k = torch.nn.functional.normalize(normal(case.key_heads, n, d), dim=-1).to(case.dtype)
    v = normal(case.heads, n, case.value_dim).to(case.dtype)
    wide = (d,) if case.kind == "channel" else ()
    decay = torch.nn.functional.logsigmoid(normal(case.heads, n, *wide)).clamp_min(-5)
    beta = (normal(case.heads, n).sigmoid(),) if case.delta else ()
    return (q, k, v, decay, *beta)


def ours(*given: Tensor) -> Tensor:
    q, k, v, decay, *beta = given
    extra = {"beta": beta[0]} if beta else {}
    return ae.linear_attention(q, k, v, ae.LinearAttentionSpec(), decay=decay, **extra)


def forward(attend: Callable[..., Tensor], given: Sequence[Tensor]) -> baselines.Step:
    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attend(*given),)

    return run


def training(attend: Callable[..., Tensor], given: Sequence[Tensor]) -> baselines.Step:
    """Output and the gradients of all operands."""
    leaves = [x.clone().requires_grad_() for x in given]
    random = torch.Generator().manual_seed(1)
    upstream = torch.randn(given[2].shape, generator=random).to(given[2].dtype)

    def run() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, upstream))

    return run


def check(case: Case, given: Sequence[Tensor], peers: dict[str, Callable[..., Tensor]]) -> float:
    """Distance of one head's first tokens from the fp64 recurrence; all of it from the peers."""
    tokens = min(case.length, 256)
    short = [x[:, :1, :tokens].double() for x in given]
    spec = ae.LinearAttentionSpec()
    extra = {"beta": short[4]} if case.delta else {}
    golden = ae.reference(*short[:3], spec, decay=short[3], **extra, dtype=torch.float64)
    with torch.no_grad():
        mine = ours(*given)
    distance = agreement.difference(mine[:, :1, :tokens], golden)
    agreement.require(case.name, distance, case.dtype)
    steps = {name: forward(peer, given) for name, peer in peers.items()}
    agreement.check_peers(case.name, [mine], steps, case.dtype)
    return distance


def peers_of(case: Case) -> dict[str, Callable[..., Tensor]]:
    if case.kind != "scalar" or case.delta:
        return {}
    torch._dynamo.reset()
    return {"eager": chunk_form, "compiled": torch.compile(chunk_form, dynamic=False)}


def measure_case(case: Case, session: Session) -> list[Row]:
    """Forward, and with gradients, against the peers and the roofline."""
    given, peers = operands(case), peers_of(case)
    distance = check(case, given, peers)
    rows = []
    for name, step, bar in (
        ("fwd", forward, FORWARD_BAR),
        ("fwd+bwd", training, TRAINING_BAR),
    ):
        steps = {"ours": step(ours, given)}
        steps |= {peer: step(attend, given) for peer, attend in peers.items()}
        if name == "fwd+bwd" and peers:
            mine, theirs = steps["ours"](), steps["eager"]()
            for a, b in zip(mine, theirs, strict=True):
                # Peers round sums of decays and every gradient to the operands' dtype.
                limit = 5e-2 if case.dtype is torch.bfloat16 else 1e-3
                distance_of = agreement.difference(b, a)
                if not distance_of <= limit:
                    raise AssertionError(f"{case.name}: a gradient differs by {distance_of:.3g}")
        times = interleave(steps, session.budget_s, session.min_rounds)
        flops = case.flops(name != "fwd")
        peak = session.peaks[-1]
        floor = max(flops / peak.flops(case.dtype), case.bytes / peak.read_bytes)
        mine_row = Row(
            name=f"{case.name}/{name}",
            unit="ms",
            ours=times["ours"].median * 1e3,
            spread=times["ours"].spread,
            gflops=flops / times["ours"].median / 1e9,
            share_of_peak=floor / times["ours"].median,
            distance=distance,
            intensity=flops / case.bytes,
        )
        if peers:
            best = min(peers, key=lambda peer: times[peer].median)
            value = times[best].median * 1e3
            ratio = value / mine_row.ours
            peer = f"chunk form, {best}"
            rows.append(replace(mine_row, peer=peer, peer_value=value, ratio=ratio, bar=bar))
        bar_here = ROOFLINE_BAR if name == "fwd" and peers else None
        rows.append(share_row(mine_row, bar_here, "roofline of the chunk form"))
    return rows


def measure_growth(case: Case, session: Session) -> list[Row]:
    """Time at twice the length, from 2k tokens on."""
    lengths = (512, 1024, 2048) if session.quick else (2048, 4096, 8192, 16384, 32768, 65536)
    rows, before = [], None
    for length in lengths:
        here = replace(case, length=length)
        times = interleave(
            {"ours": forward(ours, operands(here))}, session.budget_s / 2, session.min_rounds
        )["ours"]
        row = Row(here.name + "/growth", "ms", times.median * 1e3, times.spread)
        if before is not None:
            row = replace(
                row, peer="half the length", peer_value=before, ratio=row.ours / before,
                bar=DOUBLE_BAR, at_least=False,
            )  # fmt: skip
            rows.append(row)
        before = row.ours
    return rows


def measure_step(case: Case, session: Session, batch: int = 16) -> list[Row]:
    """One token of each of a batch of sequences: the state is read and written. Layer after layer,
    each from the state that its last step gave; together they are larger than the caches."""
    given = operands(replace(case, length=batch))
    q, k, v, decay, *beta = (x.transpose(0, 2).contiguous() for x in given)  # [batch, H, 1, ...]
    bytes_ = batch * case.heads * case.dim * case.value_dim * 4
    layers = max(2, math.ceil((168 << 20) / bytes_))
    states = [torch.randn(batch, case.heads, case.dim, case.value_dim) for _ in range(layers)]
    spec = ae.LinearAttentionSpec()
    extra = {"beta": beta[0]} if beta else {}
    turn = [0]

    def run() -> tuple[Tensor, ...]:
        turn[0] = (turn[0] + 1) % layers
        with torch.no_grad():
            out, states[turn[0]] = ae.linear_attention_step(
                q, k, v, spec, states[turn[0]], decay=decay, **extra
            )
        return out, states[turn[0]]

    before = states[1]
    out, state = run()
    whole, last = ae.linear_attention(
        q, k, v, spec, decay=decay, initial_state=before, output_final_state=True, **extra
    )
    agreement.require(case.name, agreement.difference(out, whole), case.dtype)
    agreement.require(case.name, agreement.difference(state, last), torch.float32)
    del out, state, whole, last, before
    read = peaks.QuietRead(session.threads)
    times = interleave({"ours": run, "read": read}, session.budget_s, session.min_rounds)
    peaks.library().release_buffers()
    rate = read.rate
    mine = Row(
        name=f"linear/{NAMES[case.dtype]}/{case.model}/step/b{batch}",
        unit="ms",
        ours=times["ours"].median * 1e3,
        spread=times["ours"].spread,
        share_of_peak=2 * bytes_ / times["ours"].median / rate,
    )
    return [share_row(mine, STEP_BAR, f"read of {rate / 1e9:.1f} GB/s")]


def cases(quick: bool) -> list[Case]:
    lengths = (256,) if quick else (1024, 2048, 8192)
    shapes = {
        "mamba2": (80, 1, 128, 64),
        "gated-retention": (16, 16, 64, 64),
        "yoco": (40, 40, 256, 256),
        "retnet": (32, 32, 256, 512),
    }
    if quick:
        shapes = {"mamba2": (4, 1, 128, 64)}
    found = [
        Case(model, *shape, length, dtype)
        for dtype in NAMES
        for model, shape in shapes.items()
        for length in lengths
    ]
    if not quick:
        for dtype in NAMES:
            found += [
                Case("gla", 16, 16, 128, 128, 2048, dtype, "channel"),
                Case("gated-delta-net", 16, 16, 128, 128, 2048, dtype, "scalar", True),
                Case("kda", 16, 16, 128, 128, 2048, dtype, "channel", True),
            ]
    return found


def measure(session: Session) -> None:
    """Every contest that is asked for."""
    for case in cases(session.quick):
        session.attempt(case.name, lambda case=case: measure_case(case, session))
    for dtype in NAMES:
        grown = Case("gated-retention", 16, 16, 64, 64, 0, dtype)
        name = f"linear/{NAMES[dtype]}"
        session.attempt(f"{name}/growth", lambda c=grown: measure_growth(c, session))
        for case in (
            Case("mamba2", 80, 1, 128, 64, 0, dtype),
            Case("gated-delta-net", 16, 16, 128, 128, 0, dtype, "scalar", True),
            Case("kda", 16, 16, 128, 128, 0, dtype, "channel", True),
        ):
            session.attempt(
                f"{name}/{case.model}/step", lambda case=case: measure_step(case, session)
            )
