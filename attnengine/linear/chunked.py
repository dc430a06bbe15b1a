"""Linear attention by chunks of tokens in plain PyTorch: matrix products in the place of steps.

Equal to the recurrence (:mod:`attnengine.linear.reference`) up to rounding, and far faster: what
kernels are compared with in benchmarks, and, in 16 bits, what eager PyTorch may be expected to err.
With G the sums of log-decay from a chunk's first token, and S the state before it:

    M_ts = q_t.k_s e^(G_t - G_s), s <= t;   A_ts = beta_t k_t.k_s e^(G_t - G_s), s < t
    V = v, under the delta rule (I + A)^-1 beta (v - (k e^G) S)        (DeltaNet, arXiv:2406.06484)
    out = scale ((q e^G) S + M V);          S' = e^G_last S + (k e^(G_last - G))^T V

No G is subtracted from another: each e^(G_t - G_s) is the exp of a sum of log-decays, so that it
neither overflows nor cancels, and a log-decay of -inf works.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..reference import Mods
from .arguments import LinearArguments, check_arguments
from .reference import Operands, first_state, hooked, modified, no_rows, over_sequences
from .spec import LinearAttentionSpec

CHUNK = 64  # tokens
BLOCK = 16  # tokens among which a channel decay is applied pair by pair


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: LinearAttentionSpec | None = None,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk: int = CHUNK,
    compiled: bool = False,
) -> Any:
    """``ae.linear_attention`` in plain PyTorch, in q's dtype; decays and states in fp32 (fp64).

    All heads and batch rows at once, chunk after chunk. ``chunk``: tokens of one. ``compiled``: a
    chunk's arithmetic goes through ``torch.compile`` (once per shape), the loop stays in Python.
    Arguments and results as of ``ae.linear_attention``, but positive log-decays are not looked for.
    """
    spec = LinearAttentionSpec() if spec is None else spec
    found = check_arguments(
        q, k, v, spec, decay=decay, beta=beta, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    mods, low = Mods(None), q.dtype
    given = modified(q, k, v, spec, found, mods, found.acc, low)
    state = first_state(found, spec, found.acc, q.device)
    step = _compiled_step() if compiled else chunk_step
    form = functools.partial(by_chunks, arithmetic=Plain(low, found.acc), chunk=chunk, step=step)
    out, state = over_sequences(form, given, state, found, spec)
    out = hooked("out_mod", spec.out_mod, out, mods, low)
    return (out, state) if output_final_state else out


eager = chunked  # as the numerics gate calls it: what PyTorch in q's dtype computes


@functools.cache
def _compiled_step() -> Callable[..., Any]:
    return torch.compile(chunk_step, dynamic=False)


@dataclass(frozen=True)
class Plain:
    """Arithmetic in ``low``, with sums over chunks and factors of decay in ``acc``."""

    low: torch.dtype
    acc: torch.dtype
    scales_rows: ClassVar[bool] = True  # a scalar decay is applied where it costs least

    def fed(self, x: Tensor) -> Tensor:
        """x as an operand of a product."""
        return x.to(self.low)

    def factor(self, x: Tensor) -> Tensor:
        """x as a factor of a product's elements."""
        return x.to(self.low)

    def product(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        """scale a @ b."""
        return a @ b if scale == 1.0 else (a @ b) * scale

    def sums(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b for a single column."""
        return a @ b

    def solve(self, a: Tensor, b: Tensor) -> Tensor:
        """(I + a)^-1 b; a is strictly lower triangular."""
        a, b = a.to(self.acc), b.to(self.acc)
        return torch.linalg.solve_triangular(a, b, upper=False, unitriangular=True)


def by_chunks(
    x: Operands,
    state: Tensor,
    found: LinearArguments,
    normalizer: bool,
    *,
    arithmetic: Any,
    chunk: int = CHUNK,
    step: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over the tokens of one sequence: see ``reference.recurrence``."""
    length, Hk = x.v.shape[2], x.k.shape[1]
    if length == 0:
        return no_rows(x, state), state
    shape, rows = state.shape, []
    run: Callable[..., Any] = step or chunk_step

    def heads(t: Tensor) -> Tensor:  # [B, Hk, heads that share q and k, L, ..]
        return t.unflatten(1, (Hk, t.shape[1] // Hk))

    q, k, v = (heads(t) for t in x[:3])
    g, beta = (None if t is None else heads(t) for t in x[3:])
    state = heads(state)
    for first in range(0, length, chunk):
        t = slice(first, min(first + chunk, length))
        one = [None if a is None else a[:, :, :, t] for a in (q, k, v, g, beta)]
        row, state = run(*one, state, found.scale, normalizer, arithmetic)
        rows.append(row)
    return torch.cat(rows, 3).flatten(1, 2), state.reshape(shape)


def chunk_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    scale: float,
    normalizer: bool,
    arithmetic: Any,
) -> tuple[Tensor, Tensor]:
    """(rows, new state) of one chunk: q, k [.., 1, C, D], v [.., G, C, Dv], log-decay [.., C, 1] or
    [.., C, D], beta [.., C], state [.., G, D, Dv or Dv + 1]."""
    fed, factor, product = arithmetic.fed, arithmetic.factor, arithmetic.product
    q, k, v, old = fed(q), fed(k), fed(v), fed(state)
    from_first, to_last, decayed = q, k, k  # q e^G, k e^(G_last - G), k e^G
    last, late, early = None, None, None  # e^G_last; where rows of results are scaled, and values
    ones = torch.ones((), dtype=state.dtype, device=state.device)
    up, down = ones, ones
    if g is not None:
        up, down = g.cumsum(-2).exp(), _after(g).exp()
        last = up[..., -1, :, None]
        if g.shape[-1] == 1 and arithmetic.scales_rows:
            late, early = factor(up), factor(down)
        else:
            from_first, to_last = fed(q * factor(up)), fed(k * factor(down))
            decayed = fed(k * factor(up)) if beta is not None else k
    between: Callable[..., Tensor] = _scalar if g is None or g.shape[-1] == 1 else _channel
    if beta is not None:
        a = factor(beta[..., None]) * between(k, k, g, arithmetic, 0)
        known = product(decayed, old[..., : v.shape[-1]])
        rest = v - (known if late is None else known * late)
        v = fed(arithmetic.solve(fed(a), factor(beta[..., None]) * rest))
    m, Dv = between(q, k, g, arithmetic, 1), v.shape[-1]
    rows = product(from_first, old[..., :Dv], scale)
    rows = rows if late is None else rows * late
    rows = rows + product(fed(m), v, scale)
    new = product(to_last.mT, v if early is None else v * early).to(state.dtype)
    if normalizer:  # the denominator's sums are no matrix product, and nothing of them is rounded
        z = factor(state[..., Dv:])
        if late is None:
            before = arithmetic.sums(q * factor(up), z)
            added = (k * factor(down)).sum(-2)[..., None]
        else:
            before, added = arithmetic.sums(q, z) * late, arithmetic.sums(k.mT, early)
        rows = torch.cat([rows, scale * (before + m.sum(-1, keepdim=True))], -1)
        added = added.to(new.dtype).expand(*new.shape[:-1], 1)
        new = torch.cat([new, added], -1)
    return rows, new + (state if last is None else last * state)


def _after(g: Tensor) -> Tensor:
    """Sums of the later tokens' log-decay."""
    later = g.flip(-2).cumsum(-2).flip(-2)[..., 1:, :]
    return torch.nn.functional.pad(later, (0, 0, 0, 1))


def segments(g: Tensor) -> Tensor:
    """Sums of g [.., C] over s < r <= t, at [.., t, s]; -inf above the diagonal."""
    n = g.shape[-1]
    lower = torch.ones(n, n, dtype=torch.bool, device=g.device).tril()
    spread = g[..., None].expand(*g.shape, n).masked_fill(~lower.tril(-1), 0.0)
    return spread.cumsum(-2).masked_fill(~lower, -torch.inf)


def _scalar(q: Tensor, k: Tensor, g: Tensor | None, arithmetic: Any, diagonal: int) -> Tensor:
    """q_t.k_s e^(G_t - G_s) for s < t + diagonal, else 0; g [.., C, 1]."""
    qk = arithmetic.product(q, k.mT)
    if g is not None:
        qk = qk * arithmetic.factor(segments(g[..., 0]).exp())
        return qk if diagonal else qk.tril(-1)
    return qk.tril(diagonal - 1)


def _channel(q: Tensor, k: Tensor, g: Tensor, arithmetic: Any, diagonal: int) -> Tensor:
    """The same for g [.., C, D]: pair by pair within a block of tokens; before the block, by a
    product of q from the block's first token on, and k up to the block."""
    fed, factor, rows = arithmetic.fed, arithmetic.factor, []
    n, gap = g.shape[-2], g[..., :0, :]  # gap: sums of log-decay from each token up to the block
    for first in range(0, n, BLOCK):
        at = slice(first, min(first + BLOCK, n))
        block_q, block_k, block_g = q[..., at, :], k[..., at, :], g[..., at, :]
        pairs = segments(block_g.mT).movedim(-3, -1).exp()  # [.., t, s, D]
        near = (block_q[..., :, None, :] * block_k[..., None, :, :] * factor(pairs)).sum(-1)
        up = block_g.cumsum(-2)
        near = near.tril(diagonal - 1)
        if first:
            far = fed(k[..., :first, :] * factor(gap.exp()))
            near = torch.cat(
                [arithmetic.product(fed(block_q * factor(up.exp())), far.mT), near], -1
            )
        rows.append(torch.nn.functional.pad(near, (0, n - at.stop)))
        gap = torch.cat([gap + up[..., -1:, :], _after(block_g)], -2)
    return torch.cat(rows, -2)
