"""The metrics file: one JSON object a line, written by rank 0, read by everyone.

Standard library only, because every worker imports this module.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, Self

METRICS_NAME = "metrics.jsonl"
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

RESTARTS = ("start", "resume")
NAMES_SHOWN = 6  # in an error about a folder that is no run

Row = dict[str, Any]


class MetricsLog:
    """Appends rows to a metrics file, each flushed to the system before it returns.

    Use it as a context manager or call `close`. A half line left at the end of the
    file by a killed writer is closed with a newline and never rewritten. `silent()`
    gives a log with the same methods that writes nothing, for ranks above 0.

    Raises OSError when the file cannot be opened or written (a full disk).
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        # Unbuffered and in append mode: a row is one write, so a reader in another
        # process sees it at once and a kill tears at most the last line.
        self._file = None if path is None else open(path, "ab", buffering=0)
        self._torn = self._file is not None and _ends_in_half_line(
            Path(self._file.name)
        )

    @classmethod
    def silent(cls) -> Self:
        return cls(None)

    def append(self, kind: str, **fields: object) -> None:
        """Write one row. `kind` is "train", "eval", "sample" or "event".

        Values are numbers, strings, booleans, None, lists and dicts of these, and
        anything `float()` takes, such as a 0-d tensor. NaN and the infinities are
        written as the strings "nan", "inf" and "-inf", which keeps a line valid JSON.
        """
        if self._file is None:
            return
        row = {"kind": kind} | {name: _plain(name, fields[name]) for name in fields}
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        left = memoryview(b"\n" + line if self._torn else line)
        self._torn = True
        while left:
            left = left[self._file.write(left) :]
        self._torn = False

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class History:
    """The rows of a metrics file, as they stand after every resume.

    `rows` holds them in order; numbers that were not finite are floats again (in
    every kind but "sample", whose strings are a model's answers). When a run starts
    again at step s, earlier rows of a higher step are dropped: they were computed,
    but the weights they describe were lost. `damaged_lines` counts whole lines that
    are no metrics row, for example the torn last line of a killed writer.

    `History(path)` takes a file that need not exist yet; `History.load` wants one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.rows: list[Row] = []
        self.damaged_lines = 0
        self._offset = 0
        self._file_id: tuple[int, int] | None = None
        self.refresh()

    @classmethod
    def load(cls, source: "str | os.PathLike[str] | History") -> "History":
        """Read a run folder, its metrics.jsonl, or whatever `os.fspath` makes of a run.

        A History is handed back as it is. Raises FileNotFoundError for a place that
        is no run (naming the runs below it) and ValueError for a file without rows.
        """
        if isinstance(source, History):
            return source
        history = cls(find_metrics(source))
        if history.damaged_lines and not history.rows:
            raise ValueError(
                f"{history.path}: none of its {history.damaged_lines} lines is a "
                f'metrics row (expected JSON objects with a "kind"). Give the run '
                f'folder, for example History.load("{history.path.parent}").'
            )
        return history

    def refresh(self) -> int:
        """Read what was appended since the last time; returns the number of new rows.

        A half line at the end stays unread until its newline comes. A file that was
        replaced or shortened is read again from its start.
        """
        try:
            with open(self.path, "rb") as file:
                state = os.fstat(file.fileno())
                file_id = (state.st_dev, state.st_ino)
                if file_id != self._file_id or state.st_size < self._offset:
                    self.rows, self.damaged_lines, self._offset = [], 0, 0
                    self._file_id = file_id
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return 0
        self._offset += len(whole) + len(newline)
        new_rows = 0
        for line in whole.split(b"\n"):
            if line.strip():
                row = _parse(line)
                if row is None:
                    self.damaged_lines += 1
                else:
                    self._take(row)
                    new_rows += 1
        return new_rows

    def _take(self, row: Row) -> None:
        restarts = row["kind"] == "event" and row.get("event") in RESTARTS
        if restarts and "step" in row:
            step = row["step"]
            self.rows = [old for old in self.rows if old.get("step", 0) <= step]
        self.rows.append(row)

    def select(self, kind: str) -> list[Row]:
        """The rows of one kind, oldest first."""
        return [row for row in self.rows if row["kind"] == kind]

    def column(self, kind: str, name: str) -> list[float]:
        """One number for each row of a kind; NaN where a row has no such number."""
        return [_number(row.get(name)) for row in self.select(kind)]

    def last(self, kind: str) -> Row | None:
        """The newest row of a kind, or None."""
        return next((row for row in reversed(self.rows) if row["kind"] == kind), None)

    @property
    def horizon(self) -> Row:
        """The newest start or resume row, which holds the totals of the plan, or {}."""
        for row in reversed(self.rows):
            if row["kind"] == "event" and row.get("event") in RESTARTS:
                return row
        return {}

    def __repr__(self) -> str:
        last = self.last("train") or {}
        damage = f", {self.damaged_lines} damaged lines" if self.damaged_lines else ""
        return (
            f"History({str(self.path)!r}: {len(self.rows)} rows, "
            f"step {last.get('step', 0)}{damage})"
        )


def find_metrics(source: str | os.PathLike[str]) -> Path:
    """The metrics file of a run folder or of a path to the file itself.

    Raises FileNotFoundError saying what is there instead and what to type.
    """
    path = Path(source)
    if path.is_file():
        return path
    if (path / METRICS_NAME).is_file():
        return path / METRICS_NAME
    expected = f"expected a run folder with a {METRICS_NAME}"
    if not path.exists():
        near = path.parent if path.parent.is_dir() else Path()
        raise FileNotFoundError(
            f"{path} does not exist; {expected}. {_suggest_runs(near)}"
        )
    names = sorted(entry.name for entry in path.iterdir())
    shown, hidden = names[:NAMES_SHOWN], len(names[NAMES_SHOWN:])
    more = f" and {hidden} more" if hidden else ""
    holds = f"holds {', '.join(shown)}{more}" if names else "is an empty folder"
    raise FileNotFoundError(
        f"{path} {holds} but no {METRICS_NAME}; {expected}. {_suggest_runs(path)}"
    )


def _suggest_runs(folder: Path) -> str:
    runs = sorted(found.parent for found in folder.glob(f"*/{METRICS_NAME}"))
    if not runs:
        return (
            "A training run writes it under out_dir: "
            'mm.train(cfg), then History.load("out/pretrain_512").'
        )
    others = (
        f" (also {', '.join(run.name for run in runs[1:NAMES_SHOWN])})"
        if runs[1:]
        else ""
    )
    return f'Runs in {folder}: History.load("{runs[0]}"){others}.'


def _ends_in_half_line(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _plain(name: str, value: object) -> object:
    """`value` as JSON can hold it, non-finite floats as strings."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(name, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"metrics field {name!r} is a {type(value).__name__}; expected numbers, "
            "strings, booleans, None, or lists and dicts of these. Convert it before "
            "append, for example with str()."
        ) from error
    return number if math.isfinite(number) else str(number)


def _parse(line: bytes) -> Row | None:
    """The row in a line, or None where the line is no metrics row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        return None
    if row["kind"] != "sample":
        row = _restore(row)
    return row if math.isfinite(_number(row.get("step", 0))) else None


def _restore(value: Any) -> Any:
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [_restore(item) for item in value]
    if isinstance(value, dict):
        return {name: _restore(item) for name, item in value.items()}
    return value


def _number(value: object) -> float:
    """`value` as a float, NaN where it is not one number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer beyond 1e308
        return math.nan
