"""docs/status.md says of every CUDA kernel what the recorded run found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests import cuda_cases, cuda_linear_cases, simulated

MATRICES = dict(zip(simulated.RECORDS, (cuda_cases.FULL, cuda_linear_cases.FULL), strict=True))


@pytest.mark.parametrize("name, cases", MATRICES.items(), ids=MATRICES)
def test_the_record_has_every_kernel_of_the_full_matrix(name: str, cases: Sequence[Any]) -> None:
    outcomes = simulated.recorded(name)
    assert [o.id for o in outcomes] == [case.id for case in cases]
    assert all(o.error == "" and o.spill_bytes == 0 and o.shapes >= 8 for o in outcomes)


@pytest.mark.parametrize("name", simulated.RECORDS)
def test_the_table_is_that_of_the_record(name: str) -> None:
    _, lines, _ = simulated.marked(name, simulated.STATUS.read_text())
    assert lines.endswith("\n".join([*simulated.table(simulated.recorded(name)), ""]))
