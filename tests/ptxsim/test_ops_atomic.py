"""atom and red of the simulator, on global and shared memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.ptxsim.instruction import HEAD, launch

BLOCKS, THREADS = 8, 128
LANES = BLOCKS * THREADS

# Each thread has its index %i, its source %b (and %c), a place: an index into memory.
KERNEL = (
    HEAD
    + """
.visible .entry test(.param .u64 memory, .param .u64 place, .param .u64 b, .param .u64 c,
                     .param .u64 old)
{
  .reg .b32 %t, %n, %block, %i, %at;
  .reg .bBITS %b, %c, %old;
  .reg .b64 %memory, %place, %pb, %pc, %pold, %offset;
  mov.u32 %t, %tid.x;
  mov.u32 %block, %ctaid.x;
  mov.u32 %n, %ntid.x;
  mad.lo.u32 %i, %block, %n, %t;
  ld.param.u64 %memory, [memory];
  ld.param.u64 %place, [place];
  ld.param.u64 %pb, [b];
  ld.param.u64 %pc, [c];
  ld.param.u64 %pold, [old];
  mad.wide.u32 %place, %i, 4, %place;
  mad.wide.u32 %pb, %i, BYTES, %pb;
  mad.wide.u32 %pc, %i, BYTES, %pc;
  mad.wide.u32 %pold, %i, BYTES, %pold;
  ld.global.u32 %at, [%place];
  ld.global.bBITS %b, [%pb];
  ld.global.bBITS %c, [%pc];
  mul.wide.u32 %offset, %at, BYTES;
  add.u64 %memory, %memory, %offset;
  mov.bBITS %old, 0;
  INSTRUCTION
  st.global.bBITS [%pold], %old;
  ret;
}
"""
)


def atomic(
    instruction: str,
    memory: np.ndarray,
    place: np.ndarray,
    b: np.ndarray,
    c: np.ndarray | None = None,
    *,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """What memory holds afterwards, and what each thread got."""
    bits = 8 * memory.dtype.itemsize
    text = KERNEL.replace("INSTRUCTION", instruction)
    text = text.replace("BITS", str(bits)).replace("BYTES", str(bits // 8))
    memory, old = memory.copy(), np.zeros(LANES, memory.dtype)
    arrays = [memory, place.astype(np.uint32), b, b if c is None else c, old]
    launch(text, BLOCKS, THREADS, arrays, seed=seed)
    return memory, old


EVERYONE = np.arange(LANES)
NOWHERE_ELSE = np.zeros(LANES, np.uint32)


def numbers(dtype: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype[0] == "f":
        return rng.normal(size=LANES).astype(dtype)
    bits = rng.integers(0, 2**64, LANES, dtype=np.uint64).astype(f"u{dtype[1]}")
    bits[::7] = bits[0]
    return bits.view(dtype)


OPERATIONS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "add.u32": ("u4", np.add), "add.s32": ("i4", np.add), "add.u64": ("u8", np.add),
    "add.f32": ("f4", np.add), "add.f64": ("f8", np.add),
    "min.u32": ("u4", np.minimum), "min.s32": ("i4", np.minimum),
    "min.u64": ("u8", np.minimum), "min.s64": ("i8", np.minimum),
    "max.u32": ("u4", np.maximum), "max.s32": ("i4", np.maximum),
    "max.u64": ("u8", np.maximum), "max.s64": ("i8", np.maximum),
    "and.b32": ("u4", np.bitwise_and), "or.b64": ("u8", np.bitwise_or),
    "xor.b32": ("u4", np.bitwise_xor),
    "exch.b32": ("u4", lambda old, b: b), "exch.b64": ("u8", lambda old, b: b),
    "inc.u32": ("u4", lambda old, b: np.where(old >= b, 0, old + 1)),
    "dec.u32": ("u4", lambda old, b: np.where((old == 0) | (old > b), b, old - 1)),
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_thread_its_own_place(operation: str) -> None:
    dtype, function = OPERATIONS[operation]
    memory, b = numbers(dtype, 1), numbers(dtype, 2)
    if operation[:3] in ("inc", "dec"):
        memory, b = memory % 4, b % 4
    place = np.random.default_rng(3).permutation(LANES)
    expected = memory.copy()
    expected[place] = function(memory[place], b)
    name, kind = operation.split(".")
    for form in [f".global.{name}.{kind}", f".{name}.{kind}", f".relaxed.gpu.global.{name}.{kind}"]:
        after, old = atomic(f"atom{form} %old, [%memory], %b;", memory, place, b)
        assert np.array_equal(after, expected), form
        assert np.array_equal(old, memory[place]), form
    if name != "exch":
        after, old = atomic(f"red.global.{operation} [%memory], %b;", memory, place, b)
        assert np.array_equal(after, expected) and not old.any()
    hint = "mov.b64 %offset, 0;"
    hint += f"atom.global.{name}.L2::cache_hint.{kind} %old, [%memory], %b, %offset;"
    assert np.array_equal(atomic(hint, memory, place, b)[0], expected)


@pytest.mark.parametrize(("kind", "dtype"), [("b16", "u2"), ("b32", "u4"), ("b64", "u8")])
def test_compare_and_swap(kind: str, dtype: str) -> None:
    memory, new = numbers(dtype, 4), numbers(dtype, 5)
    expected_old = np.where(EVERYONE % 2 == 0, memory, memory + 1).astype(dtype)
    after, old = atomic(
        f"atom.global.cas.{kind} %old, [%memory], %b, %c;", memory, EVERYONE, expected_old, new
    )
    assert np.array_equal(old, memory)
    assert np.array_equal(after, np.where(EVERYONE % 2 == 0, new, memory))


def test_tickets() -> None:
    """All threads of all blocks at one place: each gets a number of its own."""
    ones = np.ones(LANES, np.uint32)
    for seed in range(3):
        after, old = atomic(
            "atom.global.add.u32 %old, [%memory], %b;", np.zeros(1, "u4"), NOWHERE_ELSE, ones,
            seed=seed,
        )  # fmt: skip
        assert after == LANES
        assert np.array_equal(np.sort(old), EVERYONE)
        # Not in the order of the lanes.
        assert (np.diff(old.astype(np.int64).reshape(-1, 32), axis=1) != 1).any(axis=1).mean() > 0.9


def test_wrapping_counters() -> None:
    bound = np.full(LANES, 4, np.uint32)
    after, _ = atomic("atom.inc.u32 %old, [%memory], %b;", np.zeros(1, "u4"), NOWHERE_ELSE, bound)
    assert after == LANES % 5
    after, _ = atomic("atom.dec.u32 %old, [%memory], %b;", np.zeros(1, "u4"), NOWHERE_ELSE, bound)
    assert after == -LANES % 5


def test_one_winner() -> None:
    free, mine = np.zeros(LANES, np.uint32), EVERYONE.astype(np.uint32) + 1
    after, old = atomic(
        "atom.acquire.cta.global.cas.b32 %old, [%memory], %b, %c;",
        np.zeros(1, "u4"), NOWHERE_ELSE, free, mine,
    )  # fmt: skip
    winners = old == 0
    assert winners.sum() == 1 and after == mine[winners]


def test_exchanges_lose_nothing() -> None:
    mine = EVERYONE.astype(np.uint32) + 1
    after, old = atomic("atom.exch.b32 %old, [%memory], %b;", np.zeros(1, "u4"), NOWHERE_ELSE, mine)
    assert np.array_equal(np.sort([*old, *after]), np.arange(LANES + 1))


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_sums_in_any_order(dtype: str) -> None:
    b = numbers(dtype, 6) * np.exp2(np.random.default_rng(7).uniform(-20, 20, LANES)).astype(dtype)
    kind = "f32" if dtype == "f4" else "f64"
    totals = {
        float(atomic(f"red.global.add.{kind} [%memory], %b;", np.zeros(1, dtype), NOWHERE_ELSE, b,
                     seed=seed)[0][0])
        for seed in range(4)
    }  # fmt: skip
    exact, scale = np.sum(b.astype(np.float64)), np.abs(b).sum()
    assert all(abs(t - exact) <= scale * np.finfo(dtype).eps * LANES for t in totals)
    assert len(totals) > 1


def test_subnormals() -> None:
    """Global memory flushes them, shared memory does not."""
    tiny = np.full(LANES, 2.0**-140, np.float32)
    after, _ = atomic("red.global.add.f32 [%memory], %b;", tiny, EVERYONE, tiny)
    assert not after.any()
    shared = """
  .shared .align 4 .b8 tile[512];
  mov.u32 %n, tile;
  shl.b32 %t, %t, 2;
  add.u32 %n, %n, %t;
  st.shared.b32 [%n], %b;
  FORM
