"""The command line: attnengine demo | doctor | explain | prebuild | cache.

Each command imports what it needs by itself, so that `attnengine cache ls` starts without torch.
"""

import argparse
import ast
import dataclasses
import importlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnengine.errors import AttnEngineError


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 when something is wrong, 2 for bad usage."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.run is not _demo:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        return int(options.run(options))
    except (AttnEngineError, ValueError) as error:
        print(f"attnengine: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnengine", description="Attention variants written in PyTorch, compiled to kernels."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Any], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    command("demo", _demo, "compile, check and time variants, then train a small model")
    command("doctor", _doctor, "say what this machine has: processor, compiler, cache")

    explain = command("explain", _explain, "print every stage from a variant to its kernel")
    explain.add_argument("variant", help="a name in attnengine.variants, or FILE.py:NAME")
    explain.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="arguments of the variant"
    )
    explain.add_argument("--batch", type=int, default=1)
    explain.add_argument("--heads", type=int, default=8)
    explain.add_argument("--kv-heads", type=int, help="default: --heads")
    explain.add_argument("--length", type=int, default=2048)
    explain.add_argument("--kv-length", type=int, help="default: --length")
    explain.add_argument("--dim", type=int, default=64)
    explain.add_argument("--dtype", choices=("bf16", "fp16", "fp32", "fp64"), default="bf16")

    prebuild = command("prebuild", _prebuild, "compile kernels ahead of time: a folder or a wheel")
    prebuild.add_argument(
        "--specs", required=True, metavar="FILE|builtin",
        help="builtin[:NAME,...]; FILE.toml or FILE.json; FILE.py with SPECS; FILE.py:NAME or "
        "MODULE:NAME, requests or a function that is run",
    )  # fmt: skip
    prebuild.add_argument(
        "--target", default="cpu", metavar="cpu[:ISA]", help="an instruction set, or cpu:all"
    )
    prebuild.add_argument(
        "--out", type=Path, required=True, help="a folder for ATTNENGINE_AOT_PATH, or NAME.whl"
    )
    prebuild.add_argument("--wheel", action="store_true", help="make a wheel in the folder --out")
    prebuild.add_argument("--jobs", type=int, help="compiles at a time; default: processors")
    prebuild.add_argument("--dtypes", type=_words, default=[], help="instead of the requests'")
    prebuild.add_argument("--head-dims", type=_dims, default=[], help="such as 64,192x128")
    prebuild.add_argument("--forward-only", action="store_true", help="without the gradients")

    cache = command("cache", _no_action, "look after the kernel cache")
    actions = cache.add_subparsers(title="actions", required=True, metavar="ACTION")
    for name, run, text in (
        ("ls", _cache_ls, "list the modules, least recently used first"),
        ("verify", _cache_verify, "check the hash of every file"),
        ("prune", _cache_prune, "remove the least recently used beyond the limit"),
        ("clear", _cache_clear, "remove everything"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.set_defaults(run=run)
        if name == "verify":
            action.add_argument("--repair", action="store_true", help="remove what fails")
        if name == "prune":
            action.add_argument("--limit-mb", type=float, help="default: ATTNENGINE_CACHE_LIMIT_MB")
    return parser


def _no_action(options: Any) -> int:
    return 2


def _demo(options: Any) -> int:
    return int(importlib.import_module("attnengine.demo").main(options.rest) or 0)


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


def _explain(options: Any) -> int:
    import torch

    import attnengine
    from attnengine.prebuild import named_object

    if ":" in options.variant:
        variant = named_object(options.variant)
    else:
        variants = importlib.import_module("attnengine.variants")
        variant = None if options.variant[0] == "_" else getattr(variants, options.variant, None)
        if variant is None:
            raise ValueError(f"variant={options.variant!r}: not in attnengine.variants")
    if not hasattr(variant, "row_func"):  # a function that makes the spec
        try:
            variant = variant(**_assignments(options.settings))
        except TypeError as error:
            raise ValueError(f"{options.variant}: {error}; give arguments as KEY=VALUE") from None
    dtypes = {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        "fp64": torch.float64,
    }
    dtype = dtypes[options.dtype]
    kv_heads = options.kv_heads or options.heads
    kv_length = options.length if options.kv_length is None else options.kv_length
    q = torch.randn(options.batch, options.heads, options.length, options.dim, dtype=dtype)
    k, v = (torch.randn(options.batch, kv_heads, kv_length, options.dim, dtype=dtype) for _ in "kv")
    text = getattr(attnengine, "explain")(variant, q, k, v)  # noqa: B009  loaded on first use
    if text is not None:
        print(text)
    return 0


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _dims(text: str) -> list[int | tuple[int, int]]:
    """Head dims: 64 or 192x128 (D x Dv), separated by commas."""
    pairs = [tuple(map(int, word.split("x"))) for word in _words(text)]
    if any(len(pair) not in (1, 2) for pair in pairs):
        raise ValueError
    return [pair[0] if len(pair) == 1 else (pair[0], pair[1]) for pair in pairs]


def _prebuild(options: Any) -> int:
    from rich.console import Console

    from attnengine.prebuild_run import Options, prebuild

    given = vars(options)
    wanted = Options(**{field.name: given[field.name] for field in dataclasses.fields(Options)})
    return prebuild(wanted, Console())


def _doctor(options: Any) -> int:
    from attnengine import cache_upkeep, settings
    from attnengine.cache import Store
    from attnengine.compiler import Compiler, find_compiler

    compiler, wrong = find_compiler(), 0
    print(f"python    {platform.python_version()} on {platform.platform()}")
    try:
        print(f"torch     {importlib.metadata.version('torch')}")
    except importlib.metadata.PackageNotFoundError:
        print("torch     MISSING: pip install torch")
        wrong = 1
    try:
        isa = importlib.import_module("attnengine._host").cpu_isa()
    except ImportError as error:
        isa, wrong = f"unknown (the operator library is not built: {error})", 1
    print(f"processor {isa}, {len(os.sched_getaffinity(0))} hardware threads for this process")
    if settings.isa_override() is not None:
        print(f"          ATTNENGINE_ISA asks for {settings.isa_override()}")
    if isinstance(compiler, Compiler):
        version = compiler.version.strip().splitlines()[-1]
        print(f"compiler  {compiler.command}: {version}")
    else:
        print(f"compiler  MISSING: {compiler}")
        wrong = 0 if settings.jit_disabled() or settings.aot_paths() else 1
    if settings.jit_disabled():
        print("          ATTNENGINE_DISABLE_JIT is set: nothing is compiled")
    store = Store(settings.cache_dir())
    try:
        store.prepare()
        entries = cache_upkeep.modules(store)
        used, limit = cache_upkeep.total_bytes(store), settings.cache_limit_bytes()
        size = f"{len(entries)} modules, {_size(used)} of {_size(limit)}"
        print(f"cache     {store.root}: {size}")
    except (OSError, AttnEngineError) as error:
        print(f"cache     UNUSABLE, a temporary folder is used instead: {error}")
        wrong = 1
    for root in settings.aot_paths():
        known = len(cache_upkeep.modules(Store(root)))
        print(f"prebuilt  {root}: {known} modules")
    return wrong


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _age(then: float) -> str:
    seconds = max(0.0, time.time() - then)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _store() -> Any:
    from attnengine import settings
    from attnengine.cache import Store

    return Store(settings.cache_dir())


def _cache_ls(options: Any) -> int:
    from attnengine import cache_upkeep

    store = _store()
    entries = cache_upkeep.modules(store)
    for entry in entries:
        what = entry.label if entry.problem is None else f"BROKEN: {entry.problem}"
        size, age = _size(entry.bytes), _age(entry.used)
        print(f"{entry.digest[:12]}  {entry.isa:11}  {size:>10}  {age:>10}  {what}")
    print(f"{len(entries)} modules, {_size(cache_upkeep.total_bytes(store))} in {store.root}")
    return 0


def _cache_verify(options: Any) -> int:
    from attnengine import cache_upkeep

    store = _store()
    broken = cache_upkeep.verify_all(store, options.repair)
    for entry in broken:
        print(f"{entry.digest[:12]}  {entry.problem}")
    good = len(cache_upkeep.modules(store)) - (0 if options.repair else len(broken))
    after = " and removed" if options.repair else "; `--repair` removes them"
    print(f"{good} modules good, {len(broken)} broken{after if broken else ''} in {store.root}")
    return 1 if broken and not options.repair else 0


def _cache_prune(options: Any) -> int:
    from attnengine import cache_upkeep, settings

    limit = settings.cache_limit_bytes()
    if options.limit_mb is not None:
        if not 0 <= options.limit_mb < float("inf"):
            raise ValueError(f"--limit-mb={options.limit_mb}: expected a number >= 0")
        limit = int(options.limit_mb * 2**20)
    store = _store()
    freed = cache_upkeep.prune(store, limit, young_s=0.0)
    left = _size(cache_upkeep.total_bytes(store))
    print(f"freed {_size(freed)}; {left} of {_size(limit)} left in {store.root}")
    return 0


def _cache_clear(options: Any) -> int:
    from attnengine import cache_upkeep

    store = _store()
    freed = cache_upkeep.clear(store)
    print(f"freed {_size(freed)} in {store.root}")
    return 0
