"""The documents of a run: what is trained on, and what is held out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import TrainConfig
from .batches import TrainingStream, ValidationRows
from .demo import DEMO
from .excerpts import Excerpts, take_excerpts
from .jsonl import DataError, check_file, iter_chunks, read_rows
from .packing import split_by_hash
from .token_cache import Source, TokenCache, open_cache
from .tokenizer import TokenizerSpec


def detect_format(path: str | os.PathLike[str], demo: str = "pretrain") -> str:
    """The record format of a file, by the keys of its first row: "pretrain" or "sft".

    "demo" is the embedded corpus of the stage `demo`. Raises what `check_file` does, and
    `DataError` for rows that have neither key.
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

    The split is a view on the cache, taken by content hash, unless validation has a
    file of its own. Plain data (`describe`) carries it to other processes.
    """

    def __init__(
        self, cache: TokenCache, val_cache: TokenCache | None, val_fraction: float
    ) -> None:
        self.cache = cache
        self.val_cache = cache if val_cache is None else val_cache
        if val_cache is None:
            split = split_by_hash(cache.hashes, val_fraction)
        else:
            split = np.arange(len(cache)), np.arange(len(val_cache))
        self.documents, self.val_documents = split

    @classmethod
    def prepare(
        cls,
        cfg: TrainConfig,
        spec: TokenizerSpec,
        root: Path,
        processes: int,
    ) -> Corpus:
        """Tokenise what a resolved configuration names, unless that was done before.

        Raises `FileNotFoundError`, `DataError` naming what is wrong with a file, or
        `ValueError` where no text is left.
        """

        def cache_of(path: str) -> TokenCache:
            source = Source(
                path, cfg.stage, spec, cfg.on_bad_line, cfg.max_bad_fraction
            )
            return open_cache(source, root, processes)

        assert cfg.data_path
        val_cache = cache_of(cfg.val_path) if cfg.val_path else None
        corpus = cls(cache_of(cfg.data_path), val_cache, cfg.val_fraction)
        if not len(corpus.documents):
            raise ValueError(
                f"{cfg.data_path} has no text to train on: {len(corpus.cache)} documents "
                f"that are not empty, {len(corpus.val_documents)} of them held out"
            )
        if val_cache is not None and not len(val_cache):
            raise ValueError(
                f"{cfg.val_path} has no text to validate on: every text in it is empty; "
                "leave val_path out to hold out a part of data_path"
            )
        return corpus

    def describe(self) -> list[dict[str, Any]]:
        """Where the caches lie, as plain data for `reopen`."""
        caches = [self.cache]
        if self.val_cache is not self.cache:
            caches.append(self.val_cache)
        return [{"folder": str(one.folder), "facts": one.facts} for one in caches]

    @classmethod
    def reopen(
        cls, description: Sequence[Mapping[str, Any]], val_fraction: float
    ) -> Corpus:
        """Open caches that the process which described them has verified."""
        caches = [TokenCache(Path(one["folder"]), one["facts"]) for one in description]
        return cls(caches[0], caches[1] if caches[1:] else None, val_fraction)

    def training_stream(
        self,
        cfg: TrainConfig,
        pad_id: int,
        rank: int = 0,
        size: int = 1,
        samples: int = 0,
    ) -> TrainingStream:
        """The samples of a resolved configuration for one rank, from `samples` on."""
        ranks = {"rank": rank, "size": size, "samples": samples}
        return TrainingStream(self.cache, self.excerpts(cfg), cfg, pad_id, **ranks)

    def excerpts(self, cfg: TrainConfig) -> Excerpts:
        """What is trained on of each document: all of it, or what a row can hold."""
        assert cfg.max_seq_len
        return take_excerpts(self.cache, self.documents, cfg.max_seq_len)

    def held_out_excerpts(self, cfg: TrainConfig) -> Excerpts:
        """The same of the held-out documents."""
        assert cfg.max_seq_len
        return take_excerpts(self.val_cache, self.val_documents, cfg.max_seq_len)

    def validation_rows(self, cfg: TrainConfig, pad_id: int) -> ValidationRows | None:
        """The held-out rows, at most `eval_tokens`; None where nothing is held out."""
        excerpts = self.held_out_excerpts(cfg)
        if not len(excerpts.documents):
            return None
        return ValidationRows(self.val_cache, excerpts, cfg, pad_id)

    def judge(self, cfg: TrainConfig, limit: float) -> None:
        """Raise `ValueError` where more than `limit` of the conversations, or of those
        of a validation file all, have no answer that fits."""
        self._judge(cfg, limit, cfg.data_path, self.excerpts(cfg))
        if self.val_cache is not self.cache:
            self._judge(cfg, 1.0, cfg.val_path, self.held_out_excerpts(cfg))

    def _judge(
        self, cfg: TrainConfig, limit: float, path: str | None, excerpts: Excerpts
    ) -> None:
        kept, dropped = len(excerpts.documents), excerpts.dropped
        kept //= 2 if cfg.stage == "dpo" else 1
        if kept and dropped <= limit * (kept + dropped):
            return
        noun = "pairs" if cfg.stage == "dpo" else "conversations"
        raise ValueError(
            f"{path}: {dropped:,} of {kept + dropped:,} {noun} have no "
            f"whole answer within max_seq_len={cfg.max_seq_len} tokens, so nothing could "
            f"be learned from them; raise max_seq_len (the longest has "
            f"{excerpts.longest:,} tokens), or let more than {limit:.3g} of them be left "
            'out: max_bad_fraction=…, with on_bad_line="skip"'
        )