"""
    for form in ["atom.shared.add.f32 %old, [%n], %b;",
                 "cvt.u64.u32 %offset, %n; cvta.shared.u64 %offset, %offset;"
                 "atom.add.f32 %old, [%offset], %b;"]:  # fmt: skip
        body = shared.replace("FORM", form + " ld.shared.b32 %old, [%n];")
        _, total = atomic(body, tiny, EVERYONE, tiny)
        assert (total == np.float32(2.0**-139)).all(), form


def half_values(kind: str, seed: int) -> np.ndarray:
    """Two halves of small integers for each thread, so that their sums are exact."""
    x = np.random.default_rng(seed).integers(-4, 5, 2 * LANES).astype(np.float32)
    return halves(kind, x).view(np.uint32)


def halves(kind: str, x: np.ndarray) -> np.ndarray:
    if kind.startswith("f16"):
        return x.astype(np.float16).view(np.uint16)
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def floats(kind: str, bits: np.ndarray) -> np.ndarray:
    if kind.startswith("f16"):
        return bits.view(np.float16).astype(np.float32)
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_packed_halves(kind: str) -> None:
    memory, b = half_values(kind, 8), half_values(kind, 9)
    after, old = atomic(f"atom.global.add.noftz.{kind} %old, [%memory], %b;", memory, EVERYONE, b)
    assert np.array_equal(floats(kind, after), floats(kind, memory) + floats(kind, b))
    assert np.array_equal(old, memory)
    some = b.copy()
    some[64:] = 0
    add = f"red.global.add.noftz.{kind} [%memory], %b;"
    after, _ = atomic(add, np.zeros(1, "u4"), NOWHERE_ELSE, some)
    assert np.array_equal(floats(kind, after), floats(kind, some).reshape(-1, 2).sum(axis=0))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_halves_round_once(kind: str) -> None:
    rng = np.random.default_rng(10)
    x, y = (halves(kind, rng.normal(size=LANES).astype(np.float32)) for _ in range(2))
    after, _ = atomic(f"atom.add.noftz.{kind} %old, [%memory], %b;", x, EVERYONE, y)
    total = (floats(kind, x).astype(np.float64) + floats(kind, y)).astype(np.float32)
    assert np.array_equal(after, halves(kind, total))


VECTORS = [("add.v4.f32", "f32", 4), ("add.v2.f32", "f32", 2), ("max.noftz.v2.f16x2", "f16x2", 2),
           ("add.noftz.v4.bf16x2", "bf16x2", 4)]  # fmt: skip


@pytest.mark.parametrize(("form", "kind", "items"), VECTORS)
def test_vectors(form: str, kind: str, items: int) -> None:
    """One access of a vector is one operation on each of its elements."""
    memory = half_values(kind, 11) if "16" in kind else numbers("f4", 11)
    b = half_values(kind, 12) if "16" in kind else numbers("f4", 12)
    names = [f"%e{k}" for k in range(items)]
    group = "{" + ", ".join(names) + "}"
    load = f".reg .b32 %e<{items}>; .reg .pred %p; .reg .b32 %lane; rem.u32 %lane, %i, {items};"
    load += "setp.eq.u32 %p, %lane, 0;"
    load += "".join(f"@%p ld.global.b32 {n}, [%pb+{4 * k}];" for k, n in enumerate(names))
    after, _ = atomic(load + f"@%p red.global.{form} [%memory], {group};", memory, EVERYONE, b)
    as_floats = (lambda x: floats(kind, x)) if "16" in kind else (lambda x: x)
    function = np.maximum if form.startswith("max") else np.add
    assert np.array_equal(as_floats(after), function(as_floats(memory), as_floats(b)))
    returned = load + f"@%p atom.global.{form} {group}, [%memory], {group}; @%p mov.b32 %old, %e1;"
    _, old = atomic(returned, memory, EVERYONE, b)
    assert np.array_equal(old[::items], memory[1::items])


def test_shared_counters() -> None:
    """A histogram in shared memory; each block has its own."""
    body = """
  .shared .align 4 .b8 bins[16];
  .reg .pred %p;
  .reg .b32 %bin;
  mov.u32 %bin, bins;
  setp.lt.u32 %p, %t, 4;
  shl.b32 %n, %t, 2;
  add.u32 %n, %n, %bin;
  mov.b32 %at, 0;
  @%p st.shared.b32 [%n], %at;
  bar.sync 0;
  shl.b32 %at, %b, 2;
  add.u32 %at, %at, %bin;
  red.shared.add.u32 [%at], 1;
  bar.sync 0;
  @%p ld.shared.b32 %old, [%n];
"""
    b = np.random.default_rng(13).integers(0, 4, LANES).astype(np.uint32)
    _, old = atomic(body, np.zeros(1, "u4"), NOWHERE_ELSE, b)
    for block in range(BLOCKS):
        mine = slice(block * THREADS, (block + 1) * THREADS)
        assert np.array_equal(old[mine][:4], np.bincount(b[mine], minlength=4))


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("atom.global.mul.u32 %old, [%memory], %b;", "operation"),
        ("atom.global.add.b32 %old, [%memory], %b;", "type"),
        ("atom.global.and.u32 %old, [%memory], %b;", "type"),
        ("atom.global.add.f16x2 %old, [%memory], %b;", "noftz"),
        ("red.global.exch.b32 [%memory], %b;", "operation"),
        ("atom.volatile.global.add.u32 %old, [%memory], %b;", "modifier .volatile"),
        ("atom.global.cas.b32 %old, [%memory], %b;", "3 operands"),
    ],
)
def test_unknown_forms(instruction: str, reason: str) -> None:
    memory = np.zeros(LANES, np.uint32)
    with pytest.raises(Exception, match=reason):
        atomic(instruction, memory, EVERYONE, memory)
