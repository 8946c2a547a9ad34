"""HTML for the outputs of a cell: one style, legible on light and dark pages."""

import base64
import functools
import html
from importlib import resources
from typing import Any


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


def show(body: str, text: str, before: Any = None, picture: bytes = b"") -> Any:
    """Show HTML in the common style, `text` where there is none, and return the display.

    If there is a display of `before`, its output is replaced. `picture` is a PNG for
    print, where no HTML is shown.
    """
    from IPython.display import display

    bundle = {"text/html": page(body), "text/plain": text}
    if picture:
        bundle["image/png"] = base64.b64encode(picture).decode()
    if before is None:
        return display(bundle, raw=True, display_id=True)
    before.update(bundle, raw=True)
    return before
