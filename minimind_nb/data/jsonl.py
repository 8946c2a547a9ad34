"""Validated reading of JSON Lines: bytes become rows, or faults with a place.

Python's own `json` accepts lone surrogates and duplicate keys, and
`str.splitlines` splits inside strings at U+2028; neither happens here.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

MAX_LINE_BYTES = 16_000_000
# About 40 MB, all bad rows of ten million rows at the default limit of 1 %.
KEPT_PROBLEMS = 100_000
LISTED_PROBLEMS = 5
EXCERPT_CHARACTERS = 80

BOM = b"\xef\xbb\xbf"

Row = dict[str, Any]


class Fault(ValueError):
    """Why a row cannot be used: its kind, for counting, and the reason in words.

    The last occurrence of `mark` in the line is the place of the fault.
    """

    def __init__(self, kind: str, reason: str, mark: str | None = None) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.mark = mark


class BadRow(NamedTuple):
    """A refused row: physical line and column (in characters), both from 1, and why.

    The column is 0 for a row that is no line of its file.
    """

    line: int
    column: int
    kind: str
    reason: str
    excerpt: str


class DataError(ValueError):
    """A data file cannot be used: because of its `problems`, or as a whole."""

    def __init__(self, message: str, problems: Iterable[BadRow] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems)


Content = TypeVar("Content")


class Chunk(NamedTuple):
    """Whole lines of JSON, the first of them number `first_line` (from 1).

    Of a file of another kind, `numbers` are the line or row that each is made of.
    """

    first_line: int
    data: bytes
    numbers: Sequence[int] = ()


@dataclass
class Tally:
    """The rows of a chunk or of a file, counted; of the bad ones the first are kept.

    `forms` has the first line of each form of rows, `ignored` the number of rows with
    each key that means nothing.
    """

    good: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    forms: dict[str, int] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    problems: list[BadRow] = field(default_factory=list)

    def refuse(self, row: BadRow) -> None:
        """Count a bad row."""
        self.kinds[row.kind] += 1
        if len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(row)

    def add(self, other: "Tally") -> None:
        """Add the rows that follow."""
        self.good += other.good
        self.kinds += other.kinds
        self.ignored += other.ignored
        self.forms = other.forms | self.forms
        self.problems += other.problems[: KEPT_PROBLEMS - len(self.problems)]

    def raise_if_too_many(
        self,
        path: str | os.PathLike[str],
        on_bad_line: str = "error",
        max_bad_fraction: float = 0.01,
    ) -> None:
        """Raise `DataError` unless there are rows, of one form, and few enough bad ones.

        `on_bad_line="error"` allows none, "skip" a share of `max_bad_fraction`.
        """
        if len(self.forms) > 1:
            found = (f"{form} (line {line})" for form, line in self.forms.items())
            raise DataError(
                f"{path} has rows of several forms: {', '.join(found)}; separate them"
            )
        bad = self.kinds.total()
        total = self.good + bad
        if not total:
            raise DataError(f"{path} has no rows: every line in it is blank")
        allowed = max_bad_fraction * total if on_bad_line == "skip" else 0
        if bad <= allowed and self.good:
            return
        kinds = (f"{n} {k.replace('_', ' ')}" for k, n in self.kinds.most_common())
        lines = [
            f"{path}: {bad} of {total} rows read cannot be used: {', '.join(kinds)}"
        ]
        listed = LISTED_PROBLEMS if self.good else 1
        for row in self.problems[:listed]:
            place = f"{Path(path).name}:{row.line}"
            place += f":{row.column}" if row.column else ""
            lines += [f"  {place}: {row.reason}", f"      {row.excerpt}"]
        if bad > listed:
            lines.append(f"  … and {bad - listed} more")
        lines.append(
            f'Fix these lines; on_bad_line="skip" leaves out at most max_bad_fraction='
            f"{max_bad_fraction:g} of the rows, here {bad / total:.3%}."
        )
        raise DataError("\n".join(lines), self.problems)


def split_lines(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of each line that is not blank."""
    data = chunk.data.removeprefix(BOM if chunk.first_line == 1 else b"")
    numbers = chunk.numbers or itertools.count(chunk.first_line)
    lines = zip(numbers, data.split(b"\n"), strict=False)
    return ((number, raw) for number, raw in lines if raw.strip())


def read_rows(
    chunk: Chunk, read: Callable[[Row], Content]
) -> tuple[list[tuple[int, Content]], Tally]:
    """Return line and content of the good rows of a chunk, and all its rows counted.

    `read` takes a row and raises a `Fault` for a bad one. A byte order mark on line 1,
    CRLF, blank lines and a missing last newline are accepted.
    """
    rows: list[tuple[int, Content]] = []
    tally = Tally()
    for number, raw in split_lines(chunk):
        try:
            rows.append((number, read(_parse(raw))))
        except ValueError as error:
            tally.refuse(_explain(number, raw, error, not chunk.numbers))
    tally.good = len(rows)
    return rows, tally


def _parse(raw: bytes) -> Row:
    if len(raw) > MAX_LINE_BYTES:
        raise Fault("too_long", "the line has more than 16 MB, the most for one row")
    text = raw.decode("utf-8")
    try:
        row = _DECODER.decode(text)
        if "\\" in text and ("\\ud" in text or "\\uD" in text):
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair fails
    except RecursionError:
        raise Fault("too_deep", "nested too deep to be read") from None
    if not isinstance(row, dict):
        raise Fault("not_object", "the line is a list or a single value, not {…}")
    return row


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise Fault("duplicate_key", f"the key {key!r} comes twice", f'"{key}"')
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_refuse_duplicates)


def _explain(line: int, raw: bytes, error: ValueError, has_column: bool) -> BadRow:
    """Return the place, kind and cause of a line's error, in plain words."""
    text = raw.decode("utf-8", "backslashreplace")
    at = 0
    if isinstance(error, UnicodeDecodeError):
        at = len(raw[: error.start].decode("utf-8"))
        found = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        error = Fault("not_utf8", f"{found}; from GBK: iconv -f GB18030 -t UTF-8")
    elif isinstance(error, UnicodeEncodeError):
        escape = f"\\u{ord(error.object[error.start]):04x}"
        at = text.lower().rfind(escape)
        error = Fault("lone_surrogate", f"{escape} is half of a surrogate pair")
    elif not isinstance(error, Fault):
        at = min(getattr(error, "pos", 0), len(text.rstrip()))
        error = _explain_syntax(text, at, getattr(error, "msg", str(error)))
    elif error.mark:
        at = max(0, text.rfind(error.mark))
    shown = text[max(0, at - EXCERPT_CHARACTERS // 2) :][:EXCERPT_CHARACTERS]
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
    column = at + 1 if has_column else 0
    return BadRow(line, column, error.kind, error.reason, shown[:EXCERPT_CHARACTERS])


def _explain_syntax(text: str, at: int, message: str) -> Fault:
    if "\0" in text:
        return Fault("nul", "a NUL byte: the file was cut off or damaged")
    if (first := text.lstrip()[:1]) != "{":
        return Fault("not_json", f"the line begins with {first!r}, a row with '{{'")
    if message.startswith("Extra data"):
        return Fault("extra_data", "more than one object a line")
    if at == len(text.rstrip()) or message.startswith("Unterminated string"):
        reason = "the row does not end on this line: was it cut off?"
        return Fault("truncated", reason)
    return Fault("broken_json", f"broken JSON: {message}")
