"""What the parent shows while the workers train: a cell's picture or plain lines.

A view reads the history and nothing else. It is called from the loop that watches
the workers, so whatever goes wrong in it is caught, counted and reported once.
"""

import base64
import contextlib
import html
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ..session import current_session, running_kernel
from .metrics import History, Row
from .progress import (
    STATUS_WORDS,
    Plan,
    describe,
    failed_saves,
    figures,
    outcome,
    position,
)

# A drawing takes 0.2 s of the cores that the workers need, and an update sends 70 kB.
REDRAW_SECONDS = 5.0
LOG_SECONDS = 60.0
MOST_FAILURES = 3
SMALL = "opacity:.65;font-size:85%"


class View:
    """Shows nothing; the other views build on it.

    `start` comes before the workers, its `plan` giving `total_steps` until a row does;
    `update` after every look at the metrics, about twice a second; `finish` once, with
    a status of a run; `note` at any time, with a line about what happened beside the
    steps. None of them raises an Exception: `failures` counts them by method.
    """

    def __init__(self) -> None:
        self.plan: Plan = {}
        self.notes: list[str] = []
        self.failures: Counter[str] = Counter()
        self._failed_saves = 0

    def start(self, history: History, plan: Plan | None = None) -> None:
        self.plan = plan or {}
        self._failed_saves = len(failed_saves(history))
        self.update(history)

    def update(self, history: History) -> None:
        self.attempt(self._tell_failed_saves, history)
        self.attempt(self._update, history)

    def finish(self, history: History, status: str) -> None:
        self.attempt(self._tell_failed_saves, history)
        self.attempt(self._finish, history, status)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.attempt(self._note, text)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Show the package's log messages as notes, and nowhere else, meanwhile."""
        logger = logging.getLogger("minimind_nb")
        level, propagate = logger.level, logger.propagate
        handler = _NoteHandler(self)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            yield
        finally:
            logger.propagate = propagate
            logger.setLevel(level)
            logger.removeHandler(handler)

    def attempt(self, action: Callable[..., object], *arguments: object) -> None:
        """Do what must not fail the run: tell its first failure, stop after three."""
        name = getattr(action, "__qualname__", "the view")
        if self.failures[name] == MOST_FAILURES:
            return
        try:
            action(*arguments)
        except Exception as error:
            self.failures[name] += 1
            if self.failures[name] == 1:
                text = f"{name} failed ({type(error).__name__}: {error})"
                with contextlib.suppress(OSError, ValueError):  # stderr may be gone
                    print(f"{text}; the training is not affected", file=sys.stderr)

    def _tell_failed_saves(self, history: History) -> None:
        failed = failed_saves(history)
        for text in failed[self._failed_saves :]:
            self.note(text)
        self._failed_saves = len(failed)

    def _update(self, history: History) -> None:
        pass

    def _finish(self, history: History, status: str) -> None:
        self._update(history)

    def _note(self, text: str) -> None:
        pass


class _NoteHandler(logging.Handler):
    """Hand each log message to a view as a note."""

    def __init__(self, view: View) -> None:
        super().__init__()
        self._view = view

    def emit(self, record: logging.LogRecord) -> None:
        self._view.note(record.getMessage())


class CallbackView(View):
    """Hands the history to a function of the user's whenever it has new rows."""

    def __init__(self, callback: Callable[[History], object]) -> None:
        super().__init__()
        self._callback = callback
        self._last: Row | None = None

    def _update(self, history: History) -> None:
        if history.rows and history.rows[-1] is not self._last:
            self._last = history.rows[-1]
            self._callback(history)


