"""What a mod may not say: clear refusals, at the line of the user's function."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from operator_cases import FLAT, TABLE, ZERO_D

import attnengine as ae


def tracing(mod: Callable, kind: str = "score_mod") -> None:
    from attnengine import trace
    from attnengine.capture import captures_of_spec

    spec = ae.AttentionSpec(**{kind: mod})
    trace.trace(spec, captures_of_spec(spec).tensors, "f32")


def line_of(f: Callable, offset: int = 1) -> str:
    return f"{__file__}:{f.__code__.co_firstlineno + offset}"


def refused(mod: Callable, *parts: str, kind: str = "score_mod", offset: int = 1) -> None:
    with pytest.raises(ae.TraceError) as error:
        tracing(mod, kind)
    text = str(error.value)
    assert kind in text
    for part in (*parts, line_of(mod, offset)):
        assert part in text, text


def test_unsupported_operator_is_named_with_its_line() -> None:
    def mod(score, b, h, q, k):
        shifted = score + 1
        return torch.special.bessel_j0(shifted)

    refused(mod, "aten.special_bessel_j0", "not supported", "pointwise", offset=2)


def test_matrix_product_says_what_to_use() -> None:
    def mod(score, b, h, q, k):
        return score + (TABLE[0] @ TABLE[0].mT)[q, k]

    refused(mod, "aten.mm", "capture the result")


def test_sorted_row_says_what_to_use() -> None:
    def mod(score, b, h, q, k):
        return score + TABLE[q, 0].sort()[0][k % 5]

    refused(mod, "aten.sort", "capture the result")


def test_long_reduction() -> None:
    long = torch.randn(4, 1000)

    def mod(score, b, h, q, k):
        return score + long[h].sum()

    refused(mod, "1000 captured elements", "reduce before the call")


@pytest.mark.parametrize("random", ["rand_like", "bernoulli", "dropout"])
def test_random_numbers(random: str) -> None:
    functions = {
        "rand_like": torch.rand_like,
        "bernoulli": lambda x: torch.bernoulli(torch.sigmoid(x)),
        "dropout": lambda x: F.dropout(x, 0.5),
    }
    draw = functions[random]

    def mod(score, b, h, q, k):
        return score + draw(score)

    with pytest.raises(ae.TraceError, match="random numbers are not replayed.*capture them"):
        tracing(mod)


def test_branch_on_a_traced_value() -> None:
    def mod(score, b, h, q, k):
        if q > k:
            return score
        return -score

    refused(mod, "data-dependent", "torch.where")


@pytest.mark.parametrize("read", [lambda x: x.item(), int, float, bool, lambda x: x.tolist()])
def test_reading_a_traced_value(read: Callable) -> None:
    def mod(score, b, h, q, k):
        return score * read(q)

    with pytest.raises(ae.TraceError, match="data-dependent.*torch.where"):
        tracing(mod)


def test_reading_a_captured_number_says_what_it_costs() -> None:
    """A captured tensor is an input of the kernel: its value is not there while tracing."""

    def mod(score, b, h, q, k):
        return score * ZERO_D.item()

    with pytest.raises(ae.TraceError, match="data-dependent"):
        tracing(mod)


def test_slice_bounded_by_a_tensor() -> None:
    n = torch.tensor(3)

    def mod(score, b, h, q, k):
        return score + FLAT[:n].sum()

    refused(mod, "slice bounded by a tensor", "Python ints")


def test_statically_out_of_range() -> None:
    def mod(score, b, h, q, k):
        return score + TABLE[3, q, k]

    refused(mod, "out of", "3")


def test_out_of_range_constant_in_tensor_form() -> None:
    def mod(score, b, h, q, k):
        return score + FLAT[torch.tensor(4)]

    refused(mod, "index 4", "out of", "size 4")


@pytest.mark.parametrize("what", ["score", "index", "capture", "view", "viewed", "setitem", "out"])
def test_changing_an_input(what: str) -> None:
    """Refused before it happens: tracing must not change the user's tensors either."""
    table = torch.zeros(8)

    def add(score, b, h, q, k):
        if what == "score":
            return score.add_(1)
        if what == "index":
            return score + q.mul_(2)
        if what == "capture":
            table.add_(1)
        if what == "view":
            score.view(1).add_(1)
        if what == "viewed":
            table.view(2, 4)[0].add_(1)
        if what == "setitem":
            table[q] = score
        if what == "out":
            torch.add(score, 1, out=table[0])
        return score

    with pytest.raises(ae.TraceError, match="out-of-place|read-only"):
        tracing(add)
    assert not table.any()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (lambda s, q: q > 1, "dtype bool"),
        (lambda s, q: q, "dtype i64"),
        (lambda s, q: TABLE[q], r"shape \(4, 5\)"),
        (lambda s, q: s.unsqueeze(0).expand(3), r"shape \(3,\)"),
        (lambda s, q: None, "NoneType"),
        (lambda s, q: 1.0, "float"),
        (lambda s, q: (s, s), "tuple"),
    ],
)
def test_wrong_result_of_score_mod(value: Callable, text: str) -> None:
    def mod(score, b, h, q, k):
        return value(score, q)

    with pytest.raises(ae.TraceError, match=f"score_mod.*{text}.*expected"):
        tracing(mod)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (lambda q, k: q - k, "dtype i64.*expected bool"),
        (lambda q, k: TABLE[q] > 0, "shape"),
        (lambda q, k: True, "bool"),
    ],
)
def test_wrong_result_of_mask_mod(value: Callable, text: str) -> None:
    def mod(b, h, q, k):
        return value(q, k)

    with pytest.raises(ae.TraceError, match=f"mask_mod.*{text}"):
        tracing(mod, "mask_mod")


