"""Rows become documents of token ids, as their record format says.

Change `VERSION` whenever this gives other ids for the same row: it is part of the token
cache's key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .conversations import (
    IN_LOSS,
    ChatEncoder,
    Message,
    check_conversation,
    check_pair,
    check_prompt,
    count_shared,
    plain,
)
from .fast_encoding import BulkEncoder
from .jsonl import Check, Chunk, Fault, Row, Tally, check_text_row, read_rows

VERSION = 3

Arrays = dict[str, np.ndarray]
Chat = tuple[list[Message], int]
"""A conversation, and how many of its first messages stay out of the loss."""


class Document(NamedTuple):
    """Token ids; of a conversation also their marks and the bytes of each answer that
    is in the loss."""

    ids: np.ndarray
    marks: np.ndarray | None = None
    answer_sizes: Sequence[int] = ()


@dataclass(frozen=True)
class RecordFormat:
    """How rows of one kind are checked, hashed and encoded.

    `chats` returns the conversations of a row, `per_row` of them; None for plain text.
    """

    check: Check
    chats: Callable[[Row], list[Chat]] | None = None
    per_row: int = 1

    def text(self, row: Row) -> str:
        """Return what a row's content hash is made of; "" for a row without text."""
        if not self.chats:
            return row["text"]
        messages = [message for chat, _ in self.chats(row) for message in chat]
        said = [[message["role"], message["content"]] for message in messages]
        return json.dumps(said, ensure_ascii=False)

    def encode(
        self, rows: Sequence[Row], encoder: BulkEncoder
    ) -> list[list[Document | Fault]]:
        """Return the documents of each row, a `Fault` in place of an impossible one."""
        if not self.chats:
            texts = [row["text"] for row in rows]
            return [[document] for document in _encode_texts(texts, encoder)]
        chats = [chat for row in rows for chat in self.chats(row)]
        documents = iter(_encode_chats(chats, encoder))
        return [[next(documents) for _ in range(self.per_row)] for _ in rows]


def _encode_texts(texts: list[str], encoder: BulkEncoder) -> list[Document]:
    """Encode texts between begin and end token.

    Neither is doubled if the text has it already, as MiniMind's published rows do.
    Special strings in the text become their special ids.
    """
    spec = encoder.spec
    begin, end = np.array([[spec.bos_id], [spec.eos_id]], np.uint32)
    documents = []
    for ids in encoder.encode(texts):
        parts = [] if len(ids) and ids[0] == spec.bos_id else [begin]
        parts += [ids] if len(ids) and ids[-1] == spec.eos_id else [ids, end]
        documents.append(Document(np.concatenate(parts) if parts[1:] else ids))
    return documents


def _encode_chats(chats: list[Chat], encoder: BulkEncoder) -> list[Document | Fault]:
    """Encode conversations up to the last token in the loss."""
    encoded = ChatEncoder(encoder.spec, encoder).encode(
        [messages for messages, _ in chats], [context for _, context in chats]
    )
    documents: list[Document | Fault] = []
    for (messages, context), one in zip(chats, encoded, strict=True):
        if isinstance(one, Fault):
            documents.append(one)
            continue
        ids, marks = one
        end = int(np.flatnonzero(marks & IN_LOSS)[-1]) + 1
        sizes = [
            len(message["content"].encode())
            for message in messages[context:]
            if message["role"] == "assistant"
        ]
        documents.append(Document(ids[:end], marks[:end], sizes))
    return documents


def _conversation(row: Row) -> list[Chat]:
    """Every answer is in the loss."""
    return [(plain(row["conversations"]), 0)]


def _prompt(row: Row) -> list[Chat]:
    """Only the last answer is in the loss."""
    messages = plain(row["conversations"])
    return [(messages, len(messages) - 1)]


def _pair(row: Row) -> list[Chat]:
    """The chosen, then the rejected: in the loss are the answers after the shared part."""
    chosen, rejected = plain(row["chosen"]), plain(row["rejected"])
    shared = count_shared(chosen, rejected)
    return [(chosen, shared), (rejected, shared)]


RECORD_FORMATS = {
    "pretrain": RecordFormat(check_text_row),
    "sft": RecordFormat(check_conversation, _conversation),
    "rlaif": RecordFormat(check_prompt, _prompt),
    "dpo": RecordFormat(check_pair, _pair, per_row=2),
}
"""Record formats by stage; "rlaif" has no stage, another program trains on it."""


def token_type(vocab_size: int) -> str:
    """Return the smallest array type that holds all ids: "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def encode_chunk(
    record_format: str, encoder: BulkEncoder, chunk: Chunk
) -> tuple[Arrays, Tally]:
    """Return the arrays of a chunk, by the name of their file, and its rows counted.

    `token_cache.TokenCache` says what they hold; `offsets` are the documents' ends.
    """
    kind, vocab_size = RECORD_FORMATS[record_format], encoder.spec.vocab_size
    rows, tally = read_rows(chunk, kind.check)
    texts = [(line, row, kind.text(row).encode()) for line, row in rows]
    full = [each for each in texts if each[2]]
    encoded = kind.encode([row for _, row, _ in full], encoder)
    documents: list[tuple[int, bytes, Document]] = []
    for (line, row, text), made in zip(full, encoded, strict=True):
        if faults := [one for one in made if isinstance(one, Fault)]:
            tally.good -= 1
            tally.refuse(line, json.dumps(row, ensure_ascii=False).encode(), faults[0])
        else:
            whole = (one for one in made if isinstance(one, Document))
            documents += [(line, text, one) for one in whole]
    tally.problems.sort()
    ids = [document.ids for _, _, document in documents]
    tokens = np.concatenate([np.zeros(0, np.uint32), *ids])
    if tokens.max(initial=0) >= vocab_size:
        raise ValueError(
            f"the tokenizer gave the id {tokens.max()} but states {vocab_size} "
            "entries: use another tokenizer"
        )
    hashes = (hashlib.blake2b(text, digest_size=8) for _, text, _ in documents)
    arrays = {
        "tokens": tokens.astype(token_type(vocab_size)),
        "offsets": np.cumsum([len(each) for each in ids], dtype=np.int64),
        "lines": np.array([line for line, _, _ in documents], np.int64),
        "sizes": np.array([len(text) for _, text, _ in documents], np.int64),
        "hashes": np.frombuffer(b"".join(h.digest() for h in hashes), "<u8"),
    }
    if kind.chats:
        marks = [one.marks for _, _, one in documents if one.marks is not None]
        sizes = [one.answer_sizes for _, _, one in documents]
        in_loss = [np.count_nonzero(each & IN_LOSS) for each in marks]
        arrays |= {
            "sizes": np.array([sum(each) for each in sizes], np.int64),
            "marks": np.concatenate([np.zeros(0, np.uint8), *marks]),
            "trained": np.array(in_loss, np.int64),
            "answers": np.array([len(each) for each in sizes], np.int64),
            "answer_sizes": np.array([n for each in sizes for n in each], np.int64),
        }
    return arrays, tally
