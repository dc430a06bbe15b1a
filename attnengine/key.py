"""The canonical, hashable meaning of one kernel.

A key holds what the generated code depends on and nothing else: never batch, heads, lengths,
strides or object identities. Two specs that mean the same have equal keys and share one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .derive import Derived
from .ir import Node, digest, inputs_of, text
from .trace import Traced


@dataclass(frozen=True)
class Form:
    """Which calls a kernel of one meaning serves, where one kernel for all of them would be slow.

    CPU kernels serve all. ``sequences``: rows and keys of any lengths, packed or in a cache.
    ``decode_rows`` (with it): tiles of so few rows (16, 32 or 64; the query rows of a group of
    heads), and work that is split along the keys; 0: tiles for many rows. ``shared_kv``: v is the
    first columns of k in memory (MLA's latent), and is read with it.
    """

    decode_rows: int = 0
    sequences: bool = False
    shared_kv: bool = False

    def __post_init__(self) -> None:
        if self.decode_rows not in DECODE_ROWS or (self.decode_rows and not self.sequences):
            raise ValueError(
                f"decode_rows={self.decode_rows}, sequences={self.sequences}: expected 16, 32 or "
                "64 with sequences=True, or 0"
            )

    @staticmethod
    def of_sequences(rows: int, shared_kv: bool = False) -> Form:
        """For sequences of at most ``rows`` rows of scores: query rows times heads of a group."""
        return Form(next((n for n in DECODE_ROWS if n >= max(rows, 1)), 0), True, shared_kv)

    @property
    def word(self) -> str:
        """Its name in FORM_WORDS."""
        if not self.sequences:
            return "dense"
        return f"decode{self.decode_rows}" if self.decode_rows else "prefill"

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.word}, shared KV" if self.shared_kv else self.word


DECODE_ROWS = (0, 16, 32, 64)
FORM_WORDS: dict[str, tuple[Form, ...]] = {
    "dense": (Form(),),
    "decode": tuple(Form(rows, True) for rows in DECODE_ROWS if rows),
    "prefill": (Form(0, True),),
    **{f"decode{rows}": (Form(rows, True),) for rows in DECODE_ROWS if rows},
}
"""What a request may call forms: "dense" is attnengine.attention; the others are caches and packed
sequences, "decode" of 16, 32 and 64 rows (query rows times heads of a group) at most, "prefill" of
more."""


@dataclass(frozen=True)
class KernelKey:
    """``graphs`` is the canonical text of every traced function that the kernel contains."""

    kind: str  # "forward" or "backward"
    element: str  # dtype of q, k, v: f32, f64, bf16, f16
    head_dim: int
    value_dim: int
    graphs: str
    captures: tuple[tuple[str, int], ...]  # (dtype, rank) of each captured tensor
    grads: tuple[int, ...]
    saved_states: tuple[str, ...]  # running states kept for backward
    group_varies: bool  # the mask depends on the head: rows of a tile come from one head
    form: Form = field(default=Form(), repr=False)

    def digest(self) -> str:
        return digest(repr(self) + (repr(self.form) if self.form != Form() else ""))


def _graphs(traced: Traced, extra: dict[str, Node]) -> str:
    row = traced.row
    roots: dict[str, Node] = {}
    if traced.mask is not None:
        roots["mask"] = traced.mask
    if traced.score is not None:
        roots["score"] = traced.score
    roots |= {f"mod.{n}": v for n, v in traced.operands.items()}
    roots |= {f"init.{n}": v for n, v in row.init.items()}
    return text(roots | extra)


def group_varies(traced: Traced) -> bool:
    return traced.mask is not None and "h" in inputs_of([traced.mask])


def _captures(traced: Traced) -> tuple[tuple[str, int], ...]:
    from .ir import DTYPE_NAMES

    return tuple((DTYPE_NAMES[t.dtype], t.dim()) for t in traced.captures)


def forward_key(
    traced: Traced, element: str, head_dim: int, value_dim: int, saved_states: tuple[str, ...]
) -> KernelKey:
    row = traced.row
    extra = {"weights": row.weights_online, "factor": row.factor, "out": row.out_factor}
    extra |= {f"new.{n}": v for n, v in row.new_state.items()}
    extra |= {f"saved.{n}": v for n, v in row.saved.items()}
    if row.merged is not None and row.merge_factors is not None:
        extra |= {f"merged.{n}": v for n, v in row.merged.items()}
        extra |= {"fa": row.merge_factors[0], "fb": row.merge_factors[1]}
    return KernelKey(
        "forward", element, head_dim, value_dim, _graphs(traced, extra), _captures(traced), (),
        saved_states, group_varies(traced),
    )  # fmt: skip


def backward_key(
    traced: Traced, derived: Derived, element: str, head_dim: int, value_dim: int
) -> KernelKey:
    extra = {"weights": derived.weights, "dscore": derived.dscore}
    for kind, scatters in (("s", derived.scatters), ("r", derived.row_scatters)):
        for i, s in enumerate(scatters):
            extra |= {f"{kind}{i}.c{s.capture}": s.value}
            extra |= {f"{kind}{i}.i{j}": x for j, x in enumerate(s.index)}
    for name, (node, scatters) in derived.operands.items():
        extra[f"d{name}"] = node
        extra |= {f"d{name}.s{i}.c{s.capture}": s.value for i, s in enumerate(scatters)}
    return KernelKey(
        "backward", element, head_dim, value_dim, _graphs(traced, extra), _captures(traced),
        derived.grads, derived.final_states, group_varies(traced),
    )  # fmt: skip
