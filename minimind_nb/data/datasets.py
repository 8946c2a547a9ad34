"""Torch data sets over the token cache, one row of the file each.

Training does not use them (it packs); they are for reading data the way MiniMind's
scripts do, and for loops and trainers of one's own. All take a `path` ("demo" is the
embedded corpus), a `tokenizer` (an object or a path, None the shipped one) and read
through the validated token cache, which lies in `cache_dir` (where this session keeps
such things unless set). They raise `FileNotFoundError`, or `DataError` naming the lines
that are wrong.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from ..session import current_session
from .conversations import TRAINED
from .demo import locate
from .excerpts import take_excerpts
from .record_formats import RECORD_FORMATS
from .token_cache import Source, open_cache
from .tokenizer import read_tokenizer

_Example = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_T_co = TypeVar("_T_co", covariant=True)


class _CachedRows(Dataset[_T_co]):
    _record_format = "pretrain"

    def __init__(
        self,
        path: str | os.PathLike[str],
        tokenizer: Any = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.spec = read_tokenizer(tokenizer)
        root = Path(cache_dir) if cache_dir else current_session().cache_folder("out")
        file = str(locate(path, self._record_format))
        self.cache = open_cache(Source(file, self._record_format, self.spec), root)

    def __len__(self) -> int:
        return len(self.cache) // RECORD_FORMATS[self._record_format].per_row

    def _number(self, index: int) -> int:
        return range(len(self))[index]  # negative and too large ones, as in a list


class _PaddedRows(_CachedRows[_T_co]):
    def __init__(
        self,
        path: str | os.PathLike[str],
        tokenizer: Any = None,
        max_seq_len: int = 1024,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if max_seq_len < 2:  # noqa: PLR2004 - an input and its target
            raise ValueError(f"max_seq_len={max_seq_len} is too small, 2 is needed")
        super().__init__(path, tokenizer, cache_dir)
        self.max_seq_len = max_seq_len
        documents = np.arange(len(self.cache))
        excerpts = take_excerpts(self.cache, documents, max_seq_len - 1)
        self._starts = np.zeros_like(documents)
        self._targets = np.minimum(self.cache.targets, max_seq_len - 1)
        self._learned = np.zeros(len(documents), bool)
        kept = excerpts.documents
        self._starts[kept] = excerpts.starts
        self._targets[kept] = np.minimum(excerpts.targets, max_seq_len - 1)
        self._learned[kept] = True

    def _example(self, document: int) -> _Example:
        start, count = int(self._starts[document]), int(self._targets[document])
        ids = self.cache.piece(document, start, count).astype(np.int64)
        padded = torch.full((self.max_seq_len,), self.spec.pad_id, dtype=torch.int64)
        padded[: len(ids)] = torch.from_numpy(ids)
        mask = torch.zeros(self.max_seq_len - 1, dtype=torch.int64)
        if self.cache.marks is None:
            mask[:count] = 1
        elif self._learned[document]:
            marks = self.cache.marks_of(document)[start + 1 : start + 1 + count]
            mask[:count] = torch.from_numpy((marks & TRAINED).astype(np.int64))
        return padded[:-1], padded[1:], mask


class PretrainDataset(_PaddedRows[_Example]):
    """Documents of a JSONL file as `(X, Y, loss_mask)`, padded to one length.

    Each is [max_seq_len - 1] int64: `Y` is `X` one token on, `loss_mask` is 1 where `Y`
    is text and 0 where it is padding, as in MiniMind. A longer document is cut.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tokenizer: Any = None,
        max_seq_len: int = 512,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(path, tokenizer, max_seq_len, cache_dir)

    def __getitem__(self, index: int) -> _Example:
        return self._example(self._number(index))


class SFTDataset(_PaddedRows[_Example]):
    """Conversations as `(X, Y, loss_mask)`, padded to one length.

    As `PretrainDataset`, but `loss_mask` is 1 on answers alone, with what closes them.
    A longer conversation ends after the last whole answer that fits; where not even the
    first one does, it is cut anywhere and its mask is 0 throughout.
    """

    _record_format = "sft"

    def __getitem__(self, index: int) -> _Example:
        return self._example(self._number(index))


class DPODataset(_PaddedRows[dict[str, torch.Tensor]]):
    """Pairs as `x_chosen`, `y_chosen`, `mask_chosen`, and the same of the `rejected`.

    Each is [max_seq_len - 1] int64 as in `SFTDataset`; masks are 1 on the answers after
    what both have in common. Of a longer prompt both lose the same oldest turns; where
    that does not help, both are cut anywhere and their masks are 0 throughout.
    """

    _record_format = "dpo"

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number = 2 * self._number(index)
        example = {}
        for document, name in enumerate(("chosen", "rejected"), number):
            parts = zip("x y mask".split(), self._example(document), strict=True)
            example |= {f"{part}_{name}": tensor for part, tensor in parts}
        return example


class RLAIFDataset(_CachedRows[dict[str, str]]):
    """Conversations as `prompt` and `answer`, the assistant's last turn, held back.

    The prompt is text as the chat template writes it, up to where the answer begins;
    the answer is without what closes it. For trainers that generate answers themselves.
    """

    _record_format = "rlaif"

    def __init__(
        self,
        path: str | os.PathLike[str],
        tokenizer: Any = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(path, tokenizer, cache_dir)
        self._tokenizer = Tokenizer.from_str(self.spec.json)

    def __getitem__(self, index: int) -> dict[str, str]:
        number = self._number(index)
        ids = self.cache.document(number)
        begin = int(np.argmax(self.cache.marks_of(number) & TRAINED))
        prompt, answer = (
            self._tokenizer.decode(part.tolist(), skip_special_tokens=False)
            for part in (ids[:begin], ids[begin:])
        )
        answer = answer.removesuffix("\n").removesuffix(self.spec.eos_token)
        return {"prompt": prompt, "answer": answer}
