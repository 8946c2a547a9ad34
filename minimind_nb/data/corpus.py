"""The documents of a run: what is trained on, and what is held out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ResolvedConfig
from .batches import TrainingStream, ValidationRows
from .demo import DEMO
from .jsonl import DataError, check_file, iter_chunks, read_rows
from .packing import TruncatedDocuments, split_by_hash, truncate_documents
from .token_cache import Source, TokenCache, open_cache
from .tokenizer import TokenizerSpec


def detect_format(path: str | os.PathLike[str], demo: str = "pretrain") -> str:
    """Return the record format of a file, "pretrain" or "sft", by its first row's keys.

    "demo" is the embedded corpus of the stage `demo`. Raises as `check_file` does, and
    `DataError` if the row has neither key.
    """
    if path == DEMO:
        return "pretrain" if demo == "pretrain" else "sft"
    check_file(path)
    rows, tally = read_rows(next(iter_chunks(path)), lambda _: None)
    keys = set(rows[0][1]) if rows else set()
    for key, record_format in (("conversations", "sft"), ("text", "pretrain")):
        if key in keys:
            return record_format
    found = f"the keys {sorted(keys)}" if rows else str(tally.problems[:1])
    raise DataError(
        f"{path} has neither texts nor conversations, its first row {found}: expected is "
        'one {"text": "…"} or {"conversations": […]} a line'
    )


class Corpus:
    """The token caches of a run, and which of their documents are for what.

    Without a validation file of its own, validation is a part of `cache`, taken by
    content hash. `documents` and `val_documents` are numbers in `cache` and `val_cache`,
    `truncated` and `val_truncated` the parts of them that rows can hold. Plain data
    (`describe`) carries a corpus to other processes.
    """

    def __init__(
        self, cache: TokenCache, val_cache: TokenCache | None, cfg: ResolvedConfig
    ) -> None:
        self.cache = cache
        self.val_cache = cache if val_cache is None else val_cache
        if val_cache is None:
            split = split_by_hash(cache.hashes, cfg.val_fraction)
        else:
            split = np.arange(len(cache)), np.arange(len(val_cache))
        self.documents, self.val_documents = split
        width = cfg.max_seq_len
        self.truncated = truncate_documents(cache, self.documents, width)
        self.val_truncated = truncate_documents(
            self.val_cache, self.val_documents, width
        )

    @classmethod
    def prepare(
        cls,
        cfg: ResolvedConfig,
        spec: TokenizerSpec,
        root: Path,
        processes: int,
        max_dropped: float,
    ) -> Corpus:
        """Tokenise the files of a resolved configuration, if that was not done before.

        Raises `DataError` for a malformed file, and `ValueError` if no text is left or
        more than a share of `max_dropped` of the conversations has no answer that fits.
        """

        def open_file(path: str) -> TokenCache:
            policy = (cfg.on_bad_line, cfg.max_bad_fraction)
            return open_cache(Source(path, cfg.stage, spec, *policy), root, processes)

        cache = open_file(cfg.data_path)
        val_cache = None
        if cfg.val_path:
            same = cfg.val_path == cfg.data_path  # which is hashed only once
            val_cache = (
                TokenCache(cache.folder, cache.facts)
                if same
                else open_file(cfg.val_path)
            )
        corpus = cls(cache, val_cache, cfg)
        if not len(corpus.documents):
            raise ValueError(
                f"{cfg.data_path} has no text to train on: {len(cache)} documents that "
                f"are not empty, {len(corpus.val_documents)} of them held out"
            )
        if cfg.val_path and not len(corpus.val_documents):
            raise ValueError(
                f"{cfg.val_path} has no text to validate on: every text in it is empty; "
                "leave val_path out to hold out a part of data_path"
            )
        _check_truncation(cfg, cfg.data_path, corpus.truncated, max_dropped)
        if cfg.val_path:
            _check_truncation(cfg, cfg.val_path, corpus.val_truncated, 1.0)
        return corpus

    def describe(self) -> list[dict[str, Any]]:
        """Return where the caches lie, as plain data for `reopen`."""
        caches = [self.cache]
        if self.val_cache is not self.cache:
            caches.append(self.val_cache)
        return [{"folder": str(one.folder), "facts": one.facts} for one in caches]

    @classmethod
    def reopen(
        cls, description: Sequence[Mapping[str, Any]], cfg: ResolvedConfig
    ) -> Corpus:
        """Open caches that the process which described them has verified."""
        caches = [TokenCache(Path(one["folder"]), one["facts"]) for one in description]
        return cls(caches[0], caches[1] if caches[1:] else None, cfg)

    def training_stream(
        self,
        cfg: ResolvedConfig,
        pad_id: int,
        rank: int = 0,
        size: int = 1,
        samples: int = 0,
    ) -> TrainingStream:
        """Return the samples of a resolved configuration for one rank."""
        place = {"rank": rank, "size": size, "samples": samples}
        return TrainingStream(self.cache, self.truncated, cfg, pad_id, **place)

    def validation_rows(
        self, cfg: ResolvedConfig, pad_id: int
    ) -> ValidationRows | None:
        """Return the held-out rows, at most `eval_tokens`; None if nothing is held out."""
        if not len(self.val_truncated.documents):
            return None
        return ValidationRows(self.val_cache, self.val_truncated, cfg, pad_id)


def _check_truncation(
    cfg: ResolvedConfig, path: str, truncated: TruncatedDocuments, max_dropped: float
) -> None:
    pairs = cfg.stage == "dpo"
    kept, dropped = len(truncated.documents) // (1 + pairs), truncated.dropped
    if kept and dropped <= max_dropped * (kept + dropped):
        return
    raise ValueError(
        f"{path}: {dropped:,} of {kept + dropped:,} {'pairs' if pairs else 'conversations'} "
        f"have no whole answer within max_seq_len={cfg.max_seq_len} tokens, so nothing "
        "could be learned from them; raise max_seq_len (the longest has "
        f"{truncated.longest:,} tokens), or let a larger share than {max_dropped:.3g} be "
        'left out: max_bad_fraction=…, with on_bad_line="skip"'
    )
