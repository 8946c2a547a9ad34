"""The token cache: a data file tokenised once, verified, and memory-mapped."""

from __future__ import annotations

import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..session import die_with_parent
from ..storage import verified
from .encoding import BulkEncoder
from .faults import BadRow, Tally, write_rejected
from .jsonl import Chunk, check_file, iter_chunks, read_rows
from .records import RECORD_FORMATS, VERSION
from .tokenizer import TokenizerSpec

CHUNK_BYTES = 2 << 20
# Below this a pool of helpers costs more than it saves: two start in 0.9 s of processor
# time, and one process alone tokenises 16 MB in 2.1 s.
_ALONE_BYTES = 16 << 20
_REPORT_SECONDS = 5.0
_REJECTED = "rejected.jsonl"
_ARRAYS = {
    "offsets": np.dtype(np.int64),
    "lines": np.dtype(np.int64),
    "sizes": np.dtype(np.int64),
    "hashes": np.dtype(np.uint64),
}


@dataclass(frozen=True)
class Source:
    """What a token cache is made of: a file, its record format, a tokenizer."""

    path: str
    record_format: str
    tokenizer: TokenizerSpec
    on_bad_line: str = "error"
    max_bad_fraction: float = 0.01

    def key(self) -> str:
        """Names the cache: equal for equal content, whatever the file is called."""
        parts = [
            verified.hash_file(Path(self.path)),
            self.path.endswith(".gz"),
            self.tokenizer.fingerprint,
            self.record_format,
            VERSION,
            self.on_bad_line,
        ]
        text = verified.canonical_json(parts)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()


class TokenCache:
    """Documents as token ids, memory-mapped.

    `tokens` holds all ids on end (uint16; uint32 for vocabularies over 65,536);
    document d is `tokens[offsets[d]:offsets[d + 1]]`. `lines` are physical line numbers
    in the file, from 1; `sizes` the texts' UTF-8 bytes; `hashes` their 64-bit hashes.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = facts
        self.tokens = _map(folder / "tokens", np.dtype(facts["token_type"]))
        self.offsets = _map(folder / "offsets", _ARRAYS["offsets"])
        self.lines = _map(folder / "lines", _ARRAYS["lines"])
        self.sizes = _map(folder / "sizes", _ARRAYS["sizes"])
        self.hashes = _map(folder / "hashes", _ARRAYS["hashes"])

    def __len__(self) -> int:
        return len(self.lines)

    def document(self, number: int) -> np.ndarray:
        """The ids of one document."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

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
    comes second waits for the first. Raises `FileNotFoundError`, `DataError` or
    `OSError`.
    """
    check_file(source.path)
    key = source.key()
    folder = root / f"tokens-{key[:24]}"
    root.mkdir(parents=True, exist_ok=True)
    with _one_builder(root / f".{folder.name}.lock"):
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
        _build(source, folder, processes, on_progress)
        return TokenCache(folder, verified.verify(folder))


@contextlib.contextmanager
def _one_builder(lock: Path) -> Iterator[None]:
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _judge_again(source: Source, facts: dict[str, Any], rejected: Path) -> None:
    """Hold a cache built under a laxer max_bad_fraction to this one."""
    tally = Tally(source.path, source.on_bad_line, source.max_bad_fraction)
    tally.good = facts["rows"]
    tally.kinds.update(facts["bad_rows"])
    if tally.kinds:
        with rejected.open(encoding="utf-8") as lines:
            tally.problems = [BadRow(**json.loads(line)) for line in lines]
    tally.judge()


@dataclass
class _Encoded:
    """What a helper made of a chunk."""

    tokens: bytes
    counts: np.ndarray
    lines: np.ndarray
    sizes: np.ndarray
    hashes: np.ndarray
    rows: int
    empty: int
    blank: int
    problems: list[BadRow]


class _ChunkEncoder:
    """Turns chunks into ids; one a process."""

    def __init__(self, record_format: str, spec: TokenizerSpec) -> None:
        self.format = RECORD_FORMATS[record_format]
        self.spec = spec
        self.encoder = BulkEncoder(spec, threads=1)
        self.token_type = token_type(spec.vocab_size)

    def __call__(self, chunk: Chunk) -> _Encoded:
        rows, problems, blank = read_rows(chunk, self.format.check)
        pairs = [(line, self.format.text(row)) for line, row in rows]
        pairs = [(line, text) for line, text in pairs if text]
        texts = [text for _, text in pairs]
        raw = [text.encode("utf-8") for text in texts]
        ids = self.format.encode(texts, self.encoder, self.spec)
        tokens = np.concatenate(ids) if ids else np.zeros(0, np.int64)
        if len(tokens) and tokens.max() >= self.spec.vocab_size:
            raise ValueError(
                f"the tokenizer gave the id {tokens.max()} but states {self.spec.vocab_size} "
                "entries, so a model would have no row for it; its tokenizer.json is "
                "inconsistent: use another tokenizer"
            )
        return _Encoded(
            tokens=tokens.astype(self.token_type).tobytes(),
            counts=np.array([len(each) for each in ids], np.int64),
            lines=np.array([line for line, _ in pairs], np.int64),
            sizes=np.array([len(each) for each in raw], np.int64),
            hashes=np.array([_content_hash(each) for each in raw], np.uint64),
            rows=len(rows),
            empty=len(rows) - len(pairs),
            blank=blank,
            problems=problems,
        )


def token_type(vocab_size: int) -> str:
    """The smallest array type that holds all ids: "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _content_hash(raw: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def _build(
    source: Source, folder: Path, processes: int, on_progress: Callable[[str], None]
) -> None:
    tally = Tally(source.path, source.on_bad_line, source.max_bad_fraction)
    facts: dict[str, Any] = {"token_type": token_type(source.tokenizer.vocab_size)}
    size = Path(source.path).stat().st_size
    if size < _ALONE_BYTES and not source.path.endswith(".gz"):
        processes = 1
    with verified.writing(folder, facts) as aside, contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context((aside / name).open("wb"))
            for name in ("tokens", *_ARRAYS)
        }
        chunks = iter_chunks(source.path, CHUNK_BYTES)
        parts = stack.enter_context(_encoding(source, chunks, processes))
        totals = _write_parts(parts, files, tally, on_progress, size)
        tally.judge()
        if tally.problems:
            write_rejected(aside / _REJECTED, tally.problems)
        facts.update(
            totals,
            blank=tally.blank,
            bad_rows=dict(tally.kinds),
            rows=tally.good,
            tokenizer=source.tokenizer.fingerprint,
        )
        for file in files.values():
            file.flush()


