"""The machine code of the kernels' innermost loops: no spilled vector, few instructions beside the
products. Rate and cause are measured elsewhere; this keeps a change of compiler or of a template
from undoing them unseen."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from disassembly import Loop, innermost_loops

import attnengine as ae
from attnengine import library, settings

F32, BF16 = torch.float32, torch.bfloat16
RUNNABLE = settings.ISAS[: settings.ISAS.index(library.cpu_isa()) + 1]

# (spec, dtype, head dim, isa, kind). The window's modules are those of the memory test: as a causal
# mask, it has partial tiles and full ones.
MODULES = {
    "forward bf16 64 window": ("window", BF16, 64, "avx512_bf16", "forward"),
    "backward bf16 64 window": ("window", BF16, 64, "avx512_bf16", "backward"),
    "forward bf16 128": ("full", BF16, 128, "avx512_bf16", "forward"),
    "forward f32 128": ("full", F32, 128, "avx512_bf16", "forward"),
    "backward f32 128": ("full", F32, 128, "avx512_bf16", "backward"),
    "forward f32 64 avx2": ("full", F32, 64, "avx2", "forward"),
}
# Products per step of the register tile, rows x vectors; the share of such a loop's instructions
# that are products, at least: 62 % and 48 % where B is packed, 44 % where bf16 rows are paired.
TILE = {"avx512_bf16": 6 * 4, "avx2": 6 * 2}
PACKED_SHARE = {"avx512_bf16": 0.60, "avx2": 0.46}
NATURAL_SHARE = 0.42
# Loops of fewer rows, and of scores straight from memory, are products too; nothing else that has
# fused multiply-adds comes near (a row's dot product: 22 %).
PRODUCT_SHARE = 0.28


@functools.cache
def loops(name: str) -> tuple[Loop, ...]:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed (binutils)")
    spec_name, dtype, d, isa, kind = MODULES[name]
    if isa not in RUNNABLE:
        pytest.skip(f"this CPU runs {library.cpu_isa()} at best, not {isa}")
    spec = ae.variants.sliding_window(256) if spec_name == "window" else ae.AttentionSpec()
    q, k, v = (torch.empty(1, 1, 1, d, dtype=dtype) for _ in range(3))
    handle = ae.compile(spec, q, k, v, backward=kind == "backward", isa=isa)
    kernel = handle.id if kind == "forward" else handle.program.backward()
    return tuple(innermost_loops(library.kernel_info(kernel).path))


def products(name: str) -> list[Loop]:
    dot = MODULES[name][1] == BF16
    return [
        x for x in loops(name)
        if (x.dots if dot else x.products >= 4 and x.share >= PRODUCT_SHARE)
        and not x.is_exponential
    ]  # fmt: skip


def table(found: list[Loop]) -> str:
    return "\n".join(["", *map(str, found)])


def refuse(found: list[Loop]) -> None:
    if found:
        pytest.fail(table(found), pytrace=False)


@pytest.mark.parametrize("name", MODULES)
def test_products_do_not_spill(name: str) -> None:
    found = products(name)
    assert found, "no loop of products: does the disassembly still show them?"
    spilled = [x for x in found if x.spills]
    refuse(spilled)


@pytest.mark.parametrize("name", MODULES)
def test_register_tile(name: str) -> None:
    """Scores and outputs (backward: five products of two modes) run on the whole register tile, and
    hardly anything else is in their loops."""
    isa = MODULES[name][3]
    tiles = [x for x in products(name) if x.products % TILE[isa] == 0]
    packed = [x for x in tiles if x.share >= PACKED_SHARE[isa]]
    if len(packed) < 2:
        pytest.fail(table(products(name)), pytrace=False)
    slow = [x for x in tiles if x.share < NATURAL_SHARE]
    refuse(slow)


@pytest.mark.parametrize("name", MODULES)
def test_exponentials_do_not_spill(name: str) -> None:
    """The row functions' loops: nothing is stored to the stack. (That a constant of the polynomial
    is read from there, with 16 registers, costs no more than reading it anywhere else.)"""
    found = [x for x in loops(name) if x.is_exponential and "gemm" not in x.function]
    assert found, "no loop with an exp2: does the disassembly still show them?"
    stored = [x for x in found if any(i.stores for i in x.spills)]
    refuse(stored)
