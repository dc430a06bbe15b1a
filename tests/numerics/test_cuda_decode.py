"""CUDA kernels of sequences through the numerics gate, in the simulator: caches, pages, packed
rows; every policy of the segment schedule, with outputs cut at all kinds of places."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnengine as ae
from attnengine import api, build, dispatch, gate, library, ops, ops_sequences, program
from attnengine.key import Form
from attnengine.target import isa_of
from tests import ptxsim
from tests.cuda_cases import UserSoftmax
from tests.numerics.problems import generator

pytestmark = [pytest.mark.usefixtures("simulator"), pytest.mark.compiles]
INF, NAN = float("inf"), float("nan")
BF16, F16 = torch.bfloat16, torch.float16
HQ, HKV = 4, 2
# Policy, splits, workers: a worker per output; parts of which some are empty; a line cut where
# outputs do not end, and by more workers than there are tiles.
POLICIES = {"tiles": (0, 1, 1), "split": (1, 3, 1), "streamk": (2, 1, 5), "crowd": (2, 1, 999)}
UNCOVERED = 2  # rows of q that belong to no sequence, where they are packed


@pytest.fixture(scope="module", autouse=True)
def simulator() -> Iterator[None]:
    ptxsim.install()
    yield
    library.host.set_schedule_policy(-1)


@dataclass
class Orders:
    """Orders of execution: of every test, layout and policy others, the same in every run."""

    case: str = ""
    count: int = 1  # --orders: of each call

    def seed(self, what: str) -> None:
        ptxsim.seed(zlib.crc32(f"{self.case} {what}".encode()))


orders = Orders()


@pytest.fixture(autouse=True)
def case(request: pytest.FixtureRequest) -> None:
    orders.case, orders.count = request.node.name, request.config.getoption("--orders")
    orders.seed("")


class MergedSoftmax(UserSoftmax):
    """A user's softmax that says how its parts merge."""

    def merge(self, a: Any, b: Any) -> tuple[Any, Any, Any]:
        m = torch.maximum(a["m"], b["m"])
        fa, fb = torch.exp(a["m"] - m), torch.exp(b["m"] - m)
        squares = a["squares"] * fa * fa + b["squares"] * fb * fb
        return {"m": m, "r": a["r"] * fa + b["r"] * fb, "squares": squares}, fa, fb


# -- what a batch of sequences means, and where it lies --------------------------------------------


def shifted(spec: ae.AttentionSpec, b: int, offset: int) -> ae.AttentionSpec:
    """The spec as sequence ``b`` sees it alone, its row 0 with index ``offset``."""

    def mod(f: Callable) -> Callable:
        return lambda *x: f(*x[:-4], x[-4] * 0 + b, x[-3], x[-2] + offset, x[-1])

    return replace(
        spec,
        score_mod=mod(spec.score_mod) if spec.score_mod else None,
        mask_mod=mod(spec.mask_mod) if spec.mask_mod else None,
    )