def _write_parts(
    parts: Iterator[_Encoded],
    files: Mapping[str, BinaryIO],
    tally: Tally,
    on_progress: Callable[[str], None],
    size: int,
) -> dict[str, int]:
    totals: collections.Counter[str] = collections.Counter()
    next_report = time.monotonic() + _REPORT_SECONDS
    files["offsets"].write(np.zeros(1, np.int64).tobytes())
    for part in parts:
        tally.add(part.rows, part.problems, part.blank)
        offsets = totals["tokens"] + np.cumsum(part.counts)
        files["tokens"].write(part.tokens)
        files["offsets"].write(offsets.tobytes())
        for name in ("lines", "sizes", "hashes"):
            files[name].write(getattr(part, name).tobytes())
        totals["tokens"] += int(part.counts.sum())
        totals["documents"] += len(part.counts)
        totals["text_bytes"] += int(part.sizes.sum())
        totals["empty"] += part.empty
        if time.monotonic() > next_report:
            next_report = time.monotonic() + _REPORT_SECONDS
            done = f"tokenised {totals['text_bytes'] / 1e6:,.0f} MB of text"
            on_progress(f"{done} (the file has {size / 1e6:,.0f} MB)")
    return dict(totals)


@contextlib.contextmanager
def _encoding(
    source: Source, chunks: Iterator[Chunk], processes: int
) -> Iterator[Iterator[_Encoded]]:
    """Encode chunks in this process or in helpers; results come in order."""
    if processes == 1:
        encoder = _ChunkEncoder(source.record_format, source.tokenizer)
        yield map(encoder, chunks)
        return
    with concurrent.futures.ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_helper,
        initargs=(os.getpid(), source.record_format, source.tokenizer),
    ) as pool:
        try:
            yield _in_order(pool, chunks, 2 * processes)
        except concurrent.futures.process.BrokenProcessPool as error:
            raise RuntimeError(
                "a helper process that tokenises was killed; when nobody did, the "
                "machine ran out of memory: close what else runs, and start again"
            ) from error


def _in_order(
    pool: concurrent.futures.Executor, chunks: Iterator[Chunk], in_flight: int
) -> Iterator[_Encoded]:
    waiting: collections.deque[concurrent.futures.Future[_Encoded]]
    waiting = collections.deque()
    for chunk in chunks:
        waiting.append(pool.submit(_encode_in_helper, chunk))
        if len(waiting) > in_flight:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_helper: _ChunkEncoder | None = None


def _start_helper(parent_pid: int, record_format: str, spec: TokenizerSpec) -> None:
    global _helper  # noqa: PLW0603 - an executor's initializer can only leave a global
    die_with_parent(parent_pid)
    _helper = _ChunkEncoder(record_format, spec)


def _encode_in_helper(chunk: Chunk) -> _Encoded:
    assert _helper is not None
    return _helper(chunk)


def _map(file: Path, dtype: np.dtype) -> np.ndarray:
    if file.stat().st_size == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(file, dtype, mode="r")
