"""CUDA kernels of sequences through the numerics gate, in the simulator: caches, pages, packed
rows; every policy of the segment schedule, with outputs cut at all kinds of places."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import attnengine as ae
from attnengine import api, build, gate, library, ops, ops_sequences, program
from attnengine.key import Form
from tests import ptxsim
from tests.cuda_batches import (
    F16,
    HKV,
    HQ,
    INF,
    LAYOUTS,
    NAN,
    POLICIES,
    Batch,
    Call,
    MergedSoftmax,
    cache,
    pages,
    run,
)
from tests.cuda_cases import UserSoftmax

pytestmark = [pytest.mark.usefixtures("simulator"), pytest.mark.compiles]


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
    orders.case, orders.count = request.node.name, request.config.getoption("--orders", 1)
    orders.seed("")


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
    shared = handle.schedule([130, 5], heads=(HQ, HKV), capacity=4096)
    assert shared.choice.policy == "split" and "2 rows of a head" in str(shared)
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
