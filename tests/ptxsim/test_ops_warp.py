"""shfl, vote, match, redux, activemask and elect of the simulator."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import numpy as np
import pytest

from tests.ptxsim.instruction import Negated, execute

WARPS = 64
LANES = 32 * WARPS
ALL = 0xFFFFFFFF


def values(seed: int, low: int = 0, high: int = 2**32) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, LANES, dtype=np.uint64).astype(np.uint32)


def per_warp(x: np.ndarray) -> np.ndarray:
    return x.reshape(WARPS, 32)


def members(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random set of lanes for each warp: as a mask for each lane, and who is in it."""
    rng = np.random.default_rng(seed)
    active = rng.random(LANES) < rng.choice([0.1, 0.5, 0.9], WARPS).repeat(32)
    per_warp(active)[:, 7] = True  # nobody has an empty set
    per_warp(active)[0] = True
    masks = (per_warp(active) << np.arange(32, dtype=np.uint64)).sum(axis=1).astype(np.uint32)
    return masks.repeat(32), active


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The source lane, and whether it is in range: the pseudo-code of the PTX ISA."""
    bval, cval, segment = b & 31, c & 31, c >> 8 & 31
    max_lane = (lane & segment) | (cval & ~segment)
    min_lane = lane & segment
    if mode == "up":
        j = lane - bval
        inside = j >= max_lane
    elif mode == "down":
        j = lane + bval
        inside = j <= max_lane
    elif mode == "bfly":
        j = lane ^ bval
        inside = j <= max_lane
    else:
        j = min_lane | (bval & ~segment)
        inside = j <= max_lane
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffle(mode: str) -> None:
    a, b = values(1), values(2)
    rng = np.random.default_rng(3)
    # Segments of a power of two, and what nobody would write.
    usual = [(32 - (1 << k)) << 8 | (0 if mode == "up" else 31) for k in range(6)]
    c = np.where(rng.random(LANES) < 0.5, rng.choice(usual, LANES), values(4)).astype(np.uint32)
    d, p = execute(f"shfl.sync.{mode}.b32", ["b32", "pred"], a, b, c, ALL, pair=True)
    single = execute(f"shfl.sync.{mode}.b32", ["b32"], a, b, c, ALL)[0]
    assert np.array_equal(d, single)
    for lane in range(LANES):
        j, inside = shuffled(mode, lane % 32, int(b[lane]), int(c[lane]))
        assert d[lane] == a[lane - lane % 32 + j], lane
        assert p[lane] == inside, lane
    assert 0 < p.sum() < LANES


def test_shuffle_with_immediates() -> None:
    """A butterfly sum, as reductions are written."""
    a = values(5)
    total = a
    for step in (16, 8, 4, 2, 1):
        got = execute("shfl.sync.bfly.b32", ["b32"], total, step, 31, -1)[0]
        total = total + got
    assert np.array_equal(total, per_warp(a).sum(axis=1, dtype=np.uint32).repeat(32))


def test_shuffle_among_members() -> None:
    """Lanes that do not take part keep what they had; reading from one gives nothing to rely on."""
    masks, active = members(6)
    a = values(7)
    runs = []
    for seed in range(2):
        runs += execute(
            "shfl.sync.bfly.b32", ["b32"], a, 1, 31, masks, active=active, initial=99, seed=seed
        )
    partner = active.reshape(-1, 2)[:, ::-1].reshape(-1)
    swapped = a.reshape(-1, 2)[:, ::-1].reshape(-1)
    both = active & partner
    assert both.any() and (active & ~partner).any()
    for got in runs:
        assert np.array_equal(got[both], swapped[both])
        assert (got[~active] == 99).all()
    alone = active & ~partner
    assert (runs[0][alone] != swapped[alone]).mean() > 0.99
    assert (runs[0][alone] != runs[1][alone]).mean() > 0.99


@pytest.mark.parametrize("negated", [False, True])
def test_votes(negated: bool) -> None:
    masks, active = members(8)
    p = np.random.default_rng(9).random(LANES) < 0.5
    per_warp(p)[::5] = True
    per_warp(p)[1::5] = False
    source = Negated(p) if negated else p
    holds = per_warp(p != negated)
    inside = per_warp(active)
    everyone, anyone = (holds | ~inside).all(axis=1), (holds & inside).any(axis=1)
    ballot = ((holds & inside) << np.arange(32, dtype=np.uint64)).sum(axis=1)
    expected = {
        "all.pred": everyone,
        "any.pred": anyone,
        "uni.pred": everyone | ~anyone,
        "ballot.b32": ballot,
    }
    for mode, of_warp in expected.items():
        kind = mode.split(".")[1]
        got = execute(f"vote.sync.{mode}", [kind], source, masks, active=active)[0]
        assert np.array_equal(got[active], of_warp.repeat(32)[active]), mode
        assert len(set(of_warp)) > 1


@pytest.mark.parametrize("bits", [32, 64])
def test_match(bits: int) -> None:
    masks, active = members(10)
    a = values(11, 0, 3)
    per_warp(a)[::3] = 1
    if bits == 64:  # told apart by the upper half
        a = a.astype(np.uint64) << np.uint64(32) | np.uint64(5)
    any_ = execute(f"match.any.sync.b{bits}", ["b32"], a, masks, active=active)[0]
    d, p = execute(f"match.all.sync.b{bits}", ["b32", "pred"], a, masks, pair=True, active=active)
    for warp in range(WARPS):
        inside = np.flatnonzero(per_warp(active)[warp]).tolist()
        x = per_warp(a)[warp]
        same = len(set(x[inside])) == 1
        for lane in inside:
            mask = sum(1 << other for other in inside if x[other] == x[lane])
            assert any_[32 * warp + lane] == mask
            assert d[32 * warp + lane] == (mask if same else 0)
            assert p[32 * warp + lane] == same
    assert 0 < p[active].sum() < active.sum()


REDUCTIONS: dict[str, tuple[Callable[[int, int], int], str]] = {
    "add.u32": (operator.add, "u4"),
    "add.s32": (operator.add, "i4"),
    "min.u32": (min, "u4"),
    "min.s32": (min, "i4"),
    "max.u32": (max, "u4"),
    "max.s32": (max, "i4"),
    "and.b32": (operator.and_, "u4"),
    "or.b32": (operator.or_, "u4"),
    "xor.b32": (operator.xor, "u4"),
}


@pytest.mark.parametrize("operation", REDUCTIONS)
def test_reductions(operation: str) -> None:
    masks, active = members(12)
    a = values(13) | (0x80000001 if operation == "and.b32" else 0)
    function, dtype = REDUCTIONS[operation]
    got = execute(f"redux.sync.{operation}", ["b32"], a, masks, active=active)[0]
    for warp in range(WARPS):
        inside = per_warp(active)[warp]
        expected = functools.reduce(function, per_warp(a.view(dtype))[warp][inside].tolist())
        assert (per_warp(got)[warp][inside] == expected & ALL).all()


def test_elections() -> None:
    masks, active = members(14)
    d, p = execute("elect.sync", ["b32", "pred"], masks, pair=True, active=active)
    for warp in range(WARPS):
        inside = np.flatnonzero(per_warp(active)[warp]).tolist()
        leaders = [lane for lane in inside if per_warp(p)[warp, lane]]
        assert len(leaders) == 1
        assert (per_warp(d)[warp][inside] == leaders[0]).all()


def test_active_lanes() -> None:
    masks, active = members(15)
    got = execute("activemask.b32", ["b32"], active=active)[0]
    assert np.array_equal(got[active], masks[active])


@pytest.mark.parametrize(
    ("opcode", "reason"),
    [
        ("shfl.bfly.b32", "sync"),
        ("shfl.sync.rot.b32", "mode"),
        ("vote.sync.ballot.pred", "type"),
        ("redux.sync.mul.u32", "operation"),
        ("redux.sync.and.u32", "type"),
    ],
)
def test_unknown_forms(opcode: str, reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        execute(opcode, ["b32"], values(1), 1, 31, ALL)
