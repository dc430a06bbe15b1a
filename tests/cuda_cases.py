"""What the CUDA kernels are tested on: the same list for the simulator and for a GPU.

``COVER`` is a pairwise cover: every value of every factor (row function, mask, score_mod, head
dims, dtype) meets every value of every other one in some kernel. Six row functions and five pairs
of head dims need 30 kernels at least, and 30 is what it has. ``FULL`` has every combination of row
function, mask and score_mod, with dims and dtypes spread over them, and the kernels of ``EXTRA``.

A kernel runs on ``case.shapes(...)``: lengths, groups and layouts that together wrap its ring of
stages, end in the middle of tiles, and leave rows without a live key. They are small: a shape costs
a simulator one or two seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import attnengine as ae
from attnengine.spec import State

WINDOW = 400  # keys: more than a ring of 3 stages of 64 keys, or of 2 of 128, holds
SOFTCAP = 5.0  # scores are of the order of 1: the cap must bend some of them
RAGGED = 17  # keys or rows in the last tile of most lengths
SLACK = 8  # elements at the end of a padded row: 16 bytes, so that rows stay aligned

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
DIMS = {
    "d64": (64, 64),
    "d128": (128, 128),
    "d192x128": (192, 128),
    "d128x256": (128, 256),
    "d80": (80, 80),
}


class UserSoftmax(ae.OnlineFunc):
    """A softmax as a user writes it, which also saves how few keys a row looks at: ``focus``, the
    sum of its squared weights. Three running numbers, two of them scaled differently."""

    state = {"m": float("-inf"), "r": 0.0, "squares": 0.0}

    def update(self, scores: Tensor, state: State) -> tuple[Tensor, State, Any]:
        m = torch.maximum(state["m"], scores.amax().detach())
        alpha = torch.exp(state["m"] - m)
        p = torch.exp(scores - m)
        squares = state["squares"] * alpha * alpha + (p * p).sum()
        return p, {"m": m, "r": state["r"] * alpha + p.sum(), "squares": squares}, alpha

    def finalize(self, out: Tensor, state: State) -> tuple[Tensor, State]:
        r = state["r"]
        # The largest term is 1, so a row with a live key has r >= 1; one without has focus 0.
        focus = state["squares"] / torch.clamp(r * r, min=1.0)
        return out / r, {"lse": state["m"] + torch.log(r), "focus": focus.detach()}

    def weights(self, scores: Tensor, saved: State) -> Tensor:
        return torch.exp(scores - saved["lse"])


# -- shapes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Sizes and memory layout of one problem.

    layout: "contiguous" [B, H, L, D]; "heads_last" stored [B, L, H, D]; "padded" rows of D + 8
    elements (16-byte aligned where D allows); "unaligned" rows of D + 1 elements, one element off
    the start; "columns" stored [B, H, D, L]; "shared" K and V of batch 1, one head for all.
    """

    name: str
    B: int
    Hq: int
    Hkv: int
    L: int
    S: int
    layout: str = "contiguous"

    def __str__(self) -> str:
        return f"{self.name}-B{self.B}H{self.Hq}/{self.Hkv}L{self.L}S{self.S}-{self.layout}"


