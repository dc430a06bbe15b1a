"""Every kernel of these tests writes into results and scratch that were filled with NaN."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

from attnengine import library

# Derandomized: a failure is a change of the engine, not of the dice.
hypothesis.settings.register_profile(
    "numerics",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("numerics")


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    library.host.set_poison(True)
    yield
    library.host.set_poison(False)
