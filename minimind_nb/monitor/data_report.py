"""Data before training, for a cell or a terminal: figures, rows to look at, samples."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .page import facts_row, page
from .tables import Facts

LEARNED, END = "\ue000", "\ue001"
"""Characters of private use around what is in the loss, in the text of a document."""
_NOTHING = "Nothing to leave out was found."
_LEGEND = "Each box is a document; what is learned is on a tint."


class Preview(list[str]):
    """Samples as text, below a line that says how the rows were understood.

    A sample is given as its documents. A terminal shows what is in the loss between ⟦
    and ⟧, a page on a tint, and `special` strings faint, each turn on a new line.
    """

    def __init__(
        self, title: str, samples: Sequence[Sequence[str]], special: Iterable[str] = ()
    ) -> None:
        marks = str.maketrans({LEARNED: "⟦", END: "⟧"})
        super().__init__("".join(sample).translate(marks) for sample in samples)
        self.title, self.samples = title, samples
        escaped = (re.escape(html.escape(each)) for each in special)
        self._special = re.compile(rf"(\n?(?:{'|'.join(escaped)})(?:\w+(?=\n))?)")

    def __repr__(self) -> str:
        return "\n\n".join([self.title, *self])

    def _repr_html_(self) -> str:
        return page(self.body())

    def body(self) -> str:
        """Return the HTML of the samples, without the style."""
        body = f'{html.escape(self.title)}<div class="faint">{_LEGEND}</div>'
        for sample in self.samples:
            documents = "".join(f"<div>{self._show(each)}</div>" for each in sample)
            body += f'<div class="card sample">{documents}</div>'
        return body

    def _show(self, document: str) -> str:
        shown = self._special.sub(
            r'<span class="faint">\1</span>', html.escape(document)
        )
        shown = shown.replace(LEARNED, '<span class="learned">')
        return shown.replace(END, "</span>")


class Finding(NamedTuple):
    """Rows to look at: what they are, [n, 4] numbers of their file and line and of those
    that they repeat (or -1), the first lines, a row, and code that leaves them out."""

    what: str
    rows: np.ndarray
    lines: str
    example: str
    code: str


class DataReport(Facts):
    """Figures of data by name; `findings` by kind, and samples in `preview`.

    `charts` are bars by title, and the number of the first that is marked.
    """

    def __init__(
        self,
        facts: dict[str, Any],
        findings: dict[str, Finding],
        charts: dict[str, tuple[np.ndarray, int]],
        preview: Preview,
    ) -> None:
        super().__init__(preview.title, facts)
        self.findings, self.charts, self.preview = findings, charts, preview

    def __repr__(self) -> str:
        parts = [super().__repr__()]
        for what, rows, lines, example, code in self.findings.values():
            parts.append(f"{len(rows):,} × {what}: {lines}\n  {example}\n  {code}")
        return "\n\n".join(parts if parts[1:] else [*parts, _NOTHING])

    def _repr_html_(self) -> str:
        facts = {name.replace("_", " "): text for name, text in self._table().rows}
        body = f'<div class="title">{html.escape(self.title)}</div>{facts_row(facts)}'
        charts = (_bars(title, *each) for title, each in self.charts.items())
        body += f'<div class="facts">{"".join(charts)}</div>'
        body += "<table>"
        for found in self.findings.values():
            what, _, lines, example, code = (html.escape(str(each)) for each in found)
            body += (
                f'<tr><td class="number">{len(found.rows):,}</td><td><b>{what}</b>: '
            )
            body += f'{lines}<div class="faint">{example}</div><code>{code}</code></td></tr>'
        body += "</table>" if self.findings else f"</table>{_NOTHING}"
        summary = f"<summary>{len(self.preview)} samples</summary>"
        return page(f"{body}<details>{summary}{self.preview.body()}</details>")


def _bars(title: str, heights: np.ndarray, marked: int) -> str:
    bars = "".join(
        f'<i class="{"marked" * (n >= marked)}" style="height:{share:.1%}"></i>'
        for n, share in enumerate(heights / heights.max(initial=1))
    )
    return f'<div class="chart faint"><div class="bars">{bars}</div>{title}</div>'
