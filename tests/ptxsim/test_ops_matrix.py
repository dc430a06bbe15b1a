"""ldmatrix and stmatrix of the simulator: fragments to and from rows in shared memory."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptxsim.instruction import HEAD, launch

ROWS = 64  # of 16 bytes in the tile

# %tile: address of the tile; %row: this lane's row; %data, %out: its global addresses.
KERNEL = (
    HEAD
    + """
.visible .entry test(.param .u64 offsets, .param .u64 data, .param .u64 out)
{
  .reg .b32 %t, %row, %tile, %a<4>, %r<4>, %at;
  .reg .b64 %offsets, %data, %out, %generic;
  .shared .align 16 .b8 tile[1024];
  mov.u32 %t, %tid.x;
  ld.param.u64 %offsets, [offsets];
  ld.param.u64 %data, [data];
  ld.param.u64 %out, [out];
  mad.wide.u32 %offsets, %t, 4, %offsets;
  mad.wide.u32 %data, %t, 16, %data;
  mad.wide.u32 %out, %t, 16, %out;
  ld.global.u32 %row, [%offsets];
  mov.u32 %tile, tile;
  shl.b32 %at, %t, 4;
  add.u32 %at, %at, %tile;
  add.u32 %row, %row, %tile;
  cvt.u64.u32 %generic, %row;
  cvta.shared.u64 %generic, %generic;
  BODY
  ret;
}
"""
)
LOAD = """
  ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%data];
  st.shared.v4.b32 [%at], {%a0, %a1, %a2, %a3};
  ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%data+512];
  st.shared.v4.b32 [%at+512], {%a0, %a1, %a2, %a3};
  mov.b32 %r0, 0;
  mov.b32 %r1, 0;
  mov.b32 %r2, 0;
  mov.b32 %r3, 0;
  bar.sync 0;
  INSTRUCTION
  st.global.v4.b32 [%out], {%r0, %r1, %r2, %r3};
"""
STORE = """
  mov.b32 %a0, 0;
  st.shared.v4.b32 [%at], {%a0, %a0, %a0, %a0};
  st.shared.v4.b32 [%at+512], {%a0, %a0, %a0, %a0};
  ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%data];
  bar.sync 0;
  INSTRUCTION
  bar.sync 0;
  ld.shared.v4.b32 {%a0, %a1, %a2, %a3}, [%at];
  st.global.v4.b32 [%out], {%a0, %a1, %a2, %a3};
  ld.shared.v4.b32 {%a0, %a1, %a2, %a3}, [%at+512];
  st.global.v4.b32 [%out+512], {%a0, %a1, %a2, %a3};
"""

LANE = np.arange(32)


def fragment(matrix: np.ndarray, trans: bool) -> np.ndarray:
    """What each lane holds of an 8x8 matrix, as 32 bits: the figure of the PTX ISA."""
    if trans:
        matrix = matrix.T
    low = matrix[LANE // 4, 2 * (LANE % 4)].astype(np.uint32)
    return low | matrix[LANE // 4, 2 * (LANE % 4) + 1].astype(np.uint32) << 16


def registers(count: int) -> str:
    return "{" + ", ".join(f"%r{i}" for i in range(count)) + "}"


@pytest.mark.parametrize("space", [".shared", ".shared::cta", ""])
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_load(count: int, trans: bool, space: str) -> None:
    rng = np.random.default_rng(count)
    data = rng.integers(0, 2**16, (ROWS, 8), dtype=np.uint16)
    rows = rng.permutation(ROWS - 1)[:32]
    # Lanes whose address is not used have one that would be an error.
    offsets = np.where(LANE < 8 * count, 16 * rows, 16 * 10**6 + 1).astype(np.uint32)
    out = np.zeros((32, 4), np.uint32)
    address = "[%row+16]" if space else "[%generic+16]"
    suffix = ".trans" if trans else ""
    instruction = (
        f"ldmatrix.sync.aligned.m8n8.x{count}{suffix}{space}.b16 {registers(count)}, {address};"
    )
    text = KERNEL.replace("BODY", LOAD.replace("INSTRUCTION", instruction))
    launch(text, 1, 32, [offsets, data, out])
    for i in range(count):
        matrix = data[rows[8 * i : 8 * i + 8] + 1]
        assert np.array_equal(out[:, i], fragment(matrix, trans)), i
    assert not out[:, count:].any()


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_store(count: int, trans: bool) -> None:
    rng = np.random.default_rng(count)
    matrices = rng.integers(1, 2**16, (count, 8, 8), dtype=np.uint16)
    data = np.zeros((32, 4), np.uint32)
    for i in range(count):
        data[:, i] = fragment(matrices[i], trans)
    rows = rng.permutation(ROWS)[:32]
    out = np.zeros((ROWS, 8), np.uint16)
    suffix = ".trans" if trans else ""
    instruction = (
        f"stmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 [%row], {registers(count)};"
    )
    text = KERNEL.replace("BODY", STORE.replace("INSTRUCTION", instruction))
    launch(text, 1, 32, [(16 * rows).astype(np.uint32), data, out])
    expected = np.zeros_like(out)
    expected[rows[: 8 * count]] = matrices.reshape(-1, 8)
    assert np.array_equal(out, expected)


def test_misaligned_row_is_reported() -> None:
    offsets = (16 * LANE).astype(np.uint32)
    offsets[5] += 8
    arrays = [offsets, np.zeros((ROWS, 8), np.uint16), np.zeros((32, 4), np.uint32)]
    instruction = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {registers(4)}, [%row];"
    text = KERNEL.replace("BODY", LOAD.replace("INSTRUCTION", instruction))
    with pytest.raises(Exception, match="misaligned"):
        launch(text, 1, 32, arrays)


def test_all_lanes_have_to_be_there() -> None:
    arrays = [
        (16 * LANE).astype(np.uint32),
        np.zeros((ROWS, 8), np.uint16),
        np.zeros((32, 4), np.uint32),
    ]
    instruction = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {registers(4)}, [%row];"
    text = KERNEL.replace("BODY", LOAD.replace("INSTRUCTION", instruction))
    with pytest.raises(Exception, match="divergence"):
        launch(text, 1, 16, arrays)
