"""The script that calls: every spawned process imports it once more."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType


def refuse_unguarded_script(caller: str) -> None:
    """Raise where spawned processes would run the calling script again.

    Spawned processes import the main script; a call of `caller` at its top level,
    outside `if __name__ == "__main__":`, would start processes from there without end.
    """
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if file is None or getattr(main, "__spec__", None) is not None:
        return
    path = Path(file)
    if not path.is_file():
        raise RuntimeError(
            f"the main script {file} cannot be read again by worker processes; save "
            "it as a file and run that, or use a notebook or the command line"
        )
    frame: FrameType | None = sys._getframe()
    while frame and not (
        frame.f_globals is main.__dict__ and frame.f_code.co_name == "<module>"
    ):
        frame = frame.f_back
    if frame and not _is_guarded(path, line := frame.f_lineno):
        raise RuntimeError(
            f"{path}:{line} calls {caller} at the top level of a script, and every worker "
            "process would run that line again. Put it under a guard:\n\n"
            '    if __name__ == "__main__":\n'
            f"        … = mm.{caller}(…)\n"
        )


def _is_guarded(path: Path, line: int) -> bool:
    """Whether a line of a script stands under `if __name__ == "__main__":`."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return True  # a compiled or zipped launcher: not a script that we can judge
    return any(
        isinstance(node, ast.If)
        and "__name__" in {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
        and node.lineno <= line <= (node.end_lineno or line)
        for node in tree.body
    )
