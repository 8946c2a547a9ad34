"""The documents of a run: what is trained on, and what is held out."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..config import ResolvedConfig
from .batches import TrainingStream, ValidationRows
from .containers import check_file, find_files, iter_chunks
from .conversations import find_stage
from .demo import DEMO
from .jsonl import Chunk, DataError, read_rows
from .packing import TruncatedDocuments, split_by_hash, truncate_documents
from .token_cache import JoinedCache, Source, TokenCache, open_cache
from .tokenizer import TokenizerSpec


def detect_format(
    path: str | os.PathLike[str],
    demo: str = "pretrain",
    expected: Sequence[str] = ("pretrain", "sft"),
) -> str:
    """Return one of the stages `expected` by the keys of a file's first row.

    "demo" is the embedded corpus of the stage `demo`. Raises as `check_file` does.
    """
    if path == DEMO:
        return "pretrain" if demo == "pretrain" else "sft"
    check_file(path)
    rows, tally = read_rows(next(iter_chunks(path), Chunk(1, b"")), lambda row: row)
    if not rows:
        tally.raise_if_too_many(path)
    found = find_stage(rows[0][1])
    if not found or found not in expected:
        raise DataError(
            f"{path} has neither texts nor conversations, its first row the keys "
            f'{list(rows[0][1])}: expected is one {{"text": "…"}} or '
            '{"conversations": […]} a line'
        )
    return found


class Corpus:
    """The token caches of a run, and which of their documents are for what.

    There is one a file, the last of them of `val_path` if it is set. Otherwise a part of
    the documents, taken by content hash, is held out. `documents` and `val_documents`
    are numbers in `cache` and `val_cache`, `truncated` and `val_truncated` the parts of
    them that rows can hold.
    """

    def __init__(self, caches: Sequence[TokenCache], cfg: ResolvedConfig) -> None:
        self.caches = caches
        files = caches[:-1] if cfg.val_path else caches
        self.cache = files[0] if len(files) == 1 else JoinedCache(files)
        self.val_cache = caches[-1] if cfg.val_path else self.cache
        if cfg.val_path:
            split = np.arange(len(self.cache)), np.arange(len(self.val_cache))
        else:
            split = split_by_hash(self.cache.hashes, cfg.val_fraction)
        self.documents, self.val_documents = split
        width = cfg.max_seq_len
        self.truncated = truncate_documents(self.cache, self.documents, width)
        self.val_truncated = truncate_documents(
            self.val_cache, self.val_documents, width
        )

    @classmethod
    def prepare(
        cls, cfg: ResolvedConfig, spec: TokenizerSpec, root: Path, processes: int
    ) -> "Corpus":
        """Tokenise the files of a resolved configuration, if that was not done before.

        Raises `DataError` for a malformed file, and `ValueError` if no text is left, or
        no conversation has an answer that fits.
        """
        policy = (cfg.on_bad_line, cfg.max_bad_fraction)
        files = find_files(cfg.data_path)
        if cfg.data_weights and len(cfg.data_weights) != len(files):
            raise ValueError(
                f"data_weights={cfg.data_weights} has {len(cfg.data_weights)} numbers for "
                f"{len(files)} files: set one for each of {', '.join(files)}"
            )
        paths = [*files, *filter(None, [cfg.val_path])]
        opened = {  # an evaluation names one file twice
            path: open_cache(Source(path, cfg.stage, spec, *policy), root, processes)
            for path in dict.fromkeys(paths)
        }
        corpus = cls([opened[path] for path in paths], cfg)
        _check(cfg, ", ".join(files), corpus.truncated)
        trained = corpus.cache.file_of(corpus.truncated.documents)
        for number, file in enumerate(files if cfg.data_weights else ()):
            if number not in trained:
                raise ValueError(f"{file} has no row to train on: leave it out")
        if cfg.val_path:
            _check(cfg, cfg.val_path, corpus.val_truncated)
        return corpus

    def training_stream(
        self, cfg: ResolvedConfig, pad_id: int, **place: int
    ) -> TrainingStream:
        """Return the samples for the `rank` of `place`, after those that are done."""
        return TrainingStream(self.cache, self.truncated, cfg, pad_id, **place)

    def validation_rows(
        self, cfg: ResolvedConfig, pad_id: int
    ) -> ValidationRows | None:
        """Return the held-out rows, at most `eval_tokens`; None if nothing is held out."""
        if not len(self.val_truncated.documents):
            return None
        return ValidationRows(self.val_cache, self.val_truncated, cfg, pad_id)


def _check(cfg: ResolvedConfig, path: str, truncated: TruncatedDocuments) -> None:
    if len(truncated.documents):
        return
    if not truncated.dropped:
        raise ValueError(f"{path} has no text to use: every text in it is empty")
    raise ValueError(
        f"{path}: none of {truncated.dropped:,} "
        f"{'pairs' if cfg.stage == 'dpo' else 'conversations'} has a whole answer within "
        f"max_seq_len={cfg.max_seq_len} tokens; raise it (the longest has "
        f"{truncated.longest:,} tokens)"
    )
