"""Data before training, for a cell or a terminal: figures, rows to look at, samples."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .page import page
from .tables import Facts, Table


@dataclass(repr=False)
class Preview:
    """Samples as their documents, and how the rows were understood.

    What is in the loss is between ⟦ and ⟧: in a cell on a tint, and the `special` strings
    of a template faint.
    """

    title: str
    samples: Sequence[Sequence[str]]
    special: Sequence[str]

    def __repr__(self) -> str:
        return "\n\n".join([self.title, *map("\n".join, self.samples)])

    def _repr_html_(self) -> str:
        escaped = "|".join(re.escape(html.escape(each)) for each in self.special)
        faint = r'<span class="faint">\g<0></span>'
        tint = str.maketrans({"⟦": '<span class="learned">', "⟧": "</span>"})
        about = "Each box is a document; what is learned is on a tint."
        body = f'{html.escape(self.title)}<div class="faint">{about}</div>'
        for sample in self.samples:
            text = "</div><div>".join(map(html.escape, sample))
            text = re.sub(rf"(?:{escaped})(?:\w+(?=\n))?", faint, text).translate(tint)
            body += f'<div class="card sample"><div>{text}</div></div>'
        return page(body)


@dataclass(repr=False)
class DataReport:
    """Figures of data `files`; by kind the lines to look at and why; the heights of bars
    by title; samples."""

    facts: Facts
    files: Sequence[str]
    findings: dict[str, dict[int | str, str]]
    charts: dict[str, np.ndarray]
    preview: Preview

    @property
    def table(self) -> Table:
        """The kinds of `findings`, with the first lines of each."""
        rows = []
        for kind, lines in self.findings.items():
            first = [f"line {n}, {why}" for n, why in [*lines.items()][:3]]
            first += ["…"] * (len(lines) > len(first))
            rows.append([kind, f"{len(lines):,}", "\n".join(first)])
        return Table("Rows to look at", ["kind", "rows", "first"], rows)

    def __repr__(self) -> str:
        return f"{self.facts}\n\n{self.table}"

    def _repr_html_(self) -> str:
        charts = ""
        for title, heights in self.charts.items():
            shares = heights / heights.max(initial=1)
            bars = "".join(f'<i style="height:{share:.1%}"></i>' for share in shares)
            charts += f'<div><div class="bars">{bars}</div>{title}</div>'
        body = f'{self.facts.html()}<div class="facts faint">{charts}</div>'
        body += self.table.html()
        if count := len(self.preview.samples):
            samples = self.preview._repr_html_()
            body += f"<details><summary>{count} samples</summary>{samples}</details>"
        return page(body)
