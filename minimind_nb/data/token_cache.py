"""The token cache: a data file tokenised once, verified, and memory-mapped."""

import concurrent.futures
import concurrent.futures.process
import contextlib
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
from collections import Counter, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from fcntl import LOCK_EX
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..lifetime import die_with_parent, without_main_script
from ..progress_bar import open_bar
from ..storage import file_system, verified
from .containers import find_kind, iter_chunks
from .conversations import IN_LOSS
from .jsonl import DataError, Tally
from .record_formats import IDS_VERSION, Arrays, encode_chunk
from .tokenizer import TokenizerSpec

CHUNK_BYTES = 2 << 20
_CACHE_SHARE = 0.9  # of the bytes of a JSONL file; 0.68 of texts, 0.89 of chats
_GZIP_RATIO = 3
# Below this helpers cost more than they save: two start in 0.9 s of processor time, and
# one process alone tokenises 16 MB in 2.1 s.
_ALONE_BYTES = 16 << 20
REJECTED = "rejected.jsonl"
_CONTENT_VERSION = 3  # of the hash by which runs know their data

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """The ingredients of a token cache: a file, its record format, a tokenizer."""

    path: str
    record_format: str
    tokenizer: TokenizerSpec
    on_bad_line: str = "error"
    max_bad_fraction: float = 0.01

    def content(self) -> str:
        """Return a hash of the file's bytes and format, by which runs know their data."""
        parts = [verified.hash_file(Path(self.path)), self.path.endswith(".gz")]
        parts += [self.record_format, _CONTENT_VERSION]
        if (kind := find_kind(self.path)) != "lines":
            parts.append(kind)
        return _hash(*parts)

    def name(self, content: str) -> str:
        """Return the name of the cache of this content."""
        parts: list[Any] = [content, self.tokenizer.fingerprint, self.on_bad_line]
        if (version := IDS_VERSION[self.record_format]) != _CONTENT_VERSION:
            parts.append(version)
        return f"tokens-{_hash(*parts)[:24]}"


def names_before_version_3(
    path: str, record_format: str, fingerprint: str, on_bad_line: str
) -> set[str]:
    """Return the names that caches of this content had, which runs of then recorded."""
    content = (verified.hash_file(Path(path)), path.endswith(".gz"), fingerprint)
    reading = ((record_format, version, on_bad_line) for version in (1, 2))
    return {f"tokens-{_hash(*content, *parts)[:24]}" for parts in reading}


class TokenCache:
    """Documents as token ids, memory-mapped.

    `tokens` (uint16, or uint32) has document d at `[offsets[d]:offsets[d + 1]]`. One a
    document are `lines` (physical, from 1), `sizes` (UTF-8 bytes of the text, or of the
    answers in the loss) and `hashes` (64-bit, of the row).

    Chats also have `marks` (uint8 a token, bits as in `conversations`), and a document
    `loss_tokens` and `answers`, the numbers of tokens and of answers in the loss, and
    in `answer_sizes` the UTF-8 bytes of each of these. All are None for plain text.
    `starts` are the numbers of the first document of each file.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = facts
        self.starts = np.zeros(1, np.int64)
        self.tokens: Any = self._map("tokens", facts["token_type"])
        self.offsets = self._map("offsets")
        self.lines = self._map("lines")
        self.sizes = self._map("sizes")
        self.hashes = self._map("hashes", np.uint64)
        self.marks: Any = None
        self.loss_tokens = self.answers = self.answer_sizes = None
        if facts["record_format"] != "pretrain":
            self.marks = self._map("marks", np.uint8)
            self.loss_tokens = self._map("trained")
            self.answers = self._map("answers")
            self.answer_sizes = self._map("answer_sizes")

    def _map(self, name: str, dtype: npt.DTypeLike = np.int64) -> np.ndarray:
        file = self.folder / name
        if file.stat().st_size == 0:
            return np.zeros(0, dtype)  # an empty file cannot be mapped
        return np.memmap(file, dtype, mode="r")

    def __len__(self) -> int:
        return len(self.lines)

    def file_of(self, documents: npt.ArrayLike) -> np.ndarray:
        """Return the number of the file, from 0, that documents come from."""
        return np.searchsorted(self.starts, documents, side="right") - 1

    def document(self, number: int) -> np.ndarray:
        """Return the ids of one document."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

    def marks_of(self, number: int) -> np.ndarray:
        """Return the marks of one document of a chat format."""
        assert self.marks is not None
        return self.marks[self.offsets[number] : self.offsets[number + 1]]

    def piece(self, number: int, start: int, count: int) -> np.ndarray:
        """Return the ids of `count` targets of a document, and the one before them."""
        begin = int(self.offsets[number]) + start
        return self.tokens[begin : begin + count + 1]

    def loss_mask(self, number: int, start: int, count: int) -> np.ndarray:
        """Return which targets of a piece are in the loss (bool); of plain text, all."""
        if self.marks is None:
            return np.ones(count, bool)
        begin = int(self.offsets[number]) + start + 1
        return self.marks[begin : begin + count] & IN_LOSS > 0

    @property
    def targets(self) -> np.ndarray:
        """The number of predicted tokens of each document: all but its first."""
        return np.maximum(np.diff(self.offsets) - 1, 0)


