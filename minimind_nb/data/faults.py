"""What is wrong with a row of data, where, and whether the rest may be used.

A *fault* says what: a stable `kind` for counting, a `reason` for people. A
`BadRow` says where as well. `Tally` adds up the rows of a file and decides;
`DataError` is what the user meets when the answer is no.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

EXCERPT_CHARACTERS = 80
LISTED_PROBLEMS = 5
# About 40 MB: the bad rows of ten million rows at the default limit of 1 %.
KEPT_PROBLEMS = 100_000

# A string is swallowed whole (an unclosed one to the end of the line), so brackets and
# constants found stand outside of strings; possessive, so that 12 MB need no stack.
TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]|-?Infinity|NaN')


class Fault(NamedTuple):
    """What a check has against a row: a stable kind, a reason, the key concerned."""

    kind: str
    reason: str
    key: str | None = None


@dataclass(frozen=True)
class BadRow:
    """A refused row: physical line and column (in characters), both from 1, and why.

    `kind` is stable and short, for counting; `reason` is for people; `excerpt`
    is at most 80 printable characters around the column.
    """

    line: int
    column: int
    kind: str
    reason: str
    excerpt: str


class DataError(ValueError):
    """A data file, or rows of it, cannot be used.

    `problems` holds the rows concerned (none for a fault of the whole file), and
    `kinds` how many there were of each kind.
    """

    def __init__(
        self,
        message: str,
        problems: Iterable[BadRow] = (),
        kinds: dict[str, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.problems = list(problems)
        self.kinds = dict(kinds or Counter(row.kind for row in self.problems))

    @classmethod
    def of_rows(
        cls,
        path: str | os.PathLike[str],
        problems: list[BadRow],
        total_rows: int,
        advice: str,
        kinds: dict[str, int] | None = None,
    ) -> "DataError":
        """List the first five of `problems`, count all by kind, end with `advice`.

        `kinds` is needed only where `problems` is not the whole list.
        """
        error = cls("", problems, kinds)
        counts = sorted(error.kinds.items(), key=lambda item: -item[1])
        counted = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in counts)
        bad = sum(error.kinds.values())
        lines = [f"{path}: {bad} of {total_rows} rows cannot be used: {counted}"]
        for row in problems[:LISTED_PROBLEMS]:
            place = f"{Path(path).name}:{row.line}:{row.column}"
            lines += [f"  {place}: {row.reason}", f"      {row.excerpt}"]
        if bad > LISTED_PROBLEMS:
            lines.append(f"  … and {bad - LISTED_PROBLEMS} more")
        error.args = ("\n".join([*lines, advice]),)
        return error


class RefusedError(Exception):
    """Raised while parsing a line, for what `json` itself would let through."""

    def __init__(self, fault: Fault, position: int | None = None) -> None:
        super().__init__(fault.reason)
        self.fault = fault
        self.position = position


def json_type(value: Any) -> str:
    """Name the JSON type of a parsed value, with its article: "a list", "null"."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), "a number")


