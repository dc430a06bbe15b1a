"""A prepared handle: compile once, call with any batch, heads and lengths, print what was decided,
and use it inside torch.compile."""

import torch

import attnengine as ae

causal = ae.AttentionSpec(mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)
q, k, v = (torch.randn(2, 4, 100, 32) for _ in range(3))
attend = ae.compile(causal, q, k, v)
print(attend.plan)

x = torch.randn(1, 8, 333, 32)  # other sizes, the same kernel
assert torch.allclose(attend(x, x, x), ae.reference(x, x, x, causal), atol=1e-5)


@torch.compile(fullgraph=True, backend="aot_eager")
def layer(x):
    return attend(x, x, x) + x


assert torch.allclose(layer(q), attend(q, q, q) + q, atol=1e-5)
