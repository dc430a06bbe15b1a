"""A score function with a learnable tensor: the slopes of ALiBi are trained, not fixed."""

import torch

import attnengine as ae

q, k, v = (torch.randn(2, 4, 100, 32, requires_grad=True) for _ in range(3))
slopes = torch.nn.Parameter(torch.tensor([0.5, 0.25, 0.125, 0.0625]))

spec = ae.AttentionSpec(
    score_mod=lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx),
    mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx,
)
out = ae.attention(q, k, v, spec)
out.square().mean().backward()

expected = ae.reference(q, k, v, spec)
print("largest difference from the reference:", (out - expected).abs().max().item())
print("gradient of the slopes:", slopes.grad)
assert torch.allclose(out, expected, atol=1e-5)
