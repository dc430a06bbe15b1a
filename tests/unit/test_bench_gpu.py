"""The GPU benchmark without a GPU: its lists, counts, peers, checks and tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    gpu_agreement,
    gpu_cache_peers,
    gpu_cases,
    gpu_peers,
    gpu_report,
    gpu_suite,
    gpu_timing,
)
from bench import gpu_worker as worker
from bench.gpu_caches import LEAST_BYTES, CacheCase
from bench.gpu_cases import FAMILIES, TimedCase, by_name, timed_cases
from bench.gpu_report import Results

ROOT = Path(__file__).resolve().parents[2]


def small(variant: str, **sizes: int) -> TimedCase:
    """A case that a CPU does in no time, by a kernel that other tests need too."""
    given = {"B": 2, "Hq": 4, "Hkv": 2, "L": 40, "S": 40, "D": 40, "Dv": 24, **sizes}
    return TimedCase("small", variant, "none", **given, dtype=torch.bfloat16, rank=0)


# -- cases -----------------------------------------------------------------------------------------


def test_names_are_unique_and_important_shapes_come_first() -> None:
    cases = timed_cases()
    assert len({c.name for c in cases}) == len(cases) == sum(len(f) for f in FAMILIES)
    assert [c.family for c in cases[: len(FAMILIES)]] == [f[0].family for f in FAMILIES]
    assert {c.family for c in timed_cases(("llama/B8", "relu"))} == {"llama", "relu"}
    assert timed_cases(("none",)) == []


@pytest.mark.parametrize(
    "name, flops, moved",
    [
        # 2*B*H*S*S*(D+Dv)/2: 2 * 32 * 4096^2 * 256 / 2; q, k, v, out of 4096 x 32 x 128 fp16
        ("llama/B1/S4096", 137438953472.0, 4 * 4096 * 32 * 128 * 2),
        # D 192, Dv 128: 2 * 8 * 16 * 2048^2 * 320 / 2
        ("deepseek/B8/S2048", 171798691840.0, 2 * 8 * 16 * 2048 * (192 + 128) * 2),
        # ReLU has no mask, and nothing is halved: 2 * 64 * 6 * 1024^2 * 128
        ("relu/B64/S1024", 103079215104.0, 4 * 64 * 6 * 1024 * 64 * 2),
        # decode: 2 * 8 * 16 * 8192 * 320; the cache and one row of q and out
        ("decode/B8/S8192", 671088640.0, 8 * 16 * (8192 + 1) * 320 * 2),
        # 20 % of 256 blocks of 32 keys is 51.2: 52 blocks, 1664 keys of each cache
        ("sparse-decode/B8/S8192", 2.0 * 8 * 32 * 1664 * 256, 8 * (8 * 1664 + 32) * 256 * 2),
        # a window of 256: the first 255 rows meet fewer keys
        ("window/B4/S2048", 2.0 * 4 * 32 * (256 * 257 / 2 + 1792 * 256) * 256, None),
        ("mla-decode/B8/S4096", 2.0 * 8 * 128 * 4096 * 1088, 2 * 8 * (4096 + 128) * 1088),
    ],
)
def test_work_is_counted_as_by_hand(name: str, flops: float, moved: int | None) -> None:
    case = by_name(name)
    assert case.flops == flops
    assert moved is None or case.bytes == moved


def test_one_kernel_serves_all_sizes_of_a_family() -> None:
    kernels = list(gpu_cases.one_per_kernel(timed_cases()))
    # gqa is bf16, gqa-decode fp16 without a mask: kernels of their own. A cache's serves pages too.
    shared = {"cache-ragged", "cache-paged", "cache-ragged-paged"}
    own = [f[0].family for f in FAMILIES if f[0].family not in shared]
    assert [c.family for c in kernels] == own


def test_sparse_cache_keeps_what_is_counted() -> None:
    case = by_name("sparse-decode/B8/S2048")
    live = gpu_cases.dense_mask(case, "cpu")
    assert live.shape == (8, 32, 1, 2048)
    assert set(live.sum(-1).flatten().tolist()) == {case.kept_keys}
    assert torch.equal(live[:, 0], live[:, 3]) and not torch.equal(live[:, 0], live[:, 4])


def test_operands_are_grouped_and_the_same_every_time() -> None:
    case = small("causal")
    q, k, v = case.operands("cpu")
    assert (q.shape, k.shape, v.shape) == ((2, 4, 40, 40), (2, 2, 40, 40), (2, 2, 40, 24))
    assert torch.equal(q, case.operands("cpu")[0])


# -- agreement -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", ["full", "causal", "window", "relu", "sigmoid", "retention", "sparse"]
)
def test_expected_rows_are_what_attnengine_means(variant: str) -> None:
    import attnengine as ae

    case = small(variant, L=1, S=96) if variant == "sparse" else small(variant, Dv=32)
    operands = case.operands("cpu")
    golden = ae.reference(*operands, gpu_peers.spec(case, "cpu"), dtype=torch.float64)
    rows = slice(0, case.L)
    mine = gpu_agreement.expected_rows(case, *operands, 1, 3, rows)
    assert gpu_agreement.difference(mine, golden[1, 3]) < 1e-6  # fp32 captures, of the bias


def test_wrong_outputs_are_named_and_not_timed() -> None:
    case = small("causal", L=600, S=600)
    operands = case.operands("cpu")
    heads = [
        [gpu_agreement.expected_rows(case, *operands, b, h, slice(0, case.L)) for h in range(4)]
        for b in range(2)
    ]
    right = torch.stack([torch.stack(row) for row in heads]).to(case.dtype)
    assert gpu_agreement.distance(case, operands, right) < 4e-3  # rounded to bf16
    wrong = right.clone()
    wrong[1, 3, 599] = 0
    with pytest.raises(AssertionError, match=r"rows 472:600 of batch 1, head 3"):
        gpu_agreement.distance(case, operands, wrong)
    elsewhere = right.clone()
    elsewhere[0, 1] *= 1.1  # a head that the bands do not see
    gpu_agreement.distance(case, operands, elsewhere)
    with pytest.raises(AssertionError, match="another contestant"):
        gpu_agreement.distance(case, operands, elsewhere, right)
    with pytest.raises(AssertionError, match="differ by inf"):
        gpu_agreement.distance(case, operands, right * float("nan"))
    with pytest.raises(AssertionError, match="expected"):
        gpu_agreement.distance(case, operands, right[..., :8])


# -- peers -----------------------------------------------------------------------------------------


def test_installed_peers_are_found_without_importing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "flashinfer" not in gpu_peers.installed()
    (tmp_path / "flashinfer").mkdir()
    (tmp_path / "flashinfer" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    info = tmp_path / "flashinfer_python-9.8.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flashinfer-python\nVersion: 9.8\n")
    (info / "top_level.txt").write_text("flashinfer\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert gpu_peers.installed()["flashinfer"] == "9.8"
    assert "flashinfer" in gpu_peers.contestants(by_name("llama/B1/S4096"), False)
    assert "flashinfer" not in gpu_peers.contestants(by_name("window/B4/S2048"), False)


def test_who_can_mean_a_case() -> None:
    llama, relu = by_name("llama/B1/S4096"), by_name("relu/B64/S1024")
    assert gpu_peers.contestants(llama, False)[:3] == list(gpu_peers.BACKENDS)
    assert gpu_peers.contestants(llama, True) == ["flex"]
    assert gpu_peers.contestants(relu, False) == []
    assert gpu_peers.contestants(relu, True) == ["dense"]


def test_padding_serves_who_needs_one_head_dim() -> None:
    case = small("causal", Hkv=4)
    operands = case.operands("cpu")

    def run_with(q: Any, k: Any, v: Any) -> Any:
        def run() -> torch.Tensor:
            if q.shape != v.shape:
                raise RuntimeError("one head dim, please")
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=case.scale
            )
            return out[..., : case.Dv]

        return run

    run = gpu_peers.first_that_runs(run_with, case, operands)
    assert gpu_agreement.distance(case, operands, run()) < 2e-3
    with pytest.raises(RuntimeError, match="never"):
        gpu_peers.first_that_runs(lambda *_: refuse, case, operands)


def refuse() -> None:
    raise RuntimeError("never")


# -- report ----------------------------------------------------------------------------------------


def test_page_says_what_is_missing_and_why(tmp_path: Path) -> None:
    results = Results("command", "today", ceilings={"matmul fp16": 8e14, "exp2": "no jiterator"})
    results.timed["llama/B1/S4096"] = {
        "peers": {"ok": True, "rows": {
            "sdpa-flash": {"status": "ok", "ms": 1.0, "spread": 0.01},
            "sdpa-cudnn": {"status": "RuntimeError: no kernel"},
            "attnengine": {"status": "NotImplementedError: not in this version"},
        }},
        "compiled": {"ok": True, "rows": {"flex": {"status": "ok", "ms": 3.0, "spread": 0.1}}},
    }  # fmt: skip
    results.suite = {
        "a": {"ok": True, "failures": [], "calls": 20, "used": 0.5, "build_s": 14.0},
        "b": {"ok": True, "failures": ["wrap: (a) L2 error"], "calls": 20, "used": 9.0,
              "build_s": 11.0},
        "c": {"ok": False, "error": "BuildError: no nvcc\nat all"},
    }  # fmt: skip
    page = gpu_report.markdown(results)
    line = next(x for x in page.splitlines() if x.startswith("| llama"))
    assert "| cannot run this yet |  |  | sdpa-flash 1 ms |  | flex 3 |" in line
    assert "- sdpa-cudnn: RuntimeError: no kernel (llama/B1/S4096)" in page
    assert "3 kernels: 1 FAILED, 1 not built, 1 passed." in page
    assert "- FAILED: wrap: (a) L2 error (b)" in page
    assert "- not built: BuildError: no nvcc (c)" in page
    assert "- matmul fp16: 800 TFLOP/s" in page and "- exp2: no jiterator" in page
    assert results.wrong == ["b"]


def test_decode_is_rated_in_bytes() -> None:
    case = by_name("decode/B8/S8192")
    rate, share = gpu_report.rates(case, case.bytes / 2e12, {"read": 4e12})
    assert (rate, share) == ("2 TB/s", "50%")


# -- what workers do, on the CPU -------------------------------------------------------------------


def test_a_case_is_checked_and_timed() -> None:
    found = gpu_timing.measure_case(small("causal", Hkv=4), False, 0.01, (), "cpu")
    rows = found["rows"]
    assert rows["sdpa-flash"]["status"] == "ok" and rows["sdpa-flash"]["ms"] > 0
    assert rows["sdpa-cudnn"]["status"].startswith("RuntimeError")
    assert rows["attnengine"]["status"] == "ok" and rows["attnengine"]["distance"] < 2e-3
    skipped = gpu_timing.measure_case(small("relu"), False, 0.01, ("attnengine",), "cpu")
    assert skipped["rows"] == {}


def test_a_kernel_goes_through_the_gate() -> None:
    found = gpu_suite.check("sigmoid-window-plain-d8-fp16", seeds=(0,), device="cpu")
    assert found["failures"] == [] and found["calls"] >= 9 and 0 < found["used"] <= 1


def test_an_error_is_an_answer() -> None:
    found = worker.answer({"do": "suite", "name": "no-such-kernel"})
    assert not found["ok"] and not found["fatal"] and "KeyError" in found["error"]


# -- KV caches -------------------------------------------------------------------------------------

CACHE_KINDS = {"dense": {}, "ragged": {"lengths": (40, 7, 33)}, "paged": {"page": 16},
               "latent": {"latent": True, "page": 16, "Hkv": 1}}  # fmt: skip


def small_cache(kind: str) -> CacheCase:
    given = {"lengths": (40, 40, 40), "Hq": 4, "Hkv": 2, "D": 40, "Dv": 24, **CACHE_KINDS[kind]}
    return CacheCase("small-cache", "none", **given)


def test_caches_are_larger_than_any_other_memory() -> None:
    for case in (c for c in timed_cases() if isinstance(c, CacheCase)):
        assert case.cache_bytes >= LEAST_BYTES, case.name
    assert by_name("cache/B8/S32768").cache_bytes == 8 * 32768 * 8 * 256 * 2
    mla = by_name("cache-mla/B64/S16384")
    assert mla.cache_bytes == 64 * 16384 * 576 * 2
    assert mla.flops == 2 * 64 * 128 * 16384 * (576 + 512)


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_cache_contestants_agree(kind: str) -> None:
    """Ours and whoever runs on a CPU, against the fp64 reference; what lies beyond a sequence's
    keys would show."""
    case = small_cache(kind)
    operands = case.operands("cpu")
    with torch.no_grad():
        out = gpu_peers.make("attnengine", case, operands)()
    limit = gpu_agreement.AGREEMENT[case.dtype]
    assert gpu_agreement.distance(case, operands, out) < limit
    with pytest.raises(AssertionError, match="rows 0:1 of batch 0, head 0 differ"):
        gpu_agreement.distance(case, operands, out * 1.1)
    if kind == "dense":  # what a CPU's back end takes
        square = dataclasses.replace(case, Dv=case.D)
        operands = square.operands("cpu")
        out = gpu_peers.make("sdpa-flash", square, operands)()
        assert gpu_agreement.distance(square, operands, out) < limit
    assert gpu_report.rates(case, 1e-3, {"copy": case.bytes * 2000, "read": 1.0})[1] == "50%"


def test_cache_is_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu_timing.measure_case(small_cache("paged"), False, 0.02, (), "cpu")
    assert list(found["rows"]) == [*gpu_peers.installed(), "attnengine"] and found["flushed"]
    assert found["rows"]["attnengine"]["ms"] > 0


def test_cache_as_flashinfer_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_cache("paged")
    x = case.operands("cpu")
    assert x.table is not None
    _, _, starts, indices, last = gpu_cache_peers.paged(case, x)
    assert starts.tolist() == [0, 3, 6, 9] and last.tolist() == [8, 8, 8]
    assert indices.tolist() == x.table.flatten().tolist()
    ragged = small_cache("ragged")
    _, _, starts, indices, last = gpu_cache_peers.paged(ragged, ragged.operands("cpu"))
    assert (starts.tolist(), indices.tolist(), last.tolist()) == (
        [0, 1, 2, 3],
        [0, 1, 2],
        [40, 7, 33],
    )
    monkeypatch.setattr(gpu_peers, "installed", lambda: {"flashinfer": "1", "flash-attn-2": "2"})
    assert gpu_peers.contestants(case, False) == ["flashinfer", "flash-attn-2"]
    assert gpu_peers.contestants(small_cache("latent"), False) == ["flashinfer"]
    assert gpu_peers.contestants(ragged, True) == ["flex"]
    assert gpu_peers.contestants(case, True) == []
