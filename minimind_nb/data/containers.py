"""Data files of every usual kind, read as lines of JSON.

JSON Lines are read as they are. The objects of a JSON array, the rows of a parquet file
and the documents of a plain text, parted by blank lines, become a line each. All but
parquet may be compressed with gzip, whatever their name.
"""

import contextlib
import difflib
import glob
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..session import current_session
from .jsonl import BOM, MAX_LINE_BYTES, Chunk, DataError

MOST_ARRAY_BYTES = 256_000_000
_HEAD_BYTES = 1 << 10
_PARQUET_ROWS = 1000
_GZIP, _PARQUET = rb"\x1f\x8b", rb"PAR1"
_ARRAY, _ROWS = rb"\s*\[\s*[\[{]", rb"\s*(\[\s*)?\{\s*\""
# How files begin that cannot be read, and what they are.
_OTHER_FILES = (
    (rb"\Z", 'empty: write one row a line, such as {"text": "…"}'),
    (rb"PK\x03\x04", "a zip archive: unpack it with unzip"),
    (rb"\xfd7zXZ", "compressed with xz: unpack it with xz -d"),
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it with zstd -d"),
    (rb"BZh", "compressed with bzip2: unpack it with bunzip2"),
    (rb"\xff\xfe|\xfe\xff|\0[^\0]|[^\0]\0", "UTF-16: use iconv -f UTF-16 -t UTF-8"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file: run git lfs pull"),
    (rb"(?i)\s*<(!doctype|html)", "an HTML page: download the file itself again"),
)
_SUFFIXES = re.compile(r"^[^.].*\.(jsonl|json|parquet|txt)(\.gz)?$", re.IGNORECASE)
_TABLE = rb"\s*[^\s{\[].*\n\s*[^\s{\[]"
_Numbered = tuple[int, str]  # the number of a row, and its JSON on one line


def find_files(data_path: str | tuple[str, ...]) -> list[str]:
    """Return the files that a data path means: its own, or those of several paths, of a
    folder or of a pattern, in order.

    Raises `FileNotFoundError` if a folder or pattern has none.
    """
    if isinstance(data_path, tuple):
        return list(itertools.chain(*map(find_files, data_path)))
    path = Path(data_path)
    if not path.is_dir() and (path.exists() or not glob.has_magic(data_path)):
        return [data_path]
    found = path.iterdir() if path.is_dir() else map(Path, glob.glob(data_path))
    files = [str(file) for file in sorted(found) if _SUFFIXES.search(file.name)]
    if not files:
        raise FileNotFoundError(
            f"{data_path} has no .jsonl, .json, .parquet or .txt file: "
            + current_session().missing_remedy()
        )
    return files


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise `OSError` or `DataError` if a file's beginning is of no kind to be read."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    if not path.is_file():
        names = os.listdir(path.parent) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
        meant = f"did you mean {path.with_name(near[0])}?" if near else ""
        hint = meant or current_session().missing_remedy()
        raise FileNotFoundError(f"{path} does not exist, or is no file: {hint}")
    head = _read_head(path)
    for beginning, what in _OTHER_FILES:
        if re.match(beginning, head):
            raise DataError(f"{path} is {what}")
    if re.match(_TABLE, head) and find_kind(path) == "lines":
        raise DataError(f"{path} is CSV or text: write JSON Lines, or name it .txt")


def iter_chunks(path: str | os.PathLike[str], size: int = 1 << 20) -> Iterator[Chunk]:
    """Yield the rows of a file as JSON Lines, in chunks of about `size` bytes.

    Memory stays within twice `size` + 16 MB, but for a JSON array: a longer line, which
    `read_rows` refuses, is cut off. Raises `DataError` for a damaged file.
    """
    path = Path(path)
    read = {"parquet": _read_parquet, "text": _read_text, "array": _read_array}
    if (kind := find_kind(path)) == "lines":
        yield from _read_lines(path, size)
    else:
        yield from _group(read[kind](path), size)


def find_kind(path: str | os.PathLike[str]) -> str:
    """Return how a file is read: as "lines" (of JSON), "array", "text" or "parquet"."""
    head, name = _read_head(Path(path)), os.fspath(path).lower().removesuffix(".gz")
    if re.match(_PARQUET, head):
        return "parquet"
    if name.endswith(".txt") and not re.match(_ROWS, head):
        return "text"
    return "array" if re.match(_ARRAY, head) else "lines"


def _read_head(path: Path) -> bytes:
    with _open(path) as stream:
        return stream.read(_HEAD_BYTES).removeprefix(BOM)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[io.BufferedIOBase]:
    with path.open("rb") as file:
        packed = re.match(_GZIP, file.read(2))
        file.seek(0)
        try:
            yield gzip.GzipFile(fileobj=file) if packed else file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{path} cannot be unpacked ({error}): copy it again"
            ) from error


