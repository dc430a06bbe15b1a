"""Which linear-attention kernel is wanted, beside what the hooks of a spec say."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir import FLOATS

DECAY_KINDS = ("none", "scalar", "channel")
ELEMENTS = ("f32", "f64", "bf16", "f16")


@dataclass(frozen=True)
class LinearRequest:
    """What a kernel is wanted for, beside the spec's hooks.

    ``element`` is the dtype of q, k, v and out; ``d`` and ``dv`` the widths of k and v.
    ``decay_kind``: "none"; "scalar", one log-decay per token (or head); "channel", one per token
    and channel of k. ``decay_dtype`` is None with "none" and a float dtype otherwise. Without a
    ``beta_dtype`` there is no delta rule. Dtypes are names of :data:`attnengine.ir.TORCH_DTYPES`.

    Raises ValueError where a field has no meaning.
    """

    element: str
    d: int
    dv: int
    decay_kind: str = "none"
    decay_dtype: str | None = None
    beta_dtype: str | None = None
    normalizer: bool = False

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            raise ValueError(f"element={self.element!r}: expected one of {', '.join(ELEMENTS)}")
        if self.decay_kind not in DECAY_KINDS:
            raise ValueError(
                f"decay_kind={self.decay_kind!r}: expected one of {', '.join(DECAY_KINDS)}"
            )
        if (self.decay_dtype is None) != (self.decay_kind == "none"):
            raise ValueError(
                f"decay_dtype={self.decay_dtype!r} with decay_kind={self.decay_kind!r}: a decay "
                "has a dtype, its absence has none"
            )
        for name, dtype in (("decay", self.decay_dtype), ("beta", self.beta_dtype)):
            if dtype is not None and dtype not in FLOATS:
                raise ValueError(
                    f"{name} has dtype {dtype}, expected a floating dtype ({', '.join(FLOATS)}): "
                    f"cast {name} with .float()"
                )
        if self.d < 1 or self.dv < 1:
            raise ValueError(f"D={self.d}, Dv={self.dv}: expected at least 1")

    @property
    def accumulator(self) -> str:
        """The dtype of states and sums, and of what hooks see: fp32, or fp64 for fp64 operands."""
        return "f64" if self.element == "f64" else "f32"

    @property
    def delta(self) -> bool:
        """Whether the delta rule is applied: where there is a beta."""
        return self.beta_dtype is not None
