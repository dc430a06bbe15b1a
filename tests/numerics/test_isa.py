"""Every instruction set that this CPU can run gives results that pass the same gate."""

from __future__ import annotations

import pytest
import torch
from problems import BF16, F16, F32, alibi, gathers, operands, verify

import attnengine as ae
from attnengine import library, settings

RUNNABLE = settings.ISAS[: settings.ISAS.index(library.cpu_isa()) + 1]
LENGTH, KEYS = 70, 150


def need(isa: str) -> None:
    if isa not in RUNNABLE:
        pytest.skip(f"this CPU runs {library.cpu_isa()} at best, not {isa}")


@pytest.mark.parametrize("isa", settings.ISAS)
def test_16_bits(isa: str) -> None:
    """With bf16 dot products and with fp32 ones. On AVX2 float16, which is converted there by an
    instruction of its own; the other narrow loads and stores differ in nothing but their width."""
    need(isa)
    dtype = F16 if isa == "avx2" else BF16
    spec, captures = alibi()
    for shape in (dict(B=2, L=LENGTH, S=KEYS), dict(L=1, S=900), dict(L=3, S=2)):
        # Without bf16 products gradients are those of AVX2 (tests/cpp runs them on every set).
        grads = isa in ("avx512_bf16", "avx2")
        verify(spec, *operands(dtype, **shape), captures, isa=isa, grads=grads)


@pytest.mark.parametrize("isa", ["avx2"])
def test_f32_and_every_gather(isa: str) -> None:
    need(isa)
    spec, captures = gathers(LENGTH, KEYS, stored=F32)
    verify(spec, *operands(F32, B=2, L=LENGTH, S=KEYS), captures, isa=isa, grads=False)


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """ATTNENGINE_ISA is obeyed by a spec that is new to it, and by one that has a kernel."""
    q, k, v = operands(BF16, L=LENGTH, S=KEYS)
    spec, _ = alibi()
    best = ae.attention(q, k, v, spec)
    assert ae.compile(spec, q, k, v).program.isa == library.cpu_isa()
    monkeypatch.setenv("ATTNENGINE_ISA", "portable")
    assert ae.compile(alibi()[0], q, k, v).program.isa == "portable"
    handle = ae.compile(spec, q, k, v)
    assert handle.program.isa == "portable"
    torch.testing.assert_close(handle(q, k, v), best, rtol=2.0**-6, atol=2.0**-6)


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="avx9"):
        ae.compile(ae.AttentionSpec(), *operands(F32), isa="avx9")
