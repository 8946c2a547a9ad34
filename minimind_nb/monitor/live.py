"""Live views of a training run, for the parent process: a cell's page or plain lines.

A view only reads the history. It is called from the loop that watches the workers by
`attempt`, which catches its errors and reports each once.
"""

import contextlib
import html
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from ..progress_bar import Log
from ..session import LOG_SECONDS, current_session, running_kernel
from . import progress
from .metrics import History, Row
from .page import facts_row, show

REDRAW_SECONDS = 5.0
LARGEST_SHARE = 0.02  # of the time that updates may take; the workers need the cores


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
        line = progress.outcome(history)
        self._bar.n, self._bar.total = progress.position(history)
        self._bar.set_description_str(line)
        newest = history.last("train") or history.last("eval")
        at_end = self._bar.n == self._bar.total  # `finish` has the last validation
        if self._bar.disable and newest is not self._last and not at_end:
            self._last = newest
            self.note(line)

    def finish(self, history: History, status: str) -> None:
        self.update(history)
        self._bar.close()
        self.note(progress.outcome(history))
        self.note(progress.result(history, status).note)

    def note(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)


class CellView(View):
    """Show progress and curve as one output of a cell, at the end the result.

    The output is HTML that is updated in place, without widgets, so it works under
    papermill. A batch run has a line a minute in its log, which updates do not reach.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._display: Any = None
        self._seen: list[object] = []
        self._page, self._picture = "", b""
        self._next_update = self._next_log = clock()

    def note(self, text: str) -> None:
        super().note(text)
        self._show(text)

    def update(self, history: History) -> None:
        now = self._clock()
        if now < self._next_update:
            return
        doing = self.attempt(progress.activity, history) or ""
        if [doing, *history.rows[-1:]] == self._seen:
            return
        self._seen = [doing, *history.rows[-1:]]
        line = progress.outcome(history)
        self._page = _figures(history, doing) + self._curves(history)
        self._show(line)
        if history.rows:
            taken = self._clock() - now
            self._next_update = now + max(REDRAW_SECONDS, taken / LARGEST_SHARE)
        if now >= self._next_log:
            self._next_log = now + LOG_SECONDS
            self._log(line)

    def finish(self, history: History, status: str) -> None:
        facts = progress.result(history, status, "run this cell again")
        self._page = facts.html() + self._curves(history, final=True)
        self._show("\n".join([*self.notes, repr(facts)]))
        self._log(repr(facts))

    def _log(self, text: str) -> None:
        if current_session().batch:
            Log().write(text)

    def _show(self, line: str) -> None:
        """Show the newest page with all notes; a viewer without HTML gets the line."""
        notes = "<br>".join(map(html.escape, self.notes))
        body = f'{self._page}<div class="faint">{notes}</div>'
        self._display = show(body, line, self._display, self._picture)

    def _curves(self, history: History, final: bool = False) -> str:
        """Return HTML of the chart and of the answers at the newest two validations."""
        table = progress.samples(history)
        table.rows = table.rows[-2:]
        chart = self.attempt(self._chart, history, final) if history.rows else ""
        return (chart or "") + (table.html() if table.rows else "")

    def _chart(self, history: History, final: bool) -> str:
        """Return HTML of the chart; a final one has a picture for pages without scripts."""
        from .charts import inspect

        chart, figures = inspect(history), progress.outcome(history)
        chart.title = ""  # the card has it, and the figures
        chart.subtitle = chart.subtitle.removeprefix(figures).strip(" ·")
        if final:
            self._picture = self.attempt(chart.png) or b""
        return chart.html(f"{history.path.parent.name}-{id(self)}", self._picture)


def _figures(history: History, doing: str) -> str:
    """Return HTML of a bar and figures; `doing` says what the run is at."""
    step, total = progress.position(history)
    name, doing = map(html.escape, (history.path.parent.name, doing))
    return (
        f'<div class="title">{name} <span class="faint">{doing}</span></div>'
        f'<progress value="{step}" max="{total or 1}"></progress>'
        f"{facts_row(progress.figures(history))}"
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
