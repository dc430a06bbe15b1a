"""How long a run may still take."""

from __future__ import annotations

import time
from collections.abc import Callable


class Deadline:
    """Counts down `seconds` from now. `clock`: seconds that only grow."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.began = clock()
        self.seconds = seconds

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.began

    @property
    def left(self) -> float:
        """Seconds until the end; negative after it."""
        return self.seconds - self.spent

    def allows(self, seconds: float) -> bool:
        """Whether something that takes that long still ends in time."""
        return self.left >= seconds

    def part(self, share: float) -> Deadline:
        """A deadline after `share` of the whole time, never later than this one's."""
        return Deadline(min(self.seconds * share, max(0.0, self.left)), self.clock)
