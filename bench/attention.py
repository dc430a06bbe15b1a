"""Groups forward, short, training and variants: our kernels against their peers."""

from __future__ import annotations

import dataclasses

import torch

from . import agreement, baselines
from .cases import GROUPS, Case, Peer, attention_cases, matmul_flops
from .peaks import Peaks
from .rows import Row, per_flop_row, share_row
from .runner import Samples, interleave
from .session import Session


def measure(session: Session) -> None:
    """All cases of the four groups."""
    for group in GROUPS:
        for case in attention_cases(group, session.quick):

            def one(case: Case = case) -> list[Row]:
                return measure_case(case, session)

            session.attempt(case.name, one)


def prepare(case: Case) -> tuple[dict[str, baselines.Step], float]:
    """A step per contestant, all of them checked; and ours' distance from the reference."""
    operands = case.operands()
    steps: dict[str, baselines.Step] = {}
    distance = 0.0
    for name in ["attnengine", *[p.name for p in case.peers if not p.same]]:
        variant = case.meaning(name)
        attend = baselines.ours(variant, operands, case.backward)
        steps[name] = baselines.step(attend, operands, case.backward)
        out = steps[name]()[0]
        off = agreement.check_output(f"{case.name}: {name}", out, variant, operands)
        if name == "attnengine":
            distance = off
    peers = {
        p.name: baselines.step(baselines.PEERS[p.name](case), operands, case.backward)
        for p in case.peers
        if p.same
    }
    agreement.check_peers(case.name, steps["attnengine"](), peers, case.dtype)
    return {**steps, **peers}, distance


def measure_case(case: Case, session: Session) -> list[Row]:
    """Check the contestants of the case, then time them in the same rounds."""
    steps, distance = prepare(case)
    times = interleave(steps, session.budget_s, session.min_rounds)
    return case_rows(case, times, distance, session.peaks[-1])


def case_rows(case: Case, times: dict[str, Samples], distance: float, peaks: Peaks) -> list[Row]:
    """One row per peer, one for the share of the peak where that has a bar."""
    ours = times["attnengine"]
    rate = case.flops / ours.median
    rows = []
    for peer in case.peers:
        other = times[peer.name].median
        row = Row(
            name=case.name,
            unit="ms",
            ours=ours.median * 1e3,
            spread=ours.spread,
            peer=label(peer),
            peer_value=other * 1e3,
            ratio=other / ours.median,
            bar=peer.bar,
            gflops=rate / 1e9,
            share_of_peak=rate / peaks.flops(case.dtype),
            distance=distance,
            intensity=case.intensity,
        )
        rows.append(_own(row, case, peer, other))
        if peer is case.peers[0] and case.share_bar is not None:
            dot = case.dtype is torch.bfloat16 and peaks.bf16_flops
            peak = "bf16 dot peak" if dot else "FMA peak"
            rows.append(share_row(row, case.share_bar, peak))
    return rows


def label(peer: Peer) -> str:
    """The contestant in a table."""
    return "our plain kernel" if peer.name == "plain" else peer.name


def _own(row: Row, case: Case, peer: Peer, other: float) -> Row:
    """A row against one of our own kernels says what a mod or a mask costs."""
    assert row.ratio is not None
    if peer.name == "full":
        heads = case.batch * case.heads
        flops = matmul_flops(case.meaning("full"), heads, case.dim, case.backward)
        return per_flop_row(row, flops / other / 1e9, peer.bar)
    if peer.name == "plain":
        return dataclasses.replace(row, ratio=1 / row.ratio, at_least=False)
    return row
