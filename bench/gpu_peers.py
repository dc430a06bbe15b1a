"""Who is timed: attnengine, torch's SDPA by back end, what is installed besides, FlexAttention.

A contestant is made for one case: ``make(name, case, operands)`` gives a callable without arguments
that returns the output [B, Hq, L, Dv]. What it needs (padding, masks, a compiled graph) is made
outside the clock. One that cannot do a case raises; the text goes into the table.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import gpu_cache_peers
from .gpu_caches import CacheCase
from .gpu_cases import SOFTMAX, Case, TimedCase, dense_mask, meaning

OURS = gpu_cache_peers.OURS
Operands = tuple[Tensor, Tensor, Tensor]
Run = Callable[[], Tensor]

BACKENDS = gpu_cache_peers.BACKENDS
INSTALLED = {  # contestant -> the module that it needs
    "flash-attn-2": "flash_attn",
    "flash-attn-3": "flash_attn_interface",
    "flashinfer": "flashinfer",
}


def installed() -> dict[str, str]:
    """Versions of the installed peers, by contestant. Nothing is imported to look."""
    found = {}
    for name, module in INSTALLED.items():
        if importlib.util.find_spec(module) is not None:
            found[name] = _version(module)
    return found


def _version(module: str) -> str:
    names = importlib.metadata.packages_distributions().get(module, [module])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def contestants(case: Case, compiled: bool) -> list[str]:
    """Who can mean the same as the case, without attnengine; `compiled`: who needs seconds of
    compiling per case, and so is timed in a second pass."""
    if isinstance(case, CacheCase):
        return gpu_cache_peers.contestants(case, compiled, installed())
    softmax = case.variant in SOFTMAX
    if compiled:
        return ["flex"] if softmax else ["dense"]
    if not softmax:
        return []
    plain = case.variant in ("causal", "full")
    return [*BACKENDS, *(installed() if plain else ())]


def make(name: str, case: Case, operands: Any) -> Run:
    """The contestant of that name for a case. Raises what it raises."""
    if isinstance(case, CacheCase):
        return gpu_cache_peers.make(name, case, operands)
    if name == OURS:
        return ours(case, operands)
    if name in BACKENDS:
        return sdpa(BACKENDS[name], case, operands)
    return {
        "flash-attn-2": flash_attn_2,
        "flash-attn-3": flash_attn_3,
        "flashinfer": flashinfer,
        "flex": flex,
        "dense": dense,
    }[name](case, operands)


# -- ours ------------------------------------------------------------------------------------------


def spec(case: TimedCase, device: str | torch.device) -> Any:
    """A case as attnengine takes it."""
    import attnengine as ae

    said = meaning(case, device)
    rows = {
        "relu": lambda: ae.ReLU(),
        "sigmoid": lambda: ae.Sigmoid(said.bias),
        "retention": lambda: ae.Retention(),
    }
    return ae.AttentionSpec(
        score_mod=said.score_mod,
        mask_mod=said.mask_mod,
        row_func=rows.get(case.variant, ae.Softmax)(),
        scale=case.scale,
    )


def ours(case: TimedCase, operands: Operands) -> Run:
    """attnengine through a prepared handle, as a model would hold it."""
    import attnengine as ae

    handle = ae.compile(spec(case, operands[0].device), *operands, backward=False)
    return lambda: handle(*operands)


# -- torch -----------------------------------------------------------------------------------------


def sdpa(backend: SDPBackend, case: TimedCase, operands: Operands) -> Run:
    """SDPA held to one back end; with operands padded to one head dim where it refuses two."""
    mask = dense_mask(case, operands[0].device) if case.variant in ("window", "sparse") else None
    options: dict[str, Any] = {
        "attn_mask": mask,
        "is_causal": case.variant == "causal",
        "scale": case.scale,
        "enable_gqa": case.Hq != case.Hkv,
    }

    def run_with(q: Tensor, k: Tensor, v: Tensor) -> Run:
        def run() -> Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, k, v, **options)[..., : case.Dv]

        return run

    return first_that_runs(run_with, case, operands)


def first_that_runs(
    run_with: Callable[..., Run], case: TimedCase, operands: Operands
) -> Run:  # a wrong answer is found later, here only refusals
    """On the operands as they are; if that is refused, padded to one head dim."""
    refusals = []
    for tried in (operands, padded(operands)) if case.D != case.Dv else (operands,):
        run = run_with(*tried)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                run()
            return run
        except RuntimeError as error:
            if "out of memory" in str(error) or "CUDA error" in str(error):
                raise
            reasons = [str(w.message).strip().splitlines()[0] for w in said]
            refusals.append("; ".join([str(error).strip().splitlines()[0], *reasons]))
    raise RuntimeError(refusals[-1])


def padded(operands: Operands) -> Operands:
    """All three with the larger head dim, zeros at the end: the same scores, and values that are
    cut off again."""
    width = max(operands[0].shape[3], operands[2].shape[3])
    q, k, v = (F.pad(x, (0, width - x.shape[3])) for x in operands)
    return q, k, v


def flex(case: TimedCase, operands: Operands) -> Run:
    """FlexAttention, compiled for this case alone."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    q, _, _ = operands
    said, mask = meaning(case, q.device), None
    if said.mask_mod is not None:
        own = case.variant == "sparse"  # the mask depends on batch and head
        sizes = (case.B if own else None, case.Hq if own else None, case.L, case.S)
        mask = create_block_mask(said.mask_mod, *sizes, device=str(q.device))
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def run_with(q: Tensor, k: Tensor, v: Tensor) -> Run:
        def run() -> Tensor:
            out = compiled(
                q, k, v,
                score_mod=said.score_mod, block_mask=mask, scale=case.scale,
                enable_gqa=case.Hq != case.Hkv,
            )  # fmt: skip
            return out[..., : case.Dv]

        return run

    return first_that_runs(run_with, case, operands)


