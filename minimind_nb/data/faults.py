"""What is wrong with a row of data, where, and whether the rest may be used.

A `Fault` says what: a stable `kind` for counting, a `reason` for people. A `BadRow`
says where as well. `Tally` adds up the rows of a file and decides; `DataError` is
what the user meets when the answer is no.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..storage.verified import write_text

EXCERPT_CHARACTERS = 80
LISTED_PROBLEMS = 5
# About 40 MB: the bad rows of ten million rows at the default limit of 1 %.
KEPT_PROBLEMS = 100_000


class Fault(ValueError):
    """What is wrong with a row: returned by a check, raised while parsing.

    `kind` is short and stable, for counting; `reason` is for people. The place is where
    `mark` was last written in the line, or else its beginning.
    """

    def __init__(self, kind: str, reason: str, mark: str | None = None) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.mark = mark


@dataclass(frozen=True)
class BadRow:
    """A refused row: physical line and column (in characters), both from 1, and why.

    `excerpt` is at most 80 printable characters around the column.
    """

    line: int
    column: int
    kind: str
    reason: str
    excerpt: str


class DataError(ValueError):
    """A data file cannot be used: for its `problems`, or as a whole if there are none."""

    def __init__(self, message: str, problems: Iterable[BadRow] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems)


def describe(line: int, raw: bytes, error: ValueError) -> BadRow:
    """Say in plain words what is wrong with a line that could not be read."""
    text = raw.decode("utf-8", "backslashreplace")
    if isinstance(error, Fault):
        at = text.rfind(error.mark) if error.mark else 0
        kind, reason = error.kind, error.reason
    elif isinstance(error, UnicodeDecodeError):
        at = len(raw[: error.start].decode("utf-8"))
        kind, reason = "not_utf8", f"byte 0x{raw[error.start]:02x} is not UTF-8"
        reason += "; if the file is GBK, convert it: iconv -f GB18030 -t UTF-8"
    elif isinstance(error, UnicodeEncodeError):
        escape = f"\\u{ord(error.object[error.start]):04x}"
        at = text.lower().rfind(escape)
        kind, reason = "lone_surrogate", f"{escape} is half of a surrogate pair"
    else:
        at = min(getattr(error, "pos", 0), len(text.rstrip()))
        kind, reason = _explain_syntax(text, at, getattr(error, "msg", str(error)))
    shown = text[max(0, at - EXCERPT_CHARACTERS // 2) :][:EXCERPT_CHARACTERS]
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
    return BadRow(line, max(0, at) + 1, kind, reason, shown[:EXCERPT_CHARACTERS])


def _explain_syntax(text: str, at: int, said: str) -> tuple[str, str]:
    """Turn the parser's message, which differs between versions, into a cause."""
    first, here = text.lstrip()[:1], text[at : at + 1]
    comma = "," in (text[:at].rstrip()[-1:], here)
    closed = text[at:].lstrip(", ")[:1] in ("}", "]")
    cut = at == len(text.rstrip()) or said.startswith("Unterminated string")
    # The first that holds.
    causes = (
        ("nul", "\0" in text, "a NUL byte: the file was cut off or damaged"),
        ("not_json", first != "{", f"the line begins with {first!r}, a row with '{{'"),
        ("extra_data", said.startswith("Extra data"), "more than one object a line"),
        ("trailing_comma", comma and closed, "a comma before the closing bracket"),
        ("single_quotes", here == "'", "single quotes, JSON wants double ones"),
        ("truncated", cut, "the row does not end on this line: was it cut off?"),
        ("broken_json", True, f"broken JSON: {said}"),
    )
    return next((kind, reason) for kind, holds, reason in causes if holds)


class Tally:
    """Adds up the rows of one file and decides whether it may be used.

    `on_bad_line="error"` allows no bad row; `"skip"` allows `max_bad_fraction`
    of all rows that are not blank. Of the problems the first 100,000 are kept.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        on_bad_line: str = "error",
        max_bad_fraction: float = 0.01,
    ) -> None:
        if on_bad_line not in ("error", "skip"):
            raise ValueError(f'on_bad_line is {on_bad_line!r}, use "error" or "skip"')
        self.path = path
        self.on_bad_line = on_bad_line
        self.max_bad_fraction = max_bad_fraction
        self.good = 0
        self.blank = 0
        self.problems: list[BadRow] = []
        self.kinds: Counter[str] = Counter()

    def add(
        self, good: int, problems: list[BadRow], blank: int, more: Mapping[str, int]
    ) -> None:
        """Count one chunk's good rows, its problems and its blank lines; `more` counts
        problems that are not described, by kind."""
        self.good += good
        self.blank += blank
        self.kinds.update(row.kind for row in problems)
        self.kinds.update(more)
        self.problems += problems[: KEPT_PROBLEMS - len(self.problems)]

    def judge_so_far(self) -> None:
        """Raise `DataError` as soon as a row is bad that may not be."""
        if self.on_bad_line == "error" and self.kinds:
            self.judge(" read so far")

    def judge(self, which: str = "") -> None:
        """Raise `DataError` unless there are rows, and few enough bad ones.

        It lists the first five problems, counts all by kind, and says what to do.
        `which` says of which rows, if not of all.
        """
        bad = self.kinds.total()
        total = self.good + bad
        limit = f"{100 * self.max_bad_fraction:g} %"
        if not total:
            raise DataError(f"{self.path} has only blank lines, {self.blank} of them")
        if self.on_bad_line == "error" and bad:
            advice = f'Mend these lines, or set on_bad_line="skip" (up to {limit}).'
        elif bad > self.max_bad_fraction * total or not self.good:
            advice = (
                f'on_bad_line="skip" leaves out at most {limit} of the rows, here it'
                f" would be {bad / total:.3%}: mend the file, or raise max_bad_fraction."
            )
        else:
            return
        kinds = [
            f"{n} {kind.replace('_', ' ')}" for kind, n in self.kinds.most_common()
        ]
        lines = [
            f"{self.path}: {bad} of {total} rows{which} cannot be used: "
            f"{', '.join(kinds)}"
        ]
        for row in self.problems[:LISTED_PROBLEMS]:
            place = f"{Path(self.path).name}:{row.line}:{row.column}"
            lines += [f"  {place}: {row.reason}", f"      {row.excerpt}"]
        if bad > LISTED_PROBLEMS:
            lines.append(f"  … and {bad - LISTED_PROBLEMS} more")
        raise DataError("\n".join([*lines, advice]), self.problems)


def write_rejected(file: str | os.PathLike[str], problems: list[BadRow]) -> None:
    """Write one JSON object a problem: line, column, kind, reason, excerpt."""
    rows = (json.dumps(asdict(row), ensure_ascii=False) for row in problems)
    write_text(Path(file), "".join(f"{row}\n" for row in rows))
