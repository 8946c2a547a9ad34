"""Errors of the user's making, shown in a cell as their text instead of a traceback.

IPython shows what an exception's `_render_traceback_` returns, if it has one.
"""

import dis
import functools
import inspect
from collections.abc import Callable
from typing import Any

from .session import is_watched

_KINDS = ValueError, TypeError, OSError, RuntimeError


def concise(value: Any) -> Any:
    """Return a function whose deliberate errors are shown briefly, or change a class so.

    Logs and batch runs keep the traceback, as do errors that are a fault of the package.
    Classes with a base are left alone.
    """
    if not inspect.isclass(value):
        return _wrap(value)
    for name, own in [*vars(value).items()] if value.__bases__ == (object,) else ():
        public = inspect.isfunction(own) and not name.startswith("_")
        if public or name in ("__new__", "__init__"):
            setattr(value, name, _wrap(getattr(value, name)))
    return value


def _wrap(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **settings: Any) -> Any:
        try:
            return function(*arguments, **settings)
        except _KINDS as error:
            if _is_deliberate(error) and is_watched():
                shown: Any = error
                shown._render_traceback_ = functools.partial(_render_once, error)
            raise

    return call


def _is_deliberate(error: Exception) -> bool:
    """Return whether a `raise` of this package made the error, or a name it has not."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if not trace:
        return False
    module = trace.tb_frame.f_globals.get("__name__", "")
    if module.partition(".")[0] != __package__:
        return False
    opcode = trace.tb_frame.f_code.co_code[trace.tb_lasti]
    call = isinstance(error, TypeError) and "argument" in str(error)
    return call or dis.opname[opcode] == "RAISE_VARARGS"


def _render_once(error: Any) -> list[str]:
    """Return the lines to show, the first time: `%tb` then shows the traceback."""
    del error._render_traceback_
    text = f"{type(error).__name__}: {error}"
    return [text, "", "Type %tb for the full traceback."]
