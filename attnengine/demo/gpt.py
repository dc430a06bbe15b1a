"""Part 2: a character-level GPT whose attention is a user's variant, trained for real.

Beside it, the first steps of the same model on a shorter context are run twice, with the kernel and
with the reference in its place: same seed, same data, and the losses must agree. The context is
shorter because the reference is dense and slow; the kernel is the same, since lengths are run-time
values.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text
from torch import Tensor, nn

import attnengine as ae

from .variants import SOFTCAP, TemperedSoftmaxPlusOne, causal

LOSS_AGREEMENT = 1e-3
WARMUP_STEPS = 20
Attend = Callable[[Tensor, Tensor, Tensor, ae.AttentionSpec], Tensor]


@dataclass(frozen=True)
class Config:
    """Size of the model and of the run."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 256
    batch: int = 8
    steps: int = 300
    timed: int = 12  # steps in turns with SDPA's, for tokens/s
    compared: int = 20  # steps that are repeated with the reference
    compared_context: int = 64
    rate: float = 2e-3


@dataclass
class Training:
    """What the training did."""

    losses: list[float] = field(default_factory=list)
    short_losses: list[float] = field(default_factory=list)
    reference_losses: list[float] = field(default_factory=list)
    tokens_per_s: dict[str, float] = field(default_factory=dict)
    sample: str = ""
    failures: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


