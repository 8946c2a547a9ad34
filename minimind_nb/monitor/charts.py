"""One chart for one run and for many: interactive in a page, and a picture of it."""

import base64
import html
import io
import json
import math
import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from . import curves
from .curves import KINDS, X_LABELS, Y_LABELS
from .metrics import History
from .page import page, read_asset
from .progress import outcome
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_OUTPUT = 300_000  # bytes of a bundle, which has the picture twice
MOST_NUMBERS = 2_000, 1_400, 1_000, 700, 500, 350, 250, 150, 100, 50  # of a curve
SEVERAL = "with markers: validation · thin: training"


class Chart:
    """A chart of one or several runs; `plot_history` describes the choices.

    A cell shows it, interactive where scripts run and as a picture elsewhere. `figure`
    is that picture as a matplotlib Figure, to change before `savefig`.
    """

    def __init__(
        self,
        histories: Sequence[History],
        title: str | None = None,
        *,
        x: str = "step",
        y: str = "loss",
        smoothing: float | None = None,
        log_x: bool = False,
        log_y: bool | None = None,
        names: Sequence[str] = (),
        notes: Sequence[str] = (),
        table: Table | None = None,
    ) -> None:
        self.alone = len(histories) == 1
        self._names = names or [history.path.parent.name for history in histories]
        first = self._names[0] if self.alone else f"{len(self._names)} runs"
        self.title = first if title is None else title
        words = outcome(histories[0]) if self.alone else SEVERAL
        self.subtitle = " · ".join([words, *notes]) if self.title else ""
        self._histories, self._table = histories, table
        self._tables = [curves.read_run(history) for history in histories]
        columns = [kind for tables in self._tables for kind in tables.values()]
        known = [n for n in Y_LABELS if any(not np.isnan(c[n]).all() for c in columns)]
        self._labels = {name: Y_LABELS[name] for name in known} or Y_LABELS
        if {history.stage for history in histories} == {"dpo"}:
            self._labels = self._labels | {"loss": "loss (nats per pair)"}
        for name, value, offered in (("x", x, X_LABELS), ("y", y, self._labels)):
            if value not in offered:
                raise ValueError(
                    f"{name}={value!r} is not a choice of this chart; expected "
                    f"{name}={' or '.join(map(repr, offered))}."
                )
        counts = [len(tables["train"]["step"]) for tables in self._tables]
        self._weights = [curves.choose_smoothing(n, smoothing) for n in counts]
        self.choices = {"x": x, "y": y, "smoothing": smoothing}
        self.choices |= {"log_x": log_x, "log_y": log_y}

    def data(self, most: int = MOST_NUMBERS[0]) -> dict[str, Any]:
        """Return what is drawn: quantities with their curves of at most `most` numbers,
        and for each run the places of their points and of its resumes."""
        runs, ys = [], {}
        for y, label in self._labels.items():
            ys[y] = {"label": label, "log": y == "perplexity", "curves": []}
        for number, history in enumerate(self._histories):
            tables, label = self._tables[number], self._names[number]
            grids = {kind: curves.make_grid(tables[kind], most) for kind in KINDS}
            resumes = curves.places(tables["event"], slice(None))
            run = {"smoothing": self._weights[number], "grids": grids}
            runs.append(run | {"resumes": resumes})
            about = history, tables, grids, "" if self.alone else label
            for y, quantity in ys.items():
                for curve in curves.read_curves(y, *about):
                    quantity["curves"].append({"run": number, **curve})
        words = {"title": self.title, "subtitle": self.subtitle, "alone": self.alone}
        return words | {"choices": self.choices, "x": X_LABELS, "ys": ys, "runs": runs}

    def html(self, key: str = "", picture: bytes = b"") -> str:
        """Return the chart as HTML, in which the script replaces text and picture."""
        encoded = base64.b64encode(picture).decode()
        body = f'<div class="faint">{html.escape(repr(self))}</div>'
        if picture:
            style = 'alt="" style="max-width:100%"'
            body += f'<img {style} src="data:image/png;base64,{encoded}">'
        below = self._table._repr_html_() if self._table else ""
        below += f"<script>{read_asset('chart.js')}</script>"
        room = LARGEST_OUTPUT - len(encoded) - len(page(body + below).encode()) - 2_000
        text = ""
        for most in MOST_NUMBERS:
            data = {"key": key, **self.data(most)}
            text = json.dumps(data, default=_plain, separators=(",", ":"))
            if len(text) < room:
                break
        text = text.replace("<", "\\u003c")
        text = f'<script type="application/json">{text}</script>'
        return page(f'<div class="minimind-chart">{text}{body}</div>{below}')

    @cached_property
    def figure(self) -> "Figure":
        """The picture as a matplotlib Figure, made without pyplot."""
        from .picture import draw  # loads matplotlib, which no running training needs

        return draw(self.data())

    def savefig(self, path: Any, dpi: float = 120) -> None:
        """Write the picture to a file, as PNG unless its name says otherwise."""
        self.figure.savefig(path, dpi=dpi)

    def png(self, dpi: float = 120) -> bytes:
        """Return the picture as PNG of 64 colours; at 120 dpi it is 1008 pixels wide."""
        from PIL import Image

        whole, small = io.BytesIO(), io.BytesIO()
        self.savefig(whole, dpi)
        image = Image.open(whole).convert("RGB").quantize(64)  # a third of the bytes
        image.save(small, "png", optimize=True)
        return small.getvalue()

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        picture = self.png()
        bundle = {"text/html": self.html(picture=picture), "text/plain": repr(self)}
        return bundle | {"image/png": base64.b64encode(picture).decode()}

    def __repr__(self) -> str:
        line = f"{self.title}: {self.subtitle}" if self.title else self.subtitle
        return f"{line}\n{self._table!r}" if self._table else line


def chart_html(
    histories: Sequence[History], *, key: str = "", picture: bytes = b"", **choices: Any
) -> str:
    """Return the chart of runs as HTML; `choices` are those of `plot_history`.

    A reader's zoom and other choices outlive the replacement of a chart by one of the
    same `key`. `picture` is a PNG for pages without scripts.
    """
    return Chart(histories, **choices).html(key, picture)


def plot_history(history: History, title: str | None = None, **choices: Any) -> Chart:
    """Return the chart of a run.

    It begins with `y`, "loss" or what else the run has ("perplexity", "grad_norm", …),
    over `x`, "step", "tokens" (text tokens) or "minutes" (training time, all sessions).
    `smoothing` is the weight of the past in the moving average, 0 (none) up to 1, None
    for one that suits the number of rows. `log_x` and `log_y` make an axis logarithmic.
    A value that is not finite interrupts its curve and is marked at the top. Raises
    ValueError for an invalid choice.
    """
    return Chart([history], title, **choices)


def inspect(source: str | os.PathLike[str] | History, **choices: Any) -> Chart:
    """Chart a run: `mm.inspect("out/pretrain_512", y="grad_norm")`.

    Takes, and raises, what `History.load` and `plot_history` do.
    """
    return plot_history(History.load(source), **choices)


def _plain(values: np.ndarray) -> list[float | int | None]:
    """Return numbers for JSON: whole ones, others of five digits, None if not finite."""
    short = [float(f"{n:.5g}") if n % 1 else n for n in values.tolist()]
    return [None if math.isnan(n) else int(n) if n % 1 == 0 else n for n in short]
