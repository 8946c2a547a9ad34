"""Pretrain, fine-tune and inspect MiniMind language models from inside a notebook.

`import minimind_nb as mm`, then `mm.train(mm.TrainConfig(data_path="demo"))`. Names load
on first use, so importing the package loads neither torch nor matplotlib. They are
listed once, in the stub beside this file, which type checkers read.
"""

import ast
import importlib
import pkgutil
import sys
from typing import Any

__version__ = "0.1.0"

_STUB = ast.parse(pkgutil.get_data(__name__, "__init__.pyi") or b"")
_MODULES = {
    alias.name: f".{node.module}"
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_MODULES)  # noqa: PLE0605 # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name], __name__), name)
    if "IPython" in sys.modules:  # in a cell a mistake needs no traceback
        importlib.import_module(".errors", __name__).show_briefly()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
