"""Code written for torch's FlexAttention: same arguments, same BlockMask, and on the CPU it has a
backward and returns the log-sum-exp."""

import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

import attnengine as ae


def softcap(score, b, h, q_idx, kv_idx):
    return 20.0 * torch.tanh(score / 20.0)


q = torch.randn(1, 8, 256, 32, requires_grad=True)
k, v = (torch.randn(1, 2, 256, 32, requires_grad=True) for _ in range(2))
window = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < 64), None, None, 256, 256, "cpu")
out, aux = ae.flex_attention(
    q, k, v, softcap, window, enable_gqa=True, return_aux=AuxRequest(lse=True)
)
(out.square().mean() + aux.lse.mean()).backward()
print("out", tuple(out.shape), "lse", tuple(aux.lse.shape), "dk", tuple(k.grad.shape))
assert k.grad.isfinite().all()
