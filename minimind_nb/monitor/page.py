"""HTML for the outputs of a cell: one style, legible on light and dark pages."""

import functools
import html
from importlib import resources


@functools.cache
def read_asset(name: str) -> str:
    """Return a style sheet or script of this folder."""
    return (resources.files("minimind_nb.monitor") / name).read_text("utf-8")


def page(body: str) -> str:
    """Return the HTML of an output: `body` (HTML) in the common style, page.css.

    Dollars in it are no mathematics: two classes say so, to MathJax 2 and 3.
    """
    style = f"<style>{read_asset('page.css')}</style>"
    return f'{style}<div class="minimind tex2jax_ignore mathjax_ignore">{body}</div>'


def facts_row(facts: dict[str, str]) -> str:
    """Return names above their values, side by side; both are plain text."""
    cells = (
        f'<div><div class="faint">{html.escape(name)}</div>{html.escape(text)}</div>'
        for name, text in facts.items()
    )
    return f'<div class="facts">{"".join(cells)}</div>'
