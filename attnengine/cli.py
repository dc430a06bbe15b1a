"""The command line: attnengine demo | doctor | explain | plan | prebuild | cache.

Each command imports what it needs by itself, so that `attnengine cache ls` starts without torch.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnengine import variant_call
from attnengine.arch import CUDA
from attnengine.doctor import size
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
    doctor = command("doctor", _doctor, "say what this machine can do, and what is missing")
    doctor.add_argument("--json", action="store_true", help="the same facts for machines")

    for name, run, text in (
        ("explain", _explain, "print every stage from a variant to its kernel"),
        ("plan", _plan, "print candidates with predicted cost, and the choice; compile nothing"),
    ):
        variant_call.add_arguments(command(name, run, text))

    prebuild = command("prebuild", _prebuild, "compile kernels ahead of time: a folder or a wheel")
    prebuild.add_argument(
        "--specs", required=True, metavar="FILE|builtin",
        help="builtin[:NAME,...] (builtin:linear is all of linear attention); FILE.toml or "
        "FILE.json; FILE.py with SPECS; FILE.py:NAME or MODULE:NAME, requests or a function that "
        "is run",
    )  # fmt: skip
    prebuild.add_argument(
        "--target",
        default="cpu",
        metavar="TARGET,...",
        help="cpu, cpu:ISA or cpu:all; sm80 and the like for CUDA",
    )
    prebuild.add_argument(
        "--out", type=Path, required=True, help="a folder for ATTNENGINE_AOT_PATH, or NAME.whl"
    )
    prebuild.add_argument("--wheel", action="store_true", help="make a wheel in the folder --out")
    prebuild.add_argument("--jobs", type=int, help="compiles at a time; default: processors")
    prebuild.add_argument("--dtypes", type=_words, default=[], help="instead of the requests'")
    prebuild.add_argument("--head-dims", type=_dims, default=[], help="such as 64,192x128")
    prebuild.add_argument("--forward-only", action="store_true", help="without the gradients")
    prebuild.add_argument(
        "--forms", type=_words, default=[], help="of CUDA kernels: dense, decode, prefill"
    )
    prebuild.add_argument("--shared-kv", action="store_true", help="of --forms: v lies within k")
    prebuild.add_argument(
        "--decay-dtype", metavar="DTYPE", help="of linear attention's decays; default: fp32"
    )
    prebuild.add_argument(
        "--beta-dtype", metavar="DTYPE", help="of linear attention's beta; default: q's"
    )

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


def _explain(options: Any) -> int:
    import attnengine

    call = variant_call.call_of(options)
    if call.isa is None and call.lengths is None:
        print(attnengine.explain(call.spec, call.q, call.k, call.v))
    elif call.isa in CUDA or call.lengths is not None:
        from attnengine.explain import CacheCall, explained

        on_cache = None if call.lengths is None else CacheCall.of(*call[1:4], call.lengths)
        isa, d = call.isa or attnengine.dispatch.default_isa(), call.q.shape[3]
        print(explained(call.spec, call.q.dtype, d, d, isa, on_cache))
    else:
        print(attnengine.compile(*call[:4], backward=False, isa=call.isa).explain())
    return 0


def _plan(options: Any) -> int:
    from attnengine import dispatch
    from attnengine.explain import CacheCall, describe_plans
    from attnengine.key import Form

    call = variant_call.call_of(options, device="meta")
    d, isa = call.q.shape[3], call.isa or dispatch.default_isa()
    captures, shared, form = dispatch.captures_for(call.spec), None, Form()
    on_cache = None if call.lengths is None else CacheCall.of(*call[1:4], call.lengths)
    if on_cache is not None:
        form = on_cache.form(isa)
    p = dispatch.pipeline(call.spec, captures, call.q.dtype, d, d, isa, form)
    if on_cache is not None:
        shared = "a CPU kernel is asked for it: attnengine explain compiles and asks it"
        if isa in CUDA:
            shared = str(on_cache.schedule_on_device(p.forward_plans[0]))
    print(describe_plans(p, shared))
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
    from attnengine import doctor

    report = doctor.examine()
    print(doctor.as_json(report) if options.json else "\n".join(doctor.lines(report)))
    return 0 if report.can_run else 1


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
        used, age = size(entry.bytes), _age(entry.used)
        print(f"{entry.digest[:12]}  {entry.isa:11}  {used:>10}  {age:>10}  {what}")
    print(f"{len(entries)} modules, {size(cache_upkeep.total_bytes(store))} in {store.root}")
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
    left = size(cache_upkeep.total_bytes(store))
    print(f"freed {size(freed)}; {left} of {size(limit)} left in {store.root}")
    return 0


def _cache_clear(options: Any) -> int:
    from attnengine import cache_upkeep

    store = _store()
    freed = cache_upkeep.clear(store)
    print(f"freed {size(freed)} in {store.root}")
    return 0
