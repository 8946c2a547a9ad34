"""A wish to stop, and how the ranks agree on it at a step's end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

STOP_REASONS = ("terminated", "interrupted", "time_budget")
SIGNALS: dict[int, str] = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}
"""What a rank listens to."""
HEARD: dict[int, str] = {**SIGNALS, signal.SIGHUP: "terminated"}
"""What a parent passes on: a terminal that closes, too."""


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


class Signals:
    """The first signal that came to this process while a job ran, and the interrupts.

    A SIGTERM may well come twice for one wish: `timeout` sends it to the process and
    to its group.
    """

    number = 0
    interrupts = 0

    def handle(self, number: int, _frame: FrameType | None) -> None:
        self.number = self.number or number
        self.interrupts += number == signal.SIGINT


@contextlib.contextmanager
def heard_signals() -> Iterator[Signals]:
    """Count signals instead of raising, so that no line of ours is cut in two."""
    signals = Signals()
    # Only the main thread may set handlers, and only it gets the signals.
    here = threading.current_thread() is threading.main_thread()
    numbers = [*HEARD] if here else []
    if numbers and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
        numbers.remove(signal.SIGHUP)
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def count_ballots(sums: list[float]) -> str | None:
    """The reason most urgent of those any rank gave, or None."""
    given = (r for r, votes in zip(STOP_REASONS, sums, strict=True) if votes > 0)
    return next(given, None)
