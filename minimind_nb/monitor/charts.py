"""One chart for one run and for many: interactive in a page, and a picture of it."""

import base64
import html
import io
import itertools
import json
import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from . import curves
from .curves import KINDS, PARTS, X_LABELS, Y_LABELS
from .metrics import History
from .page import page, read_asset
from .progress import outcome
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_OUTPUT = 300_000  # bytes of a bundle, which has the picture twice
MOST_NUMBERS = 2_000  # of a curve


class Chart:
    """A chart of one or several runs; `inspect` describes the choices.

    A cell shows it, interactive where scripts run and as a picture elsewhere. `figure`
    is that picture as a matplotlib Figure, to change before `savefig`. `notes` are
    added to the `subtitle`, which like `title` may be changed; a `table` stands below.
    """

    def __init__(
        self,
        histories: Sequence[History],
        *,
        x: str = "step",
        y: str = "loss",
        smoothing: float | None = None,
        names: Sequence[str] = (),
        notes: Sequence[str] = (),
        table: Table | None = None,
    ) -> None:
        self._names = names or [history.path.parent.name for history in histories]
        self._table, self._alone = table, len(histories) == 1
        self._runs = [curves.read_run(history) for history in histories]
        tables = [run[kind] for run in self._runs for kind in KINDS]
        known = {
            y: Y_LABELS[y] for y in Y_LABELS if any(y in table for table in tables)
        }
        self._labels = known or Y_LABELS
        if {history.stage for history in histories} == {"dpo"}:
            self._labels = self._labels | {"loss": "loss (nats per pair)"}
        for name, value, offered in (("x", x, X_LABELS), ("y", y, self._labels)):
            if value not in offered:
                raise ValueError(
                    f"{name}={value!r} is not a choice of this chart; expected "
                    f"{name}={' or '.join(map(repr, offered))}."
                )
        self._choices = {"x": x, "y": y}
        rows = max(len(run["train"]["step"]) for run in self._runs)
        self._smoothing = curves.choose_smoothing(rows, smoothing)
        self.title = self._names[0] if self._alone else f"{len(self._names)} runs"
        about = outcome(histories[0]) if self._alone else "with dots: validation"
        words = [about, *notes]
        if any(len(run["resume"]["step"]) for run in self._runs):
            words.append("dashed: resumed")
        if any(np.isinf(column).any() for t in tables for column in t.values()):
            words.append("×: not finite")
        self.subtitle = " · ".join(words)

    def data(self, most: int = MOST_NUMBERS) -> dict[str, Any]:
        """Return what is drawn: quantities with their curves of at most `most` numbers,
        and for each run the places of their points and of its resumes."""
        ys: dict[str, Any] = {}
        for y, label in self._labels.items():
            ys[y] = {"label": label, "log": y == "perplexity", "curves": []}
        runs = []
        for run, tables in enumerate(self._runs):
            runs.append({k: curves.places(table, most) for k, table in tables.items()})
            for kind, y in itertools.product(KINDS, ys):
                drawn = ys[y]["curves"]
                for part, values in enumerate(tables[kind].get(y, np.empty((0, 0))).T):
                    words = [] if self._alone else [self._names[run]]
                    words += [f"{PARTS[y]} {part}"] if y in PARTS else []
                    number = len(drawn) if self._alone else run
                    looks = {"name": ", ".join(words) or KINDS[kind], "number": number}
                    numbers = curves.thin(values, runs[run][kind]["rows"])
                    drawn.append({"run": run, "role": kind, **looks, **numbers})
        words = {"title": self.title, "subtitle": self.subtitle}
        words |= {"choices": self._choices, "smoothing": self._smoothing}
        return words | {"x": X_LABELS, "ys": ys, "runs": runs}

    def html(self, key: str = "", picture: bytes = b"") -> str:
        """Return the chart as HTML, in which the script replaces text and picture.

        A reader's zoom and other choices outlive the replacement of a chart by one of
        the same `key`. `picture` is a PNG for pages without scripts.
        """
        encoded = base64.b64encode(picture).decode()
        body = f'<div class="faint">{html.escape(repr(self))}</div>'
        if picture:
            body += f'<img alt="" width="100%" src="data:image/png;base64,{encoded}">'
        below = self._table._repr_html_() if self._table else ""
        below += f"<script>{read_asset('chart.js')}</script>"
        room = LARGEST_OUTPUT - len(encoded) - len(page(body + below).encode()) - 2_000
        text, most = "", MOST_NUMBERS
        while not text or (len(text) > room and most > 1):
            data = {"key": key, **self.data(most)}
            text = json.dumps(data, default=_plain, separators=(",", ":"))
            most = most * 2 // 3
        text = text.replace("<", "\\u003c")
        body = f'<script type="application/json">{text}</script>{body}'
        return page(f'<div class="minimind-chart">{body}</div>{below}')

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
        image = (
            Image.open(whole).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE)
        )
        image.save(small, "png", optimize=True)
        return small.getvalue()

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        picture = self.png()
        bundle = {"text/html": self.html(picture=picture), "text/plain": repr(self)}
        return bundle | {"image/png": base64.b64encode(picture).decode()}

    def __repr__(self) -> str:
        line = f"{self.title}: {self.subtitle}" if self.title else self.subtitle
        return f"{line}\n{self._table!r}" if self._table else line


def inspect(source: str | os.PathLike[str] | History, **choices: Any) -> Chart:
    """Chart a run: `mm.inspect("out/pretrain_512", y="grad_norm")`.

    It begins with `y`, "loss" or what else the run has ("perplexity", "grad_norm", …),
    over `x`, "step", "tokens" (text tokens) or "minutes" (training time, all sessions).
    `smoothing` is the weight of the past in the moving average, 0 (none) up to 1, None
    for one that suits the number of rows. A value that is not finite interrupts its
    curve and is marked at the top. Raises ValueError for an invalid choice, and what
    `History.load` raises.
    """
    return Chart([History.load(source)], **choices)


def _plain(values: np.ndarray) -> list[float | str | None]:
    """Return numbers for JSON: whole ones, others of six digits; NaN as None."""
    short = [float(f"{n:.6g}") if n % 1 else int(n) for n in values.tolist()]
    return [{"nan": None, "inf": "Infinity"}.get(str(n), n) for n in short]
