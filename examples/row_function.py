"""A row function of one's own: softmax with one more key that has score 0 and no value, so that a
head may attend to nothing. Only the forward is written; the gradient is derived."""

import torch

import attnengine as ae


class SoftmaxPlusOne(ae.OnlineFunc):
    state = {"m": 0.0, "r": 1.0}  # running maximum and sum, starting from the extra key

    def update(self, scores, state):
        m = torch.maximum(state["m"], scores.amax().detach())
        factor = torch.exp(state["m"] - m)
        p = torch.exp(scores - m)
        return p, {"m": m, "r": state["r"] * factor + p.sum()}, factor

    def finalize(self, out, state):
        return out / state["r"], {"lse": state["m"] + torch.log(state["r"])}

    def weights(self, scores, saved):
        return torch.exp(scores - saved["lse"])


q, k, v = (torch.randn(2, 4, 100, 32, requires_grad=True) for _ in range(3))
spec = ae.AttentionSpec(
    mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, row_func=SoftmaxPlusOne()
)
grads = torch.autograd.grad(ae.attention(q, k, v, spec).square().sum(), (q, k, v))
expected = torch.autograd.grad(ae.reference(q, k, v, spec).square().sum(), (q, k, v))
for name, ours, theirs in zip("qkv", grads, expected, strict=True):
    print(f"d{name}: relative difference {((ours - theirs).norm() / theirs.norm()).item():.1e}")
    assert torch.allclose(ours, theirs, atol=1e-4)
