"""Torch data sets over the token cache, one row of the file each.

Training does not use them (it packs); they are for reading data the way MiniMind's
scripts do, and for loops of one's own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ..session import current_session
from .demo import locate
from .shards import Source, open_cache
from .tokenizer import read_tokenizer

_Example = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class PretrainDataset(Dataset[_Example]):
    """Documents of a JSONL file as `(X, Y, loss_mask)`, padded to one length.

    `path` "demo" is the embedded corpus. Each is [max_seq_len - 1] int64: `Y` is `X`
    one token on, `loss_mask` is 1 where `Y` is text and 0 where it is padding, as in
    MiniMind. A longer document is cut. Reads through the validated token cache, which
    lies in `cache_dir` (where this session keeps such things unless set). `tokenizer`
    is an object or a path, None the shipped one. Raises `FileNotFoundError`, or
    `DataError` naming the lines that are wrong.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tokenizer: Any = None,
        max_seq_len: int = 512,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if max_seq_len < 2:  # noqa: PLR2004 - an input and its target
            raise ValueError(f"max_seq_len={max_seq_len} is too small, 2 is needed")
        spec = read_tokenizer(tokenizer)
        root = Path(cache_dir) if cache_dir else current_session().cache_folder("out")
        self.cache = open_cache(Source(str(locate(path, root)), "pretrain", spec), root)
        self.pad_id = spec.pad_id
        self.max_seq_len = max_seq_len

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> _Example:
        number = range(len(self))[index]  # negative and too large ones, as in a list
        ids = self.cache.document(number)[: self.max_seq_len].astype("int64")
        padded = torch.full((self.max_seq_len,), self.pad_id, dtype=torch.int64)
        padded[: len(ids)] = torch.from_numpy(ids)
        mask = torch.zeros(self.max_seq_len - 1, dtype=torch.int64)
        mask[: len(ids) - 1] = 1
        return padded[:-1], padded[1:], mask