class Block(nn.Module):
    """Attention and MLP, pre-norm. The attention variant captures the block's own slopes."""

    def __init__(self, config: Config, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = config.heads, attend
        self.norm_attention = nn.LayerNorm(config.width)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.project = nn.Linear(config.width, config.width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width),
        )
        self.slopes = nn.Parameter(torch.linspace(-6.0, -1.0, config.heads))
        self.spec = self.variant()

    def variant(self) -> ae.AttentionSpec:
        """The user-written part: a score function with a learnable tensor, and a row function."""
        slopes = self.slopes

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            capped = SOFTCAP * torch.tanh(score / SOFTCAP)
            return capped - torch.exp(slopes[h]) * (q_idx - kv_idx)

        return ae.AttentionSpec(
            score_mod=score_mod, mask_mod=causal, row_func=TemperedSoftmaxPlusOne(1.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, width] -> the same."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = self.attend(q, k, v, self.spec).transpose(1, 2).reshape(batch, length, width)
        x = x + self.project(out)
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """Characters in, logits of the next character out; positions come from the slopes alone."""

    def __init__(self, vocabulary: int, config: Config, attend: Attend) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, config.width)
        self.blocks = nn.Sequential(*(Block(config, attend) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L] int64 -> [B, L, vocabulary]."""
        return self.head(self.norm(self.blocks(self.embed(tokens))))


def load_text() -> tuple[Tensor, str]:
    """The language manual's prose that ships with Python, as character ids, and the alphabet."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics.values())
    alphabet = "".join(sorted(set(text)))
    index = {c: i for i, c in enumerate(alphabet)}
    return torch.tensor([index[c] for c in text]), alphabet


class Trainer:
    """A model with its optimizer and its stream of batches, all from fixed seeds: two trainers of
    one config see the same weights and the same text."""

    def __init__(self, data: Tensor, vocabulary: int, config: Config, attend: Attend) -> None:
        torch.manual_seed(0)
        self.data, self.config = data, config
        self.model = GPT(vocabulary, config, attend)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.rate)
        self.chooser = torch.Generator().manual_seed(1)
        self.steps = 0

    def step(self) -> float:
        """One step of training; returns its loss."""
        config = self.config
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate * min(1.0, self.steps / WARMUP_STEPS)
        last = len(self.data) - config.context - 1
        begin = torch.randint(last, (config.batch, 1), generator=self.chooser)
        rows = self.data[begin + torch.arange(config.context + 1)]
        logits = self.model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def race(contestants: dict[str, Trainer], rounds: int) -> dict[str, float]:
    """Tokens/s of each, from the median of `rounds` steps taken in turns after one warm-up step."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for trainer in contestants.values():
        trainer.step()
    for _ in range(rounds):
        for name, trainer in contestants.items():
            start = time.perf_counter()
            trainer.step()
            taken[name].append(time.perf_counter() - start)
    return {
        name: trainer.config.batch * trainer.config.context / statistics.median(taken[name])
        for name, trainer in contestants.items()
    }


def sparkline(losses: list[float], width: int = 60) -> str:
    """The curve so far in one line of text."""
    bars = "▁▂▃▄▅▆▇█"
    count = min(width, len(losses))
    edges = [i * len(losses) // count for i in range(count + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(bars[int(7 * (m - low) / max(high - low, 1e-9))] for m in means)


class LossView:
    """Live display of one training run; plain lines every so often without a terminal."""

    def __init__(self, title: str, steps: int, console: Console) -> None:
        self.title, self.steps, self.console = title, steps, console
        self.losses: list[float] = []
        self.began = time.perf_counter()
        self.live = Live(console=console, refresh_per_second=8, transient=not console.is_terminal)

    def __enter__(self) -> LossView:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def line(self) -> str:
        """Step, loss and speed in words."""
        done = f"step {len(self.losses)}/{self.steps}"
        rate = len(self.losses) / (time.perf_counter() - self.began)
        return f"{self.title}  {done}  loss {self.losses[-1]:.3f}  {rate:.1f} steps/s"

    def add(self, loss: float) -> None:
        """Show one more step."""
        self.losses.append(loss)
        count = len(self.losses)
        if self.console.is_terminal:
            view: RenderableType = Group(
                Text(self.line()),
                ProgressBar(total=self.steps, completed=count, width=60),
                Text(sparkline(self.losses), style="cyan"),
            )
            self.live.update(view)
        elif count == self.steps or count % max(10, self.steps // 6) == 0:
            self.console.print(self.line())


def train(trainer: Trainer, title: str, steps: int, console: Console) -> list[float]:
    """Run `steps` steps with a live display; returns the losses."""
    with LossView(title, steps, console) as view:
        for _ in range(steps):
            view.add(trainer.step())
    return view.losses


@torch.no_grad()
def sample(model: GPT, alphabet: str, prompt: str, count: int, context: int) -> str:
    """Continue `prompt` by `count` characters: each call has another length, the same kernel."""
    chooser = torch.Generator().manual_seed(2)
    tokens = torch.tensor([[alphabet.index(c) for c in prompt]])
    for _ in range(count):
        odds = torch.softmax(model(tokens[:, -context:])[0, -1] / 0.7, -1)
        tokens = torch.cat([tokens, torch.multinomial(odds, 1, generator=chooser)[None]], 1)
    return "".join(alphabet[int(i)] for i in tokens[0])


def sdpa(q: Tensor, k: Tensor, v: Tensor, spec: ae.AttentionSpec) -> Tensor:
    """Plain causal attention by torch: the speed to compare with."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def run(quick: bool, console: Console) -> Training:
    """Train, compare with the reference, time SDPA, sample. Prints as it goes."""
    config = Config(steps=60, compared=6, timed=6) if quick else Config()
    short = dataclasses.replace(config, context=config.compared_context)
    data, alphabet = load_text()
    done = Training()
    console.print(
        f"{len(data):,} characters of {len(alphabet)} kinds; fp32, {config.layers} layers of width "
        f"{config.width}, {config.heads} heads, context {config.context}, batch {config.batch}"
    )

    def trainer(config: Config, attend: Attend) -> Trainer:
        return Trainer(data, len(alphabet), config, attend)

    ours, theirs = trainer(config, ae.attention), trainer(config, sdpa)
    done.losses = train(ours, "attnengine", config.steps, console)
    done.sample = sample(ours.model, alphabet, "The statement ", 120, config.context)
    console.print(Text("sample: " + repr(done.sample), style="dim"))

    where = f"context {short.context}, "
    fast, slow = trainer(short, ae.attention), trainer(short, ae.reference)
    done.short_losses = train(fast, where + "attnengine", config.compared, console)
    done.reference_losses = train(slow, where + "reference", config.compared, console)
    done.tokens_per_s = race({"attnengine": ours, "SDPA": theirs}, config.timed)

    gap = max(abs(a - b) for a, b in zip(done.short_losses, done.reference_losses, strict=True))
    if not gap <= LOSS_AGREEMENT:
        done.failures.append(f"losses differ from the reference's by {gap:.2g}")
    if not done.losses[-1] < done.losses[0] - 1.0:
        done.failures.append(f"loss fell only from {done.losses[0]:.2f} to {done.losses[-1]:.2f}")
    console.print(
        f"{config.compared} steps with the reference: losses agree within {gap:.1e} "
        f"(limit {LOSS_AGREEMENT:g})"
    )
    speed = done.tokens_per_s
    console.print(
        f"{speed['attnengine']:,.0f} tokens/s with the variant, {speed['SDPA']:,.0f} with SDPA's "
        f"plain causal attention in its place ({speed['attnengine'] / speed['SDPA']:.2f}x)"
    )
    return done
