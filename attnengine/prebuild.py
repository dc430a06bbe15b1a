"""Kernels made ahead of time: what `attnengine prebuild --specs ...` says, as requests.

:func:`read_requests` gives requests (:class:`Request`, :class:`LinearKernels`,
:class:`StatisticsKernels`); prebuild_run.py generates the sources of all and compiles them.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .builtin import BUILTIN, STATISTICS, make_spec
from .linear import builtin as linear_builtin
from .linear.spec import LinearAttentionSpec
from .prebuild_linear import LinearKernels, StatisticsKernels, linear_variant
from .prebuild_request import Kernel, Request, Wanted
from .spec import AttentionSpec


def read_requests(text: str) -> list[Wanted] | Callable[[], Any]:
    """The requests that ``--specs`` names, or a function whose kernels are wanted.

    ``builtin`` or ``builtin:NAME,NAME`` ("linear" is every name that begins with "linear.");
    FILE.toml or FILE.json; FILE.py with ``SPECS``; FILE.py:NAME or MODULE:NAME, where NAME is an
    iterable of requests (or of specs), or a function.
    Raises ValueError that says what is wrong.
    """
    if text.partition(":")[0] == "builtin":
        return _builtin(text.partition(":")[2])
    if text.endswith((".toml", ".json")):
        return _from_table(Path(text))
    found = named_object(f"{text}:SPECS" if text.endswith(".py") else text)
    return found if callable(found) else as_requests(found, text)


def named_object(text: str) -> Any:
    """The object that FILE.py:NAME or MODULE:NAME means. The file's folder, or the current one, is
    where its imports are looked for first."""
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise ValueError(f"{text!r}: expected FILE.py:NAME or MODULE:NAME")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None or not Path(place).is_file():
            raise ValueError(f"{place!r} is not a Python file")
        sys.path.insert(0, str(Path(place).resolve().parent))
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ValueError(f"{place!r} cannot be imported: {error}") from None
    try:
        return getattr(module, name)
    except AttributeError:
        raise ValueError(f"{place!r} has no {name!r}") from None


def as_requests(found: Any, place: str) -> list[Wanted]:
    """Requests from an iterable of requests and specs. Raises ValueError for anything else."""
    if isinstance(found, (Wanted, AttentionSpec, LinearAttentionSpec)):
        found = [found]
    if not isinstance(found, Iterable) or isinstance(found, (str, bytes, Mapping)):
        raise ValueError(
            f"{place} is a {type(found).__name__}, not a function and not an iterable of "
            "attnengine.prebuild.Request"
        )
    requests: list[Wanted] = []
    for number, item in enumerate(found):
        if isinstance(item, AttentionSpec):
            item = Request(item)
        elif isinstance(item, LinearAttentionSpec):
            item = LinearKernels(item)
        if not isinstance(item, Wanted):
            kind = type(item).__name__
            raise ValueError(f"{place}: item {number} is a {kind}, not a Request or AttentionSpec")
        requests.append(dataclasses.replace(item, name=item.name or f"spec {number}"))  # type: ignore[type-var]
    if not requests:
        raise ValueError(f"{place} has no requests")
    return requests


def _builtin(text: str) -> list[Wanted]:
    linear = linear_builtin.PREFIX
    known = [variant for variant, _ in BUILTIN]
    known += [linear + variant for variant, _, _ in linear_builtin.BUILTIN] + [STATISTICS]
    wanted = text.split(",") if text else known
    for name in wanted:
        if name not in known and name + "." != linear:
            names = ", ".join(dict.fromkeys(known))
            raise ValueError(f"--specs builtin:{name}: expected names of {names}")

    def asked(name: str) -> bool:
        return name in wanted or (name.startswith(linear) and linear[:-1] in wanted)

    found: list[Wanted] = [
        Request(make_spec(variant, settings), name=variant)
        for variant, settings in BUILTIN
        if asked(variant)
    ]
    found += [
        linear_variant(variant, settings, dtypes=linear_builtin.DTYPES, head_dims=dims)
        for variant, settings, dims in linear_builtin.BUILTIN
        if asked(linear + variant)
    ]
    if asked(STATISTICS):
        found.append(StatisticsKernels(linear_builtin.DTYPES))
    return found


_DEFAULTS = tuple(dict.fromkeys((*Request.OPTIONS, *LinearKernels.OPTIONS)))


def _from_table(path: Path) -> list[Wanted]:
    """A file of ``specs``, each a variant with its settings; dtypes, head_dims, backward, forms and
    shared_kv, decay_dtype and beta_dtype stand beside a variant that has them, or above all of them
    as the default."""
    data = _load(path)
    specs = data.pop("specs", None)
    if not isinstance(specs, list) or not data.keys() <= set(_DEFAULTS):
        raise ValueError(
            f"{path}: expected an array `specs` of tables with a `variant`, and beside it at most "
            f"{', '.join(_DEFAULTS)}"
        )
    requests = []
    for number, table in enumerate(specs):
        if not isinstance(table, dict) or not isinstance(table.get("variant"), str):
            raise ValueError(f"{path}: specs[{number}] has no `variant`")
        try:
            requests.append(_from_entry(data, dict(table)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: specs[{number}]: {error}") from None
    return as_requests(requests, str(path))


def _from_entry(defaults: Mapping[str, Any], table: dict[str, Any]) -> Wanted:
    variant, prefix = table.pop("variant"), linear_builtin.PREFIX
    if variant == STATISTICS:
        options = _options(StatisticsKernels, defaults, table)
        if table:
            raise ValueError(f"{variant} has no setting {next(iter(table))!r}: expected none")
        return StatisticsKernels(**options)
    if variant.startswith(prefix):
        options = _options(LinearKernels, defaults, table)
        return linear_variant(variant.removeprefix(prefix), table, **options)
    options = _options(Request, defaults, table)
    return Request(make_spec(variant, table), name=variant, **options)


def _options(
    kind: type[Wanted], defaults: Mapping[str, Any], table: dict[str, Any]
) -> dict[str, Any]:
    """What a request of a kind is told beside its variant; the rest of the table is left in it."""
    found = {name: defaults[name] for name in kind.OPTIONS if name in defaults}
    return found | {name: table.pop(name) for name in kind.OPTIONS if name in table}


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    try:
        if path.suffix == ".json":
            data = json.loads(text)
        else:
            try:
                tomllib = importlib.import_module("tomllib")
            except ImportError:
                raise ValueError("TOML needs Python 3.11; write it as JSON") from None
            data = tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return data if isinstance(data, dict) else {"specs": data}


__all__ = [
    "Kernel", "LinearKernels", "Request", "StatisticsKernels", "Wanted", "as_requests",
    "named_object", "read_requests",
]  # fmt: skip
