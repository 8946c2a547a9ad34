"""Errors of the user's making, shown in a cell as their text instead of a traceback."""

import linecache
import traceback
from typing import Any

from .session import current_session


def show_briefly() -> None:
    """Let cells show the errors that the package raises as their text; %tb shows all.

    Batch runs keep every traceback.
    """
    from IPython.core.getipython import get_ipython

    if shell := get_ipython():
        shell.set_custom_exc(
            (ValueError, TypeError, OSError, RuntimeError, ImportError), _show
        )


def _show(shell: Any, kind: type, error: Any, tb: Any, tb_offset: Any = None) -> None:
    if _is_deliberate(error, tb) and not current_session().batch:
        text = [f"{kind.__name__}: {error}", "", "Type %tb for the full traceback."]
        error._render_traceback_ = lambda: text  # IPython shows what this returns
    shell.showtraceback((kind, error, tb), tb_offset=tb_offset)
    vars(error).pop("_render_traceback_", None)  # so that %tb shows the traceback


def _is_deliberate(error: Exception, tb: Any) -> bool:
    """Return whether the package raised it, or called itself with wrong arguments."""
    *_, (frame, number) = traceback.walk_tb(tb)
    own = frame.f_globals.get("__name__", "").partition(".")[0] == __package__
    line = linecache.getline(frame.f_code.co_filename, number).strip()
    wrong = isinstance(error, TypeError) and "argument" in str(error)
    return own and (line.startswith("raise ") or wrong)
