"""The documents of a run: what is trained on, and what is held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import TrainConfig
from .batches import TrainingStream, ValidationRows
from .packing import split_by_hash
from .shards import Source, TokenCache, open_cache
from .tokenizer import TokenizerSpec


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
        on_progress: Callable[[str], None],
    ) -> Corpus:
        """Tokenise what a resolved configuration names, unless that was done before.

        Raises `FileNotFoundError`, `DataError` naming what is wrong with a file, or
        `ValueError` where no text is left.
        """

        def cache_of(path: str) -> TokenCache:
            source = Source(
                path, cfg.stage, spec, cfg.on_bad_line, cfg.max_bad_fraction
            )
            return open_cache(source, root, processes, on_progress)

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
        return TrainingStream(self.cache, self.documents, cfg, pad_id, **ranks)

    def validation_rows(self, cfg: TrainConfig, pad_id: int) -> ValidationRows | None:
        """The held-out rows, at most `eval_tokens`; None where nothing is held out."""
        if not len(self.val_documents):
            return None
        return ValidationRows(self.val_cache, self.val_documents, cfg, pad_id)