LAYOUTS = ("contiguous", "heads_last", "padded", "unaligned", "columns", "shared")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x [B, H, L, D] in a layout. What lies between rows is NaN: it may not be read
    into a result."""
    b, h, n, d = x.shape
    if layout == "contiguous" or 0 in x.shape:
        return x.contiguous()
    if layout == "heads_last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "shared":
        return x[:1, :1].contiguous().expand(1, h, n, d)
    pad, start = {"padded": (SLACK, 0), "unaligned": (1, 1)}[layout]
    storage = torch.full((b * h * n * (d + pad) + start,), float("nan"), dtype=x.dtype)
    view = storage.to(x.device)[start:].view(b, h, n, d + pad)[..., :d]
    view.copy_(x)
    return view


# -- cases -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One call: a spec with its captured tensors, and its operands, on one device."""

    spec: ae.AttentionSpec
    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Case:
    """One kernel: a meaning, a dtype and head dims; and the shapes that it is run on."""

    row: str
    mask: str
    score: str
    dims: tuple[int, int]
    dtype: torch.dtype
    mods: str = "none"
    number: int = 0  # its place in its list: turns the layouts

    @property
    def id(self) -> str:
        """Unique; for test names and command lines."""
        d, dv = self.dims
        dims = f"d{d}" if d == dv else f"d{d}x{dv}"
        word = next(w for w, t in DTYPES.items() if t is self.dtype)
        mods = "" if self.mods == "none" else f"-{self.mods}"
        return f"{self.row}-{self.mask}-{self.score}{mods}-{dims}-{word}"

    def shapes(self, *, block_m: int = 64, block_n: int = 64, stages: int = 2) -> list[Shape]:
        """What a kernel with such tiles and stages runs on; the first one wraps its ring."""
        wrap = (2 * stages + 1) * block_n + RAGGED
        if self.mask == "none":
            first = Shape("wrap", 1, 1, 1, min(37, block_m), wrap)
        else:  # the last rows must meet that many tiles: of their window, or of their document
            keys = {"window": max(wrap, WINDOW + block_m + RAGGED), "document": wrap + 2 * EDGE}
            n = keys.get(self.mask, wrap)
            first = Shape("wrap", 1, 1, 1, n, n)
        shapes = [
            first,
            Shape("square", 1, 2, 2, block_m + 1, block_m + 1),
            Shape("more-keys", 2, 2, 1, 33, block_n + 66),
            Shape("more-queries", 1, 4, 1, block_m + 66, 47),
            Shape("one-query", 2, 8, 2, 1, 200),
            Shape("one-key", 1, 3, 3, 3, 1),
            Shape("no-key", 1, 2, 1, 5, 0),
            Shape("one-pair", 1, 1, 1, 1, 1),
        ]
        if self.mask == "window":  # rows that are past their window's last key
            shapes.append(Shape("dead-rows", 1, 1, 1, WINDOW + RAGGED + 40, RAGGED))
        turned = [LAYOUTS[(self.number + i) % len(LAYOUTS)] for i in range(len(shapes))]
        return [replace(s, layout=at) for s, at in zip(shapes, turned, strict=True)]

    def problem(self, shape: Shape, seed: int = 0, device: str | torch.device = "cpu") -> Problem:
        """The call on a shape. Every tensor comes from the seed."""
        random = _Random(seed, device)
        (d, dv), q_layout = self.dims, "contiguous" if shape.layout == "shared" else shape.layout
        q = random.normal(shape.B, shape.Hq, shape.L, d, dtype=self.dtype)
        k = random.normal(shape.B, shape.Hkv, shape.S, d, dtype=self.dtype)
        v = random.normal(shape.B, shape.Hkv, shape.S, dv, dtype=self.dtype)
        return Problem(
            self.spec(shape, random),
            laid_out(q, q_layout),
            laid_out(k, shape.layout),
            laid_out(v, shape.layout),
        )

    def spec(self, shape: Shape, random: _Random | None = None) -> ae.AttentionSpec:
        """The meaning, with captured tensors for the lengths and heads of a shape."""
        random = random or _Random(0, "cpu")
        q_mod, k_mod, v_mod = OPERAND_MODS[self.mods](random)
        return ae.AttentionSpec(
            score_mod=SCORES[self.score](shape, random, self.dtype),
            mask_mod=MASKS[self.mask](shape, random),
            row_func=ROWS[self.row](shape, random),
            q_mod=q_mod,
            k_mod=k_mod,
            v_mod=v_mod,
        )

    def tiles(self, shape: Shape, block_m: int, block_n: int) -> list[int]:
        """How many KV tiles with a live key each tile of rows has, for the first head."""
        mask = self.spec(shape).mask_mod
        q, k, zero = torch.arange(shape.L), torch.arange(shape.S), torch.tensor(0)
        live = torch.ones(shape.L, shape.S, dtype=torch.bool)
        if mask is not None:
            live = live & mask(zero, zero, q[:, None], k[None])
        return [
            sum(bool(part.any()) for part in rows.split(block_n, dim=1))
            for rows in live.split(block_m)
        ]


class _Random:
    """Random tensors: made on the CPU from a seed, so that every device gets the same."""

    def __init__(self, seed: int, device: str | torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype).to(self.device)

    def place(self, x: Tensor) -> Tensor:
        return x.to(self.device)


# -- factors ---------------------------------------------------------------------------------------

Factory = Callable[..., Any]

ROWS: dict[str, Factory] = {
    "softmax": lambda shape, random: ae.Softmax(),
    "sigmoid": lambda shape, random: ae.Sigmoid(-1.5),
    "relu": lambda shape, random: ae.ReLU(),
    "retention": lambda shape, random: ae.Retention(),
    "sink": lambda shape, random: ae.SoftmaxSink(random.normal(shape.Hq)),
    "user": lambda shape, random: UserSoftmax(),
}

EDGE = 41  # tokens in the short documents at either end


def _document(shape: Shape, random: _Random) -> Factory:
    """Short documents at both ends, a long one between; other borders in every batch."""
    n = max(shape.L, shape.S, 1)
    at = torch.arange(n)
    rows = []
    for b in range(shape.B):
        cuts = torch.tensor([7, EDGE - b, EDGE, max(EDGE, n - EDGE - b)])
        rows.append(torch.bucketize(at, cuts, right=True))
    ids = random.place(torch.stack(rows))
    return ae.variants.document(ids).mask_mod


MASKS: dict[str, Factory] = {
    "none": lambda shape, random: None,
    "causal": lambda shape, random: ae.variants.causal_mask,
    "window": lambda shape, random: ae.variants.sliding_window(WINDOW).mask_mod,
    "document": _document,
}


def _alibi(shape: Shape, random: _Random, dtype: torch.dtype) -> Factory:
    slopes = random.place(ae.variants.alibi_slopes(shape.Hq))
    return ae.variants.alibi(slopes).score_mod


