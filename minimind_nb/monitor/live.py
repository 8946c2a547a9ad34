"""What the parent shows while the workers train: a cell's picture or plain lines.

A view reads the history and nothing else. It is called from the loop that watches
the workers, so whatever goes wrong in it is caught, counted and reported once.
"""

import base64
import contextlib
import html
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..session import current_session
from .metrics import History, Row
from .progress import (
    STATUS_WORDS,
    Progress,
    count,
    describe,
    describe_end,
    duration,
    loss_text,
    measure,
    perplexity_text,
    step_text,
)

# An update carries the picture too, some 70 kB: one a second would send 3 GB in 12
# hours, so they grow rarer, from one second apart to ten after half an hour.
TEXT_SECONDS, SLOW_TEXT_SECONDS, TEXT_SHARE = 1.0, 10.0, 1 / 180
PICTURE_SECONDS = 5.0
DRAWING_SHARE = 0.05  # of the time at most: workers and parent share the cores
LOG_SECONDS = 60.0
MOST_FAILURES = 3
SHOWN_NOTES = 3

Plan = Mapping[str, Any] | None


class View:
    """Shows nothing; the other views build on it.

    `start` comes before the workers, `update` after every look at the metrics (about
    twice a second), `finish` once at the end with "finished", "interrupted",
    "failed" or another status of a run. None of the three ever raises an Exception:
    `failures` counts what went wrong, and after three updates are given up.
    """

    failures = 0
    notes: Sequence[str] = ()

    def start(self, history: History, plan: Plan = None) -> None:
        """Begin; `plan` gives `total_steps` until the first row does."""
        self._guard(self._start, history, plan)

    def update(self, history: History) -> None:
        """Show what is new in the history."""
        if self.failures < MOST_FAILURES:
            self._guard(self._update, history)

    def finish(self, history: History, status: str) -> None:
        """Show how the run ended."""
        self._guard(self._finish, history, status)

    def note(self, text: str) -> None:
        """Tell something that happened before or beside the steps, in one line."""
        self.notes = [*self.notes, text]
        self._guard(self._note, text)

    def _note(self, text: str) -> None:
        pass

    def _start(self, history: History, plan: Plan) -> None:
        pass

    def _update(self, history: History) -> None:
        pass

    def _finish(self, history: History, status: str) -> None:
        pass

    def _guard(self, action: Callable[..., None], *arguments: object) -> bool:
        """Do it; whether it went well. The first failure is told on stderr."""
        try:
            action(*arguments)
        except Exception as error:
            self.failures += 1
            if self.failures == 1:
                with contextlib.suppress(OSError, ValueError):
                    print(
                        f"{type(self).__name__} failed ({type(error).__name__}: "
                        f"{error}); training goes on, view=False silences it",
                        file=sys.stderr,
                    )
            return False
        return True


class SilentView(View):
    """Shows nothing."""


class CallbackView(View):
    """Hands the history to a function of the user's whenever it has new rows."""

    def __init__(self, callback: Callable[[History], object]) -> None:
        self._callback = callback
        self._last: Row | None = None

    def _update(self, history: History) -> None:
        if history.rows and history.rows[-1] is not self._last:
            self._last = history.rows[-1]
            self._callback(history)

    def _finish(self, history: History, status: str) -> None:
        self._update(history)


