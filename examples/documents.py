"""Packed documents: a mask that reads a captured tensor. No L x S mask is ever made: the mask is
evaluated over index intervals, and only tiles that may hold a live pair are computed."""

import torch

import attnengine as ae

length = 300
document = torch.bucketize(torch.arange(length), torch.tensor([70, 155, 156]), right=True)
spec = ae.AttentionSpec(
    mask_mod=lambda b, h, q_idx, kv_idx: (document[q_idx] == document[kv_idx]) & (q_idx >= kv_idx)
)
q, k, v = (torch.randn(1, 4, length, 32) for _ in range(3))
out = ae.attention(q, k, v, spec)

# Each document by itself gives the same rows.
causal = ae.AttentionSpec(mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)
for i in range(4):
    rows = document == i
    alone = ae.attention(q[:, :, rows], k[:, :, rows], v[:, :, rows], causal)
    difference = (out[:, :, rows] - alone).abs().max().item()
    print(f"document {i}: {int(rows.sum())} tokens, difference {difference:.1e}")
    assert torch.allclose(out[:, :, rows], alone, atol=1e-5)
