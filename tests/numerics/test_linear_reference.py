"""The recurrent reference equals the published formulas; the chunk form equals the reference; the
gate passes what is right and catches what is wrong. No kernel is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import linear_problems as lp
import pytest
import torch
import torch.nn.functional as F
from linear_problems import F64, FAMILIES, Family
from torch import Tensor

import attnengine as ae
from attnengine import gate
from attnengine.linear.chunked import chunked
from attnengine.linear.ideal import ideal
from attnengine.linear.reference import reference

V = ae.linear_variants
B, HK, H, L, D, DV = 2, 2, 4, 37, 5, 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def operands(length: int = L) -> tuple[Tensor, Tensor, Tensor]:
    """q and k [B, HK, L, D], k of unit length, v [B, H, L, DV]."""
    q, k = normal(B, HK, length, D, seed=1), normal(B, HK, length, D, seed=2)
    return q, F.normalize(k, dim=-1), normal(B, H, length, DV, seed=3)


def per_head(x: Tensor) -> Tensor:
    return x.repeat_interleave(H // HK, 1)


def same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    worst = (got - want).abs().flatten().tolist()
    assert max(worst, default=0.0) <= 1e-12 * max([1.0, *want.abs().flatten().tolist()])


# -- published formulas ----------------------------------------------------------------------------


def test_retention_is_its_quadratic_form() -> None:
    """(Q K^T / sqrt(D) * Gamma) V, Gamma_ts = gamma^(t - s), s <= t."""
    q, k, v = operands()
    gamma = 1.0 - torch.exp2(-5.0 - torch.arange(H).double())
    apart = torch.arange(L)[:, None] - torch.arange(L)
    decay = (gamma[:, None, None] ** apart.clamp(min=0)).tril()
    want = (per_head(q) @ per_head(k).mT * D**-0.5 * decay) @ v
    same(ae.reference(**V.retention(q, k, v)), want)
    same(ae.reference(**V.retention(q, k, v, gamma)), want)


def test_gated_retention_and_gla_are_masked_products() -> None:
    """Weights q_t.k_s exp(G_t - G_s), a channel's own G under GLA."""
    q, k, v = operands()
    g = F.logsigmoid(normal(B, H, L, D, seed=4))
    for gates, call in ((g[..., :1], V.simple_gla(q, k, v, g[..., 0])), (g, V.gla(q, k, v, g))):
        total = gates.cumsum(2).expand(B, H, L, D)
        weights = (per_head(q) * total.exp()) @ (per_head(k) * (-total).exp()).mT
        same(ae.reference(**call), weights.tril() @ v * D**-0.5)


def test_mamba2_is_its_state_space_model() -> None:
    """h = exp(dt A) h + dt x B^T, y = h C + D x, times silu(z), states [P, N] as published."""
    C, K, x = operands()
    raw, bias, skip = normal(B, H, L, seed=4), normal(H, seed=5), normal(H, seed=6)
    A, z = -normal(H, seed=7).exp(), normal(B, H, L, DV, seed=8)
    dt, state, rows = F.softplus(raw + bias[:, None]), torch.zeros(B, H, DV, D, dtype=F64), []
    for t in range(L):
        dx = dt[:, :, t, None] * x[:, :, t]
        keep = (dt[:, :, t] * A)[..., None, None].exp()
        state = keep * state + dx[..., None] * per_head(K)[:, :, t, None, :]
        rows.append(torch.einsum("bhpn,bhn->bhp", state, per_head(C)[:, :, t]))
    y = torch.stack(rows, 2) + skip[:, None, None] * x
    same(ae.reference(**V.mamba2(x, raw, A, K, C, skip, z, bias, True)), y * F.silu(z))
    wide = skip[:, None].expand(H, DV)
    same(ae.reference(**V.mamba2(x, dt, A, K, C, wide)), y)
    got, last = ae.reference(**V.mamba2(x, dt, A, K, C), output_final_state=True)
    same(got, torch.stack(rows, 2))
    same(last, state.mT)


def test_elu_linear_is_a_normalized_product() -> None:
    q, k, v = operands()
    weights = (per_head(F.elu(q) + 1) @ per_head(F.elu(k) + 1).mT).tril()
    same(ae.reference(**V.elu_linear(q, k, v)), weights @ v / weights.sum(-1, keepdim=True))


def test_delta_rules_are_products_of_householder_like_matrices() -> None:
    """S_t = (I - beta k k^T) diag(exp(g)) S_{t-1} + beta k v^T, every gate of the family."""
    q, k, v = operands()
    beta, g = 2.0 * normal(B, H, L, seed=4).sigmoid(), F.logsigmoid(normal(B, H, L, D, seed=5))
    for gates, call in (
        (torch.zeros_like(g), V.delta_net(q, k, v, beta)),
        (g[..., :1].expand_as(g), V.gated_delta_net(q, k, v, g[..., 0], beta)),
        (g, V.kda(q, k, v, g, beta)),
    ):
        state, rows = torch.zeros(B, H, D, DV, dtype=F64), []
        for t in range(L):
            kt, bt = per_head(k)[:, :, t], beta[:, :, t, None, None]
            keep = torch.eye(D, dtype=F64) - bt * kt[..., None] * kt[..., None, :]
            state = keep @ torch.diag_embed(gates[:, :, t].exp()) @ state
            state = state + bt * kt[..., None] * v[:, :, t, None, :]
            rows.append((per_head(q)[:, :, t, None, :] @ state)[..., 0, :] * D**-0.5)
        got, last = ae.reference(**call, output_final_state=True)
        same(got, torch.stack(rows, 2))
        same(last, state)


