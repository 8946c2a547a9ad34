"""Cooperative cancellation: stop requests, and how the ranks agree on them."""

import math
import signal
import threading
import time
from types import FrameType

STOP_REASONS = ("terminated", "interrupted", "time_budget")  # the most urgent first
SIGNALS: dict[int, str] = {
    signal.SIGTERM: "terminated",
    signal.SIGINT: "interrupted",
    signal.SIGHUP: "terminated",  # the terminal was closed
}
# Ctrl-C, or a notebook's stop button, is often pressed twice, which must lose no save.
SAME_WISH_SECONDS = 2.0


class StopRequest:
    """A request to stop, set by a signal or by the session's clock, read between steps.

    Handlers only set a flag: an exception could interrupt any line, and a collective in
    a handler could wait forever. `kill` is set by a SIGINT more than `SAME_WISH_SECONDS`
    after the first; others may well come twice (`timeout` also signals the group).
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.signal = 0  # the first one
        self.kill = False
        self._first_interrupt = math.inf
        self._before = {}
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread gets signals
        under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        for number in SIGNALS:
            if number != signal.SIGHUP or not under_nohup:
                self._before[number] = signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:  # it hides who has ended
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop_flags(self) -> list[float]:
        """Return one number for each of `STOP_REASONS`: 1.0 for this rank's reason."""
        return [float(reason == self.reason) for reason in STOP_REASONS]

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.signal = self.signal or number
        self.reason = self.reason or SIGNALS[number]
        if number == signal.SIGINT:
            now = time.monotonic()
            self._first_interrupt = min(self._first_interrupt, now)
            self.kill = now - self._first_interrupt > SAME_WISH_SECONDS


def agreed_stop_reason(sums: list[float]) -> str | None:
    """Return the most urgent reason that any rank gave, from the sums of all flags."""
    given = (r for r, flags in zip(STOP_REASONS, sums, strict=True) if flags > 0)
    return next(given, None)
