"""docs/status.md says of every CUDA kernel what the recorded run found."""

from __future__ import annotations

from tests import simulated
from tests.cuda_cases import FULL


def test_the_record_has_every_kernel_of_the_full_matrix() -> None:
    outcomes = simulated.recorded()
    assert [o.id for o in outcomes] == [case.id for case in FULL]
    assert all(o.error == "" and o.spill_bytes == 0 and o.shapes >= 8 for o in outcomes)


def test_the_table_is_that_of_the_record() -> None:
    assert "\n".join(simulated.table(simulated.recorded())) in simulated.STATUS.read_text()
