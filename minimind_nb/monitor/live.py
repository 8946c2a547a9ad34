"""Live views of a training run, for the parent process: a cell's picture or plain lines.

A view only reads the history. It is called from the loop that watches the workers by
`attempt`, which catches its errors and reports each once.
"""

import base64
import contextlib
import html
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from ..session import current_session, running_kernel
from .metrics import History, Row
from .progress import STATUS_WORDS, figures, outcome, position, progress_line

# A drawing takes 0.2 s of the cores that the workers need, and an update sends 70 kB.
REDRAW_SECONDS = 5.0
SMALL = "opacity:.65;font-size:85%"


class View:
    """Show nothing, and call a function with the history when it has new rows.

    `update` is called about twice a second, `finish` once, `note` with each message.
    """

    def __init__(self, callback: Callable[[History], object] | None = None) -> None:
        self._callback = callback
        self._last: Row | None = None
        self.notes: list[str] = []
        self.failures: list[str] = []

    def update(self, history: History) -> None:
        if self._callback and history.rows and history.rows[-1] is not self._last:
            self._last = history.rows[-1]
            self._callback(history)

    def finish(self, history: History, status: str) -> None:
        self.update(history)

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Show the package's log messages as notes, and nowhere else, meanwhile."""
        logger = logging.getLogger("minimind_nb")
        level, propagate = logger.level, logger.propagate
        handler = logging.Handler()
        handler.emit = lambda record: self.attempt(self.note, record.getMessage())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            yield
        finally:
            logger.propagate = propagate
            logger.setLevel(level)
            logger.removeHandler(handler)

    def attempt(self, action: Callable[..., Any], *arguments: object) -> Any:
        """Call `action`; an error is printed the first time and never raised."""
        try:
            return action(*arguments)
        except Exception as error:
            name = getattr(action, "__qualname__", "the view")
            text = f"{name} failed ({type(error).__name__}: {error})"
            if text not in self.failures:
                self.failures.append(text)
                with contextlib.suppress(OSError, ValueError):  # stderr may be closed
                    print(f"{text}; the training is not affected", file=sys.stderr)


class TerminalView(View):
    """Show a progress bar if stderr is a terminal, else one line per logged row."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None

    def update(self, history: History) -> None:
        if self._bar is None:
            style: Any = {"bar_format": "{bar:10} {desc}", "dynamic_ncols": True}
            self._bar = tqdm(leave=False, disable=None, **style)
        line = progress_line(history)
        self._bar.n, self._bar.total = position(history)
        self._bar.set_description_str(line)
        newest = history.last("train") or history.last("eval")
        at_end = self._bar.n == self._bar.total  # `finish` has the last validation
        if self._bar.disable and newest is not self._last and not at_end:
            self._last = newest
            self.note(line)

    def finish(self, history: History, status: str) -> None:
        self.update(history)
        self._bar.close()
        self.note(outcome(history, status))

    def note(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)


class CellView(View):
    """Show progress and curve as one output of a cell, at the end one static chart.

    The output is a display that is updated in place, without JavaScript or widgets, so
    it works under papermill. Updates do not reach the log of a Kaggle batch run, so
    there a plain line a minute goes to the stderr that the kernel was started with:
    `sys.stderr` is an output of the cell, but its `fileno()` is that stream.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._display: Any = None
        self._seen: list[Row] | None = None
        self._page = ""
        self._next_update = self._next_log = clock()
        self._batch = current_session().batch

    def note(self, text: str) -> None:
        super().note(text)
        self._show_page(text)

    def update(self, history: History) -> None:
        now = self._clock()
        if now < self._next_update or history.rows[-1:] == self._seen:
            return
        if history.rows:
            self._next_update = now + REDRAW_SECONDS
        self._seen = history.rows[-1:]
        line = progress_line(history)
        self._page = self._progress(history)
        self._show_page(line)
        if self._batch and now >= self._next_log:
            self._next_log = now + current_session().log_seconds
            self._log(line)

    def finish(self, history: History, status: str) -> None:
        words = "\n".join([*self.notes, outcome(history, status)])
        title = f"{history.path.parent.name} ({STATUS_WORDS[status]})"
        picture = self.attempt(self._draw, history, title, 120)
        self._show({"text/plain": words} | ({"image/png": picture} if picture else {}))
        if self._batch:
            self._log(words)

    def _log(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # there may be no such stream
            os.write(sys.stderr.fileno(), f"{line}\n".encode())

    def _draw(self, history: History, title: str | None = None, dpi: int = 96) -> str:
        """Return the curve as a PNG in base64, "" before there is one."""
        from .charts import plot_history

        if not (history.last("train") or history.last("eval")):
            return ""
        return base64.b64encode(plot_history(history, title).png(dpi)).decode()

    def _show(self, bundle: dict[str, str]) -> None:
        """Replace what the cell shows; the first time, show it."""
        from IPython.display import display

        if self._display is None:
            self._display = display(bundle, raw=True, display_id=True)
        else:
            self._display.update(bundle, raw=True)

    def _show_page(self, line: str) -> None:
        """Show the newest page with all notes; a viewer without HTML gets the line."""
        notes = "<br>".join(map(html.escape, self.notes))
        page = f'{self._page}<div style="{SMALL}">{notes}</div>'
        self._show({"text/html": page, "text/plain": line})

    def _progress(self, history: History) -> str:
        """Return a bar, figures and curve, legible on light and dark pages."""
        step, total = position(history)
        cells = "".join(
            f'<div><div style="{SMALL}">{name}</div>{html.escape(text)}</div>'
            for name, text in figures(history).items()
        )
        curve = ""
        if picture := self.attempt(self._draw, history):
            source = f"data:image/png;base64,{picture}"
            curve = f'<img alt="loss so far" style="max-width:100%" src="{source}">'
        return (
            '<div style="max-width:800px;font-variant-numeric:tabular-nums">'
            f"<b>{html.escape(history.path.parent.name)}</b><br>"
            f'<progress style="width:100%" value="{step}" max="{total or 1}"></progress>'
            f'<div style="display:flex;flex-wrap:wrap;gap:4px 26px">{cells}</div></div>'
            f"{curve}"
        )


def choose_view(view: object = None) -> View:
    """Return the view for `train(cfg, view=…)`.

    None or True: a cell's in a Jupyter kernel, else a terminal's. False: a silent one.
    A function gets each new state of the History. Raises TypeError for anything else.
    """
    if view is None or view is True:
        return TerminalView() if running_kernel() is None else CellView()
    if view is False or callable(view):
        return View(view or None)
    raise TypeError(
        f"view={view!r}; expected None (live), False (silent) or a function of History."
    )
