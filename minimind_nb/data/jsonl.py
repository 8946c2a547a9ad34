"""Validated reading of JSON Lines: bytes on disk become rows, or faults with a place.

`iter_chunks` cuts a file into pieces of whole physical lines, `read_rows` decodes,
parses and checks the lines of one piece (in helper processes, if need be), and
`faults.Tally` adds the pieces up and decides whether the file may be used. A format of
rows is one function, `check`.

Python's own `json` accepts lone surrogates, NaN and duplicate keys, and
`str.splitlines` splits inside strings at U+2028; none of that happens here.
"""

import contextlib
import difflib
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .faults import BadRow, DataError, Fault, describe

MAX_LINE_BYTES = 16_000_000
MAX_DEPTH = 100

_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 1 << 10
_DESCRIBED = 1000  # problems of a chunk, which may be all its lines
# How a file begins that is no JSON Lines at all, and what it is then.
_OTHER_FILES = (
    (rb"\Z", 'empty: write one row a line, such as {"text": "…"}'),
    (rb"\x1f\x8b", "compressed with gzip: give it a name that ends in .gz"),
    (rb"\xff\xfe|\xfe\xff|\0[^\0]|[^\0]\0", "UTF-16: use iconv -f UTF-16 -t UTF-8"),
    (rb"\s*\[\s*[\[{]", "a JSON array: write each of its objects on a line of its own"),
    (rb"\s*[^\s{\[].*\n\s*[^\s{\[]", "CSV or plain text: write one JSON object a line"),
)


class Chunk(NamedTuple):
    """Whole physical lines of a file, or the head of one that is too long.

    `first_line` counts from 1. `overlong` is 0, or else the size in bytes of the
    single line whose first bytes are in `data` and whose rest was not kept.
    """

    first_line: int
    data: bytes
    overlong: int = 0


class ChunkRows(NamedTuple):
    """What a chunk holds, in order: (line, row)s, the refused rows; and blank lines.

    Of the refused rows the first 1,000 are described, `more` counts the rest by kind.
    """

    rows: list[tuple[int, dict[str, Any]]]
    problems: list[BadRow]
    blank: int
    more: Counter[str]


Check = Callable[[dict[str, Any]], Fault | None]


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise a one-line cause and fix if `path` cannot be a JSON Lines file.

    `FileNotFoundError` or `IsADirectoryError`; `DataError` for an empty file and
    for another format (gzip under another name, UTF-16, CSV, a JSON array). Reads
    the first kilobyte only.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a .jsonl file in it")
    if not path.exists():
        names = os.listdir(path.parent) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
        hint = f"did you mean {path.with_name(near[0])}?" if near else "check the path"
        raise FileNotFoundError(f"{path} does not exist: {hint}")
    if not path.is_file():
        raise DataError(f"{path} is a pipe or a device, which cannot be read twice")
    with _opened(path) as stream:
        head = stream.read(_HEAD_BYTES).removeprefix(_BOM)
    for beginning, what in _OTHER_FILES:
        if re.match(beginning, head):
            raise DataError(f"{path} is {what}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        advice = "copy it again, or take .gz off its name if it is not compressed"
        raise DataError(f"{path} cannot be unpacked ({error}): {advice}") from error


def iter_chunks(path: str | os.PathLike[str], size: int = 1 << 20) -> Iterator[Chunk]:
    """Yield the file as `Chunk`s of about `size` bytes of whole physical lines.

    A `.gz` is read through gzip, sizes and lines being those of its text. Memory stays
    within twice `size` + 16 MB: of a longer line only a head is kept, as a chunk of its
    own with `overlong` set. Raises as `check_file`; `DataError` for a damaged gzip too.
    """
    check_file(path)
    line = 1
    with _opened(Path(path)) as stream:
        while data := stream.read(size):
            if not data.endswith(b"\n"):
                data += stream.readline(MAX_LINE_BYTES)
            whole = data.rfind(b"\n") + 1
            overlong = len(data) - whole
            if overlong <= MAX_LINE_BYTES:  # nothing, or the last line of the file
                whole, overlong = len(data), 0
            if whole:
                yield Chunk(line, data[:whole])
                line += data.count(b"\n")
            if overlong:
                while rest := stream.readline(size):
                    overlong += len(rest)
                    if rest.endswith(b"\n"):
                        break
                yield Chunk(line, data[whole : whole + _HEAD_BYTES], overlong)
                line += 1


def read_rows(chunk: Chunk, check: Check) -> ChunkRows:
    """Decode, parse and check every line of a chunk; never raises for bad data.

    `check` is a module-level function (so that it travels to other processes) which
    gives None or a `Fault` for a row that parsed. A byte order mark on line 1, CRLF,
    blank lines (counted) and a missing last newline are accepted; the text of a row is
    never changed. Costs little more than `json.loads` on each line.
    """
    data = chunk.data.removesuffix(b"\n")
    if chunk.first_line == 1:
        data = data.removeprefix(_BOM)
    rows: list[tuple[int, dict[str, Any]]] = []
    problems: list[BadRow] = []
    blank, more = 0, Counter[str]()
    for number, raw in enumerate(data.split(b"\n"), chunk.first_line):
        size = chunk.overlong or len(raw)
        if size <= MAX_LINE_BYTES and not raw.strip():
            blank += 1
            continue
        try:
            if size > MAX_LINE_BYTES:
                limit = f"at most {MAX_LINE_BYTES / 1e6:g} MB are read"
                raise Fault("too_long", f"the line has {size / 1e6:,.1f} MB, {limit}")
            row = _parse(raw)
            if fault := check(row):
                raise fault
            rows.append((number, row))
        except ValueError as error:
            problem = describe(number, raw, error)
            if len(problems) < _DESCRIBED:
                problems.append(problem)
            else:
                more[problem.kind] += 1
    return ChunkRows(rows, problems, blank, more)


def check_text_row(row: dict[str, Any]) -> Fault | None:
    """Check a row of plain text: `{"text": "…"}`, other keys being ignored.

    An empty text is no fault; whoever makes documents of the rows counts those.
    """
    if "text" not in row:
        keys = json.dumps(list(row)[:5], ensure_ascii=False)[:80]
        return Fault("missing_text", f'no "text" in the row, its keys: {keys}')
    if not isinstance(row["text"], str):
        found = json.dumps(row["text"], ensure_ascii=False)[:40]
        return Fault("not_a_string", f'"text" is {found}, not a string', '"text"')
    return None


def _parse(raw: bytes) -> dict[str, Any]:
    text = raw.decode("utf-8")
    try:
        row = _DECODER.decode(text)
        brackets = raw.count(b"{") + raw.count(b"[")
        if brackets > MAX_DEPTH and _depth(row) > MAX_DEPTH:
            raise RecursionError
    except RecursionError:
        raise Fault("too_deep", f"nested more than {MAX_DEPTH} deep") from None
    if not isinstance(row, dict):
        reason = "the line is a list or a single value, a row is one object: {…}"
        raise Fault("not_object", reason)
    if "\\" in text and ("\\ud" in text or "\\uD" in text):
        json.dumps(row, ensure_ascii=False).encode()  # refuses half a surrogate pair
    return row


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return 0
    return 1 + max(map(_depth, value), default=0)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise Fault("duplicate_key", f"the key {key!r} comes twice", f'"{key}"')
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise Fault("not_finite", f"{name} is no JSON number", name)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant
)
