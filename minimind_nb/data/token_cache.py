"""The token cache: a data file tokenised once, verified, and memory-mapped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..storage import verified
from .faults import BadRow, DataError, Tally, write_rejected
from .jsonl import check_file, iter_chunks
from .record_formats import RECORD_FORMATS, VERSION
from .tokenising import Encoded, encode_chunks, token_type
from .tokenizer import TokenizerSpec

CHUNK_BYTES = 2 << 20
_CACHE_SHARE = 0.9  # of the bytes of a JSONL file; 0.68 of texts, 0.89 of chats
_GZIP_RATIO = 3
# Below this a pool of helpers costs more than it saves: two start in 0.9 s of processor
# time, and one process alone tokenises 16 MB in 2.1 s.
_ALONE_BYTES = 16 << 20
_REPORT_SECONDS = 5.0
_REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class Source:
    """What a token cache is made of: a file, its record format, a tokenizer."""

    path: str
    record_format: str
    tokenizer: TokenizerSpec
    on_bad_line: str = "error"
    max_bad_fraction: float = 0.01

    def content(self) -> str:
        """What is read, and how: equal for equal files, whatever they are called."""
        parts = [verified.hash_file(Path(self.path)), self.path.endswith(".gz")]
        return _hash(*parts, self.record_format, VERSION)

    def name(self, content: str) -> str:
        """The name of the cache of this content."""
        key = _hash(content, self.tokenizer.fingerprint, self.on_bad_line)
        return f"tokens-{key[:24]}"


class TokenCache:
    """Documents as token ids, memory-mapped.

    `tokens` holds all ids on end (uint16; uint32 for vocabularies over 65,536);
    document d is `tokens[offsets[d]:offsets[d + 1]]`. `lines` are physical line numbers
    in the file, from 1; `sizes` UTF-8 bytes, of the text or of the answers learned from;
    `hashes` the rows' 64-bit hashes.

    Of chat formats also: `marks` (uint8, one a token, bits as in `conversations`);
    `trained`, tokens learned from, and `answers`, of which they are, int64 a document;
    `answer_sizes`, UTF-8 bytes of each of these answers. None for plain text.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = facts
        self.tokens = _map(folder / "tokens", facts["token_type"])
        self.offsets = _map(folder / "offsets", np.int64)
        self.lines = _map(folder / "lines", np.int64)
        self.sizes = _map(folder / "sizes", np.int64)
        self.hashes = _map(folder / "hashes", np.uint64)
        self.marks = self.trained = self.answers = self.answer_sizes = None
        if facts["record_format"] != "pretrain":
            self.marks = _map(folder / "marks", np.uint8)
            self.trained = _map(folder / "trained", np.int64)
            self.answers = _map(folder / "answers", np.int64)
            self.answer_sizes = _map(folder / "answer_sizes", np.int64)

    def __len__(self) -> int:
        return len(self.lines)

    def document(self, number: int) -> np.ndarray:
        """The ids of one document."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

    def marks_of(self, number: int) -> np.ndarray:
        """The marks of one document of a chat format."""
        assert self.marks is not None
        return self.marks[self.offsets[number] : self.offsets[number + 1]]

    def piece(self, number: int, start: int, count: int) -> np.ndarray:
        """The ids of `count` targets of a document, and the one before the first."""
        begin = int(self.offsets[number]) + start
        return self.tokens[begin : begin + count + 1]

    @property
    def targets(self) -> np.ndarray:
        """The number of predicted tokens of each document: all but its first."""
        return np.maximum(np.diff(self.offsets) - 1, 0)

    @property
    def rejected_file(self) -> Path | None:
        """The list of rows left out, where some were."""
        file = self.folder / _REJECTED
        return file if file.exists() else None


def open_cache(
    source: Source,
    root: Path,
    processes: int = 1,
    on_progress: Callable[[str], None] = lambda _: None,
) -> TokenCache:
    """The token cache of a file, built if it is not there or not intact.

    Memory does not grow with the file: a few chunks of 2 MiB are in flight. Whoever
    comes second waits for the first. Raises `FileNotFoundError`, `DataError` (also
    where the file changes meanwhile) or `OSError`.
    """
    check_file(source.path)
    before = Path(source.path).stat()
    content = source.content()
    folder = root / source.name(content)
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{folder.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            try:
                facts = verified.verify(folder)
                _judge_again(source, facts, folder / _REJECTED)
                return TokenCache(folder, facts)
            except verified.DamagedFolder as damage:
                on_progress(f"the token cache is damaged and made anew: {damage}")
                shutil.rmtree(folder)
        for leftover in root.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        with_what = (source, folder, processes, on_progress)
        _build(*with_what, before=before, content=content)
        return TokenCache(folder, verified.verify(folder))


def _hash(*parts: object) -> str:
    return hashlib.sha256(verified.canonical_json(parts).encode()).hexdigest()


def _judge_again(source: Source, facts: dict[str, Any], rejected: Path) -> None:
    """Hold a cache built under a laxer max_bad_fraction to this one."""
    tally = Tally(source.path, source.on_bad_line, source.max_bad_fraction)
    tally.good = facts["rows"]
    tally.kinds.update(facts["bad_rows"])
    if tally.kinds:
        with rejected.open(encoding="utf-8") as lines:
            tally.problems = [BadRow(**json.loads(line)) for line in lines]
    tally.judge()


def estimate_bytes(file: Path) -> int:
    """What the token cache of a JSONL file takes on the disk, about."""
    unpacked = _GZIP_RATIO if file.suffix == ".gz" else 1
    return int(file.stat().st_size * unpacked * _CACHE_SHARE)


def _build(
    source: Source,
    folder: Path,
    processes: int,
    on_progress: Callable[[str], None],
    *,
    before: os.stat_result,
    content: str,
) -> None:
    """Write the cache; `before` is the state of the file when `content` was taken."""
    tally = Tally(source.path, source.on_bad_line, source.max_bad_fraction)
    facts: dict[str, Any] = {"token_type": token_type(source.tokenizer.vocab_size)}
    facts |= {"record_format": source.record_format, "content": content}
    if before.st_size < _ALONE_BYTES and not source.path.endswith(".gz"):
        processes = 1
    with verified.writing(folder, facts, estimate_bytes(Path(source.path))) as aside:
        chunks = iter_chunks(source.path, CHUNK_BYTES)
        with contextlib.closing(
            encode_chunks(source.record_format, source.tokenizer, chunks, processes)
        ) as parts:
            facts |= _write_parts(parts, aside, tally, on_progress, before.st_size)
        after = Path(source.path).stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise DataError(
                f"{source.path} changed while it was read: start again when nothing "
                "writes to it any more"
            )
        tally.judge()
        if tally.problems:
            write_rejected(aside / _REJECTED, tally.problems)
        facts |= {"bad_rows": dict(tally.kinds), "rows": tally.good}
        rows = facts["documents"] // RECORD_FORMATS[source.record_format].per_row
        facts |= {"blank": tally.blank, "empty": tally.good - rows}


def _write_parts(
    parts: Iterator[Encoded],
    folder: Path,
    tally: Tally,
    on_progress: Callable[[str], None],
    size: int,
) -> dict[str, int]:
    tokens = documents = text_bytes = 0
    next_report = time.monotonic() + _REPORT_SECONDS
    with contextlib.ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for part in parts:
            tally.add(part.rows, part.problems, part.blank, part.more)
            tally.judge_so_far()
            if not files:
                for name in part.arrays:
                    files[name] = stack.enter_context((folder / name).open("wb"))
                files["offsets"].write(bytes(8))  # the first document begins at 0
            part.arrays["offsets"] += tokens
            for name, file in files.items():
                file.write(part.arrays[name].tobytes())
            tokens += len(part.arrays["tokens"])
            documents += len(part.arrays["lines"])
            text_bytes += int(part.arrays["sizes"].sum())
            if time.monotonic() > next_report:
                next_report = time.monotonic() + _REPORT_SECONDS
                done = f"tokenised {text_bytes / 1e6:,.0f} MB of text"
                on_progress(f"{done} (the file has {size / 1e6:,.0f} MB)")
    return {"tokens": tokens, "documents": documents, "text_bytes": text_bytes}


def _map(file: Path, dtype: npt.DTypeLike) -> np.ndarray:
    if file.stat().st_size == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(file, dtype, mode="r")
