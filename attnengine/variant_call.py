"""A variant and the operands of a call, as the command line names them."""

import argparse
import ast
import importlib
from typing import Any, NamedTuple

from attnengine.arch import CUDA
from attnengine.settings import ISAS


class VariantCall(NamedTuple):
    """``spec`` on q [B, H, L, D] and k, v [B, Hkv, S, D]; ``isa`` None: this processor's best; a
    CUDA architecture where one was asked for."""

    spec: Any
    q: Any
    k: Any
    v: Any
    isa: str | None
    lengths: tuple[int, ...] | None = None  # of the caches, where it is a call on caches


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a variant, its settings and the operands."""
    parser.add_argument("variant", help="a name in attnengine.variants, full, or FILE.py:NAME")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="arguments of the variant")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="default: --heads")
    parser.add_argument("--length", type=int, help="query rows; default: 2048, with --caches 1")
    parser.add_argument("--kv-length", type=int, help="default: --length")
    parser.add_argument(
        "--caches", type=_lengths, metavar="N,...",
        help="a call on caches of so many keys, one for each sequence; --kv-length is their room",
    )  # fmt: skip
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32", "fp64"), default="bf16")
    parser.add_argument("--isa", choices=ISAS, help="default: the best of this processor")
    parser.add_argument(
        "--target", type=_target, help=f"a CUDA architecture instead: {', '.join(CUDA)}"
    )


def call_of(options: Any, device: str = "cpu") -> VariantCall:
    """The call that parsed arguments name; operands on "meta" take no memory.

    Raises ValueError for a variant, a setting or a size that does not fit.
    """
    import torch

    from attnengine.builtin import DTYPE_WORDS

    dtype = DTYPE_WORDS[options.dtype]
    kv_heads = options.heads if options.kv_heads is None else options.kv_heads
    caches, batch, length = options.caches, options.batch, options.length
    if length is None:
        length = 2048 if caches is None else 1
    room = length if caches is None else max(caches)
    kv_length = room if options.kv_length is None else options.kv_length
    batch = batch if caches is None else len(caches)
    q_size = (batch, options.heads, length, options.dim)
    kv_size = (batch, kv_heads, kv_length, options.dim)
    for name, size in zip(("batch", "heads", "length", "dim"), q_size, strict=True):
        if size < 1:
            raise ValueError(f"--{name}={size}: expected a number above 0")
    if kv_heads < 1 or options.heads % kv_heads:
        raise ValueError(f"--kv-heads={kv_heads}: expected a divisor of --heads={options.heads}")
    if kv_length < 0:
        raise ValueError(f"--kv-length={kv_length}: expected a number >= 0")
    if caches is not None:  # [B, S, H, D], as attention_with_kvcache has them; never read
        device = "meta"
    q = torch.randn(q_size, dtype=dtype, device=device)
    k, v = (torch.randn(kv_size, dtype=dtype, device=device) for _ in "kv")
    isa = options.target or options.isa
    if caches is not None:
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    return VariantCall(_spec(options.variant, options.settings), q, k, v, isa, caches)


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _target(text: str) -> str:
    name = text if "_" in text else text.replace("sm", "sm_", 1)
    if name not in CUDA:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(CUDA)}")
    return name


def _spec(name: str, settings: list[str]) -> Any:
    if ":" in name:
        from attnengine.prebuild import named_object

        variant = named_object(name)
    elif name == "full":
        variant = importlib.import_module("attnengine.spec").AttentionSpec
    else:
        variants = importlib.import_module("attnengine.variants")
        variant = None if name[0:1] in ("", "_") else getattr(variants, name, None)
        if variant is None:
            raise ValueError(f"variant={name!r}: not in attnengine.variants")
    if isinstance(variant, type) or not hasattr(variant, "row_func"):  # what makes the spec
        try:
            variant = variant(**_assignments(settings))
        except TypeError as error:
            raise ValueError(f"{name}: {error}; give arguments as KEY=VALUE") from None
    return variant


def _assignments(words: list[str]) -> dict[str, Any]:
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{word!r}: expected KEY=VALUE")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"{word!r}: the value must be a Python literal") from None
    return found