class TerminalView(View):
    """A progress bar where stderr is a terminal, else one line for each logged row."""

    def __init__(self) -> None:
        self._plan: Plan = None
        self._bar: Any = None
        self._train: Row | None = None
        self._validation: Row | None = None

    def _start(self, history: History, plan: Plan) -> None:
        self._plan = plan
        self._train, self._validation = history.last("train"), history.last("eval")
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=measure(history, plan).total_steps,
                bar_format="{bar:20} {desc}",
                dynamic_ncols=True,
                leave=False,
                file=sys.stderr,
            )

    def _update(self, history: History) -> None:
        validation, train = history.last("eval"), history.last("train")
        if validation is not None and validation is not self._validation:
            loss = validation["loss"]
            self._say(
                f"step {validation['step']:,}  validation loss {loss_text(loss)}  "
                f"ppl {perplexity_text(loss)}"
            )
            self._validation = validation
        if train is not None and train is not self._train:
            progress = measure(history, self._plan)
            if self._bar is None:
                self._say(describe(progress))
            else:
                self._bar.total, self._bar.n = progress.total_steps, progress.step
                self._bar.set_description_str(describe(progress))
            self._train = train

    def _finish(self, history: History, status: str) -> None:
        self._update(history)
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._say(describe_end(measure(history, self._plan), status))

    def _note(self, text: str) -> None:
        self._say(text)

    def _say(self, line: str) -> None:
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)


