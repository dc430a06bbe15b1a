"""Cost of a call when there is nothing to compute: dispatch, autograd, finding a known kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import attnengine as ae

from .rows import Row
from .runner import interleave
from .session import Session

# Largest allowed multiple of the peer's time; None: shown without a bar.
BARS = {
    "attention": 1.25,
    "handle": 1.0,
    "attention with grad": 1.8,
    "forward+backward": None,
    "fresh lambdas": 15.0,
}
SHAPE = (1, 1, 4, 16)  # B, H, L, D: the arithmetic of a call is well below a microsecond


def fresh_spec() -> ae.AttentionSpec:
    """A spec whose lambdas are new objects at every call, as in a model's forward."""
    return ae.AttentionSpec(
        score_mod=lambda score, b, h, q_idx, kv_idx: score * 0.5,
        mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx,
    )


def measure(session: Session) -> None:
    """Rows `calls/...` in microseconds, each against its own peer in the same rounds."""
    if any(session.wanted(f"calls/{name}") for name in BARS):
        session.attempt("calls", lambda: _measure(session))


def _measure(session: Session) -> list[Row]:
    q, k, v = (torch.randn(SHAPE) for _ in range(3))
    gq, gk, gv = (torch.randn(SHAPE, requires_grad=True) for _ in range(3))
    plain = ae.AttentionSpec()
    handle = ae.compile(plain, q, k, v)
    known = fresh_spec()
    grad = torch.randn(SHAPE)
    sdpa = F.scaled_dot_product_attention
    torch.testing.assert_close(ae.attention(q, k, v, plain), sdpa(q, k, v))

    def ours_both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(ae.attention(gq, gk, gv, plain), (gq, gk, gv), grad)

    def sdpa_both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(sdpa(gq, gk, gv), (gq, gk, gv), grad)

    torch.testing.assert_close(ours_both(), sdpa_both())
    contests: dict[str, tuple[Callable, str, Callable]] = {
        "attention": (lambda: ae.attention(q, k, v, plain), "sdpa", lambda: sdpa(q, k, v)),
        "handle": (lambda: handle(q, k, v), "sdpa", lambda: sdpa(q, k, v)),
        "attention with grad": (
            lambda: ae.attention(gq, gk, gv, plain),
            "sdpa",
            lambda: sdpa(gq, gk, gv),
        ),
        "forward+backward": (ours_both, "sdpa", sdpa_both),
        "fresh lambdas": (
            lambda: ae.attention(q, k, v, fresh_spec()),
            "same spec object",
            lambda: ae.attention(q, k, v, known),
        ),
    }
    rows = []
    for name, (mine, peer, theirs) in contests.items():
        if not session.wanted(f"calls/{name}"):
            continue
        times = interleave({"ours": mine, "peer": theirs}, session.budget_s, min_rounds=15)
        ours, other = times["ours"], times["peer"]
        rows.append(
            Row(
                name=f"calls/{name}",
                unit="us",
                ours=ours.median * 1e6,
                spread=ours.spread,
                peer=peer,
                peer_value=other.median * 1e6,
                ratio=ours.median / other.median,
                bar=BARS[name],
                at_least=False,
            )
        )
    return rows