class JoinedCache(TokenCache):
    """The caches of several files as one, whose documents are numbered through."""

    def __init__(self, caches: Sequence[TokenCache]) -> None:
        counts = [len(cache) for cache in caches]
        lengths = np.concatenate([np.diff(cache.offsets) for cache in caches])
        self.starts = np.cumsum([0, *counts[:-1]])
        self.offsets = np.append(0, np.cumsum(lengths))
        for name in "lines sizes hashes loss_tokens answers answer_sizes".split():
            arrays = [getattr(cache, name) for cache in caches]
            setattr(self, name, None if arrays[0] is None else np.concatenate(arrays))
        self.tokens = _JoinedArray([cache.tokens for cache in caches])
        self.marks = None
        if caches[0].marks is not None:
            self.marks = _JoinedArray([cache.marks for cache in caches])
        facts = [cache.facts for cache in caches]
        forms = dict.fromkeys(one.get("form", "") for one in facts)
        self.facts = facts[0] | {
            "content": _hash([one["content"] for one in facts]),
            "rows": sum(one["rows"] for one in facts),
            "form": " and ".join(filter(None, forms)),
        }
        for key in ("bad_rows", "ignored"):
            counts = (Counter(one.get(key, {})) for one in facts)
            self.facts[key] = dict(sum(counts, Counter()))


class _JoinedArray:
    """Arrays as one, of which slices within one of them are read."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = arrays
        self._begins = np.cumsum([0, *(len(array) for array in arrays[:-1])])

    def __getitem__(self, span: slice) -> np.ndarray:
        number = int(np.searchsorted(self._begins, span.start, side="right")) - 1
        begin = self._begins[number]
        return self._arrays[number][span.start - begin : span.stop - begin]


def open_cache(source: Source, root: Path, processes: int = 1) -> TokenCache:
    """Return the token cache of a file, which is built if it is missing or damaged.

    The file must be one that `check_file` accepts. It is hashed each time, and read
    again only to build, a few chunks of 2 MiB at a time. A second process waits for the
    first. Raises `DataError` (also for a file that changes meanwhile) or `OSError`.
    """
    before = Path(source.path).stat()
    content = source.content()
    folder = root / source.name(content)
    verified.check_writable(root)
    with (root / f".{folder.name}.lock").open("a") as lock:
        file_system.lock(lock.fileno(), LOCK_EX)
        if folder.exists():
            try:
                facts = verified.verify(folder)
                bad = sum(facts["bad_rows"].values())
                if bad <= source.max_bad_fraction * (bad + facts["rows"]):
                    return TokenCache(folder, facts)
            except verified.DamagedFolder as damage:
                logger.warning("the token cache is damaged, rebuilding it: %s", damage)
                shutil.rmtree(folder)
        verified.remove_leftovers(root, folder.name)
        _build(source, folder, processes, content, before)
        return TokenCache(folder, verified.verify(folder))


def _hash(*parts: object) -> str:
    return hashlib.sha256(verified.canonical_json(parts).encode()).hexdigest()


def _build(
    source: Source, folder: Path, processes: int, content: str, before: os.stat_result
) -> None:
    """Write the cache; `before` is the state of the file when `content` was taken."""
    path = Path(source.path)
    unpacked = before.st_size * (_GZIP_RATIO if path.suffix == ".gz" else 1)
    if unpacked < _ALONE_BYTES:
        processes = 1
    policy = (path, source.on_bad_line, source.max_bad_fraction)
    tally = Tally()
    facts: dict[str, Any] = {"tokens": 0}
    bar = open_bar(f"Tokenising {path.name}", unpacked, unit="B", unit_scale=True)
    with (
        bar,
        verified.writing(folder, facts, int(unpacked * _CACHE_SHARE)) as aside,
        contextlib.closing(_encode(source, processes)) as parts,
    ):
        (aside / "offsets").write_bytes(bytes(8))  # the first document begins at 0
        for arrays, counted in parts:
            tally.add(counted)
            if source.on_bad_line == "error" and tally.kinds:
                tally.raise_if_too_many(*policy)
            arrays["offsets"] += facts["tokens"]
            for name, array in arrays.items():
                with (aside / name).open("ab") as file:
                    file.write(array.tobytes())
            facts["tokens"] += len(arrays["tokens"])
            facts["token_type"] = arrays["tokens"].dtype.name
            bar.update(min(CHUNK_BYTES, unpacked - bar.n))
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise DataError(f"{path} changed while it was read: start again afterwards")
        tally.raise_if_too_many(*policy)
        if tally.problems:
            with (aside / REJECTED).open("w", encoding="utf-8") as file:
                for row in tally.problems:
                    file.write(f"{json.dumps(row._asdict(), ensure_ascii=False)}\n")
        facts |= {
            "rows": tally.good,
            "bad_rows": dict(tally.kinds),
            "form": next(iter(tally.forms), ""),
            "ignored": dict(tally.ignored),
            "record_format": source.record_format,
            "content": content,
        }


def _encode(source: Source, processes: int) -> Generator[tuple[Arrays, Tally]]:
    """Encode a file in this process or in helpers; the chunks come in order."""
    chunks = iter_chunks(source.path, CHUNK_BYTES)
    encode = functools.partial(encode_chunk, source.record_format, source.tokenizer)
    if processes == 1:
        yield from map(encode, chunks)
        return
    with concurrent.futures.ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=die_with_parent,
        initargs=(os.getpid(),),
    ) as pool:
        waiting: deque[concurrent.futures.Future[tuple[Arrays, Tally]]] = deque()
        try:
            for chunk in chunks:
                with without_main_script():  # the pool starts its helpers here
                    waiting.append(pool.submit(encode, chunk))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise RuntimeError(
                "a tokenising process was killed, perhaps for lack of memory: start again"
            ) from error
