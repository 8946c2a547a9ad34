"""Live views of a training run, for the parent process: a cell's page or plain lines.

A view only reads the history. It is called from the loop that watches the workers by
`attempt`, which catches its errors and reports each once.
"""

import contextlib
import html
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from typing import Any

from tqdm import tqdm

from ..session import current_session, running_kernel
from . import progress
from .metrics import History, Row
from .page import facts_row, page
from .tables import shorten

REDRAW_SECONDS = 5.0
LARGEST_SHARE = 0.02  # of the time that updates may take; the workers need the cores
ANSWER_WIDTH = 320  # shown of a prompt or an answer; a Chinese character takes two
_WORDS = re.compile(r"[a-zA-Z0-9]+|.", re.DOTALL)  # a Chinese character is one


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
        line = progress.progress_line(history)
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
        self.note(progress.outcome(history, status))
        self.note(progress.what_next(history, status))

    def note(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)


class CellView(View):
    """Show progress and curve as one output of a cell, at the end the result.

    The output is HTML that is updated in place, without widgets, so it works under
    papermill. Updates do not reach the log of a Kaggle batch run, so there a plain line
    a minute goes to the stderr that the kernel was started with: `sys.stderr` is an
    output of the cell, but its `fileno()` is that stream.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._display: Any = None
        self._seen: list[object] = []
        self._page = ""
        self._next_update = self._next_log = clock()
        self._batch = current_session().batch

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
        line = progress.progress_line(history)
        self._page = self._compose(_figures(history, doing), history)
        self._show(line)
        if history.rows:
            taken = self._clock() - now
            self._next_update = now + max(REDRAW_SECONDS, taken / LARGEST_SHARE)
        if self._batch and now >= self._next_log:
            self._next_log = now + current_session().log_seconds
            self._log(line)

    def finish(self, history: History, status: str) -> None:
        facts = progress.result(history, status, "run this cell again")
        outcome = progress.outcome(history, status)
        words = "\n".join([*self.notes, outcome, facts.note])
        self._page = self._compose(facts.card(), history, final=True)
        self._show(words)
        if self._batch:
            self._log(words)

    def _log(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # there may be no such stream
            os.write(sys.stderr.fileno(), f"{line}\n".encode())

    def _show(self, line: str) -> None:
        """Show the newest page with all notes; a viewer without HTML gets the line."""
        from IPython.display import display

        notes = "<br>".join(map(html.escape, self.notes))
        body = f'{self._page}<div class="faint">{notes}</div>'
        bundle = {"text/html": page(body), "text/plain": line}
        if self._display is None:
            self._display = display(bundle, raw=True, display_id=True)
        else:
            self._display.update(bundle, raw=True)

    def _compose(self, top: str, history: History, final: bool = False) -> str:
        """Return `top`, the chart and the newest answers, as far as there are any."""
        chart = self.attempt(self._chart, history, final)
        return "".join(filter(None, [top, chart, self.attempt(answers, history)]))

    def _chart(self, history: History, final: bool) -> str:
        """Return HTML of the chart; a final one has a picture for pages without scripts."""
        from .charts import inspect

        if not (history.last("train") or history.last("eval")):
            return ""
        chart = inspect(history, title="")
        picture = self.attempt(chart.png) if final else b""
        return chart.html(f"{history.path.parent.name}-{id(self)}", picture or b"")


def _figures(history: History, doing: str) -> str:
    """Return HTML of a bar and figures; `doing` says what the run is at."""
    step, total = progress.position(history)
    name, doing = map(html.escape, (history.path.parent.name, doing))
    facts = progress.figures(history) | progress.machine_figures(history)
    return (
        f'<div class="title">{name} <span class="faint">{doing}</span></div>'
        f'<progress value="{step}" max="{total or 1}"></progress>{facts_row(facts)}'
    )


def answers(history: History) -> str:
    """Return HTML of the newest answers beside those of the validation before, with
    what is new in them marked; "" without any."""
    found = progress.samples_by_step(history)
    steps = [*found][-2:]
    lines = ["".join(f"<th>step {step:,}</th>" for step in steps)]
    for prompt in found[steps[-1]] if steps else ():
        texts = [shorten(found[at].get(prompt, ""), ANSWER_WIDTH) for at in steps]
        cells = [html.escape(texts[0]), mark_changes(texts[0], texts[-1])]
        asked = html.escape(shorten(prompt, ANSWER_WIDTH))
        lines.append(f'<td class="faint" colspan="{len(steps)}">{asked}</td>')
        lines.append("".join(f"<td>{cell}</td>" for cell in cells[-len(steps) :]))
    rows = "</tr><tr>".join(lines)
    return f'<table class="answers"><tr>{rows}</tr></table>' if steps else ""


def mark_changes(old: str, new: str) -> str:
    """Return the new text as HTML, marked where it differs from the old one."""
    before, after = (_WORDS.findall(text) for text in (old, new))
    changes = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    shown = ""
    for kind, *_, begin, end in changes:
        text = html.escape("".join(after[begin:end]))
        shown += f"<mark>{text}</mark>" if text and kind != "equal" else text
    return shown


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