def test_wrong_result_of_operand_mod() -> None:
    with pytest.raises(ae.TraceError, match="k_mod.*dtype bool.*floating"):
        tracing(lambda x: x > 0, "k_mod")


def test_capture_on_another_device() -> None:
    elsewhere = torch.zeros(8, device="meta")

    def mod(score, b, h, q, k):
        return score + elsewhere[h]

    with pytest.raises(ae.TraceError, match="captured tensor on device meta.*cpu"):
        tracing(mod)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint16])
def test_capture_of_unsupported_dtype(dtype: torch.dtype) -> None:
    table = torch.zeros(8, dtype=dtype)

    def mod(score, b, h, q, k):
        return score + table[h].float()

    with pytest.raises(ae.TraceError, match=f"dtype {dtype}"):
        tracing(mod)


def test_error_inside_the_mod_keeps_its_line() -> None:
    def mod(score, b, h, q, k):
        scaled = score * 2
        return scaled + undefined_name  # noqa: F821

    refused(mod, "NameError", "undefined_name", offset=2)


def test_messages_read_as_sentences() -> None:
    def mod(score, b, h, q, k):
        return score + TABLE.sum() * FLAT[torch.tensor(9)]

    with pytest.raises(ae.TraceError) as error:
        tracing(mod)
    assert "is not supported is not supported" not in str(error.value)
    assert "out of range for dimension 0 of size 4 is not supported" not in str(error.value)


def test_branches_and_loops_over_constants() -> None:
    windows = (4, 0, 8)

    def mod(score, b, h, q, k):
        for i, w in enumerate(windows):
            if w:
                score = torch.where((h == i) & (q - k > w), -math.inf, score)
        return score

    tracing(mod)


def test_same_graph_whether_written_by_loop_or_by_hand() -> None:
    from attnengine import ir, trace
    from attnengine.capture import captures_of_spec

    def text(mod: Callable) -> str:
        spec = ae.AttentionSpec(score_mod=mod)
        traced = trace.trace(spec, captures_of_spec(spec).tensors, "f32")
        assert traced.score is not None
        return ir.text({"score": traced.score})

    def loop(score, b, h, q, k):
        for c in (2, 3):
            score = score + c * q
        return score

    assert text(loop) == text(lambda s, b, h, q, k: s + 2 * q + 3 * q)
    assert text(lambda s, b, h, q, k: s + (q - k)) == text(lambda s, b, h, q, k: s + q.sub(k))
