"""Validated reading of JSON Lines: bytes on disk become rows, or faults with a place.

Three steps, so that the middle one can run in helper processes:

- `iter_chunks` cuts a file into pieces of whole physical lines (bytes, split on
  `\\n` alone), a megabyte each, whatever the size of the file;
- `read_rows` decodes, parses and checks the lines of one piece; what it takes and
  gives back is plain data. A format of rows is one function, `check`;
- `Tally` adds the pieces up and decides: refuse the file (the default), or go on
  without a few bad rows.

Python's own `json` accepts lone surrogates, NaN and duplicate keys, and
`str.splitlines` splits inside strings at U+2028; none of that happens here.
"""

import difflib
import gzip
import io
import json
import os
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .faults import (
    TOKEN,
    BadRow,
    DataError,
    Fault,
    RefusedError,
    describe,
    json_type,
    overlong_row,
)

MAX_LINE_BYTES = 16_000_000
MAX_DEPTH = 100

_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 1 << 16
_KEPT_HEAD_BYTES = 1 << 10
_ARRAY_FIX = (
    'python3 -c "import json, sys; [print(json.dumps(row)) for row in'
    ' json.load(sys.stdin)]" < {path} > rows.jsonl'
)
_CSV_FIX = (
    'python3 -c "import csv, json, sys; [print(json.dumps(row)) for row in'
    ' csv.DictReader(sys.stdin)]" < {path} > rows.jsonl'
)
_UTF16 = ("encoded as UTF-16", "iconv -f UTF-16 -t UTF-8 {path} > rows.jsonl")
_OTHER_FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "compressed with gzip, not named .gz", "mv {path} {path}.gz"),
    (b"PK\x03\x04", "a zip archive", "unzip {path}"),
    (b"\xfd7zXZ", "compressed with xz", "xz -d {path}"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "zstd -d {path}"),
    (b"PAR1", "a Parquet file", "pandas.read_parquet(…).to_json(…, lines=True)"),
    (b"\xff\xfe", *_UTF16),
    (b"\xfe\xff", *_UTF16),
    (b"{\0", "encoded as UTF-16", "iconv -f UTF-16LE -t UTF-8 {path} > rows.jsonl"),
    (b"\0{", "encoded as UTF-16", "iconv -f UTF-16BE -t UTF-8 {path} > rows.jsonl"),
)
# A pair of surrogates, a lone one (the group), or any other escape.
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)")


class Chunk(NamedTuple):
    """Whole physical lines of a file, or the head of one that is too long.

    `first_line` counts from 1. `overlong` is 0, or else the size in bytes of the
    single line whose first bytes are in `data` and whose rest was not kept.
    """

    first_line: int
    data: bytes
    overlong: int = 0


class ChunkRows(NamedTuple):
    """The rows of a chunk as (line, row), the refused ones, the number of blank lines.

    Good rows and problems are each in the order of the file.
    """

    rows: list[tuple[int, dict[str, Any]]]
    problems: list[BadRow]
    blank: int


Check = Callable[[dict[str, Any]], Fault | None]


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise a one-line cause and fix if `path` cannot be a JSON Lines file.

    `FileNotFoundError` or `IsADirectoryError`; `DataError` for an empty file and
    for another format (gzip under another name, UTF-16, CSV, a JSON array, …). Looks
    at the first 64 KiB only.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(p.name for p in path.iterdir() if ".jsonl" in p.name)[:3]
        hint = f"name a file in it ({', '.join(found) or 'it holds no .jsonl file'})"
        raise IsADirectoryError(f"{path} is a folder, a JSONL file is needed: {hint}")
    if not path.exists():
        folder = path.parent
        names = os.listdir(folder) if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"did you mean {folder / near[0]}?" if near else "check the path"
        raise FileNotFoundError(f"{path} does not exist: {hint}")
    with path.open("rb") as raw:
        head = raw.read(_HEAD_BYTES)
    if path.suffix == ".gz":
        if head and not head.startswith(b"\x1f\x8b"):
            plain = shlex.quote(str(path.with_suffix("")))
            _refuse_file(path, "named .gz but not compressed", f"mv {{path}} {plain}")
        with _open(path) as stream:
            head = _read(stream, _HEAD_BYTES, path, 1) if head else b""
    _check_head(path, head)


def _check_head(path: Path, head: bytes) -> None:
    if not head:
        _refuse_file(path, "empty", 'write one row a line, such as {"text": "…"}')
    for magic, what, fix in _OTHER_FORMATS:
        if head.startswith(magic):
            _refuse_file(path, what, fix)
    lines = [line for line in head.removeprefix(_BOM).split(b"\n") if line.strip()]
    if lines and lines[0].lstrip().startswith(b"["):
        try:
            json.loads(lines[0])
            alone = len(lines) == 1
        except ValueError:
            alone = True
        if alone:
            _refuse_file(
                path, "a JSON array, one object a line is expected", _ARRAY_FIX
            )
    separators = {tuple(line.count(c) for c in b",\t;") for line in lines[:2]}
    rowlike = any(line.lstrip().startswith((b"{", b"[")) for line in lines[:2])
    columns = len(lines) > 1 and len(separators) == 1 and any(separators.pop())
    if not rowlike and (columns or path.suffix in (".csv", ".tsv")):
        _refuse_file(
            path, "a table (CSV), one JSON object a line is expected", _CSV_FIX
        )