def _group(rows: Iterator[_Numbered], size: int) -> Iterator[Chunk]:
    """Yield rows in chunks."""
    numbers: list[int] = []
    data = bytearray()
    for number, line in rows:
        numbers.append(number)
        data += line.encode() + b"\n"
        if len(data) >= size:
            yield Chunk(1, bytes(data), numbers)
            numbers, data = [], bytearray()
    if numbers:
        yield Chunk(1, bytes(data), numbers)


def _read_lines(path: Path, size: int) -> Iterator[Chunk]:
    line = 1
    with _open(path) as stream:
        while data := stream.read(size):
            if not data.endswith(b"\n"):
                data += stream.readline(MAX_LINE_BYTES + 1)
            yield Chunk(line, data)
            line += data.count(b"\n")
            if not data.endswith(b"\n"):  # too long, or the end of the file
                while (rest := stream.readline(size)) and not rest.endswith(b"\n"):
                    pass
                line += 1


def _read_array(path: Path) -> Iterator[_Numbered]:
    """Yield the objects of a JSON array, and the line where each begins."""
    with _open(path) as stream:
        data = stream.read(MOST_ARRAY_BYTES + 1)
    if len(data) > MOST_ARRAY_BYTES:
        raise DataError(
            f"{path} is too large for an array: jq -c '.[]' {path} > {path.stem}.jsonl"
        )
    text = _decode(path, data, 1)
    decoder, before = json.JSONDecoder(), re.compile(r"\s*([\[,])\s*")
    line, counted, end, expected = 1, 0, 0, "["
    while (found := before.match(text, end)) and found[1] == expected:
        begin, expected = found.end(), ","
        try:
            _, end = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, getattr(error, "pos", begin)) + 1
            raise DataError(f"{path}:{line} is broken JSON: {error}") from None
        line, counted = line + text.count("\n", counted, begin), begin
        yield line, text[begin:end].replace("\n", " ")
    rest = text[end:].lstrip()
    if rest.rstrip() != "]":
        line = text.count("\n", 0, len(text) - len(rest)) + 1
        raise DataError(f'{path}:{line} is a JSON array that does not end with "]"')


def _read_text(path: Path) -> Iterator[_Numbered]:
    """Yield the documents of a plain text, and the line where each begins."""
    with _open(path) as stream:
        lines = (_decode(path, line, n) for n, line in enumerate(stream, 1))
        numbered = enumerate(lines, 1)
        for blank, group in itertools.groupby(numbered, lambda one: not one[1].strip()):
            if not blank:
                numbers, parts = zip(*group, strict=True)
                document = "".join(parts).strip("\r\n")
                yield numbers[0], json.dumps({"text": document}, ensure_ascii=False)


def _read_parquet(path: Path) -> Iterator[_Numbered]:
    """Yield the rows of a parquet file and their numbers, from 1."""
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            f"{path} is parquet: pip install 'minimind_nb[parquet]'"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        batches = (batch.to_pylist() for batch in file.iter_batches(_PARQUET_ROWS))
        for number, row in enumerate(itertools.chain.from_iterable(batches), 1):
            yield number, json.dumps(_present(row), ensure_ascii=False, default=str)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is a damaged parquet file: {error}") from error


def _present(value: Any) -> Any:
    """Return a value without nulls: parquet has each key of a column in every row."""
    if isinstance(value, dict):
        return {k: _present(v) for k, v in value.items() if v is not None}
    return [*map(_present, value)] if isinstance(value, list) else value


def _decode(path: Path, data: bytes, line: int) -> str:
    try:
        return data.removeprefix(BOM if line == 1 else b"").decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line} is not UTF-8; from GBK: iconv -f GB18030 -t UTF-8"
        ) from None
