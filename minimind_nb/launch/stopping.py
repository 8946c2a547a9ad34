"""A wish to stop, and how the ranks agree on it at a step's end."""

from __future__ import annotations

import signal
from types import FrameType

STOP_REASONS = ("terminated", "interrupted", "time_budget")


class StopRequest:
    """A wish to stop: set by signals, heard at the next step's end.

    Handlers only raise a flag: a collective inside one could wait for ever.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._listen(signal.SIGTERM, "terminated")
        self._listen(signal.SIGINT, "interrupted")

    def ballot(self) -> list[float]:
        """One number for each of `STOP_REASONS`, 1.0 for this rank's reason."""
        return [float(reason == self.reason) for reason in STOP_REASONS]

    def _listen(self, number: int, reason: str) -> None:
        def handle(_number: int, _frame: FrameType | None) -> None:
            self.reason = self.reason or reason

        signal.signal(number, handle)


def count_ballots(sums: list[float]) -> str | None:
    """The reason most urgent of those any rank gave, or None."""
    for reason, votes in zip(STOP_REASONS, sums, strict=True):
        if votes > 0:
            return reason
    return None
