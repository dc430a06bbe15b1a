"""Who is timed on KV caches: attnengine, SDPA, FlexAttention, and the packages that serve models.

As gpu_peers.py: a contestant is made for one case, outside the clock, and gives the output
[B, Hq, 1, Dv]. One that cannot do a case raises.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .gpu_caches import CacheCase, Caches

OURS = "attnengine"
Run = Callable[[], Tensor]
WORKSPACE = 128 << 20  # bytes: what FlashInfer asks for
BACKENDS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,  # FlashAttention-2
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def contestants(case: CacheCase, compiled: bool, installed: Any) -> list[str]:
    """Who can mean the same. SDPA and FlexAttention know no pages, SDPA no lengths."""
    if compiled:
        return [] if case.page else ["flex"]
    plain = [] if case.page or case.ragged else [*BACKENDS]
    return [*plain, *(n for n in installed if not (case.latent and n == "flash-attn-2"))]


def make(name: str, case: CacheCase, x: Caches) -> Run:
    """The contestant of that name for a case. Raises what it raises."""
    if name in BACKENDS:
        return sdpa(BACKENDS[name], case, x)
    return {
        OURS: ours,
        "flex": flex,
        "flash-attn-2": lambda case, x: flash_attn("flash_attn", case, x),
        "flash-attn-3": lambda case, x: flash_attn("flash_attn_interface", case, x),
        "flashinfer": flashinfer_latent if case.latent else flashinfer,
    }[name](case, x)


def ours(case: CacheCase, x: Caches) -> Run:
    """attnengine as a serving loop calls it."""
    import attnengine as ae

    given = {"cache_seqlens": x.lengths, "softmax_scale": case.scale}
    if x.table is not None:
        given["block_table"] = x.table
    return lambda: ae.attention_with_kvcache(x.q, x.k, x.v, **given).transpose(1, 2)


def sdpa(backend: SDPBackend, case: CacheCase, x: Caches) -> Run:
    """SDPA held to one back end, on caches of equal length."""
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))

    def run() -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(
                q, k, v, scale=case.scale, enable_gqa=case.Hq != case.Hkv
            )

    run()  # what is refused is refused here
    return run


def flex(case: CacheCase, x: Caches) -> Run:
    """FlexAttention, compiled for this case alone; lengths are a mask that skips blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    mask = None
    if case.ragged:
        mask = create_block_mask(
            lambda b, h, q_idx, kv_idx: kv_idx < x.lengths[b],
            case.B, None, 1, case.S, device=str(q.device),
        )  # fmt: skip
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    gqa = case.Hq != case.Hkv
    return lambda: compiled(q, k, v, block_mask=mask, scale=case.scale, enable_gqa=gqa)


def flash_attn(package: str, case: CacheCase, x: Caches) -> Run:
    """The package's flash_attn_with_kvcache."""
    attend = importlib.import_module(package).flash_attn_with_kvcache
    given: dict[str, Any] = {"cache_seqlens": x.lengths, "softmax_scale": case.scale}
    if x.table is not None:
        given["page_table" if package.endswith("interface") else "block_table"] = x.table

    def run() -> Tensor:
        out = attend(x.q, x.k, x.v, **given)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def paged(case: CacheCase, x: Caches) -> tuple[Tensor, ...]:
    """(k, v, indptr, indices, last page's length) of a cache as FlashInfer takes it; a dense cache
    is one page of S rows for each sequence."""
    size = case.page or case.S
    counts = [-(-n // size) for n in case.lengths]
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if x.table is None:
        indices = torch.arange(case.B, dtype=torch.int32)
    else:
        indices = torch.cat([x.table[b, :n].cpu() for b, n in enumerate(counts)])
    last = torch.tensor([n - (c - 1) * size for n, c in zip(case.lengths, counts, strict=True)])
    device = x.q.device
    return x.k, x.v, *(t.to(device, torch.int32) for t in (starts, indices, last))


def flashinfer(case: CacheCase, x: Caches) -> Run:
    """The package's batch decode, planned outside the clock."""
    package = importlib.import_module("flashinfer")
    k, v, starts, indices, last = paged(case, x)
    memory = torch.empty(WORKSPACE, dtype=torch.uint8, device=x.q.device)
    wrapper = package.BatchDecodeWithPagedKVCacheWrapper(memory, "NHD", use_tensor_cores=True)
    wrapper.plan(
        starts, indices, last, case.Hq, case.Hkv, case.D, case.page or case.S,
        q_data_type=case.dtype, kv_data_type=case.dtype, sm_scale=case.scale,
    )  # fmt: skip
    return lambda: wrapper.run(x.q[:, 0], (k, v))[:, :, None]


def flashinfer_latent(case: CacheCase, x: Caches) -> Run:
    """The package's MLA decode: 512 columns of the latent, and those of the rotated key."""
    package = importlib.import_module("flashinfer")
    k, _, starts, indices, _ = paged(case, x)
    memory = torch.empty(WORKSPACE, dtype=torch.uint8, device=x.q.device)
    wrapper = package.mla.BatchMLAPagedAttentionWrapper(memory)
    rows = torch.arange(case.B + 1, dtype=torch.int32, device=x.q.device)
    wrapper.plan(
        rows, starts, indices, x.lengths, case.Hq, case.Dv, case.D - case.Dv, case.page, False,
        case.scale, case.dtype, case.dtype,
    )  # fmt: skip
    q, latent = x.q[:, 0], k[:, :, 0]
    parts = (q[..., : case.Dv], q[..., case.Dv :], latent[..., : case.Dv], latent[..., case.Dv :])
    return lambda: wrapper.run(*parts)[:, :, None]
