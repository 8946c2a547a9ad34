"""The metrics file: one JSON object a line, written by rank 0, read by everyone.

Standard library only, because every worker imports this module.
"""

import contextlib
import importlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..storage import verified
from ..storage.run_folder import RunFolder

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_LARGEST_LOSS = 700  # of which exp fits a float
_PENDING_BYTES = 1 << 20  # of rows that wait for a full disk

Row = dict[str, Any]


class MetricsLog(contextlib.AbstractContextManager["MetricsLog"]):
    """Append rows to a metrics file, each handed to the system before `append` returns.

    A half line of a killed writer is closed, never rewritten. Rows that a full disk does
    not take wait in memory for the next. Raises OSError for a file that is not writable.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "ab", buffering=_PENDING_BYTES)
        if self._file.tell():
            with open(path, "rb") as written:
                written.seek(-1, os.SEEK_END)
                if written.read() != b"\n":
                    self._file.write(b"\n")

    def append(self, kind: str, **fields: object) -> None:
        """Write one row. `kind` is "train", "eval", "sample" or "event".

        Values are numbers, strings, booleans, None and lists of these. NaN and the
        infinities become "nan", "inf" and "-inf", since JSON has no such numbers.
        """
        text = json.dumps({"kind": kind} | fields)
        row = json.loads(text, parse_constant=lambda name: str(float(name)))
        line = json.dumps(row, ensure_ascii=False) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            if not verified.is_full_disk(error):
                raise

    def close(self) -> None:
        """Write the waiting rows and close; raises OSError if the disk is still full."""
        self._file.close()

    def __exit__(self, error: object, *_: object) -> None:
        # A full disk must not hide the error that ends the run.
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            self.close()


class History:
    """The rows of a metrics file, as they stand after every resume.

    `rows` holds them in order, non-finite numbers as floats. When a run resumes at step
    s, earlier rows of a higher step and a partial one are dropped. `damaged_lines` counts
    complete lines that are not metrics rows. `History(path)` accepts a file that does not
    exist yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.rows: list[Row] = []
        self.damaged_lines = 0
        self._inode = self._offset = 0
        self.refresh()

    @classmethod
    def load(cls, source: "str | os.PathLike[str] | History") -> "History":
        """Read a run folder, its metrics.jsonl or a `Run`; return a History unchanged.

        Raises FileNotFoundError, listing the runs nearby, if `source` is not a run,
        and ValueError for a file without metrics rows.
        """
        if isinstance(source, History):
            return source
        path = Path(source).expanduser()
        file = path if path.is_file() else RunFolder(path).metrics_file
        if file.is_file():
            history = cls(file)
            if history.damaged_lines and not history.rows:
                raise ValueError(f"{file} has no metrics; pass the folder of a run")
            return history
        near = path if path.is_dir() else path.parent
        runs = sorted(str(found.parent) for found in near.glob(f"*/{file.name}"))
        raise FileNotFoundError(
            f"{file} does not exist; expected the folder of a training run, which "
            f"mm.train(cfg) makes. Runs in {near}: {', '.join(runs) or 'none'}."
        )

    def refresh(self) -> None:
        """Read the rows appended since; reread a replaced or shortened file."""
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
            if _starts_session(row):  # a start that follows had no checkpoint yet
                self.rewind(row["step"] if row["event"] == "resume" else -1)
            self.rows.append(row)

    def rewind(self, step: int) -> None:
        """Drop the rows of a higher step, since the weights they describe are lost, and
        the row at a stop, which the next one covers."""
        kept = (row for row in self.rows if row["step"] <= step)
        self.rows = [row for row in kept if not row.get("partial")]

    def select(self, kind: str) -> list[Row]:
        """Return the rows of one kind, oldest first."""
        return [row for row in self.rows if row["kind"] == kind]

    def column(self, kind: str, name: str) -> list[float]:
        """Return one number for each row of a kind, NaN if a row has no such number."""
        values = [row.get(name) for row in self.select(kind)]
        return [float(v) if isinstance(v, int | float) else math.nan for v in values]

    def last(self, kind: str) -> Row | None:
        """Return the newest row of a kind, or None."""
        return next((row for row in reversed(self.rows) if row["kind"] == kind), None)

    def to_frame(self) -> Any:
        """Return the train and eval rows as a pandas DataFrame, a column for each name.

        An entry of a list has its own, such as `expert_load_0_3`: layer 0, expert 3.
        """
        pandas = importlib.import_module("pandas")  # which need not be installed
        rows = (row for row in self.rows if row["kind"] in ("train", "eval"))
        return pandas.DataFrame([dict(flatten(row)) for row in rows])

    @property
    def session(self) -> list[Row]:
        """The rows since the newest start or resume; that row comes first."""
        starts = [at for at, row in enumerate(self.rows) if _starts_session(row)]
        return self.rows[max(starts, default=0) :]

    @property
    def stage(self) -> str:
        """The stage of the run; "pretrain" if no row names one."""
        return next(iter(self.session), {}).get("stage", "pretrain")

    def __repr__(self) -> str:
        return f"History({str(self.path)!r}: {len(self.rows)} rows)"


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats, infinite where it does not fit a float."""
    return math.inf if loss > _LARGEST_LOSS else math.exp(loss)


def flatten(row: Row) -> Iterator[tuple[str, Any]]:
    """Yield names and values of a row; a list's entries get their index as suffix."""
    for name, value in row.items():
        if isinstance(value, list):
            yield from flatten({f"{name}_{at}": item for at, item in enumerate(value)})
        else:
            yield name, value


def _starts_session(row: Row) -> bool:
    return row["kind"] == "event" and row.get("event") in ("start", "resume")


def _restore(value: Any) -> Any:
    if isinstance(value, list):
        return [_restore(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _parse(line: bytes) -> Row | None:
    """Return the row in a line, or None if the line is not a metrics row."""
    try:
        row = json.loads(line)
        valid = isinstance(row["kind"], str) and isinstance(row["step"], int)
    except (ValueError, TypeError, KeyError):
        return None
    if valid and row["kind"] != "sample":  # a sample's strings are texts
        row = {name: _restore(value) for name, value in row.items()}
    return row if valid else None
