"""Token statistics attention (TSSA) against the formula in PyTorch, eager and compiled, and itself
at twice the number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import attnengine as ae

from . import agreement, baselines
from .rows import Row
from .runner import Samples, interleave
from .session import Session

BARS = {"eager": 3.0, "compiled": 1.5}
DOUBLE_BAR = 2.1  # time at twice the tokens
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def forward(attend: Callable[..., Tensor], given: Sequence[Tensor]) -> baselines.Step:
    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attend(*given),)

    return run


def vision_form(w: Tensor, temp: Tensor) -> Tensor:
    """The operator as its authors' vision model writes it: w [B, h, N, d], temp [h, 1]."""
    normed = torch.nn.functional.normalize(w, dim=-2)
    pi = ((normed**2).sum(-1) * temp).softmax(dim=1)
    share = pi / (pi.sum(dim=-1, keepdim=True) + 1e-8)
    dots = share.unsqueeze(-2) @ (w**2)
    return -(w * pi.unsqueeze(-1)) * (1 / (1 + dots))


def measure_case(dtype: torch.dtype, tokens: int, session: Session) -> list[Row]:
    batch, heads, dim = 4, 12, 64
    random = torch.Generator().manual_seed(0)
    w = torch.randn(batch, heads, tokens, dim, generator=random).to(dtype)
    temp = (1 + 0.1 * torch.randn(heads, 1, generator=random)).to(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(vision_form, dynamic=False)

    def mine(w: Tensor, temp: Tensor) -> Tensor:
        return ae.token_statistics_attention(w, temp[:, 0])

    name = f"statistics/{NAMES[dtype]}/b{batch}/n{tokens}"
    golden = vision_form(w.double(), temp.double())
    distance = agreement.require(name, agreement.difference(mine(w, temp), golden), dtype)
    rows = []
    for kind, step in (("fwd", forward), ("fwd+bwd", training)):
        times = interleave(
            {
                "ours": step(mine, (w, temp)),
                "eager": step(vision_form, (w, temp)),
                "compiled": step(compiled, (w, temp)),
            },
            session.budget_s,
            session.min_rounds,
        )
        row = Row(
            f"{name}/{kind}", "ms", times["ours"].median * 1e3, times["ours"].spread,
            distance=distance,
        )  # fmt: skip
        for peer, bar in BARS.items():
            value = times[peer].median * 1e3
            limit = bar if kind == "fwd" else None
            rows.append(
                replace(row, peer=peer, peer_value=value, ratio=value / row.ours, bar=limit)
            )
    return rows


def training(attend: Callable[..., Tensor], given: Sequence[Tensor]) -> baselines.Step:
    leaves = [x.clone().requires_grad_() for x in given]
    upstream = torch.ones_like(given[0])

    def run() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, upstream))

    return run


def measure_growth(session: Session) -> list[Row]:
    """Time at twice the number of tokens, to 64k."""
    rows: list[Row] = []
    before: Samples | None = None
    for tokens in (1024, 2048) if session.quick else (4096, 8192, 16384, 32768, 65536):
        w, temp = torch.randn(1, 12, tokens, 64), torch.ones(12)
        run = forward(ae.token_statistics_attention, (w, temp))
        times = interleave({"ours": run}, session.budget_s / 2, session.min_rounds)["ours"]
        if before is not None:
            rows.append(
                Row(
                    f"statistics/fp32/growth/n{tokens}",
                    "ms",
                    times.median * 1e3,
                    times.spread,
                    "half the tokens",
                    before.median * 1e3,
                    times.median / before.median,
                    DOUBLE_BAR,
                    False,
                )  # fmt: skip
            )
        before = times
    return rows


def measure(session: Session) -> None:
    """Every contest that is asked for."""
    tokens = 256 if session.quick else 4096
    for dtype in NAMES:
        session.attempt(
            f"statistics/{NAMES[dtype]}", lambda d=dtype: measure_case(d, tokens, session)
        )
    session.attempt("statistics/growth", lambda: measure_growth(session))
