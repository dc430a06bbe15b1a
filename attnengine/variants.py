"""The field's common attention variants, each an AttentionSpec of a few lines.

Positions are top-left aligned: query i and key j at the same index are the same token. Tensors
given to a variant are captured, not copied; those that require grad get gradients. Combine masks
with :func:`and_masks` and :func:`or_masks`, and specs with ``dataclasses.replace``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .rows import ReLU, Retention, Sigmoid, SoftmaxSink
from .spec import AttentionSpec

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def and_masks(*masks: Mask) -> Mask:
    """A mask_mod that is true where all of the given mask_mods are."""
    _check_masks(masks)

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        live = masks[0](b, h, q_idx, kv_idx)
        for m in masks[1:]:
            live = live & m(b, h, q_idx, kv_idx)
        return live

    return mask


def or_masks(*masks: Mask) -> Mask:
    """A mask_mod that is true where any of the given mask_mods is."""
    _check_masks(masks)

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        live = masks[0](b, h, q_idx, kv_idx)
        for m in masks[1:]:
            live = live | m(b, h, q_idx, kv_idx)
        return live

    return mask


def causal_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """A query meets its own key and the earlier ones."""
    return q_idx >= kv_idx


def causal() -> AttentionSpec:
    """Softmax over the key of the same position and the earlier ones."""
    return AttentionSpec(mask_mod=causal_mask)


def sliding_window(window: int, causal: bool = True) -> AttentionSpec:
    """The ``window`` earlier keys and the own one; not causal: as many later ones too."""
    w = _integer("window", window, 0)
    if causal:
        return AttentionSpec(
            mask_mod=lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx <= w)
        )
    return AttentionSpec(mask_mod=lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() <= w)


def dilated(window: int, dilation: int, causal: bool = True) -> AttentionSpec:
    """Every ``dilation``-th of the earlier keys, ``window`` of them, and the own one (Longformer,
    arXiv:2004.05150); not causal: as many later ones too."""
    step = _integer("dilation", dilation, 1)
    reach = _integer("window", window, 0) * step

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        d = q_idx - kv_idx
        near = (d >= 0) & (d <= reach) if causal else d.abs() <= reach
        return near & (d % step == 0)

    return AttentionSpec(mask_mod=mask)


def prefix_lm(prefix_len: int | Tensor) -> AttentionSpec:
    """All keys before ``prefix_len`` (int, 0-d or [B] integer tensor), causal after it."""
    if isinstance(prefix_len, Tensor):
        n = _tensor("prefix_len", prefix_len, (0, 1), "0-d or [B]", floating=False)
        if n.dim() == 1:
            return AttentionSpec(mask_mod=lambda b, h, q, kv: (kv < n[b]) | (q >= kv))
        return AttentionSpec(mask_mod=lambda b, h, q, kv: (kv < n) | (q >= kv))
    length = _integer("prefix_len", prefix_len, 0)
    return AttentionSpec(mask_mod=lambda b, h, q, kv: (kv < length) | (q >= kv))


def document(doc_ids: Tensor, causal: bool = True) -> AttentionSpec:
    """Keys of the same document only. doc_ids: integer tensor [S] or [B, S]."""
    ids = _tensor("doc_ids", doc_ids, (1, 2), "[S] or [B, S]", floating=False)

    def same(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if ids.dim() == 1:
            return ids[q_idx] == ids[kv_idx]
        return ids[b, q_idx] == ids[b, kv_idx]

    return AttentionSpec(mask_mod=and_masks(causal_mask, same) if causal else same)


def neighborhood_2d(height: int, width: int, kernel: int) -> AttentionSpec:
    """Pixels of a height x width image in row-major order; each meets the ``kernel`` x ``kernel``
    window around it, shifted at the borders to stay inside (NATTEN, arXiv:2204.07143)."""
    rows, cols = _integer("height", height, 1), _integer("width", width, 1)
    half = _integer("kernel", kernel, 1) // 2
    if kernel % 2 == 0 or kernel > min(height, width):
        raise ValueError(f"kernel={kernel}: expected an odd number up to {min(height, width)}")

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        y = (q_idx // cols).clamp(half, rows - 1 - half)
        x = (q_idx % cols).clamp(half, cols - 1 - half)
        return ((kv_idx // cols - y).abs() <= half) & ((kv_idx % cols - x).abs() <= half)

    return AttentionSpec(mask_mod=mask)


def alibi_slopes(n_heads: int) -> Tensor:
    """The published slopes [H]: powers of 2**(-8/H), for other H interleaved with the next power's
    (Press et al., arXiv:2108.12409)."""
    n = _integer("n_heads", n_heads, 1)
    power = 2 ** int(math.log2(n))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(n - power)]
    return torch.tensor(slopes)


def alibi(slopes: int | Tensor, causal: bool = True) -> AttentionSpec:
    """score - slope[h] * distance. slopes: floating tensor [H], or the number of heads."""
    slope = slopes if isinstance(slopes, Tensor) else alibi_slopes(slopes)
    slope = _tensor("slopes", slope, (1,), "[H]")
    if causal:
        return AttentionSpec(
            score_mod=lambda score, b, h, q_idx, kv_idx: score + slope[h] * (kv_idx - q_idx),
            mask_mod=causal_mask,
        )
    return AttentionSpec(
        score_mod=lambda score, b, h, q_idx, kv_idx: score - slope[h] * (q_idx - kv_idx).abs()
    )


def softcap(cap: float, causal: bool = True) -> AttentionSpec:
    """cap * tanh(score / cap), as in Gemma 2 (arXiv:2408.00118)."""
    c = _positive("cap", cap)
    return AttentionSpec(
        score_mod=lambda score, b, h, q_idx, kv_idx: c * torch.tanh(score / c),
        mask_mod=causal_mask if causal else None,
    )


def t5_bucket(
    distance: Tensor, num_buckets: int, bidirectional: bool = True, max_distance: int = 128
) -> Tensor:
    """Bucket of kv_idx - q_idx (integer tensor): exact when near, logarithmic up to max_distance
    (Raffel et al., arXiv:1910.10683)."""
    base: Any = 0
    if bidirectional:
        num_buckets //= 2
        base = (distance > 0).to(torch.int64) * num_buckets
        far = distance.abs()
    else:
        far = (-distance).clamp(min=0)
    exact = num_buckets // 2
    ratio = torch.log(far.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    large = (exact + (ratio * (num_buckets - exact)).to(torch.int64)).clamp(max=num_buckets - 1)
    return base + torch.where(far < exact, far, large)


def t5_bias(
    table: Tensor, bidirectional: bool = True, max_distance: int = 128, causal: bool = False
) -> AttentionSpec:
    """score + table[bucket(kv_idx - q_idx), h]; table: floating tensor [num_buckets, H], learnable.
    T5 itself uses scale 1: ``dataclasses.replace(spec, scale=1.0)``."""
    _tensor("table", table, (2,), "[num_buckets, H]")
    far = _integer("max_distance", max_distance, 1)
    buckets, least = table.shape[0], 4 if bidirectional else 2
    if buckets < least or (bidirectional and buckets % 2):
        even = "an even number of" if bidirectional else ""
        raise ValueError(f"table has {buckets} buckets: expected {even} buckets >= {least}")
    exact = buckets // least
    if far <= exact:
        raise ValueError(f"max_distance={far}: expected more than the {exact} exact buckets")
    # A table of buckets by distance: a logarithm in each kernel could round a bucket's edge apart.
    bucket = t5_bucket(torch.arange(-far, far + 1), buckets, bidirectional, far).to(table.device)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + table[bucket[(kv_idx - q_idx).clamp(-far, far) + far], h]

    return AttentionSpec(score_mod=score_mod, mask_mod=causal_mask if causal else None)


def learned_bias(bias: Tensor, causal: bool = False) -> AttentionSpec:
    """score + bias, a floating tensor broadcastable to [B, H, L, S] (sizes of 1 are repeated)."""
    _tensor("bias", bias, (1, 2, 3, 4), "broadcastable to [B, H, L, S]")
    sizes = tuple(bias.shape)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        at = (b, h, q_idx, kv_idx)[4 - len(sizes) :]
        return score + bias[tuple(0 if n == 1 else i for n, i in zip(sizes, at, strict=True))]

    return AttentionSpec(score_mod=score_mod, mask_mod=causal_mask if causal else None)


def sink(sink: Tensor, causal: bool = True) -> AttentionSpec:
    """Softmax with a learnable sink logit per head, floating tensor [H]."""
    return AttentionSpec(row_func=SoftmaxSink(sink), mask_mod=causal_mask if causal else None)


def sigmoid(bias: float | Tensor = 0.0, causal: bool = False) -> AttentionSpec:
    """sigmoid(score + bias); bias: number, 0-d or [H] tensor (-log(keys) is usual)."""
    return AttentionSpec(row_func=Sigmoid(bias), mask_mod=causal_mask if causal else None)


def relu(causal: bool = False) -> AttentionSpec:
    """max(score, 0), not normalised."""
    return AttentionSpec(row_func=ReLU(), mask_mod=causal_mask if causal else None)


def retention(decay: int | Tensor) -> AttentionSpec:
    """score * decay[h]**(q_idx - kv_idx), causal, with the Retention row function.

    decay: floating tensor [H] of values in (0, 1], or the number of heads (the published
    1 - 2**(-5 - h), arXiv:2307.08621).
    """
    if not isinstance(decay, Tensor):
        decay = 1.0 - torch.exp2(-5.0 - torch.arange(_integer("decay", decay, 1)).float())
    gamma = _tensor("decay", decay, (1,), "[H]")

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score * torch.exp2((q_idx - kv_idx) * torch.log2(gamma[h]))

    return AttentionSpec(score_mod=score_mod, mask_mod=causal_mask, row_func=Retention())


def _check_masks(masks: tuple) -> None:
    if not masks:
        raise ValueError("expected at least one mask_mod")
    for m in masks:
        if not callable(m):
            raise TypeError(f"{m!r}: expected a mask_mod(b, h, q_idx, kv_idx)")


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r}: expected an integer")
    if value < least:
        raise ValueError(f"{name}={value}: expected at least {least}")
    return int(value)


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}: expected a number")
    if not (math.isfinite(value) and float(value) > 0):
        raise ValueError(f"{name}={value}: expected a finite number above 0")
    return float(value)


def _tensor(name: str, x: Any, dims: tuple, shape: str, floating: bool = True) -> Tensor:
    kind = "a floating" if floating else "an integer"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}={x!r}: expected a tensor {shape}")
    integral = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    if not (x.is_floating_point() if floating else integral):
        raise TypeError(f"{name} has dtype {x.dtype}: expected {kind} tensor")
    if x.dim() not in dims:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {shape}")
    return x
