"""The meaning of linear attention: the token-by-token recurrence, plain PyTorch and autograd.

Every kernel is checked against it. What the best 16-bit kernel computes is in
:mod:`attnengine.linear.ideal`; a fast plain form, by chunks, in :mod:`attnengine.linear.chunked`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import TraceError
from ..reference import Mods, means
from .arguments import LinearArguments, check_arguments, check_ends
from .spec import LinearAttentionSpec

DENOMINATOR = 1e-6  # a normalizer's denominator is kept this far away from 0


def reference(
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
    dtype: torch.dtype | None = None,
) -> Any:
    """Linear attention as the spec means it, with autograd through operands, states and captures.

    Arguments, and what is raised for them, as of ``ae.linear_attention``. Computes in fp64 for fp64
    operands, else in fp32, and returns out [B, H, L, Dv] in q's dtype, with ``output_final_state``
    also the state [N, H, D, Dv] ([.., Dv + 1] under a normalizer). ``dtype`` overrides: everything,
    captured fp32 tensors included, is computed and returned in it. Raises ValueError for a
    log-decay that is positive or NaN, TraceError for a hook that changes the shape of its operand.
    """
    spec = LinearAttentionSpec() if spec is None else spec
    found = check_arguments(
        q, k, v, spec, decay=decay, beta=beta, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    acc, mods = dtype or found.acc, Mods(dtype)
    given = modified(q, k, v, spec, found, mods, acc)
    check_decay(given.decay)
    state = first_state(found, spec, acc, q.device)
    group = found.H // found.Hk
    q, k = (x.repeat_interleave(group, 1) for x in (given.q, given.k))
    out, state = over_sequences(
        recurrence, Operands(q, k, given.v, given.decay, given.beta), state, found, spec
    )
    out = hooked("out_mod", spec.out_mod, out, mods, acc)
    out = out if dtype is not None else out.to(v.dtype)
    return (out, state) if output_final_state else out


means(LinearAttentionSpec, reference)


class Operands(NamedTuple):
    """Tensors of some tokens after their hooks: q, k [.., H, L, D], v [.., H, L, Dv], the log-decay
    [.., H, L, 1] or [.., H, L, D], beta [.., H, L]."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None

    def tokens(self, first: int, last: int) -> Operands:
        """Those of tokens first <= t < last."""
        q, k, v, decay, beta = (None if x is None else x[:, :, first:last] for x in self)
        assert q is not None and k is not None and v is not None
        return Operands(q, k, v, decay, beta)


def recurrence(x: Operands, state: Tensor, found: LinearArguments, normalizer: bool) -> Any:
    """scale q^T S of every token, and the last state; under a normalizer S ends with a column z."""
    rows, Dv = [], found.Dv
    for t in range(x.v.shape[2]):
        q, k, v = x.q[:, :, t], x.k[:, :, t], x.v[:, :, t]
        if x.decay is not None:
            state = x.decay[:, :, t].exp()[..., None] * state
        if x.beta is not None:
            v = x.beta[:, :, t, None] * (v - (k[..., None] * state[..., :Dv]).sum(-2))
        if normalizer:
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        state = state + k[..., None] * v[..., None, :]
        rows.append((q[..., None] * state).sum(-2))
    if not rows:
        return no_rows(x, state), state
    return torch.stack(rows, 2) * found.scale, state


def no_rows(x: Operands, state: Tensor) -> Tensor:
    """The rows of no token: still a function of the operands, with gradients of zero."""
    empty = sum(t.flatten()[:0].sum() for t in x if t is not None)
    return state.new_zeros(*x.v.shape[:2], 0, state.shape[-1]) + empty


# -- what every form of the recurrence shares ------------------------------------------------------


def modified(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: LinearAttentionSpec,
    found: LinearArguments,
    mods: Mods,
    acc: torch.dtype,
    low: torch.dtype | None = None,
) -> Operands:
    """The operands after their hooks, in ``acc`` (q, k, v and their hooks in ``low``, if given);
    q and k keep their Hk heads."""
    low = low or acc
    decay, beta = found.decay, found.beta
    if decay is not None:
        decay = hooked("decay_mod", spec.decay_mod, decay.to(acc), mods, acc)
        decay = decay if found.decay_kind == "channel" else decay[..., None]
    return Operands(
        hooked("q_mod", spec.q_mod, q.to(low), mods, low),
        hooked("k_mod", spec.k_mod, k.to(low), mods, low),
        hooked("v_mod", spec.v_mod, v.to(low), mods, low),
        decay,
        None if beta is None else beta.to(acc),
    )


def hooked(name: str, fn: Any, x: Tensor, mods: Mods, acc: torch.dtype) -> Tensor:
    """``fn(x)``, which must have the shape of x."""
    if fn is None:
        return x
    with mods:
        y = fn(x)
    if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
        kind = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise TraceError(
            f"{name}: returned {kind} for an operand {tuple(x.shape)}, expected a floating tensor "
            "of that shape; a hook is elementwise, with captured tensors that broadcast against x"
        )
    return y.to(acc)


def check_decay(decay: Tensor | None) -> None:
    """Raises ValueError for a log-decay (after decay_mod) that is positive or NaN."""
    if decay is not None and not bool((decay <= 0).all()):
        raise ValueError(
            f"decay: largest log-decay (after decay_mod) is {decay.max().item():.6g}, limit 0: a "
            "state that grows overflows; pass logs of factors in [0, 1], such as logsigmoid(x) or "
            "-softplus(x)"
        )


def first_state(
    found: LinearArguments, spec: LinearAttentionSpec, acc: torch.dtype, device: torch.device
) -> Tensor:
    """The initial states [N, H, D, columns]; a missing column z is 0."""
    if found.initial_state is None:
        shape = (found.N, found.H, found.D, found.columns)
        return torch.zeros(shape, dtype=acc, device=device)
    state = found.initial_state.to(acc)
    missing = found.columns - state.shape[-1]
    return torch.nn.functional.pad(state, (0, missing)) if missing else state


def over_sequences(
    form: Any, x: Operands, state: Tensor, found: LinearArguments, spec: LinearAttentionSpec
) -> tuple[Tensor, Tensor]:
    """Output [B, H, L, Dv] before out_mod, and final states, by ``form``, a form of
    :func:`recurrence`."""
    normalizer = spec.normalizer == "sum"
    if found.cu_seqlens is None:
        rows, state = form(x, state, found, normalizer)
    else:
        parts, states = [no_rows(x, state)], []
        for i, first, last in spans(found.cu_seqlens, found.L):
            part, after = form(x.tokens(first, last), state[i : i + 1], found, normalizer)
            parts.append(part)
            states.append(after)
        rows, state = torch.cat(parts, 2), torch.cat(states) if states else state
    return normalized(rows) if normalizer else rows, state


def spans(cu_seqlens: Tensor, length: int) -> Iterator[tuple[int, int, int]]:
    """(number, first token, last token + 1) of every sequence."""
    ends = cu_seqlens.tolist()
    check_ends(ends, length)
    for i in range(len(ends) - 1):
        yield i, ends[i], ends[i + 1]


def normalized(rows: Tensor) -> Tensor:
    """Rows scale q^T [S | z] -> q^T S / q^T z."""
    out, z = rows[..., :-1], rows[..., -1:]
    away = torch.where(z < 0, z.new_tensor(-DENOMINATOR), z.new_tensor(DENOMINATOR))
    return out / torch.where(z.abs() < DENOMINATOR, away, z)
