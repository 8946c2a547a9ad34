"""Small tables that display themselves in a cell and a terminal."""

import html
import re
import unicodedata
from typing import Any

from .page import facts_row, page

WIDEST = 60  # columns of a terminal that a cell of a table may take
_NUMBER = re.compile(r"[-+]?([\d,]*\.?\d+(e[-+]\d+)?|nan|inf)( ?%| [KMG]iB)?")


class Table:
    """Rows of text with named columns below a title.

    A terminal gets each cell on one line of at most 60 columns; a page gets the whole
    text, which `rows` holds too, with numbers to the right, below the HTML `above`.
    """

    above = ""

    def __init__(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        self.title = title
        self.columns = columns
        self.rows = rows

    def __repr__(self) -> str:
        lines = [self.columns, *self.rows] if self.rows else []
        return _align(self.title, [[*map(shorten, row)] for row in lines if row])

    def html(self) -> str:
        """Return HTML for a `page`: the title, and the rows below the columns' names."""
        kinds = [
            ' class="number"' * all(map(_NUMBER.fullmatch, filter(None, column)))
            for column in zip(*self.rows, strict=True)
        ]
        head = [self.columns] if self.columns and self.rows else []
        rows = ""
        for number, row in enumerate([*head, *self.rows]):
            tag = "th" if number < len(head) else "td"
            cells = zip(kinds, map(html.escape, row), strict=True)
            line = "".join(f"<{tag}{kind}>{text}</{tag}>" for kind, text in cells)
            rows += f"<tr>{line}</tr>"
        return (
            f'<div class="title">{html.escape(self.title)}</div><table>{rows}</table>'
        )

    def _repr_html_(self) -> str:
        return page(self.above + self.html())


class Facts(dict[str, Any]):
    """Names with texts or numbers, in order, below a title; with a `note`, a card."""

    def __init__(self, title: str, facts: dict[str, Any], note: str = "") -> None:
        super().__init__(facts)
        self.title = title
        self.note = note

    def _table(self) -> Table:
        rows = [[n, f"{v:,}" if isinstance(v, int) else v] for n, v in self.items()]
        rows = [[n, v if isinstance(v, str) else f"{v:,.6g}"] for n, v in rows]
        return Table(self.title, [], rows)

    def html(self) -> str:
        """Return HTML for a `page`: a table, or title, note, and facts side by side."""
        if not self.note:
            return self._table().html()
        title, note = map(html.escape, (self.title, self.note))
        facts = facts_row(dict(self._table().rows))
        return f'<div class="card"><div class="title">{title}</div>{note}{facts}</div>'

    def __repr__(self) -> str:
        head = "\n".join(filter(None, [self.title, self.note]))
        return _align(head, self._table().rows)

    def _repr_html_(self) -> str:
        return page(self.html())


def shorten(text: str, width: int = WIDEST) -> str:
    """Return the text on one line, cut with "…" if it is wider than `width` columns."""
    line = " ".join(text.split())
    if columns_of(line) <= width:
        return line
    while columns_of(line) >= width:
        line = line[: min(len(line) - 1, width)]
    return f"{line}…"


def columns_of(text: str) -> int:
    """Return the columns a text takes in a terminal; a Chinese character takes two."""
    return sum(1 + (unicodedata.east_asian_width(one) in "WF") for one in text)


def _align(title: str, rows: list[list[str]]) -> str:
    """Return the rows below the title, each column as wide as its widest cell."""
    widths = [max(map(columns_of, cells)) for cells in zip(*rows, strict=True)]
    lines = [title]
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = (cell + " " * (width - columns_of(cell)) for cell, width in cells)
        lines.append(f"  {'  '.join(padded)}".rstrip())
    return "\n".join(lines)
