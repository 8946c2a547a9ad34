"""Errors of the user's making, shown in a cell as their text instead of a traceback."""

import dis
import functools
import inspect
import traceback
from typing import Any

from .session import is_watched


def concise(value: Any) -> Any:
    """Return a function whose deliberate errors a cell shows briefly, or change a class.

    A class with a base is left alone. Batch runs keep every traceback.
    """
    if inspect.isclass(value):
        for name, own in [*vars(value).items()] if value.__bases__ == (object,) else ():
            if inspect.isfunction(own) or name == "__new__":
                setattr(value, name, concise(getattr(value, name)))
        return value

    @functools.wraps(value)
    def call(*arguments: Any, **settings: Any) -> Any:
        try:
            return value(*arguments, **settings)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            if _is_deliberate(error) and is_watched():
                shown: Any = error  # IPython shows what this returns
                shown._render_traceback_ = functools.partial(_render_once, error)
            raise

    return call


def _is_deliberate(error: Exception) -> bool:
    """Return whether the package raised it, or lacks the name of an argument."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    own = frame.f_globals.get("__name__", "").partition(".")[0] == __package__
    raised = dis.opname[frame.f_code.co_code[frame.f_lasti]] == "RAISE_VARARGS"
    return own and (raised or isinstance(error, TypeError) and "argument" in str(error))


def _render_once(error: Any) -> list[str]:
    del error._render_traceback_  # so that %tb shows the traceback
    text = f"{type(error).__name__}: {error}"
    return [text, "", "Type %tb for the full traceback."]
