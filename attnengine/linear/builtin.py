"""The named variants as programs to be made ahead of time: operands of an example call for each,
the common ones that `attnengine prebuild` makes by default, and the command that makes one.

A kernel does not depend on batch, heads and lengths, so an example of any sizes stands for all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import build
from ..builtin import dtype_word
from ..ir import TORCH_DTYPES
from . import variants
from .arguments import check_arguments
from .request import LinearRequest
from .spec import LinearAttentionSpec
from .stages import Sizes

PREFIX = "linear."  # of names on the command line: there is a retention with a softmax's pairs too
SIZES: Sizes = (2, 8, 8, 64)  # B, Hk, H, L of examples

BUILTIN: tuple[tuple[str, Mapping[str, Any], tuple[Any, ...]], ...] = (
    ("simple_gla", {}, (64, 128)),
    ("retention", {}, (64, 128)),  # the same kernels
    ("gla", {}, (64, 128)),
    ("mamba2", {}, (64, (128, 64))),
    ("mamba2", {"D": True}, (64, (128, 64))),
    ("mamba2", {"D": True, "z": True}, (64, (128, 64))),
    ("elu_linear", {}, (64, 128)),
    ("delta_net", {}, (64, 128)),
    ("gated_delta_net", {}, (64, 128)),
    ("kda", {}, (64, 128)),
)
"""(variant, settings, head dims), in bf16 and fp32."""
DTYPES = (torch.bfloat16, torch.float32)

# Widths of operands beyond [B, heads, L], by the names of parameters; "H" is a tensor [H].
_WIDTHS = {
    "q": "D", "k": "D", "B": "D", "C": "D", "gk": "D", "v": "Dv", "x": "Dv", "z": "Dv",
    "g": "", "beta": "", "dt": "", "A": "H", "D": "H", "dt_bias": "H", "gamma": "H",
}  # fmt: skip
_OWN_DTYPE = ("g", "gk", "dt", "A", "D", "dt_bias", "gamma")  # of parameters and log-decays


class Kind(NamedTuple):
    """What operands a variant has beside q, k and v."""

    decay: str  # "none", "scalar" or "channel"
    delta: bool


def names() -> list[str]:
    """The public functions of :mod:`attnengine.linear.variants`."""
    return [
        name
        for name, value in vars(variants).items()
        if inspect.isfunction(value)
        and value.__module__ == variants.__name__
        and not name.startswith("_")
    ]


def example(
    variant: str, settings: Mapping[str, Any], dtype: torch.dtype, d: int, dv: int
) -> dict[str, Any]:
    """The arguments of a call on example operands, which all require grad.

    ``settings``: {"D": True} gives the variant a tensor that it can do without. Raises ValueError
    for a name or a setting that there is not.
    """
    if variant not in names():
        known = ", ".join(PREFIX + name for name in names())
        raise ValueError(f"variant={PREFIX + variant!r}: expected one of {known}")
    make = getattr(variants, variant)
    parameters = inspect.signature(make).parameters
    free = [n for n, p in parameters.items() if p.default is not inspect.Parameter.empty]
    for name, value in settings.items():
        if name not in free or not isinstance(value, bool):
            raise ValueError(
                f"{PREFIX}{variant} has no setting {name} = {value!r}: expected "
                f"{', '.join(f'{n} = true' for n in free) or 'none'}"
            )
    given: dict[str, Any] = {}
    for name in parameters:
        if name in free and not settings.get(name, False):
            continue
        given[name] = True if name not in _WIDTHS else _operand(variant, name, dtype, d, dv)
    return dict(make(**given))


def _operand(variant: str, name: str, dtype: torch.dtype, d: int, dv: int) -> Tensor:
    B, _, H, L = SIZES
    width = "D" if (variant, name) == ("kda", "g") else _WIDTHS[name]
    shape: tuple[int, ...] = (H,) if width == "H" else (B, H, L)
    if width in ("D", "Dv"):
        shape = (*shape, d if width == "D" else dv)
    if name in _OWN_DTYPE:
        dtype = torch.promote_types(dtype, torch.float32)
    return torch.ones(shape, dtype=dtype).requires_grad_()


def spec_of(
    variant: str, settings: Mapping[str, Any], dtype: torch.dtype, d: int, dv: int
) -> LinearAttentionSpec:
    """The spec of a variant for operands of a dtype and head dims, which its hooks may read."""
    spec: LinearAttentionSpec = example(variant, settings, dtype, d, dv)["spec"]
    return spec


def kind_of(variant: str, settings: Mapping[str, Any]) -> Kind:
    """Raises ValueError as :func:`example`."""
    a = check_arguments(**example(variant, settings, torch.float32, 8, 8))
    return Kind(a.decay_kind, a.beta is not None)


_kind_of_builtin = functools.cache(lambda at: kind_of(*BUILTIN[at][:2]))


def prebuild_command(
    request: LinearRequest, isa: str, same: Callable[[LinearAttentionSpec], bool]
) -> str:
    """What to do about a kernel that is missing, with the command that makes it.

    ``same(spec)`` tells whether a spec would give that kernel: if one of BUILTIN does, the command
    names it; otherwise it needs a file that imports the spec.
    """
    element = TORCH_DTYPES[request.element]
    word, accumulator = dtype_word(element), TORCH_DTYPES[request.accumulator]
    others = {}
    for name, dtype, usual in (
        ("decay_dtype", request.decay_dtype, accumulator),
        ("beta_dtype", request.beta_dtype, element),
    ):
        if dtype is not None and TORCH_DTYPES[dtype] != usual:
            others[name] = dtype_word(TORCH_DTYPES[dtype])
    d, dv = request.d, request.dv
    for at, (variant, settings, _) in enumerate(BUILTIN):
        if _kind_of_builtin(at) == (request.decay_kind, request.delta) and same(
            spec_of(variant, settings, element, d, dv)
        ):
            dims = f"{d}" if d == dv else f"{d}x{dv}"
            specs = f"builtin:{PREFIX}{variant} --dtypes {word} --head-dims {dims}"
            for name, dtype in others.items():
                specs += f" --{name.replace('_', '-')} {dtype}"
            return build.remedy(specs, isa)
    dims = f"{d}" if d == dv else f"[({d}, {dv})]"
    more = "" if request.decay_kind == "none" else f', decay="{request.decay_kind}"'
    more += ", delta=True" if request.delta else ""
    more += "".join(f', {name}="{dtype}"' for name, dtype in others.items())
    return (
        f"{build.remedy('kernels.py', isa)}\n"
        "  where kernels.py imports the LinearAttentionSpec of this call as `spec` and says\n"
        "    from attnengine.prebuild import LinearKernels\n"
        f'    SPECS = [LinearKernels(spec, dtypes="{word}", head_dims={dims}{more})]'
    )
