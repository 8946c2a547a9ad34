"""A row becomes token ids: one function for each record format.

Change `VERSION` whenever a function here gives other ids for the same row: it is part
of the token cache's key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .encoding import BulkEncoder
from .jsonl import Check, check_text_row
from .tokenizer import TokenizerSpec

VERSION = 1

Row = dict[str, Any]


@dataclass(frozen=True)
class RecordFormat:
    """How rows of one kind are checked, read and encoded.

    `text` gives what a row's content hash is made of, empty for a row that has
    nothing to learn from; `encode` turns such texts into one array of ids each.
    """

    check: Check
    text: Callable[[Row], str]
    encode: Callable[[list[str], BulkEncoder, TokenizerSpec], list[np.ndarray]]


def encode_documents(
    texts: list[str], encoder: BulkEncoder, spec: TokenizerSpec
) -> list[np.ndarray]:
    """Ids of pretraining documents: begin token, text, end token.

    Neither is doubled where the text has it already, as MiniMind's published rows do.
    Special strings in the text become their special ids.
    """
    begin, end = np.array([[spec.bos_id], [spec.eos_id]], np.uint32)
    documents = []
    for ids in encoder.encode(texts):
        has_begin = len(ids) and ids[0] == spec.bos_id
        has_end = len(ids) and ids[-1] == spec.eos_id
        parts = [] if has_begin else [begin]
        parts += [ids] if has_end else [ids, end]
        documents.append(np.concatenate(parts) if len(parts) > 1 else ids)
    return documents


RECORD_FORMATS: dict[str, RecordFormat] = {
    "pretrain": RecordFormat(
        check=check_text_row, text=lambda row: row["text"], encode=encode_documents
    ),
}
"""Record formats by stage."""
