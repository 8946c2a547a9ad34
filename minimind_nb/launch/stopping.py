"""A wish to stop, and how the ranks agree on it at a step's end."""

from __future__ import annotations

import signal
from types import FrameType

STOP_REASONS = ("terminated", "interrupted", "time_budget")
SIGNALS: dict[int, str] = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}


class StopRequest:
    """A wish to stop: set by signals, heard at the next step's end.

    Handlers only raise a flag: a collective inside one could wait for ever.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before = {n: signal.signal(n, self._handle) for n in SIGNALS}

    def restore(self) -> None:
        """Put back the handlers of before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ballot(self) -> list[float]:
        """One number for each of `STOP_REASONS`, 1.0 for this rank's reason."""
        return [float(reason == self.reason) for reason in STOP_REASONS]

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.reason = self.reason or SIGNALS[number]


def count_ballots(sums: list[float]) -> str | None:
    """The reason most urgent of those any rank gave, or None."""
    given = (r for r, votes in zip(STOP_REASONS, sums, strict=True) if votes > 0)
    return next(given, None)
