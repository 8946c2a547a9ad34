"""Rows become documents of token ids, as their record format says.

Change `VERSION` whenever this gives other ids for the same row: it is part of the token
cache's key.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .chat_template import Chat, ChatEncoder
from .conversations import (
    IN_LOSS,
    check_conversation,
    check_pair,
    count_shared,
    plain,
)
from .fast_encoding import BulkEncoder
from .jsonl import Chunk, Fault, Row, Tally, check_text_row, read_rows
from .tokenizer import TokenizerSpec

VERSION = 3

CHECKS = {
    "pretrain": check_text_row,
    "sft": check_conversation,
    "rlaif": functools.partial(check_conversation, answered=True),
    "dpo": check_pair,
}
"""Checks of a row by record format: the stages, and "rlaif" for other programs."""

Arrays = dict[str, np.ndarray]


class Document(NamedTuple):
    """A row's line, what its content hash is made of, and its token ids; of a
    conversation also their marks and the bytes of each answer in the loss."""

    line: int
    content: bytes
    ids: np.ndarray
    marks: np.ndarray | None = None
    answer_sizes: Sequence[int] = ()


def per_row(record_format: str) -> int:
    """Return how many documents a row makes: 2 of pairs, chosen and rejected, else 1."""
    return 2 if record_format == "dpo" else 1


def token_type(vocab_size: int) -> str:
    """Return the smallest array type that holds all ids: "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


_encoder = functools.lru_cache(maxsize=1)(BulkEncoder)


def encode_chunk(
    record_format: str, tokenizer: TokenizerSpec, chunk: Chunk
) -> tuple[Arrays, Tally]:
    """Return the arrays of a chunk, by the name of their file, and its rows counted.

    `token_cache.TokenCache` says what they hold; `offsets` are the documents' ends.
    """
    encoder, vocab_size = _encoder(tokenizer), tokenizer.vocab_size
    rows, tally = read_rows(chunk, CHECKS[record_format])
    if record_format == "pretrain":
        documents = _encode_texts(rows, encoder)
    else:
        documents = _encode_chats(rows, record_format, encoder, tally)
    ids = [document.ids for document in documents]
    tokens = np.concatenate([np.zeros(0, np.uint32), *ids])
    if tokens.max(initial=0) >= vocab_size:
        raise ValueError(
            f"the tokenizer gave the id {tokens.max()} but states {vocab_size} "
            "entries: use another tokenizer"
        )
    hashes = (hashlib.blake2b(one.content, digest_size=8) for one in documents)
    arrays = {
        "tokens": tokens.astype(token_type(vocab_size)),
        "offsets": np.cumsum([len(each) for each in ids], dtype=np.int64),
        "lines": np.array([one.line for one in documents], np.int64),
        "sizes": np.array([len(one.content) for one in documents], np.int64),
        "hashes": np.frombuffer(b"".join(h.digest() for h in hashes), "<u8"),
    }
    if record_format != "pretrain":
        marks = [one.marks for one in documents if one.marks is not None]
        sizes = [one.answer_sizes for one in documents]
        in_loss = [np.count_nonzero(each & IN_LOSS) for each in marks]
        arrays |= {
            "sizes": np.array([sum(each) for each in sizes], np.int64),
            "marks": np.concatenate([np.zeros(0, np.uint8), *marks]),
            "trained": np.array(in_loss, np.int64),
            "answers": np.array([len(each) for each in sizes], np.int64),
            "answer_sizes": np.array([n for each in sizes for n in each], np.int64),
        }
    return arrays, tally


def _encode_texts(
    rows: Sequence[tuple[int, Row]], encoder: BulkEncoder
) -> list[Document]:
    """Encode texts that are not empty between begin and end token.

    Neither is doubled if the text has it already, as MiniMind's published rows do.
    Special strings in the text become their special ids.
    """
    spec = encoder.spec
    begin, end = np.array([[spec.bos_id], [spec.eos_id]], np.uint32)
    texts = [(line, row["text"]) for line, row in rows if row["text"]]
    documents = []
    encoded = encoder.encode([text for _, text in texts])
    for (line, text), ids in zip(texts, encoded, strict=True):
        parts = [] if len(ids) and ids[0] == spec.bos_id else [begin]
        parts += [ids] if len(ids) and ids[-1] == spec.eos_id else [ids, end]
        whole = np.concatenate(parts) if parts[1:] else ids
        documents.append(Document(line, text.encode(), whole))
    return documents


def _encode_chats(
    rows: Sequence[tuple[int, Row]],
    record_format: str,
    encoder: BulkEncoder,
    tally: Tally,
) -> list[Document]:
    """Encode conversations up to the last token in the loss.

    A row that the chat template refuses is counted as a bad one in `tally`.
    """
    chats = [_chats(row, record_format) for _, row in rows]
    chat_encoder = ChatEncoder(encoder.spec, encoder)
    encoded = iter(chat_encoder.encode(list(itertools.chain(*chats))))
    documents = []
    for (line, row), conversations in zip(rows, chats, strict=True):
        said = [list(one.values()) for chat, _ in conversations for one in chat]
        content = json.dumps(said, ensure_ascii=False).encode()
        made = [next(encoded) for _ in conversations]
        if faults := [one for one in made if isinstance(one, Fault)]:
            tally.good -= 1
            tally.refuse(line, json.dumps(row, ensure_ascii=False).encode(), faults[0])
            continue
        whole = [one for one in made if not isinstance(one, Fault)]
        for (ids, marks), (chat, context) in zip(whole, conversations, strict=True):
            end = int(np.flatnonzero(marks & IN_LOSS)[-1]) + 1
            answers = [one for one in chat[context:] if one["role"] == "assistant"]
            sizes = [len(one["content"].encode()) for one in answers]
            documents.append(Document(line, content, ids[:end], marks[:end], sizes))
    tally.problems.sort()
    return documents


def _chats(row: Row, record_format: str) -> list[Chat]:
    """Return the conversations of a row.

    In the loss are every answer of "sft", the last one of "rlaif", and of pairs the
    answers after the messages that both share.
    """
    if record_format == "dpo":
        chosen, rejected = plain(row["chosen"]), plain(row["rejected"])
        shared = count_shared(chosen, rejected)
        return [(chosen, shared), (rejected, shared)]
    messages = plain(row["conversations"])
    return [(messages, len(messages) - 1 if record_format == "rlaif" else 0)]
