"""Part 1: compile, check, time. Every number in the table was checked first."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attnengine as ae

from .. import gate
from ..library import host
from .variants import ENTRIES, Entry

HEADS, DIM = 8, 64
CHECKED_HEADS, CHECKED_LENGTH = 2, 300  # the dense fp64 reference is slow


@dataclass
class Result:
    """What one variant did. Times are medians in ms, by contestant; a contestant that cannot do the
    job is absent."""

    name: str
    shape: str
    compile_s: float = 0.0
    checked: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    forward_ms: dict[str, float] = field(default_factory=dict)
    both_ms: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


def operands(heads: int, length: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Leaf q, k, v of [1, H, L, 64] and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, length, DIM)
    made = [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]
    return [x.requires_grad_() for x in made[:3]], made[3]


def median_ms(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Interleaved medians after one warm-up call each."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def sdpa(entry: Entry, spec: ae.AttentionSpec, length: int) -> Callable[..., Tensor]:
    """SDPA as near to the variant as it gets."""
    if entry.sdpa == "causal":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    zero = torch.zeros((), dtype=torch.int64)
    rows, columns = torch.arange(length)[:, None], torch.arange(length)
    assert spec.mask_mod is not None
    mask = spec.mask_mod(zero, zero, rows, columns)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(spec: ae.AttentionSpec, length: int) -> Callable[..., Tensor]:
    """FlexAttention compiled for the variant; on the CPU it is forward only."""
    assert spec.mask_mod is not None
    torch._dynamo.reset()
    mask = create_block_mask(spec.mask_mod, None, None, length, length, device="cpu")
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, score_mod=spec.score_mod, block_mask=mask)


def check(entry: Entry, dtype: torch.dtype, result: Result) -> None:
    """Output, row statistics and every gradient through the numerics gate, on a length that no tile
    divides. Learned tensors are rebuilt, so the same kernel gets other captured tensors."""
    spec, learned = entry.build(CHECKED_HEADS, CHECKED_LENGTH)
    leaves, _ = operands(CHECKED_HEADS, CHECKED_LENGTH, dtype)
    captures = {f"learned{i}": tensor for i, tensor in enumerate(learned)}
    try:
        reports = gate.compare(
            lambda q, k, v: ae.attention(q, k, v, spec, return_aux=True),
            spec,
            *leaves,
            captures=captures,
        )
        result.checked = [str(report) for report in reports]
    except gate.GateError as wrong:
        result.failures.append(f"{entry.name}: {wrong}")


def run_entry(
    entry: Entry, out: Path, dtype: torch.dtype, length: int, rounds: int, note: Callable
) -> Result:
    """One variant from Python to numbers. `note(text)` reports progress."""
    name = str(dtype).removeprefix("torch.")
    result = Result(entry.name, f"1x{HEADS}x{length}x{DIM} {name}")
    spec, learned = entry.build(HEADS, length)
    leaves, grad = operands(HEADS, length, dtype)

    note("tracing, planning, compiling")
    start = time.perf_counter()
    attend = ae.compile(spec, *leaves)
    attend(*leaves).backward(grad)
    result.compile_s = time.perf_counter() - start
    stem = entry.name.split(",")[0].split(" (")[0].replace(" ", "-")
    (out / f"{stem}.forward.cpp").write_text(attend.source)
    (out / f"{stem}.backward.cpp").write_text(attend.backward_source or "")

    note("checking against the fp64 reference")
    check(entry, dtype, result)

    note("timing")
    q, k, v = (x.detach() for x in leaves)
    forward: dict[str, Callable[[], object]] = {"attnengine": lambda: attend(q, k, v)}
    both: dict[str, Callable[[], object]] = {}
    rival = sdpa(entry, spec, length)
    forward["SDPA"] = lambda: rival(q, k, v)
    if entry.flex:
        note("compiling FlexAttention")
        compiled = flex(spec, length)
        forward["FlexAttention"] = lambda: compiled(q, k, v)

    def gradients(attention: Callable[..., Tensor], wanted: list[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attention(*leaves), wanted, grad)

    both["attnengine"] = gradients(attend, leaves + learned)
    both["SDPA"] = gradients(rival, leaves)
    note("timing")
    with torch.no_grad():
        result.forward_ms = median_ms(forward, rounds)
    result.both_ms = median_ms(both, max(3, rounds // 2))
    return result


def show(results: list[Result], console: Console) -> None:
    """The table of part 1."""
    view = Table(title=f"Times in ms ({results[0].shape}, {torch.get_num_threads()} threads)")
    for heading in (
        "variant",
        "compile",
        "checks",
        "forward",
        "SDPA",
        "FlexAttention",
        "fwd+bwd",
        "SDPA fwd+bwd",
    ):
        view.add_column(heading, justify="left" if heading == "variant" else "right")
    for entry, result in zip(ENTRIES, results, strict=True):
        mark = "" if entry.sdpa == "mask" else "*"

        def against(times: dict[str, float], peer: str, mark: str) -> str:
            if peer not in times:
                return "cannot"
            ratio = times[peer] / times["attnengine"]
            return f"{times[peer]:.1f}{mark} ({ratio:.1f}x)"

        view.add_row(
            result.name,
            f"{result.compile_s:.1f} s",
            "[red]FAILED[/]" if result.failures else f"[green]{len(result.checked)} passed[/]",
            f"{result.forward_ms['attnengine']:.1f}",
            against(result.forward_ms, "SDPA", mark),
            against(result.forward_ms, "FlexAttention", ""),
            f"{result.both_ms['attnengine']:.1f}",
            against(result.both_ms, "SDPA", mark),
        )
    console.print(view)
    console.print(
        "* SDPA cannot express this variant; the time is its plain causal attention. "
        "FlexAttention on the CPU has no backward.",
        style="dim",
    )


def run(out: Path, quick: bool, console: Console) -> list[Result]:
    """All variants, with a progress display; prints the table."""
    dtype = torch.bfloat16 if host.cpu_isa() == "avx512_bf16" else torch.float32
    length, rounds = (512, 5) if quick else (2048, 9)
    results = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(ENTRIES))
        for entry in ENTRIES:

            def note(text: str, entry: Entry = entry) -> None:
                progress.update(task, description=f"{entry.name}: {text}")

            results.append(run_entry(entry, out, dtype, length, rounds, note))
            progress.advance(task)
        progress.update(task, description="variants done")
    show(results, console)
    return results
