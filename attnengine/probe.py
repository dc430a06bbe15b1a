"""What the derivatives of a row function are in terms of its weights, found by probing in fp64.

A graph of scalars does not say that a derivative is a multiple of the weights; random rows do. The
probes evaluate the traced functions of a whole row at random scores, captures and the statistics
that these give; what holds there to 1e-9 is taken to hold.
"""

from __future__ import annotations

import torch

from .ir import FLOATS, TORCH_DTYPES, Node, evaluate, leaves
from .row_graphs import KEYS
from .trace import Traced

# (mean, standard deviation) of the scores of each trial. Large ones would show a clamp, negative
# ones a floor of the running state; beyond 100, exp of a difference leaves the range of fp64.
_SCORES = ((0.0, 1.0), (0.0, 1.0), (-3.0, 1.0), (3.0, 1.0), (0.0, 10.0), (0.0, 100.0))


class Probes:
    """``saved``: the statistics of a row that is one tile, by name, as functions of its scores."""

    def __init__(self, traced: Traced, saved: dict[str, Node]) -> None:
        self.t = traced
        self.g = traced.graph
        self.d = traced.dtype
        self.saved = saved

    def trial(self, i: int) -> tuple[dict[Node, torch.Tensor], ...]:
        """Random scores and captures, and the statistics that they give."""
        gen = torch.Generator().manual_seed(i)
        mean, deviation = _SCORES[i]
        values: dict[Node, torch.Tensor] = {}
        roots = [*self.saved.values(), self.t.row.weights]
        for leaf in leaves(roots):
            if leaf.op == "input" and leaf.attr[0].startswith("saved:"):
                continue
            shape = (KEYS,) if leaf.vec else ()
            if leaf.dtype in FLOATS:
                values[leaf] = torch.randn(shape, dtype=torch.float64, generator=gen)
            else:
                values[leaf] = torch.ones(shape, dtype=TORCH_DTYPES[leaf.dtype])
        scores = self.g.input("scores", self.d, vec=True)
        values.setdefault(scores, torch.randn(KEYS, dtype=torch.float64, generator=gen))
        values[scores] = mean + deviation * values[scores]
        stats = evaluate(list(self.saved.values()), values, KEYS, torch.float64)
        table = {
            self.g.input(f"saved:{n}", self.d): v for n, v in zip(self.saved, stats, strict=True)
        }
        return values, table

    def own(self) -> float | None:
        """kappa if dw_k/ds_k = kappa w_k."""
        scores = self.g.input("scores", self.d, vec=True)
        ratios = []
        for i in range(len(_SCORES)):
            values, table = self.trial(i)

            def weights(x: torch.Tensor, v: dict = values, t: dict = table) -> torch.Tensor:
                out = evaluate([self.t.row.weights], {**v, **t, scores: x}, KEYS, torch.float64)
                return out[0].expand(KEYS)

            w = weights(values[scores])
            # w_k reads s_k alone, so the sum has the slopes of all.
            dw = torch.autograd.functional.jacobian(lambda x: weights(x).sum(), values[scores])
            live = w != 0
            if bool((dw[~live] != 0).any()) or not bool(live.any()):
                return None
            ratios.append(dw[live] / w[live])
        kappa = _constant(ratios)
        return kappa if kappa else None

    def together(self, known: dict[str, tuple[float, bool]]) -> float | None:
        """kappa if the sum of f_i dc_i/ds_k over the statistics c that weights read is kappa w_k,
        where dw/dc_i = f_i w; the sum of G_i dc_i/ds_k is then kappa rowsum(dO o O) w_k."""
        scores = self.g.input("scores", self.d, vec=True)
        ratios = []
        for i in range(len(_SCORES)):
            values, table = self.trial(i)
            read = [self.g.input(f"saved:{n}", self.d) for n in known]
            factors = [
                factor / table[c] if over else torch.tensor(factor, dtype=torch.float64)
                for c, (factor, over) in zip(read, known.values(), strict=True)
            ]

            def combined(x: torch.Tensor, v: dict = values, f: list = factors) -> torch.Tensor:
                stats = evaluate(
                    [self.saved[n] for n in known], {**v, scores: x}, KEYS, torch.float64
                )
                return sum((a * c for a, c in zip(f, stats, strict=True)), 0.0 * x.sum())

            grad = torch.autograd.functional.jacobian(combined, values[scores])
            (w,) = evaluate([self.t.row.weights], {**values, **table}, KEYS, torch.float64)
            w = w.expand(KEYS)
            live = w != 0
            if bool((grad[~live] != 0).any()) or not bool(live.any()):
                return None
            ratios.append(grad[live] / w[live])
        return _constant(ratios)

    def weights(self, name: str) -> tuple[float, bool] | None:
        """(kappa, False) if dw/dc = kappa w, (kappa, True) if dw/dc = kappa w / c, else None."""
        target = self.g.input(f"saved:{name}", self.d)
        ratios, scaled = [], []
        for i in range(len(_SCORES)):
            values, table = self.trial(i)
            c = table[target].detach().clone().requires_grad_()

            def weights(x: torch.Tensor, v: dict = values, t: dict = table) -> torch.Tensor:
                out = evaluate([self.t.row.weights], {**v, **t, target: x}, KEYS, torch.float64)
                return out[0].expand(KEYS)

            w = weights(c).detach()
            dw = torch.autograd.functional.jacobian(weights, c)
            live = w != 0
            if not bool(live.any()):
                continue
            if bool((dw[~live] != 0).any()):
                return None
            ratios.append(dw[live] / w[live])
            scaled.append(ratios[-1] * c.detach())
        for candidates, over in ((ratios, False), (scaled, True)):
            kappa = _constant(candidates)
            if kappa is not None:
                return kappa, over
        return None

    def statistic(self, name: str) -> float | None:
        """kappa if dc/ds = kappa w over a whole row (0: not a function of the scores)."""
        scores = self.g.input("scores", self.d, vec=True)
        ratios = []
        for i in range(len(_SCORES)):
            values, table = self.trial(i)

            def statistic(x: torch.Tensor, v: dict = values) -> torch.Tensor:
                return evaluate([self.saved[name]], {**v, scores: x}, KEYS, torch.float64)[0]

            grad = torch.autograd.functional.jacobian(statistic, values[scores])
            (w,) = evaluate([self.t.row.weights], {**values, **table}, KEYS, torch.float64)
            w = w.expand(KEYS)
            if bool((grad == 0).all()):
                ratios.append(torch.zeros(1, dtype=torch.float64))
                continue
            live = w != 0
            if bool((grad[~live] != 0).any()) or not bool(live.any()):
                return None
            ratios.append(grad[live] / w[live])
        return _constant(ratios)


def _constant(values: list[torch.Tensor]) -> float | None:
    """The common value if all agree to 1e-9, snapped to an integer when it is one."""
    if not values:
        return None
    flat = torch.cat([v.reshape(-1) for v in values])
    if not bool(torch.isfinite(flat).all()):
        return None
    mean = float(flat.mean())
    if float((flat - mean).abs().max()) > 1e-9 * max(1.0, abs(mean)):
        return None
    return float(round(mean)) if abs(mean - round(mean)) < 1e-9 else mean