class Batch:
    """Sequences of ``keys`` keys with ``rows`` query rows each, and what a spec makes of them."""

    def __init__(
        self,
        spec: ae.AttentionSpec,
        keys: Sequence[int],
        rows: int | Sequence[int] = 1,
        dtype: torch.dtype = BF16,
        d: int = 64,
        dv: int = 64,
        align_end: bool = True,
        values: Callable[[Tensor], Tensor] = lambda v: v,
        heads: tuple[int, int] = (HQ, HKV),
        latent: bool = False,
    ) -> None:
        g = generator(sum(keys))
        hq, hkv = heads
        each = [rows] * len(keys) if isinstance(rows, int) else list(rows)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(dtype)

        self.spec, self.align_end, self.heads = spec, align_end, heads
        self.q = [normal(1, hq, n, d) for n in each]
        self.k = [normal(1, hkv, n, d) for n in keys]
        if latent:  # values are the first columns of the keys
            self.k = [values(k) for k in self.k]
            self.v = [k[..., :dv] for k in self.k]
        else:
            self.v = [values(normal(1, hkv, n, dv)) for n in keys]
        self.want = [
            gate.Expectation(shifted(spec, b, k.shape[2] - q.shape[2] if align_end else 0),
                             q, k, v, grads=False)
            for b, (q, k, v) in enumerate(zip(self.q, self.k, self.v, strict=True))
        ]  # fmt: skip

    @property
    def form(self) -> Form:
        most = max(q.shape[2] for q in self.q)
        return Form.of_sequences(most * self.heads[0] // self.heads[1])

    def check(self, call: Call, form: Form | None = None) -> list[Tensor]:
        """One call, each sequence through the gate; returns the outputs of the sequences."""
        program, out, stats = run(self.spec, call, form or self.form, self.align_end)
        outs = []
        for b, want in enumerate(self.want):
            n = self.q[b].shape[2]
            row, first = (0, call.starts[b]) if call.starts is not None else (b, 0)
            own = out[row : row + 1, :, first : first + n]
            saved = {
                name: stats[i, row : row + 1, :, first : first + n]
                for i, name in enumerate(program.sources.stats)
            }
            want.judge(own, saved, want.inputs)
            outs.append(own)
        if call.starts is not None:
            assert (out[:, :, call.starts[-1] :] == 0).all()
        return outs


@dataclass
class Call:
    """Operands and tables of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    tables: dict[str, Tensor]
    key_more: int = 0
    starts: list[int] | None = None  # of packed rows
    max_rows: int = 0

    def to(self, device: str) -> Call:
        tables = {name: table.to(device) for name, table in self.tables.items()}
        q, k, v = (x.to(device) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, tables=tables)


def _int32(x: Any) -> Tensor:
    return torch.as_tensor(x, dtype=torch.int32)


def _filled(xs: Sequence[Tensor], rows: int, capacity: int, at: Callable) -> Tensor:
    """Keys of sequence b, position j in row and position at(b, j); NaN elsewhere."""
    out = torch.full((rows, xs[0].shape[1], capacity, xs[0].shape[3]), NAN, dtype=xs[0].dtype)
    for b, x in enumerate(xs):
        for j in range(x.shape[2]):
            row, position = at(b, j)
            out[row, :, position] = x[0, :, j]
    return out


def cache(x: Batch, more: int = 0) -> Call:
    """A dense cache in shuffled rows with padding on the left; ``more`` keys were appended."""
    count, longest = len(x.k), max(k.shape[2] for k in x.k)
    row = [(b + 1) % (count + 1) for b in range(count)]
    pad = [3 * b % 7 for b in range(count)]
    ends = [k.shape[2] + p - more for k, p in zip(x.k, pad, strict=True)]
    k, v = (
        _filled(xs, count + 1, longest + 9, lambda b, j: (row[b], pad[b] + j)) for xs in (x.k, x.v)
    )
    tables = {"key_start": _int32(pad), "key_end": _int32(ends), "kv_row": _int32(row)}
    return Call(torch.cat(x.q), k, v, tables, more)


def pages(x: Batch, size: int) -> Call:
    """Pages in random order; those that no sequence has hold NaN."""
    need = [-(-k.shape[2] // size) for k in x.k]
    order = torch.randperm(sum(need) + 2, generator=generator(size)).tolist()
    table = torch.full((len(x.k), max(need) + 1), -1, dtype=torch.int32)
    for b, n in enumerate(need):
        for i in range(n):
            table[b, i] = order.pop()
    total = sum(need) + 2
    k, v = (
        _filled(xs, total, size, lambda b, j: (int(table[b, j // size]), j % size))
        for xs in (x.k, x.v)
    )
    ends = _int32([k.shape[2] for k in x.k])
    return Call(torch.cat(x.q), k, v, {"key_end": ends, "pages": table})


def packed(x: Batch) -> Call:
    """Rows and keys of all sequences one after the other."""
    hq, d = x.q[0].shape[1], x.q[0].shape[3]
    spare = torch.full((1, hq, UNCOVERED, d), NAN, dtype=x.q[0].dtype)
    starts = [torch.tensor([t.shape[2] for t in xs]).cumsum(0) for xs in (x.q, x.k)]
    q_at, k_at = (_int32([0, *s.tolist()]) for s in starts)
    tables = {
        "q_start": q_at[:-1], "q_end": q_at[1:], "key_start": k_at[:-1], "key_end": k_at[1:],
    }  # fmt: skip
    most = max(q.shape[2] for q in x.q)
    return Call(
        torch.cat([*x.q, spare], 2), torch.cat(x.k, 2), torch.cat(x.v, 2), tables,
        starts=q_at.tolist(), max_rows=most,
    )  # fmt: skip


LAYOUTS: dict[str, Callable[[Batch], Call]] = {
    "cache": cache,
    "appended": lambda x: cache(x, 1),
    "pages16": lambda x: pages(x, 16),
    "pages64": lambda x: pages(x, 64),
    "packed": packed,
}


def run(
    spec: ae.AttentionSpec, call: Call, form: Form, align_end: bool
) -> tuple[Any, Tensor, Tensor]:
    captures = dispatch.captures_for(spec)
    d, dv = call.q.shape[3], call.v.shape[3]
    isa = "sm_80" if call.q.device.type == "cpu" else isa_of(call.q)
    program = dispatch.program(spec, captures, call.q.dtype, d, dv, isa, form)
    tensors = dispatch.bound_tensors(program, captures)
    names = ("q_start", "q_end", "key_start", "key_end", "kv_row", "pages")
    tables = [call.tables.get(n) for n in names]
    out, stats = torch.ops.attnengine.forward_sequences(
        call.q, call.k, call.v, tensors, program.forward(), d**-0.5, True, *tables,
        call.max_rows or call.q.shape[2], 1 << 20, call.key_more, align_end,
    )  # fmt: skip
    return program, out.cpu(), stats.cpu()


def every(
    x: Batch,
    layouts: Sequence[str],
    policies: Sequence[str] = tuple(POLICIES),
    device: str = "cpu",
) -> None:
    """All layouts with all policies, each in other orders of execution."""
    for layout in layouts:
        call = LAYOUTS[layout](x).to(device)
        for name in policies:
            library.host.set_schedule_policy(*POLICIES[name])
            for number in range(orders.count):
                order = f"{layout} {name} {number}"
                orders.seed(order)
                try:
                    x.check(call)
                except (gate.GateError, RuntimeError) as error:
                    raise AssertionError(f"{order}: {error}") from None


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


# -- kernels ---------------------------------------------------------------------------------------

RAGGED = (130, 0, 1, 333, 64)


def test_softmax_in_every_layout() -> None:
    every(Batch(ae.AttentionSpec(), RAGGED), ["cache", "pages16", "pages64", "packed"])
    every(Batch(ae.AttentionSpec(), (130, 5, 1, 97)), ["appended"], ["tiles", "streamk"])


def test_causal_rows_have_absolute_positions() -> None:
    x = Batch(ae.AttentionSpec(mask_mod=causal), (130, 3, 200, 33), rows=3, dtype=F16)
    every(x, ["cache", "pages16", "packed"])


def test_a_window_counts_the_tiles_that_it_leaves() -> None:
    """Sequences of different lengths whose windows start within tiles and hold several."""
    window = ae.variants.sliding_window(150)
    x = Batch(ae.AttentionSpec(mask_mod=window.mask_mod), (400, 9, 151, 290), rows=2)
    every(x, ["pages64", "packed"])


def test_softcap_alibi_and_the_sequence_number() -> None:
    slopes = ae.variants.alibi_slopes(HQ)
    gain = torch.tensor([1.0, 0.5, 2.0, 0.25])

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return 5 * torch.tanh(score * gain[b] / 5) + slopes[h] * (k - q)

    every(Batch(ae.AttentionSpec(score_mod=score_mod), (140, 0, 31, 222)), ["cache", "pages16"])


def test_a_mask_of_captured_tensors() -> None:
    """Its block tables are read by the schedule too."""
    ids = (torch.arange(700) // 90) % 3
    spec = ae.AttentionSpec(mask_mod=lambda b, h, q, k: ids[k] == ids[q])
    every(Batch(spec, (400, 100, 0, 650)), ["cache"])


def test_a_sink_counts_once() -> None:
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0])
    spec = ae.AttentionSpec(row_func=ae.SoftmaxSink(sink), mask_mod=causal)
    every(Batch(spec, (200, 0, 70), rows=1), ["pages16"])


def test_row_functions_of_users() -> None:
    every(Batch(ae.AttentionSpec(row_func=MergedSoftmax()), RAGGED), ["cache"])
    unsplit = Batch(ae.AttentionSpec(row_func=UserSoftmax()), RAGGED)
    every(unsplit, ["cache"])
    made = run(unsplit.spec, cache(unsplit), unsplit.form, True)[0]
    assert not made.in_form(unsplit.form).sources.forward.count("AE_EXPORT_COMBINE")


def test_a_row_function_without_states() -> None:
    every(Batch(ae.AttentionSpec(row_func=ae.ReLU()), (130, 0, 70)), ["cache"])


@pytest.mark.parametrize("rows", [5, 13])
def test_more_rows_take_larger_tiles(rows: int) -> None:
    """10 and 26 rows of a group of 2 would fit tiles of 16 and 32; groups of 4 take 32 and 64."""
    x = Batch(
        ae.AttentionSpec(mask_mod=causal), (190, 60, 0), rows, d=128, dv=128, heads=(8, 2)
    )  # fmt: skip
    assert x.form.decode_rows == {5: 32, 13: 64}[rows]
    every(x, ["pages16"], ["split", "streamk"])


def test_prefill_of_packed_sequences() -> None:
    """Tiles for many rows: sequences that are shorter than the longest leave theirs at once."""
    x = Batch(ae.AttentionSpec(mask_mod=causal), (150, 20, 0, 90), (150, 7, 3, 40), align_end=False)
    assert x.form.decode_rows == 0
    every(x, ["packed"], ["tiles", "streamk"])


def test_a_chunk_of_a_prompt_against_its_cache() -> None:
    """66 rows of a group and the keys before them: too few outputs for a GPU, so their keys are
    split as those of a decode are."""
    x = Batch(ae.AttentionSpec(mask_mod=causal), (330, 0, 70), 33, dtype=F16)
    assert x.form.decode_rows == 0
    every(x, ["pages16"], ["split", "streamk"])


def test_a_head_dependent_mask() -> None:
    """Rows of a tile are then of one head."""
    spec = ae.AttentionSpec(mask_mod=lambda b, h, q, k: k % (h + 2) == 0)
    every(Batch(spec, (130, 40)), ["cache"], ["streamk"])


# -- what a masked key holds -----------------------------------------------------------------------


def test_inf_and_nan_of_values_in_parts() -> None:
    """They reach the rows that see their key, whichever part it lies in, and no others."""

    def poisoned(v: Tensor) -> Tensor:
        v = v.clone()
        if v.shape[2] > 300:
            v[..., 20, 5], v[..., 100, 3], v[..., 250, 3] = -INF, INF, -INF
            v[..., 301, 0] = NAN
            v[..., 302, :] = NAN  # dead in every row
        return v

    spec = ae.AttentionSpec(mask_mod=lambda b, h, q, k: k != 302)
    every(Batch(spec, (333, 64, 310), values=poisoned), ["pages16"])


def test_equal_bits_in_any_order() -> None:
    """Parts merge in the order of the keys: a row function without approximations gives the same
    bits whatever ran first."""
    x = Batch(ae.AttentionSpec(row_func=ae.ReLU()), (130, 0, 70))
    call, results = cache(x), []
    library.host.set_schedule_policy(*POLICIES["streamk"])
    for seed in range(3):
        ptxsim.seed(seed)
        results.append(torch.cat(x.check(call)))
    assert all(torch.equal(results[0], r) for r in results)


# -- what is read, and what is refused -------------------------------------------------------------


def test_keys_are_read_once_for_a_group() -> None:
    x = Batch(ae.AttentionSpec(), (512, 256), heads=(8, 2))
    library.host.set_schedule_policy(*POLICIES["tiles"])
    x.check(pages(x, 64))
    read = ptxsim.counters()["regions"]
    for name in ("k", "v"):
        assert read[name]["read"] == (512 + 256) * 2 * 64 * 2
    assert ptxsim.counters()["matrix_bank_conflicts"] == 0


def test_the_choice_follows_the_bounds() -> None:
    """Nothing forced: one output of many keys is split, one of few is not worth a merge."""
    library.host.set_schedule_policy(-1)
    for keys, split in ((700, True), (60, False)):
        x = Batch(ae.AttentionSpec(), (keys,))
        x.check(pages(x, 64))
        assert ("workspace" in ptxsim.counters()["regions"]) == split


def test_a_call_on_a_cache_builds_its_kernel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does tracing one; the dense kernel comes with the first dense call."""
    built, real = [], build.device_module
    monkeypatch.setattr(program, "_programs", {})
    monkeypatch.setattr(build, "device_module", lambda *a: built.append(a[2]) or real(*a))
    spec = ae.AttentionSpec()
    x = Batch(spec, (40, 3))
    call = cache(x)
    handle = api._handle(call.q, call.k, call.v, spec, "sm_80", backward=False)
    names = ("q_start", "q_end", "key_start", "key_end", "kv_row", "pages")
    tables = *(call.tables.get(n) for n in names), 1, 1 << 20, 0, True
    operands = call.q, call.k, call.v, []
    kernel = handle.sequences_id(*operands[:3], 1)
    out, _ = ops_sequences.forward_sequences(*operands, kernel, handle.scale, False, *tables)
    key = handle.key
    traced, _ = torch.ops.attnengine.attention_sequences(*operands, key, handle.scale, *tables)
    assert torch.equal(out, traced) and ops._saved_stats(key) == (1, 1) and ops._on_cuda(key)
    assert len(built) == 1 and built[0].endswith("decode16")
    handle(call.q, call.k[: len(x.k)], call.v[: len(x.v)])
    assert len(built) == 2


def test_a_dense_kernel_refuses_sequences() -> None:
    x = Batch(ae.AttentionSpec(), (40, 3))
    with pytest.raises(ValueError, match="takes no sequences"):
        run(x.spec, cache(x), Form(), True)


# -- wide heads: MLA -------------------------------------------------------------------------------

LATENT, VALUES = 576, 512  # DeepSeek-V2's: 512 latent columns and 64 of the rotated key


def latent(x: Batch, size: int) -> Call:
    """Pages whose values are the first columns of the keys: a view, read once."""
    call = pages(x, size)
    return replace(call, v=call.k[..., :VALUES])


@pytest.mark.parametrize("rows", [1, 3])
def test_latent_attention_reads_the_cache_once(rows: int) -> None:
    """8 heads and one latent: a tile of 16 rows, and one of 32 with rows of several queries."""
    spec = ae.AttentionSpec(mask_mod=causal)
    x = Batch(spec, (150, 0, 40), rows, d=LATENT, dv=VALUES, heads=(8, 1), latent=True)
    form = replace(x.form, shared_kv=True)
    call = latent(x, 16)
    for policy in ("tiles", "streamk"):
        library.host.set_schedule_policy(*POLICIES[policy])
        x.check(call, form)
        if policy == "tiles":
            read = ptxsim.counters()["regions"]
            assert read["k"]["read"] + read["v"]["read"] == (150 + 40) * LATENT * 2
    with pytest.raises(ValueError, match="must be a view of k"):
        run(spec, replace(call, v=call.v.contiguous()), form, True)


def test_wide_heads_with_values_of_their_own() -> None:
    x = Batch(ae.AttentionSpec(), (70, 33), d=LATENT, dv=VALUES, heads=(8, 1))
    every(x, ["cache"], ["tiles", "split"])


def test_inf_and_nan_in_a_latent() -> None:
    """K holds them too: scores there are dead by the mask, and V's are cleared in K's tile."""

    def poisoned(v: Tensor) -> Tensor:
        v = v.clone()
        if v.shape[2] > 50:
            v[..., 50, :] = NAN
        return v

    spec = ae.AttentionSpec(mask_mod=lambda b, h, q, k: k != 50)
    x = Batch(
        spec, (90, 20), d=LATENT, dv=VALUES, heads=(8, 1), latent=True, values=poisoned
    )  # fmt: skip
    library.host.set_schedule_policy(*POLICIES["streamk"])
    x.check(latent(x, 16), replace(x.form, shared_kv=True))


# -- how calls find their kernel -------------------------------------------------------------------


def test_a_handle_and_the_traceable_operator_find_the_kernel() -> None:
    x = Batch(ae.AttentionSpec(), (130, 5))
    call = pages(x, 16)
    handle = ae.compile(x.spec, x.q[0], x.k[0], x.v[0], target="sm_80", backward=False)
    kernel = handle.sequences_id(call.q, call.k, call.v, 1)
    assert library.kernel_info(kernel).cuda.block_m == 16
    assert not library.kernel_info(handle.id).cuda.sequences
    names = ("q_start", "q_end", "key_start", "key_end", "kv_row", "pages")
    tables = [call.tables.get(n) for n in names]
    library.host.set_schedule_policy(*POLICIES["streamk"])
    out, _ = torch.ops.attnengine.attention_sequences(
        call.q, call.k, call.v, [], handle.key, 64**-0.5, *tables, 1, 1 << 20, 0, True
    )
    for b, want in enumerate(x.want):
        want.judge(out[b : b + 1], {}, want.inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the tests above simulate one")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_gpu(layout: str) -> None:
    """The same on hardware, where blocks run together and lengths are beyond a simulator's."""
    window = ae.variants.sliding_window(1500).mask_mod
    for spec, rows in (
        (ae.AttentionSpec(), 1),
        (ae.AttentionSpec(mask_mod=causal), 3),
        (ae.AttentionSpec(mask_mod=window, row_func=MergedSoftmax()), 7),
    ):
        x = Batch(spec, (4000, 8, 1, 20000, 333), rows, d=128, dv=128, heads=(8, 2))
        every(x, [layout], [*POLICIES], "cuda")
        library.host.set_schedule_policy(-1)
        x.check(LAYOUTS[layout](x).to("cuda"))
