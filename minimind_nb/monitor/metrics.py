"""The metrics file: one JSON object a line, written by rank 0, read by everyone.

Standard library only, because every worker imports this module.
"""

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from ..storage import verified

METRICS_NAME = "metrics.jsonl"
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
RESTARTS = ("start", "resume")

Row = dict[str, Any]


class MetricsLog:
    """Appends rows to a metrics file, each handed to the system before it returns.

    A half line left at the end by a killed writer is closed with a newline and never
    rewritten. What a full disk does not take is kept and goes ahead of the next row; a
    file that was deleted is made anew. Raises OSError when the file cannot be opened or
    written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._pending = b""
        self._open()

    def _open(self) -> None:
        self._file = open(self._path, "a+b", buffering=0)
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    @classmethod
    def silent(cls) -> Self:
        """A log that keeps nothing, for ranks above 0."""
        return cls(os.devnull)

    def append(self, kind: str, **fields: object) -> None:
        """Write one row. `kind` is "train", "eval", "sample" or "event".

        Values are numbers, strings, booleans, None and lists of these. NaN and the
        infinities become "nan", "inf" and "-inf": JSON has no such numbers.
        """
        row = {"kind": kind} | {name: _plain(value) for name, value in fields.items()}
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        self._pending += line.encode()
        try:
            self._write_pending()
        except OSError as error:
            if not verified.is_full_disk(error):
                raise

    def close(self) -> None:
        """Write what is pending, and close; raises OSError where the disk is full."""
        try:
            self._write_pending()
        finally:
            self._file.close()

    def _write_pending(self) -> None:
        if self._pending and not os.path.exists(self._path):
            self._file.close()
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            self._open()
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            return self.close()
        with contextlib.suppress(OSError):  # it says less than what is under way
            self.close()


class History:
    """The rows of a metrics file, as they stand after every resume.

    `rows` holds them in order; numbers that were not finite are floats again (not in
    "sample" rows, whose strings are a model's answers). When a run starts again at
    step s, earlier rows of a higher step are dropped: the weights they describe were
    lost. `damaged_lines` counts whole lines that are no metrics row. `History(path)`
    takes a file that need not exist yet; `History.load` wants one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.rows: list[Row] = []
        self.damaged_lines = 0
        self._inode = self._offset = 0
        self.refresh()

    @classmethod
    def load(cls, source: "str | os.PathLike[str] | History") -> "History":
        """Read a run folder, its metrics.jsonl or a `Run`; a History is handed back.

        Raises FileNotFoundError for a place that is no run (naming the runs there)
        and ValueError for a file without rows.
        """
        if isinstance(source, History):
            return source
        history = cls(find_metrics(source))
        if history.damaged_lines and not history.rows:
            raise ValueError(
                f"{history.path}: none of its {history.damaged_lines} lines is a metrics "
                'row, a JSON object with "kind" and "step"; give the folder of a run.'
            )
        return history

    def refresh(self) -> None:
        """Read what was appended since, a replaced or shortened file from its start."""
        if not self.path.is_file():
            return
        with open(self.path, "rb") as file:
            state = os.fstat(file.fileno())
            if state.st_ino != self._inode or state.st_size < self._offset:
                self.rows, self.damaged_lines, self._offset = [], 0, 0
                self._inode = state.st_ino
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole + newline)
        for line in filter(bytes.strip, whole.splitlines()):
            row = _parse(line)
            if row is None:
                self.damaged_lines += 1
                continue
            if _restarts(row):
                self.rows = [old for old in self.rows if old["step"] <= row["step"]]
            self.rows.append(row)

    def select(self, kind: str) -> list[Row]:
        """The rows of one kind, oldest first."""
        return [row for row in self.rows if row["kind"] == kind]

    def column(self, kind: str, name: str) -> list[float]:
        """One number for each row of a kind; NaN where a row has no such number."""
        values = [row.get(name) for row in self.select(kind)]
        return [float(v) if isinstance(v, int | float) else math.nan for v in values]

    def last(self, kind: str) -> Row | None:
        """The newest row of a kind, or None."""
        return next((row for row in reversed(self.rows) if row["kind"] == kind), None)

    @property
    def session(self) -> list[Row]:
        """The rows from the newest start or resume on; that one holds the totals."""
        starts = [index for index, row in enumerate(self.rows) if _restarts(row)]
        return self.rows[starts[-1] :] if starts else self.rows

    @property
    def stage(self) -> str:
        """The stage that the rows are of; where no event names one, pretraining."""
        return next(iter(self.session), {}).get("stage", "pretrain")

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write the training and validation rows as one table, replacing a file there.

        A column for each name, `kind` and `step` first, empty where a row has no such
        value. Lists take a column an entry: `peak_memory_gib_1` is the second process',
        `expert_load_0_3` the share of the fourth expert in the first layer. Raises
        ValueError for the metrics file itself.
        """
        kinds = ("train", "eval")
        rows = [dict(flatten(row)) for row in self.rows if row["kind"] in kinds]
        columns = dict.fromkeys(
            ["kind", "step", *(name for row in rows for name in row)]
        )
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file = Path(path)
        if file.resolve() == self.path.resolve():
            raise ValueError(
                f"{file} holds the metrics themselves; name another file, such as "
                f"{file.with_suffix('.csv')}"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        verified.write_text(file, text.getvalue())
        return file

    def __repr__(self) -> str:
        step = self.rows[-1]["step"] if self.rows else 0
        damage = f", {self.damaged_lines} damaged lines" if self.damaged_lines else ""
        return (
            f"History({str(self.path)!r}: {len(self.rows)} rows, step {step}{damage})"
        )


def find_metrics(source: str | os.PathLike[str]) -> Path:
    """The metrics file of a run folder or of a path to the file itself.

    Raises FileNotFoundError that names the runs that are there, or how to make one.
    """
    path = Path(source)
    file = path if path.is_file() else path / METRICS_NAME
    if file.is_file():
        return file
    found = f"has no {METRICS_NAME}" if path.is_dir() else "does not exist"
    near = path if path.is_dir() else path.parent
    runs = sorted(str(found.parent) for found in near.glob(f"*/{METRICS_NAME}"))
    raise FileNotFoundError(
        f"{path} {found}; expected the folder of a training run, which mm.train(cfg) "
        f"makes in out_dir. Runs in {near}: {', '.join(runs) or 'none'}."
    )


def _restarts(row: Row) -> bool:
    return row["kind"] == "event" and row.get("event") in RESTARTS


def flatten(row: Row) -> Iterator[tuple[str, Any]]:
    """Names and values of a row, an entry of a list by its place."""
    for name, value in row.items():
        if isinstance(value, list):
            yield from flatten({f"{name}_{at}": item for at, item in enumerate(value)})
        else:
            yield name, value


def _plain(value: object) -> object:
    """`value` as JSON can hold it, non-finite floats as strings."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    lost = isinstance(value, float) and not math.isfinite(value)
    return str(value) if lost else value


def _restore(value: Any) -> Any:
    if isinstance(value, list):
        return [_restore(item) for item in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def _parse(line: bytes) -> Row | None:
    """The row in a line, or None where the line is no metrics row."""
    try:
        row = json.loads(line)
        kind, step = row["kind"], row["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(kind, str) or not isinstance(step, int):
        return None
    if kind == "sample":
        return row
    return {name: _restore(value) for name, value in row.items()}