# -- rules of the reference ------------------------------------------------------------------------

KDA = Family(F64, D, DV, "channel", True, "sum", "gates")


def test_a_sequence_in_parts_is_the_whole() -> None:
    """The final state, z included, is the initial state of what follows; one token is a step."""
    p = lp.problem(replace(KDA, hooks="features"), 0, B=2, heads=(HK, H), L=23)
    out, last = p.call(reference, p.leaves(), output_final_state=True)
    parts, state = [], p.initial_state
    for first, end in ((0, 9), (9, 9), (9, 10), (10, 23)):
        t = slice(first, end)
        part, state = reference(
            p.q[:, :, t], p.k[:, :, t], p.v[:, :, t], p.spec, decay=p.decay[:, :, t],
            beta=p.beta[:, :, t], initial_state=state, output_final_state=True,
        )  # fmt: skip
        parts.append(part)
    same(torch.cat(parts, 2), out)
    same(state, last)


@pytest.mark.parametrize("initial", [False, True])
def test_packed_sequences_are_separate_ones(initial: bool) -> None:
    p = lp.problem(replace(KDA, hooks="none"), 1, heads=(HK, H), lengths=(4, 0, 1, 7, 0))
    state = normal(5, H, D, DV + 1).abs() if initial else None
    rest = {"beta": p.beta, "decay": p.decay, "output_final_state": True}
    out, last = reference(
        p.q, p.k, p.v, p.spec, cu_seqlens=p.cu_seqlens, initial_state=state, **rest
    )
    ends = p.cu_seqlens.tolist()
    for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
        x = {n: t[:, :, a:b] for n, t in (("q", p.q), ("k", p.k), ("v", p.v))}
        rest |= {"beta": p.beta[:, :, a:b], "decay": p.decay[:, :, a:b]}
        one = None if state is None else state[i : i + 1]
        part, after = reference(**x, spec=p.spec, initial_state=one, **rest)
        same(out[:, :, a:b], part)
        same(last[i : i + 1], after)


def test_nothing_is_still_a_function() -> None:
    """No token: an empty output, the initial state kept, gradients of zero; z starts at 0."""
    for lengths in ((), (0, 0)):
        p = lp.problem(replace(KDA, hooks="none"), 2, B=1, heads=(HK, H), L=0, lengths=lengths)
        state = normal(max(1, len(lengths)), H, D, DV).requires_grad_()
        leaves = p.leaves() | {"initial_state": state}
        out, last = p.call(reference, leaves, output_final_state=True)
        assert out.shape == (1, H, 0, DV)
        assert torch.equal(last, F.pad(state, (0, 1)))
        dq, ds = torch.autograd.grad([out.sum(), last.sum()], [leaves["q"], state])
        assert dq.numel() == 0 and torch.equal(ds, torch.ones_like(ds))


def test_denominators_keep_away_from_zero() -> None:
    """|scale q.z| < 1e-6 becomes +-1e-6, without a gradient there."""
    q = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=F64).view(1, 1, 4, 1).requires_grad_()
    k = torch.tensor([0.0, 1e-7, 1.0, 1.0], dtype=F64).view(1, 1, 4, 1)
    v = torch.ones(1, 1, 4, 1, dtype=F64)
    spec = ae.LinearAttentionSpec(normalizer="sum", scale=1.0)
    out = reference(q, k, v, spec)
    same(out[0, 0, :, 0], torch.tensor([0.0, 0.1, 1.0, 1.0], dtype=F64))
    (dq,) = torch.autograd.grad(out.sum(), q)
    same(dq[0, 0, :, 0], torch.tensor([0.0, 0.1, 0.0, 0.0], dtype=F64))
    tiny = reference(-q.detach()[:, :, :2], k[:, :, :2], v[:, :, :2], spec)
    same(tiny[0, 0, :, 0], torch.tensor([0.0, 0.1], dtype=F64))  # -1e-7 / -1e-6


def test_an_infinite_decay_forgets() -> None:
    q, k, v = operands()
    g = F.logsigmoid(normal(B, H, L, seed=4))
    g[:, :, 20] = -torch.inf
    g.requires_grad_()
    out = ae.reference(**V.gated_delta_net(q, k, v, g, torch.ones(B, H, L, dtype=F64)))
    (dg,) = torch.autograd.grad(out.sum(), g)
    assert dg.isfinite().all() and not dg[:, :, 20].any()
    later = [x[:, :, 20:] for x in (q, k, v, g, torch.ones(B, H, L, dtype=F64))]
    same(out[:, :, 20:], ae.reference(**V.gated_delta_net(*later)))