def dense(case: TimedCase, operands: Operands) -> Run:
    """The formula over a dense score matrix, compiled. Raises MemoryError for one too large."""
    q, k, v = operands
    scores = 4.0 * case.B * case.Hq * case.L * case.S  # bytes, in fp32
    room = memory(q.device)
    if scores > 0.4 * room:
        raise MemoryError(f"a score matrix of {scores / 2**30:.0f} GiB, of {room / 2**30:.0f} GiB")
    torch._dynamo.reset()
    said, scale = meaning(case, q.device), case.scale
    live = dense_mask(case, q.device) if said.mask_mod is not None else None

    def relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.relu((q @ k.mT) * scale) @ v

    def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.sigmoid((q @ k.mT).float() * scale + said.bias)
        return torch.where(live, weights, 0.0).to(v.dtype) @ v

    def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        h = torch.arange(case.Hq, device=q.device)[:, None, None]
        q_idx = torch.arange(case.L, device=q.device)[:, None]
        kv_idx = torch.arange(case.S, device=q.device)
        assert said.score_mod is not None
        s = said.score_mod((q @ k.mT).float() * scale, None, h, q_idx, kv_idx)
        s = torch.where(live, s, 0.0)
        return (s / s.abs().sum(-1, keepdim=True).clamp(min=1.0)).to(v.dtype) @ v

    formulas = {"relu": relu, "sigmoid": sigmoid, "retention": retention}
    compiled = torch.compile(formulas[case.variant], fullgraph=True, dynamic=False)
    return lambda: compiled(q, k, v)


def memory(device: torch.device) -> float:
    """Bytes of the device, of which a contestant may take a part."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return 4.0 * 2**30


# -- packages besides torch ------------------------------------------------------------------------


def heads_last(operands: Operands) -> Operands:
    """[B, L, H, D], contiguous: the layout of these packages, made outside the clock."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in operands)
    return q, k, v


def flash_attn_2(case: TimedCase, operands: Operands) -> Run:
    """The package's FlashAttention-2."""
    attend = importlib.import_module("flash_attn").flash_attn_func

    def run_with(*tried: Tensor) -> Run:
        q, k, v = heads_last((tried[0], tried[1], tried[2]))

        def run() -> Tensor:
            out = attend(q, k, v, softmax_scale=case.scale, causal=case.variant == "causal")
            return out.transpose(1, 2)[..., : case.Dv]

        return run

    return first_that_runs(run_with, case, operands)


def flash_attn_3(case: TimedCase, operands: Operands) -> Run:
    """The package's FlashAttention-3, which takes some unequal head dims as they are."""
    attend = importlib.import_module("flash_attn_interface").flash_attn_func

    def run_with(*tried: Tensor) -> Run:
        q, k, v = heads_last((tried[0], tried[1], tried[2]))

        def run() -> Tensor:
            out = attend(q, k, v, softmax_scale=case.scale, causal=case.variant == "causal")
            out = out[0] if isinstance(out, tuple) else out
            return out.transpose(1, 2)[..., : case.Dv]

        return run

    return first_that_runs(run_with, case, operands)


def flashinfer(case: TimedCase, operands: Operands) -> Run:
    """The package's prefill or decode kernel, of one sequence."""
    if case.B != 1:
        raise RuntimeError("single-sequence kernels: B = 1 only")
    package = importlib.import_module("flashinfer")
    q, k, v = (x[0] for x in heads_last(operands))  # [L, H, D]
    if case.decode:
        return lambda: package.single_decode_with_kv_cache(
            q[0], k, v, sm_scale=case.scale
        )[None, :, None]  # fmt: skip

    def run() -> Tensor:
        causal = case.variant == "causal"
        out = package.single_prefill_with_kv_cache(q, k, v, causal=causal, sm_scale=case.scale)
        return out.transpose(0, 1)[None]

    return run
