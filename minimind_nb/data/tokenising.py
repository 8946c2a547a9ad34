"""Chunks of rows become arrays of ids, in this process or in helpers."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import hashlib
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np

from ..lifetime import die_with_parent, without_main_script
from .conversations import TRAINED
from .fast_encoding import BulkEncoder
from .faults import BadRow, Fault, describe
from .jsonl import Chunk, read_rows
from .record_formats import RECORD_FORMATS, Document
from .tokenizer import TokenizerSpec


class Encoded(NamedTuple):
    """What became of a chunk; `arrays` by the name of the file they go to."""

    arrays: dict[str, np.ndarray]
    rows: int
    problems: list[BadRow]
    blank: int
    more: Counter[str]


class _ChunkEncoder:
    """Turns chunks into ids; one a process."""

    def __init__(self, record_format: str, spec: TokenizerSpec) -> None:
        self.record_format = record_format
        self.format = RECORD_FORMATS[record_format]
        self.spec = spec
        self.encoder = BulkEncoder(spec, threads=1)

    def __call__(self, chunk: Chunk) -> Encoded:
        rows, problems, blank, more = read_rows(chunk, self.format.check)
        texts = [self.format.text(row) for _, row in rows]
        full = [
            (*row, text.encode()) for row, text in zip(rows, texts, strict=True) if text
        ]
        made = self.format.encode([row for _, row, _ in full], self.encoder, self.spec)
        documents: list[tuple[int, bytes, Document]] = []
        faults: list[BadRow] = []
        for (line, row, raw), each in zip(full, made, strict=True):
            if isinstance(each, Fault):
                shown = json.dumps(row, ensure_ascii=False).encode()
                faults.append(describe(line, shown, each))
            else:
                documents += [(line, raw, document) for document in each]
        arrays = self._arrays(documents)
        problems = sorted([*problems, *faults], key=lambda problem: problem.line)
        return Encoded(arrays, len(rows) - len(faults), problems, blank, more)

    def _arrays(
        self, documents: list[tuple[int, bytes, Document]]
    ) -> dict[str, np.ndarray]:
        ids = [document.ids for _, _, document in documents]
        tokens = np.concatenate([np.zeros(0, np.uint32), *ids])
        if tokens.max(initial=0) >= self.spec.vocab_size:
            raise ValueError(
                f"the tokenizer gave the id {tokens.max()} but states "
                f"{self.spec.vocab_size} entries: use another tokenizer"
            )
        hashes = (hashlib.blake2b(raw, digest_size=8) for _, raw, _ in documents)
        arrays = {
            "tokens": tokens.astype(token_type(self.spec.vocab_size)),
            "offsets": np.cumsum([len(each) for each in ids], dtype=np.int64),
            "lines": np.array([line for line, _, _ in documents], np.int64),
            "sizes": np.array([len(raw) for _, raw, _ in documents], np.int64),
            "hashes": np.frombuffer(b"".join(h.digest() for h in hashes), "<u8"),
        }
        if self.record_format != "pretrain":
            marks = [one.marks for _, _, one in documents if one.marks is not None]
            sizes = [document.answer_sizes for _, _, document in documents]
            trained = [np.count_nonzero(each & TRAINED) for each in marks]
            arrays |= {
                "sizes": np.array([sum(each) for each in sizes], np.int64),
                "marks": np.concatenate([np.zeros(0, np.uint8), *marks]),
                "trained": np.array(trained, np.int64),
                "answers": np.array([len(each) for each in sizes], np.int64),
                "answer_sizes": np.array([n for each in sizes for n in each], np.int64),
            }
        return arrays


def token_type(vocab_size: int) -> str:
    """The smallest array type that holds all ids: "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def encode_chunks(
    record_format: str, spec: TokenizerSpec, chunks: Iterator[Chunk], processes: int
) -> Generator[Encoded, None, None]:
    """Encode chunks in this process or in helpers; results come in order."""
    if processes == 1:
        yield from map(_ChunkEncoder(record_format, spec), chunks)
        return
    with concurrent.futures.ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_helper,
        initargs=(os.getpid(), record_format, spec),
    ) as pool:
        waiting: deque[concurrent.futures.Future[Encoded]] = deque()
        try:
            for chunk in chunks:
                with without_main_script():  # it is here that helpers are started
                    waiting.append(pool.submit(_encode_in_helper, chunk))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise RuntimeError(
                "a helper process that tokenises was killed; when nobody did, the "
                "machine ran out of memory: close what else runs, and start again"
            ) from error


_helper: _ChunkEncoder | None = None


def _start_helper(parent_pid: int, record_format: str, spec: TokenizerSpec) -> None:
    global _helper  # noqa: PLW0603 - an executor's initializer can only leave a global
    die_with_parent(parent_pid)
    _helper = _ChunkEncoder(record_format, spec)


def _encode_in_helper(chunk: Chunk) -> Encoded:
    assert _helper is not None
    return _helper(chunk)
