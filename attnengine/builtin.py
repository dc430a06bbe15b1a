"""Variants by name and settings, and the common ones that `attnengine prebuild` makes by default.

A setting that is a tensor is given as {"shape": [8], "dtype": "fp32", "requires_grad": true}: a
kernel depends on the rank, the dtype and whether there is a gradient, not on sizes and values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import build, variants
from .key import Form
from .spec import AttentionSpec

DTYPE_WORDS: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
_INTEGERS = {f"int{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}
_TENSOR = {"shape", "dtype", "requires_grad"}

_HEADS = 8


def _learned(*shape: int) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": "fp32", "requires_grad": True}


def _ids(*shape: int) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": "int64"}


BUILTIN: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("full", {}),
    ("causal", {}),
    ("sliding_window", {"window": 256}),
    ("sliding_window", {"window": 4096}),  # Mistral 7B, Gemma 2
    ("prefix_lm", {"prefix_len": _ids(2)}),
    ("document", {"doc_ids": _ids(64)}),
    ("document", {"doc_ids": _ids(2, 64)}),
    ("alibi", {"slopes": _HEADS}),
    ("softcap", {"cap": 20.0}),
    ("softcap", {"cap": 50.0}),  # Gemma 2
    ("t5_bias", {"table": _learned(32, _HEADS)}),
    ("learned_bias", {"bias": _learned(_HEADS, 64, 64)}),
    ("sink", {"sink": _learned(_HEADS)}),
    ("sigmoid", {}),
    ("sigmoid", {"bias": {"shape": [], "dtype": "fp32"}}),
    ("relu", {}),
    ("retention", {"decay": _HEADS}),
)
"""(variant, settings); "full" is the plain softmax without a mask."""

STATISTICS = "token_statistics"
"""The name of token statistics attention, which has no variants."""
EXPORTED = (
    "\n  or, for an exported program, --specs kernels.py:run with a function run() that loads its "
    "file and calls it"
)
"""What prebuild_command leaves to say about a kernel of an exported program."""


def names() -> list[str]:
    """The names that make_spec knows: "full" and the public variants that return a spec."""
    found = [
        name
        for name, value in vars(variants).items()
        if inspect.isfunction(value)
        and value.__module__ == variants.__name__
        and value.__annotations__.get("return") == "AttentionSpec"
    ]
    return ["full", *found]


def make_spec(variant: str, settings: Mapping[str, Any]) -> AttentionSpec:
    """The spec of a variant of :mod:`attnengine.variants`, or of "full".

    Raises ValueError for a name or a setting that it does not have, and what the variant raises.
    """
    if variant not in names():
        raise ValueError(f"variant={variant!r}: expected one of {', '.join(names())}")
    make = AttentionSpec if variant == "full" else getattr(variants, variant)
    known = {} if variant == "full" else inspect.signature(make).parameters
    for name in settings:
        if name not in known:
            raise ValueError(
                f"{variant} has no setting {name!r}: expected {', '.join(known) or 'none'}"
            )
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in settings:
            raise ValueError(f"{variant} needs the setting {name!r}")
    return make(**{name: _setting(variant, name, value) for name, value in settings.items()})


def _setting(variant: str, name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    words = DTYPE_WORDS | _INTEGERS
    dtype, shape = words.get(value.get("dtype", "fp32")), value.get("shape", ())
    sizes = isinstance(shape, (list, tuple)) and all(isinstance(n, int) and n > 0 for n in shape)
    if not value.keys() <= _TENSOR or "shape" not in value or dtype is None or not sizes:
        raise ValueError(
            f"{variant}.{name}={dict(value)}: expected a tensor as shape = [sizes above 0], "
            f"dtype = one of {', '.join(words)}, requires_grad = true or false"
        )
    return torch.ones(shape, dtype=dtype).requires_grad_(bool(value.get("requires_grad", False)))


def dtype_word(dtype: torch.dtype) -> str:
    """The name of a dtype on the command line, such as "bf16"."""
    return next(word for word, known in DTYPE_WORDS.items() if known == dtype)


def prebuild_command(
    dtype: torch.dtype, d: int, dv: int, isa: str, form: Form, same: Callable[[AttentionSpec], bool]
) -> str:
    """What to do about a kernel that is missing, with the command that makes it.

    ``same(spec)`` tells whether a spec would give that kernel: if one of BUILTIN does, the command
    names it; otherwise it needs a file that imports the spec.
    """
    word = dtype_word(dtype)
    for variant, settings in BUILTIN:
        if same(make_spec(variant, settings)):
            dims = f"{d}" if d == dv else f"{d}x{dv}"
            specs = f"builtin:{variant} --dtypes {word} --head-dims {dims}"
            if form != Form():
                specs += f" --forms {form.word}" + (" --shared-kv" if form.shared_kv else "")
            return build.remedy(specs, isa)
    dims = f"{d}" if d == dv else f"[({d}, {dv})]"
    more = "" if form == Form() else f', forms="{form.word}"'
    more += ", shared_kv=True" if form.shared_kv else ""
    return (
        f"{build.remedy('kernels.py', isa)}\n"
        "  where kernels.py imports the AttentionSpec of this call as `spec` and says\n"
        "    from attnengine.prebuild import Request\n"
        f'    SPECS = [Request(spec, dtypes="{word}", head_dims={dims}{more})]'
    )


def statistics_command(dtype: torch.dtype, d: int, isa: str) -> str:
    """The same about a kernel of token statistics attention."""
    specs = f"builtin:{STATISTICS} --dtypes {dtype_word(dtype)} --head-dims {d}"
    return build.remedy(specs, isa)