def _refuse_file(path: Path, what: str, fix: str) -> NoReturn:
    fix = fix.replace("{path}", shlex.quote(str(path)))
    raise DataError(f"{path} is {what}; to mend it: {fix}")


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _read(stream: io.BufferedIOBase, size: int, path: Path, line: int) -> bytes:
    try:
        return stream.read(size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is damaged after line {line - 1} ({error}); copy or download it"
            f" again, and test it with: gzip -t {shlex.quote(str(path))}"
        ) from error


def iter_chunks(path: str | os.PathLike[str], size: int = 1 << 20) -> Iterator[Chunk]:
    """Yield the file as `Chunk`s of about `size` bytes of whole physical lines.

    A `.gz` is read through gzip, sizes and lines being those of its text. Memory
    stays within `size` + 16 MB: of a longer line only a head is kept, given as a
    chunk of its own with `overlong` set. Raises as `check_file`; `DataError` too
    where a gzip file is damaged.
    """
    check_file(path)
    path = Path(path)
    line = 1
    begun = bytearray()  # the line that no block has ended yet, or its head
    overlong = 0  # its size, once that is too much to keep it
    with _open(path) as stream:
        while block := _read(stream, size, path, line):
            if overlong:
                rest, newline, block = block.partition(b"\n")
                overlong += len(rest)
                if not newline:
                    continue
                yield Chunk(line, bytes(begun), overlong)
                line, overlong = line + 1, 0
                begun.clear()
            cut = block.rfind(b"\n") + 1
            if cut:
                begun += block[:cut]
                yield Chunk(line, bytes(begun))
                line += begun.count(b"\n")
                begun.clear()
            begun += block[cut:]
            if len(begun) > MAX_LINE_BYTES:
                overlong = len(begun)
                del begun[_KEPT_HEAD_BYTES:]
    if begun:
        yield Chunk(line, bytes(begun), overlong)


def read_rows(chunk: Chunk, check: Check) -> ChunkRows:
    """Decode, parse and check every line of a chunk; never raises for bad data.

    `check` is a module-level function (so that it travels to other processes) which
    gives None or a `Fault` for a row that parsed. A byte order mark on line 1, CRLF,
    blank lines (counted) and a missing last newline are accepted; the text of a row is
    never changed. Costs little more than `json.loads` on each line.
    """
    if chunk.overlong:
        bad = overlong_row(*chunk, limit=MAX_LINE_BYTES)
        return ChunkRows([], [bad], 0)
    lines = chunk.data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    if chunk.first_line == 1 and lines:
        lines[0] = lines[0].removeprefix(_BOM)
    rows: list[tuple[int, dict[str, Any]]] = []
    problems: list[BadRow] = []
    blank = 0
    escapes = b"\\u" in chunk.data
    for number, raw in enumerate(lines, chunk.first_line):
        if not raw or raw.isspace():
            blank += 1
            continue
        if len(raw) > MAX_LINE_BYTES:
            problems.append(overlong_row(number, raw, len(raw), MAX_LINE_BYTES))
            continue
        try:
            row = _parse(raw.removesuffix(b"\r"), escapes)
            if fault := check(row):
                raise RefusedError(fault)
            rows.append((number, row))
        except (ValueError, RefusedError) as error:
            problems.append(describe(number, raw, error))
    return ChunkRows(rows, problems, blank)


def check_text_row(row: dict[str, Any]) -> Fault | None:
    """Check a row of plain text: `{"text": "…"}`, other keys being ignored.

    An empty text is no fault; whoever makes documents of the rows counts those.
    """
    if "text" not in row:
        keys = json.dumps(list(row)[:5], ensure_ascii=False)[:80]
        return Fault("missing_text", f'no "text" in the row, its keys: {keys}')
    if not isinstance(row["text"], str):
        found = json_type(row["text"])
        return Fault("not_a_string", f'"text" is {found}, not a string', "text")
    return None


def _parse(raw: bytes, escapes: bool) -> dict[str, Any]:
    text = raw.decode("utf-8")
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH:
        _refuse_deep(text)
    row = _DECODER.decode(text)
    if escapes and ("\\ud" in text or "\\uD" in text):
        _refuse_lone_surrogates(text)
    if not isinstance(row, dict):
        reason = f"the line is {json_type(row)}, a row is one object: {{…}}"
        raise RefusedError(Fault("not_object", reason))
    return row


def _refuse_lone_surrogates(text: str) -> None:
    for escape in _ESCAPE.finditer(text):
        if escape[1]:
            reason = f"\\{escape[1]} is half of a surrogate pair, no character"
            raise RefusedError(Fault("lone_surrogate", reason), escape.start())


def _refuse_deep(text: str) -> None:
    depth = 0
    for token in TOKEN.finditer(text):
        depth += (token[0] in "[{") - (token[0] in "]}")
        if depth > MAX_DEPTH:
            reason = f"nested more than {MAX_DEPTH} deep"
            raise RefusedError(Fault("too_deep", reason), token.start())


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        key = next(key for key, n in counts.items() if n > 1)
        raise RefusedError(Fault("duplicate_key", f"the key {key!r} comes twice", key))
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise RefusedError(Fault("not_finite", f"{name} is no JSON number", name))


_DECODER = json.JSONDecoder(
    object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant
)
