"""A module of attnengine imports only from modules that come before it in the pipeline."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "attnengine"

# Stages in order; a stage may be several modules, themselves in order. A new module gets a place
# here. docs/how-a-call-flows.md explains each (test_docs.py checks that it names them all).
STAGES: dict[str, tuple[str, ...]] = {
    "foundation": ("errors", "settings", "platform_tag", "clean_thread"),
    "spec": ("spec", "rows", "variants"),
    "meaning": ("products", "reference", "statistics_reference", "noise", "gate"),
    "trace": (
        "ir", "capture", "aten", "arrays", "fx_values", "lower_pointwise", "lower_shapes", "lower",
        "user_code", "tracer", "row_graphs", "trace", "probe", "pullback", "derive",
    ),
    "normalize": ("key", "serialize", "blockmask"),
    "plan": ("arch", "diagonal", "plan", "plan_cuda"),
    "generate": ("emit", "dialect", "unit", "source", "source_backward", "statistics_source"),
    "build": (
        "cache_entry", "cache_lock", "cache", "cache_upkeep", "prebuilt", "headers", "elf",
        "compiler", "cutlass", "nvcc", "ptx", "staging", "build",
    ),
    "run": (
        "library", "schedule", "masks", "memory", "stages", "builtin", "target", "program",
        "dispatch", "exported",
        "explain", "ops",
        "backward", "handle", "api", "flash_args", "ops_sequences", "ops_sequences_backward",
        "rotary", "kvcache", "varlen", "merge", "statistics_ops",
        "token_statistics", "linear",
    ),
    "faces": (
        "demo", "prebuild_request", "prebuild_linear", "prebuild", "kernel_wheel", "prebuild_run",
        "machine", "doctor", "variant_call", "cli",
    ),
}  # fmt: skip
ORDER = [module for modules in STAGES.values() for module in modules]


def place(module: str) -> int:
    """Position in the pipeline; what has no place yet counts as last."""
    return ORDER.index(module) if module in ORDER else len(ORDER)


def sources() -> list[tuple[str, Path]]:
    """(module, file) of every Python file of the package but its __init__."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module not in ("__init__", "__main__"):
            found.append((module, path))
    return found


def imported(path: Path) -> set[tuple[str, int]]:
    """(module, line) of every import from attnengine, also inside functions."""
    depth = len(path.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == depth:
                module = f"attnengine.{module}".rstrip(".")
            elif node.level:
                continue  # inside a subpackage: one stage
            names = [module]
            if module == "attnengine":
                names = [f"{module}.{name.name}" for name in node.names]
        for name in names:
            first, _, rest = name.partition(".")
            if first == "attnengine":
                found.add((rest.split(".")[0] or "api", getattr(node, "lineno", 0)))
    return found


def test_every_module_has_a_place() -> None:
    modules = {module for module, _ in sources()}
    assert modules <= set(ORDER), f"add to STAGES: {sorted(modules - set(ORDER))}"


def test_every_place_has_a_module() -> None:
    modules = {module for module, _ in sources()}
    assert set(ORDER) <= modules, f"gone, remove from STAGES: {sorted(set(ORDER) - modules)}"


@pytest.mark.parametrize("module, path", sources(), ids=lambda x: getattr(x, "name", str(x)))
def test_imports_point_backwards(module: str, path: Path) -> None:
    extensions = {"_host"}  # compiled, imports nothing of ours
    wrong = [
        f"{path.name}:{line} imports {other}"
        for other, line in sorted(imported(path))
        if other not in extensions and other != module and place(other) > place(module)
    ]
    assert not wrong, "; ".join(wrong)
