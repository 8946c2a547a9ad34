"""Small tables that display themselves in a cell and in a terminal."""

import html
import unicodedata
from typing import Any

WIDEST = 60  # columns of a terminal that a cell of a table may take
STYLE = "text-align:left;vertical-align:top;white-space:pre-wrap"


class Table:
    """Rows of text with named columns below a title.

    A terminal gets each cell on one line of at most 60 columns; a page gets the whole
    text, which `rows` holds too.
    """

    def __init__(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        self.title = title
        self.columns = columns
        self.rows = rows

    def __repr__(self) -> str:
        lines = [self.columns, *self.rows] if self.rows else []
        return _align(self.title, [[*map(shorten, row)] for row in lines])

    def _repr_html_(self) -> str:
        columns = self.columns if self.rows else []
        page = f"<b>{html.escape(self.title)}</b><table>"
        for tag, row in [("th", columns), *(("td", row) for row in self.rows)]:
            cells = (f"<{tag} style='{STYLE}'>{html.escape(t)}</{tag}>" for t in row)
            page += f"<tr>{''.join(cells)}</tr>"
        return f"{page}</table>"


class Facts(dict[str, Any]):
    """Names with texts or numbers, in order, below a title."""

    def __init__(self, title: str, facts: dict[str, Any]) -> None:
        super().__init__(facts)
        self.title = title

    def _rows(self) -> list[list[str]]:
        return [
            [name, value if isinstance(value, str) else f"{value:,.6g}"]
            for name, value in self.items()
        ]

    def __repr__(self) -> str:
        return _align(self.title, self._rows())

    def _repr_html_(self) -> str:
        return Table(self.title, [], self._rows())._repr_html_()


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
