"""One line of progress for work that takes long: in a terminal, a cell or a log."""

import contextlib
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from .session import current_session, running_kernel

_HIDDEN = ContextVar("hidden", default=False)
_DELAY, _REDRAW_SECONDS = 1.0, 0.5


@contextlib.contextmanager
def hidden(hide: bool = True) -> Iterator[None]:
    """Show no bars in the block, if `hide`."""
    token = _HIDDEN.set(hide or _HIDDEN.get())
    try:
        yield
    finally:
        _HIDDEN.reset(token)


def open_bar(title: str, total: float | None = None, **style: Any) -> Any:
    """Return tqdm's bar, which appears after a second and is gone when it is closed.

    Without a cell or a terminal there is none; a batch run logs a line now and then.
    """
    from tqdm import tqdm

    session, disable = current_session(), _HIDDEN.get() or None  # None: by the terminal
    if running_kernel() is not None:
        seconds = session.log_seconds if session.batch else _REDRAW_SECONDS
        style |= {"file": _Output(session.batch), "mininterval": seconds, "ncols": 100}
        style["ascii"], disable = False, bool(disable)
    if total is None:
        style["bar_format"] = "{desc} {elapsed}"
    style |= {"miniters": 0, "leave": False, "delay": _DELAY}
    return tqdm(desc=title, total=total, disable=disable, **style)


class _Output:
    """The file of a bar in a kernel: one output of the cell, or the kernel's log."""

    def __init__(self, batch: bool) -> None:
        self._batch, self._display = batch, None

    def write(self, text: str) -> None:
        from IPython.display import display

        line = text.strip()  # "" erases it
        output: Any = {"text/plain": line}
        if self._batch:
            with contextlib.suppress(
                OSError, ValueError
            ):  # there may be no such stream
                os.write(sys.stderr.fileno(), f"{line}\n".encode() if line else b"")
        elif self._display is None:
            self._display = display(output, raw=True, display_id=True)
        else:
            self._display.update(output, raw=True)
