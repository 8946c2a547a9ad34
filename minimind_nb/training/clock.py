"""How long steps and saves take, and when the session leaves no time for more."""

from __future__ import annotations

import collections
import statistics
import time

_REMEMBERED_STEPS = 200
_FIRST_SAVE_SECONDS = 10.0  # assumed until one was measured
_PERCENTILES = 20


class SessionClock:
    """Knows a deadline on the monotonic clock (None: there is none).

    The margin is the 95th percentile of the step times plus two saves, so that the
    last save fits in even when it is slow.
    """

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        self._steps: collections.deque[float]
        self._steps = collections.deque(maxlen=_REMEMBERED_STEPS)
        self._longest_save = 0.0

    def add_step(self, seconds: float) -> None:
        """Remember how long a step took."""
        self._steps.append(seconds)

    def add_save(self, seconds: float) -> None:
        """Remember how long a save took."""
        self._longest_save = max(self._longest_save, seconds)

    def margin_seconds(self) -> float:
        """The time that one more step and the save after it may take."""
        slow = max(self._steps, default=0.0)
        if len(self._steps) > _PERCENTILES:
            slow = statistics.quantiles(self._steps, n=_PERCENTILES)[-1]
        return slow + 2 * (self._longest_save or _FIRST_SAVE_SECONDS)

    def is_over(self) -> bool:
        """Whether another step could miss the deadline."""
        if self.deadline is None:
            return False
        return time.monotonic() + self.margin_seconds() > self.deadline