class TerminalView(View):
    """A progress bar where stderr is a terminal, else one line for each logged row."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._seen: list[Row | None] = [None, None, None]

    def _update(self, history: History) -> None:
        if self._bar is None and sys.stderr.isatty():
            from tqdm import tqdm

            layout = "{bar:10} {desc}"
            self._bar = tqdm(bar_format=layout, dynamic_ncols=True, leave=False)
        newest = history.rows[-1] if history.rows else {}
        reference = newest if newest.get("event") == "reference" else None
        seen = [history.last("train"), history.last("eval"), reference]
        line = describe(history, self.plan)
        if self._bar is not None:
            self._bar.n, self._bar.total = position(history, self.plan)
            self._bar.set_description_str(line)
        elif seen != self._seen:
            self._note(line)
        self._seen = seen

    def _finish(self, history: History, status: str) -> None:
        self._update(history)
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._note(outcome(history, status))

    def _note(self, text: str) -> None:
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.write(text, file=sys.stderr)


class CellView(View):
    """One output of a notebook cell: progress and curve, at the end one static chart.

    It is a display that is updated in place, so it needs neither JavaScript nor
    widgets and works under papermill. While the run lasts it is HTML with the curve
    as a picture inside; at the end it becomes a PNG with a line of text. Updates of a
    display do not reach the log of a Kaggle batch run, so there a plain line goes,
    once a minute, to the stderr that the kernel was started with: `sys.stderr` is an
    output of the cell, but its `fileno()` is that stream.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._display: Any = None
        self._seen: list[Row] | None = None
        self._picture = ""
        self._next_update = self._next_log = clock()
        self._batch = current_session().batch

    def _note(self, text: str) -> None:
        if not self._seen:  # later ones come with the next update
            self._show({"text/html": self._notes(), "text/plain": text})

    def _update(self, history: History) -> None:
        now = self._clock()
        if now < self._next_update or history.rows[-1:] == self._seen:
            return
        if history.rows:
            self._next_update = now + REDRAW_SECONDS
        self._seen = history.rows[-1:]
        self.attempt(self._draw, history)
        line = describe(history, self.plan)
        self._show({"text/html": self._page(history), "text/plain": line})
        if self._batch and now >= self._next_log:
            self._next_log = now + LOG_SECONDS
            self._log(line)

    def _finish(self, history: History, status: str) -> None:
        words = "\n".join([*self.notes, outcome(history, status)])
        title = f"{history.path.parent.name} ({STATUS_WORDS[status]})"
        self._picture = ""
        self.attempt(self._draw, history, title, 120)
        picture = {"image/png": self._picture} if self._picture else {}
        self._show({"text/plain": words} | picture)
        if self._batch:
            self._log(words)

    def _log(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # there may be no such stream
            os.write(sys.stderr.fileno(), f"{line}\n".encode())

    def _draw(self, history: History, title: str | None = None, dpi: int = 96) -> None:
        from .charts import plot_history

        if history.select("train") or history.select("eval"):
            png = plot_history(history, title).png(dpi)
            self._picture = base64.b64encode(png).decode()

    def _show(self, bundle: dict[str, str]) -> None:
        """Replace what the cell shows; the first time, show it."""
        from IPython.display import display

        if self._display is None:
            self._display = display(bundle, raw=True, display_id=True)
        else:
            self._display.update(bundle, raw=True)

    def _page(self, history: History) -> str:
        """A bar, figures, curve and notes in colours for light and dark pages."""
        step, total = position(history, self.plan)
        cells = "".join(
            f'<div><div style="{SMALL}">{name}</div>{text}</div>'
            for name, text in figures(history, self.plan).items()
        )
        page = (
            '<div style="max-width:800px;font-variant-numeric:tabular-nums">'
            f"<b>{html.escape(history.path.parent.name)}</b>"
            '<div style="background:rgba(128,128,128,.25);margin:6px 0 8px">'
            f'<div style="width:{step / (total or 1):.1%};height:8px;'
            'background:#0072B2"></div></div>'
            f'<div style="display:flex;flex-wrap:wrap;gap:4px 26px">{cells}</div></div>'
        )
        if self._picture:
            source = f"data:image/png;base64,{self._picture}"
            page += f'<img alt="loss so far" style="max-width:100%" src="{source}">'
        return page + self._notes()

    def _notes(self) -> str:
        return f'<div style="{SMALL}">{"<br>".join(map(html.escape, self.notes))}</div>'


def choose_view(view: object = None) -> View:
    """The view for `train(cfg, view=…)`.

    None or True: the cell's in a Jupyter kernel, else the terminal's. False: none. A
    function gets each new state of the History. Anything else is a TypeError.
    """
    if view is None or view is True:
        return TerminalView() if running_kernel() is None else CellView()
    if view is False:
        return View()
    if callable(view):
        return CallbackView(view)
    raise TypeError(
        f"view={view!r} is a {type(view).__name__}; expected None (a live view), False "
        "(silent) or a function of the history, for example view=False."
    )