@pytest.mark.parametrize("kind", ["none", "scalar", "channel"])
@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("normalizer", [None, "sum"])
def test_gradcheck(kind: str, beta: bool, normalizer: str | None) -> None:
    """Gradients of operands, states, decays, beta and captured tensors, from out and state."""
    family = Family(F64, 3, 2, kind, beta, normalizer, "gates")
    p = lp.problem(family, 3, heads=(1, 2), lengths=(3, 0, 2), per_head=False)
    leaves = p.leaves() | {"initial_state": normal(3, 2, 3, 2).requires_grad_()}
    inputs = [*leaves.values(), *p.captures.values()]

    def call(*_: Tensor) -> Any:
        return p.call(reference, leaves, output_final_state=True)

    assert torch.autograd.gradcheck(call, inputs)


# -- the chunk form --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "scalar", "channel"])
@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("normalizer", [None, "sum"])
@pytest.mark.parametrize("hooks", ["none", "gates"])
def test_chunks_are_the_recurrence(
    kind: str, beta: bool, normalizer: str | None, hooks: str
) -> None:
    """Forward and every gradient in fp64; decays from weak to -inf, tails, packed sequences."""
    family = Family(F64, 7, 5, kind, beta, normalizer, hooks)
    for seed, lengths in ((0, None), (1, (65, 0, 16, 1))):
        p = lp.problem(family, seed, lengths=lengths)
        lp.check_linear(p, *p.run(chunked))


@pytest.mark.parametrize("chunk", [1, 5, 16, 48, 100])
def test_any_chunk(chunk: int) -> None:
    p = lp.problem(replace(FAMILIES["f64-channel-delta-sum"], hooks="none"), 4, B=1, L=100)
    leaves = p.leaves()
    same(p.call(chunked, leaves, chunk=chunk), p.call(reference, leaves))


# -- the gate --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_gate_passes_what_is_right(name: str) -> None:
    """The recurrence in fp32 and the ideal kernel, through every rule."""
    for seed in range(2):
        expected = lp.Expected(lp.problem(FAMILIES[name], 10 + seed))
        for fn in (reference, ideal):
            expected.check(*expected.problem.run(fn))


def scaled(*args: Any, spec: Any = None, **options: Any) -> Any:
    q, k, v, spec = args
    return ideal(q, k, v * 1.01, spec, **options)


def lost_token(q: Tensor, k: Tensor, v: Tensor, spec: Any, **options: Any) -> Any:
    """Token 70 never reaches the state of one head in four."""
    keep = torch.ones_like(v[:, :, :, :1])
    keep[:, 0, 70] = 0.0
    return ideal(q, k, v * keep, spec, **options)


def early_decay(q: Tensor, k: Tensor, v: Tensor, spec: Any, **options: Any) -> Any:
    """A token's own decay reaches its own value, too."""
    options["decay"] = options["decay"].roll(-1, 2)
    return ideal(q, k, v, spec, **options)


def no_carry(q: Tensor, k: Tensor, v: Tensor, spec: Any, **options: Any) -> Any:
    """The state does not cross from one chunk to the next."""
    halves = [slice(0, 64), slice(64, None)]
    state, outs = options.pop("initial_state", None), []
    for t in halves:
        rest = {n: options[n][:, :, t] for n in ("decay", "beta") if n in options}
        out, last = ideal(q[:, :, t], k[:, :, t], v[:, :, t], spec, initial_state=state,
                          output_final_state=True, **rest)  # fmt: skip
        state = 0.5 * last
        outs.append(out)
    return torch.cat(outs, 2), last


def coarse_beta(q: Tensor, k: Tensor, v: Tensor, spec: Any, **options: Any) -> Any:
    options["beta"] = options["beta"].to(torch.float8_e4m3fn).float()
    return ideal(q, k, v, spec, **options)


@pytest.mark.parametrize("family", [Family(beta=True), FAMILIES["bf16-delta"]], ids=["f32", "bf16"])
@pytest.mark.parametrize("bug", [scaled, lost_token, early_decay, no_carry, coarse_beta])
def test_gate_catches(family: Family, bug: Callable[..., Any]) -> None:
    """Injected bugs, in the output alone and in the gradients alone; a wrong factor in each."""
    p = lp.problem(family, 5, B=1, heads=(2, 4), L=128, lengths=(), per_head=False)
    p = replace(p, decay=-0.1 * normal(1, 4, 128).abs().float())
    expected = lp.Expected(p)
    outputs, grads = p.run(bug)
    with pytest.raises(gate.GateError):
        expected.check(outputs)
    with pytest.raises(gate.GateError):
        expected.check((), grads)
    right = p.run(ideal)
    expected.check(*right)
    for n, grad in right[1].items():  # sums that cancel are less certain in 16 bits
        wrong = grad * (1.05 if n in ("decay", "beta") else 1.01)
        with pytest.raises(gate.GateError):
            expected.check((), {n: wrong})