class CellView(View):
    """One output of a notebook cell: progress and curve, at the end one static chart.

    It is a display that is updated in place, so it needs neither JavaScript nor
    widgets and works under papermill. While the run lasts it is HTML with the curve
    as a picture inside; at the end it becomes a PNG with a line of text. Updates of a
    display do not reach the log of a Kaggle batch run, so there a plain line goes,
    once a minute, to the stderr that the kernel process was started with: not a
    second output of the cell, unlike everything that is printed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._plan: Plan = None
        self._handle: Any = None
        self._last: Row | None = None
        self._picture = ""
        self._picture_of: Row | None = None
        self._began = self._seen = self._drawing_seconds = 0.0
        self._next_text = self._next_idle_text = self._next_picture = 0.0
        self._batch = current_session().batch
        self._next_log = 0.0

    def _start(self, history: History, plan: Plan) -> None:
        self._plan = plan
        self._began = self._seen = self._clock()
        self._next_log = self._began + LOG_SECONDS
        self._show(self._bundle(history))

    def _note(self, text: str) -> None:
        if not self._began:  # later notes come with the next update
            self._show({"text/html": notes_html(self.notes), "text/plain": text})

    def _show(self, bundle: Mapping[str, object]) -> None:
        """Replace what the cell shows; the first time, show it."""
        from IPython.display import display

        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def _update(self, history: History) -> None:
        now = self._clock()
        last = history.rows[-1] if history.rows else None
        fresh = last is not self._last
        if now < (self._next_text if fresh else self._next_idle_text):
            return
        if fresh:
            self._last, self._seen = last, now
        if now >= self._next_picture and self._picture_of is not last:
            self._picture_of = last
            drawn = self._guard(self._draw, history)
            pause = max(PICTURE_SECONDS, self._drawing_seconds / DRAWING_SHARE)
            self._next_picture = now + pause if drawn else math.inf
        self._handle.update(self._bundle(history), raw=True)
        pause = (now - self._began) * TEXT_SHARE
        self._next_text = now + min(SLOW_TEXT_SECONDS, max(TEXT_SECONDS, pause))
        self._next_idle_text = now + SLOW_TEXT_SECONDS
        if self._batch and now >= self._next_log:
            write_to_log(describe(measure(history, self._plan)))
            self._next_log = now + LOG_SECONDS

    def _finish(self, history: History, status: str) -> None:
        if self._handle is None:  # the start failed, and said so
            return
        words = describe_end(measure(history, self._plan), status)
        words = "\n".join([*self.notes[-SHOWN_NOTES:], words])
        bundle: dict[str, object] = {"text/plain": words}
        title = history.path.parent.name
        if status != "finished":
            title += f" ({STATUS_WORDS.get(status, status)})"
        self._picture = ""
        if self._guard(self._draw, history, title, 120) and self._picture:
            bundle["image/png"] = self._picture
        self._handle.update(bundle, raw=True)
        if self._batch:
            write_to_log(words)

    def _draw(self, history: History, title: str = "", dpi: float = 96) -> None:
        from .plots import figure_png, plot_history

        began = self._clock()
        if history.select("train") or history.select("eval"):
            png = figure_png(plot_history(history, title), dpi)
            self._picture = base64.b64encode(png).decode("ascii")
        self._drawing_seconds = self._clock() - began

    def _bundle(self, history: History) -> dict[str, object]:
        """The running view as HTML, and as text for what shows no HTML."""
        progress = measure(history, self._plan)
        now = self._clock()
        page = progress_html(
            history.path.parent.name, progress, now - self._began, now - self._seen
        )
        if self._picture:
            page += (
                f'<img alt="loss so far" style="max-width:100%;margin-top:10px" '
                f'src="data:image/png;base64,{self._picture}">'
            )
        page += notes_html(self.notes)
        return {"text/html": page, "text/plain": describe(progress)}


def progress_html(
    name: str, progress: Progress, elapsed: float, waited: float = 0.0
) -> str:
    """The running view's bar and figures, in colours that suit light and dark pages.

    `elapsed` is seconds since the start of this session, `waited` since the last row.
    """
    left = progress.seconds_left
    loss, validation = progress.loss, progress.validation_loss
    speed = progress.tokens_per_second
    facts = {
        "elapsed": duration(elapsed),
        "time left": None if left is None else duration(max(0.0, left - waited)),
        "text tokens/s": None if speed is None else f"{speed:,.0f}",
        "text tokens": None if progress.tokens is None else count(progress.tokens),
        "loss": None if loss is None else loss_text(loss),
        "perplexity": None if loss is None else perplexity_text(loss),
        "validation loss": None if validation is None else loss_text(validation),
        "skipped steps": str(progress.skipped_steps) if progress.skipped_steps else "",
    }
    cells = "".join(
        f'<div><div style="opacity:.65;font-size:85%">{label}</div>{value or "…"}</div>'
        for label, value in facts.items()
        if value != ""
    )
    return (
        '<div style="max-width:800px;font-variant-numeric:tabular-nums">'
        '<div style="display:flex;justify-content:space-between">'
        f"<b>{html.escape(name)}</b><span>{step_text(progress)}</span></div>"
        '<div style="height:8px;margin:6px 0 8px;border-radius:4px;'
        'background:rgba(128,128,128,.25)">'
        f'<div style="width:{100 * progress.fraction:.1f}%;height:100%;'
        'border-radius:4px;background:#0072B2"></div></div>'
        '<div style="display:flex;flex-wrap:wrap;gap:4px 26px">'
        f"{cells}</div></div>"
    )


def notes_html(notes: Sequence[str]) -> str:
    """The last notes, small, below the figures."""
    lines = "".join(f"<div>{html.escape(note)}</div>" for note in notes[-SHOWN_NOTES:])
    return f'<div style="opacity:.65;font-size:85%;margin-top:6px">{lines}</div>'


def write_to_log(line: object) -> None:
    """Write a line to the stderr that this process was started with.

    In a kernel `sys.stderr` is a cell's output, but its `fileno()` is the original
    stream, which the kernel's parent collects. Does nothing where there is none.
    """
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"{line}\n".encode())


def choose_view(view: object = None) -> View:
    """The view for `train(cfg, view=…)`.

    None or True: the cell's in a Jupyter kernel, else the terminal's. False: silent.
    A View is taken as it is, a callable gets each new state of the History. Anything
    else is a TypeError.
    """
    if view is None or view is True:
        return CellView() if _in_kernel() else TerminalView()
    if view is False:
        return SilentView()
    if isinstance(view, View):
        return view
    if callable(view):
        return CallbackView(view)
    raise TypeError(
        f"view={view!r} is a {type(view).__name__}; expected None (a live view), False "
        "(silent) or a function of the history, for example view=False."
    )


def _in_kernel() -> bool:
    if "ipykernel" not in sys.modules:
        return False
    from ipykernel.zmqshell import ZMQInteractiveShell
    from IPython.core.getipython import get_ipython

    return isinstance(get_ipython(), ZMQInteractiveShell)
