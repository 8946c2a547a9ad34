"""Torch data sets over the token cache, one row of the file each, as in MiniMind.

They serve other loops and trainers; ours packs. All take a `path` ("demo" is the embedded
corpus), a `tokenizer` (an object or a path, None the shipped one) and a `cache_dir` (None
for the session's own). They raise `FileNotFoundError`, or `DataError` naming the lines.
"""

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from ..session import current_session
from .conversations import IN_LOSS
from .demo import locate
from .packing import truncate_documents
from .token_cache import Source, open_cache
from .tokenizer import read_tokenizer

PathLike = str | os.PathLike[str]


class _Rows(Dataset[Any]):
    _record_format = ""

    def __init__(
        self, path: PathLike, tokenizer: Any = None, cache_dir: PathLike | None = None
    ) -> None:
        self.spec = read_tokenizer(tokenizer)
        root = Path(cache_dir) if cache_dir else current_session().cache_folder("out")
        file = str(locate(path, root, self._record_format))
        self.cache = open_cache(Source(file, self._record_format, self.spec), root)

    def __len__(self) -> int:
        return len(self.cache) // (2 if self._record_format == "dpo" else 1)


class _PaddedRows(_Rows):
    def __init__(
        self,
        path: PathLike,
        tokenizer: Any = None,
        max_seq_len: int | None = None,
        cache_dir: PathLike | None = None,
    ) -> None:
        super().__init__(path, tokenizer, cache_dir)
        usual = 512 if self._record_format == "pretrain" else 1024
        self.max_seq_len = max_seq_len or usual
        documents, width = np.arange(len(self.cache)), self.max_seq_len - 1
        truncated = truncate_documents(self.cache, documents, width)
        # A document without a whole answer is cut anywhere and has an empty loss mask.
        self._pieces = np.stack([documents, 0 * documents, self.cache.targets], 1)
        self._pieces[truncated.documents] = truncated.pieces
        self._pieces[:, 2] = np.minimum(self._pieces[:, 2], width)
        self._has_loss = np.isin(documents, truncated.documents)

    def __getitem__(self, index: int) -> Any:
        number = range(len(self._pieces))[index]  # negative ones as in a list
        document, start, count = self._pieces[number].tolist()
        ids = self.cache.piece(document, start, count).astype(np.int64)
        mask = self.cache.loss_mask(document, start, count) & self._has_loss[number]
        room = (0, self.max_seq_len - 1 - count)
        padded = torch.from_numpy(np.pad(ids, room, constant_values=self.spec.pad_id))
        return padded[:-1], padded[1:], torch.from_numpy(np.pad(mask, room)).long()


class PretrainDataset(_PaddedRows):
    """Documents of a JSONL file as `(X, Y, loss_mask)`, padded to one length (512).

    Each is [max_seq_len - 1] int64: `Y` is `X` one token on, `loss_mask` is 1 where `Y`
    is text and 0 where it is padding, as in MiniMind. A longer document is cut.
    """

    _record_format = "pretrain"


class SFTDataset(_PaddedRows):
    """Conversations as `(X, Y, loss_mask)`, padded to one length (1024).

    As `PretrainDataset`, but `loss_mask` is 1 on answers alone, with what closes them.
    A longer conversation ends after the last whole answer that fits; if not even the
    first one does, it is cut anywhere and its mask is 0 throughout.
    """

    _record_format = "sft"


class DPODataset(_PaddedRows):
    """Pairs as `x_chosen`, `y_chosen`, `mask_chosen`, and the same of the `rejected`.

    Each is [max_seq_len - 1] int64 as in `SFTDataset`; masks are 1 on the answers after
    what both have in common. Of a longer prompt both lose the same oldest turns; if
    that does not help, both are cut anywhere and their masks are 0 throughout.
    """

    _record_format = "dpo"

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, example = 2 * range(len(self))[index], {}
        for document, name in enumerate(("chosen", "rejected"), number):
            parts = zip("x y mask".split(), super().__getitem__(document), strict=True)
            example |= {f"{part}_{name}": tensor for part, tensor in parts}
        return example


class RLAIFDataset(_Rows):
    """Conversations as `prompt` and `answer`, the assistant's last turn, held back.

    The prompt is text as the chat template writes it, up to where the answer begins;
    the answer, "" if the row leaves it empty, is without what closes it. For trainers
    that generate answers themselves.
    """

    _record_format = "rlaif"

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.spec.json)

    def __getitem__(self, index: int) -> dict[str, str]:
        number = range(len(self))[index]
        ids = self.cache.document(number)
        answered = self.cache.marks_of(number) & IN_LOSS > 0
        begin = int(np.argmax(answered)) if answered.any() else len(ids)
        prompt, answer = (
            self._tokenizer.decode(part.tolist(), skip_special_tokens=False)
            for part in (ids[:begin], ids[begin:])
        )
        answer = answer.removesuffix("\n").removesuffix(self.spec.eos_token)
        return {"prompt": prompt, "answer": answer}