def overlong_row(line: int, head: bytes, size: int, limit: int) -> BadRow:
    """Describe a line of `size` bytes, more than `limit`, of which a head is known."""
    reason = f"the line has {size / 1e6:,.1f} MB, at most {limit / 1e6:g} MB are read"
    text = head[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")
    return BadRow(line, 1, "too_long", reason, _excerpt(text, 0))


def describe(line: int, raw: bytes, error: ValueError | RefusedError) -> BadRow:
    """Say in plain words what is wrong with a line that could not be parsed."""
    text = raw.decode("utf-8", "backslashreplace")
    if isinstance(error, RefusedError):
        fault = error.fault
        position = _locate(text, fault) if error.position is None else error.position
    elif isinstance(error, UnicodeDecodeError):
        position = len(raw[: error.start].decode("utf-8"))
        fault = _encoding_fault(raw, error.start)
    elif isinstance(error, json.JSONDecodeError):
        fault, position = _syntax_fault(text, error)
    else:  # int() of more than 4,300 digits
        fault, position = Fault("broken_json", "a number of thousands of digits"), 0
    excerpt = _excerpt(text, position)
    return BadRow(line, position + 1, fault.kind, fault.reason, excerpt)


def _excerpt(text: str, position: int) -> str:
    room = EXCERPT_CHARACTERS
    start = max(0, min(position - room // 2, len(text) - room))
    shown = text[start : start + room]
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
    return shown[:room]


def _locate(text: str, fault: Fault) -> int:
    """Find the place of a fault that is known by its key, or by its constant."""
    if fault.kind == "not_finite":
        tokens = TOKEN.finditer(text)
        return next((t.start() for t in tokens if t[0] == fault.key), 0)
    if fault.key is None:
        return 0
    name = re.escape(json.dumps(fault.key, ensure_ascii=False))
    found = [match.start() for match in re.finditer(name + r"\s*:", text)] or [0]
    return found[-1 if fault.kind == "duplicate_key" else 0]


def _encoding_fault(raw: bytes, start: int) -> Fault:
    reason = f"byte 0x{raw[start]:02x} is not UTF-8"
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        return Fault("not_utf8", f"{reason}; the text was damaged or mixed")
    fix = "convert the file: iconv -f GB18030 -t UTF-8"
    return Fault("not_utf8", f"{reason}; the line reads as GBK, {fix}")


def _syntax_fault(text: str, error: json.JSONDecodeError) -> tuple[Fault, int]:
    """Turn the parser's message, which differs between versions, into a cause."""
    end, said = len(text.rstrip()), error.msg
    at = min(error.pos, end)
    first, here = text.lstrip(" \t\r")[:1], text[at : at + 1]
    comma = at if here == "," else len(text[:at].rstrip()) - 1
    closer = text[at + (here == ",") :].lstrip()[:1]
    in_string = said.startswith("Unterminated") or (
        said.startswith("Invalid \\u") and '"' not in text[at:]
    )
    cut_off = "the line ends inside {}: it was cut off, or one row spans lines"
    # The first that holds: kind, condition, reason, position.
    causes = (
        ("nul", "\0" in text, _nul_reason(text), text.find("\0")),
        ("bom", first == "\ufeff", "a byte order mark after line 1: joined files?", 0),
        (
            "not_json",
            first != "{",
            f"the line begins with {first!r}, a row with '{{'",
            text.find(first),
        ),
        (
            "two_objects",
            said.startswith("Extra data") and text[at:].lstrip(", ")[:1] == "{",
            "two objects on one line",
            at,
        ),
        ("extra_data", said.startswith("Extra"), f"{here!r} follows the object", at),
        (
            "trailing_comma",
            text[comma : comma + 1] == "," and closer in ("}", "]"),
            f"a comma before {closer!r}",
            comma,
        ),
        ("single_quotes", here == "'", "single quotes, JSON wants double ones", at),
        (
            "control_character",
            said.startswith("Invalid control"),
            f"a raw control character in a string, write it as {json.dumps(here)}",
            at,
        ),
        ("truncated", in_string, cut_off.format("a string"), at),
        ("truncated", at >= end, cut_off.format("an object"), at),
    )
    for kind, holds, reason, position in causes:
        if holds:
            return Fault(kind, reason), position
    return Fault("broken_json", f"broken JSON: {said}"), at


def _nul_reason(text: str) -> str:
    tail = text.rstrip("\r").endswith("\0")
    return "a NUL byte: " + ("the file was cut off" if tail else "the file is damaged")


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

    def add(self, good: int, problems: list[BadRow], blank: int) -> None:
        """Count one chunk's good rows, its problems and its blank lines."""
        self.good += good
        self.blank += blank
        self.kinds.update(row.kind for row in problems)
        self.problems += problems[: KEPT_PROBLEMS - len(self.problems)]

    def judge(self) -> None:
        """Raise `DataError` unless there are rows, and few enough bad ones."""
        bad = sum(self.kinds.values())
        total = self.good + bad
        if not total:
            what = f"only blank lines ({self.blank})" if self.blank else "no line"
            raise DataError(
                f'{self.path} has {what}; write one row a line, such as {{"text": "…"}}'
            )
        limit = f"{self.max_bad_fraction:.3%}".rstrip("0%").rstrip(".") + " %"
        if self.on_bad_line == "error" and bad:
            advice = f'Mend these lines, or set on_bad_line="skip" (up to {limit}).'
        elif bad > self.max_bad_fraction * total or not self.good:
            share = f"{bad / total:.3%}".replace("%", " %")
            advice = (
                f'on_bad_line="skip" leaves out at most {limit} of the rows, here it'
                f" would be {share}: mend the file, or raise max_bad_fraction."
            )
        else:
            return
        raise DataError.of_rows(self.path, self.problems, total, advice, self.kinds)


def write_rejected(file: str | os.PathLike[str], problems: list[BadRow]) -> None:
    """Write one JSON object a problem: line, column, kind, reason, excerpt."""
    file = Path(file)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    rows = (json.dumps(asdict(row), ensure_ascii=False) for row in problems)
    aside.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    os.replace(aside, file)
