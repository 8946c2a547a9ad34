"""A short table of facts that shows itself in a cell and in a terminal."""

from __future__ import annotations

import html


class Facts(dict[str, str]):
    """Names and what is said of them, in order; `title` stands above."""

    def __init__(self, title: str, facts: dict[str, str]) -> None:
        super().__init__(facts)
        self.title = title

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(
            [self.title, *(f"  {name:<{width}}  {text}" for name, text in self.items())]
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in self.items()
        )
        return f"<b>{html.escape(self.title)}</b><table>{rows}</table>"
