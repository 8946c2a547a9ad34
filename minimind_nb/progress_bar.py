"""One line of progress for work that takes long: in a terminal, a cell or a log."""

import contextlib
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from .session import LOG_SECONDS, current_session, running_kernel

_DELAY, _REDRAW_SECONDS = 1.0, 0.5
_HIDDEN = ContextVar("hidden", default=False)


@contextlib.contextmanager
def hidden(hide: bool = True) -> Iterator[None]:
    """Show no bars in the block, if `hide`."""
    token = _HIDDEN.set(hide)
    try:
        yield
    finally:
        _HIDDEN.reset(token)


class Log:
    """The log of a batch run, as a file that takes a line at a time.

    In a kernel `sys.stderr` is an output of the cell, but its `fileno()` is the stream
    that the kernel was started with.
    """

    def write(self, text: str) -> None:
        line = text.strip()
        with contextlib.suppress(OSError, ValueError):  # there may be no such stream
            os.write(sys.stderr.fileno(), f"{line}\n".encode() if line else b"")


def open_bar(title: str, total: float | None = None, **style: Any) -> Any:
    """Return tqdm's bar, which appears after a second and is gone when it is closed.

    Without a cell or a terminal there is none; a batch run logs a line now and then.
    """
    from tqdm import tqdm

    style = {"mininterval": _REDRAW_SECONDS, "disable": _HIDDEN.get() or None} | style
    if running_kernel() is not None:  # whose stdout is no terminal, yet shows a bar
        style |= {"file": sys.stdout, "ncols": 100, "disable": _HIDDEN.get()}
        if current_session().batch:
            style |= {"file": Log(), "mininterval": LOG_SECONDS}
    if total is None:
        style["bar_format"] = "{desc} {elapsed}"
    style |= {"miniters": 0, "leave": False, "delay": _DELAY}
    return tqdm(desc=title, total=total, **style)
