"""Small tables that display themselves in a cell, a terminal and Markdown."""

import html
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from .page import facts_row, page

WIDEST = 60  # columns of a terminal that a cell of a table may take
_NUMBER = re.compile(r"[-+]?([\d,]*\.?\d+(e[-+]\d+)?|nan|inf)( ?%| [KMG]iB)?")


class Table:
    """Rows of text with named columns below a title and a `note`, if any.

    A terminal gets each cell on one line of at most 60 columns; a page gets the whole
    text, which `rows` holds too, with numbers to the right.
    """

    def __init__(
        self, title: str, columns: list[str], rows: list[list[str]], note: str = ""
    ) -> None:
        self.title = title
        self.columns = columns
        self.rows = rows
        self.note = note

    def markdown(self) -> str:
        """Return the table in Markdown, in which a bar ends a cell, a new line a row."""
        names = self.columns or [""] * max(map(len, self.rows), default=0)
        lines = [names, ["---"] * len(names), *self.rows]
        rows = " |\n| ".join(
            " | ".join(" ".join(text.split()).replace("|", "\\|") for text in row)
            for row in lines
        )
        return f"| {rows} |"

    def __repr__(self) -> str:
        lines = [self.columns, *self.rows] if self.rows else []
        return _align(self, [[*map(shorten, row)] for row in lines if row])

    def _repr_html_(self) -> str:
        kinds = [_kind(column) for column in zip(*self.rows, strict=True)]
        lines = [("td", row) for row in self.rows]
        if self.columns and self.rows:
            lines.insert(0, ("th", self.columns))
        rows = ""
        for tag, row in lines:
            cells = zip(kinds, map(html.escape, row), strict=True)
            line = "".join(f"<{tag}{kind}>{text}</{tag}>" for kind, text in cells)
            rows += f"<tr>{line}</tr>"
        return page(f"{heading(self)}<table>{rows}</table>")


class Facts(dict[str, Any]):
    """Names with texts or numbers, in order, below a title and a `note`, if any."""

    def __init__(self, title: str, facts: dict[str, Any], note: str = "") -> None:
        super().__init__(facts)
        self.title = title
        self.note = note

    def _table(self) -> Table:
        texts = {n: v if isinstance(v, str) else f"{v:,.6g}" for n, v in self.items()}
        return Table(self.title, [], [*map(list, texts.items())], self.note)

    def card(self) -> str:
        """Return HTML for a `page`: the facts side by side, below title and note."""
        facts = facts_row(dict(self._table().rows))
        return f'<div class="card">{heading(self)}{facts}</div>'

    def markdown(self) -> str:
        """Return the facts as a table in Markdown, without the title."""
        return self._table().markdown()

    def __repr__(self) -> str:
        return _align(self, self._table().rows)

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()


def heading(shown: Table | Facts) -> str:
    """Return HTML for a `page`: the title, and the note below it."""
    note = f"<div>{html.escape(shown.note)}</div>" if shown.note else ""
    return f'<div class="title">{html.escape(shown.title)}</div>{note}'


def _kind(column: Iterable[str]) -> str:
    """Return the class of a column's cells: numbers stand to the right."""
    texts = [*filter(None, column)]
    return ' class="number"' if texts and all(map(_NUMBER.fullmatch, texts)) else ""


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


def _align(shown: Table | Facts, rows: list[list[str]]) -> str:
    """Return the rows below title and note, each column as wide as its widest cell."""
    widths = [max(map(columns_of, cells)) for cells in zip(*rows, strict=True)]
    lines = [*filter(None, [shown.title, shown.note])]
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = (cell + " " * (width - columns_of(cell)) for cell, width in cells)
        lines.append(f"  {'  '.join(padded)}".rstrip())
    return "\n".join(lines)