def _bias(shape: Shape, random: _Random, dtype: torch.dtype) -> Factory:
    """score + bias[h, q_idx, kv_idx]: of the operands' dtype, stored with the heads inside."""
    columns = max(shape.S, 1)  # indexing an empty tensor cannot be traced
    bias = random.normal(shape.L, shape.Hq, columns, dtype=dtype).transpose(0, 1)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + bias[h, q_idx, kv_idx]

    return score_mod


SCORES: dict[str, Factory] = {
    "plain": lambda shape, random, dtype: None,
    "alibi": _alibi,
    "softcap": lambda shape, random, dtype: ae.variants.softcap(SOFTCAP).score_mod,
    "bias": _bias,
}


def _operand_mods(random: _Random) -> tuple[Factory, Factory, Factory]:
    """Elementwise mods of q, k and v; a captured number in one of them."""
    gain = random.place(torch.tensor(0.75))
    return (
        lambda x: x * gain,
        lambda x: torch.tanh(x) + 0.25,
        lambda x: torch.where(x > 0, x, 0.1 * x),
    )


OPERAND_MODS: dict[str, Factory] = {
    "none": lambda random: (None, None, None),
    "mods": _operand_mods,
}


# -- the lists -------------------------------------------------------------------------------------

FACTORS: tuple[tuple[Any, ...], ...] = (
    tuple(ROWS),
    tuple(MASKS),
    tuple(SCORES),
    tuple(DIMS),
    tuple(DTYPES),
)
_STRIDE = 251  # see scattered()


def tuples(combination: Sequence[Any], size: int = 2) -> Iterator[tuple[tuple[int, Any], ...]]:
    """The pairs (or triples) of values of different factors that meet in a combination."""
    return itertools.combinations(enumerate(combination), size)


def all_tuples(factors: Sequence[Sequence[Any]], size: int = 2) -> set:
    """All that a cover must contain."""
    places = itertools.combinations(range(len(factors)), size)
    return {
        tuple(zip(at, values, strict=True))
        for at in places
        for values in itertools.product(*(factors[i] for i in at))
    }


def cover(
    combinations: Iterable[Sequence[Any]], wanted: set, size: int = 2
) -> list[tuple[Any, ...]]:
    """A greedy cover: takes the combination with the most tuples that are still wanted, the first
    among equals, until none is wanted."""
    pool, left = [tuple(c) for c in combinations], set(wanted)
    chosen: list[tuple[Any, ...]] = []
    while left:
        best = max(pool, key=lambda c: sum(t in left for t in tuples(c, size)))
        gained = left & set(tuples(best, size))
        if not gained:
            raise ValueError(f"no combination has {sorted(left, key=str)[0]}")
        chosen.append(best)
        left -= gained
    return chosen


def scattered(combinations: Iterable[Sequence[Any]]) -> list[Sequence[Any]]:
    """The same in an order without runs, in which the greedy cover reaches the minimum."""
    pool = list(combinations)
    return [pool[i * _STRIDE % len(pool)] for i in range(len(pool))]


def _full(start: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """``start`` and one kernel for every combination of the first three factors that it lacks: with
    the dims and the dtype that bring the most new triples."""
    chosen = list(start)
    have = {c[:3] for c in chosen}
    left = all_tuples(FACTORS, 3)
    for c in chosen:
        left -= set(tuples(c, 3))
    for head in itertools.product(*FACTORS[:3]):
        if head in have:
            continue
        tails = scattered(itertools.product(*FACTORS[3:]))
        options = [(*head, *tail) for tail in tails]
        best = max(options, key=lambda c: sum(t in left for t in tuples(c, 3)))
        chosen.append(best)
        left -= set(tuples(best, 3))
    return chosen


def _cases(combinations: Iterable[Sequence[Any]]) -> tuple[Case, ...]:
    return tuple(
        Case(row, mask, score, DIMS[dims], DTYPES[dtype], number=i)
        for i, (row, mask, score, dims, dtype) in enumerate(combinations)
    )


_chosen = cover(scattered(itertools.product(*FACTORS)), all_tuples(FACTORS))

COVER = _cases(_chosen)
EXTRA = (
    Case("softmax", "causal", "plain", (128, 128), torch.bfloat16, "mods", 0),
    Case("user", "document", "softcap", (64, 64), torch.float16, "mods", 1),
    Case("softmax", "causal", "plain", (256, 256), torch.bfloat16, number=2),
    Case("softmax", "none", "plain", (40, 24), torch.float16, number=3),
    Case("softmax", "causal", "alibi", (36, 20), torch.bfloat16, number=4),  # rows of 72 bytes
    Case("sigmoid", "window", "plain", (8, 8), torch.float16, number=5),
    Case("sink", "causal", "bias", (8, 200), torch.bfloat16, number=6),
)
FULL = (*_cases(_full(_chosen)), *EXTRA)


def by_id(name: str) -> Case:
    """The case of an id. Raises KeyError for one that no list has."""
    return {case.id: case for case in FULL}[name]
