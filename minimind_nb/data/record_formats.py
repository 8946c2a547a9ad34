"""Rows become documents of token ids, as their record format says.

Change `IDS_VERSION` whenever this gives other ids for the same row: it is part of the
name of a token cache.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .chat_template import ChatEncoder
from .conversations import IN_LOSS, PASSED_ON, Chat, Message, Understood, understand
from .fast_encoding import BulkEncoder
from .jsonl import Chunk, Row, Tally, read_rows
from .tokenizer import TokenizerSpec

IDS_VERSION = {"pretrain": 3, "sft": 4, "rlaif": 4, "dpo": 4}

Arrays = dict[str, np.ndarray]


class Document(NamedTuple):
    """What the content hash of a row is made of, and its token ids; of a conversation
    also their marks and the bytes of each answer in the loss."""

    content: bytes
    ids: np.ndarray
    marks: np.ndarray | None = None
    answer_sizes: Sequence[int] = ()


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
    read = functools.partial(understand, record_format)
    if record_format != "pretrain":
        chat_encoder = ChatEncoder(tokenizer, encoder)
        read = functools.partial(_encode_chats, record_format, chat_encoder)
    rows, tally = read_rows(chunk, read)
    for line, row in rows:
        tally.forms.setdefault(row.form, line)
        tally.ignored.update(row.ignored)
    if record_format == "pretrain":
        texts = [(line, row.content) for line, row in rows if row.content]
        lines = [line for line, _ in texts]
        documents = [*_encode_texts(encoder, [text for _, text in texts])]
    else:
        lines = [line for line, row in rows for _ in row.content]
        documents = [document for _, row in rows for document in row.content]
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
        "lines": np.array(lines, np.int64),
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


def _encode_texts(encoder: BulkEncoder, texts: Sequence[str]) -> Iterator[Document]:
    """Encode texts between begin and end token.

    Neither is doubled if the text has it already, as MiniMind's published rows do.
    Special strings in the text become their special ids.
    """
    spec = encoder.spec
    begin, end = np.array([[spec.bos_id], [spec.eos_id]], np.uint32)
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        parts = [] if len(ids) and ids[0] == spec.bos_id else [begin]
        parts += [ids] if len(ids) and ids[-1] == spec.eos_id else [ids, end]
        yield Document(text.encode(), np.concatenate(parts) if parts[1:] else ids)


def _encode_chats(record_format: str, encoder: ChatEncoder, row: Row) -> Understood:
    """Read a row, with its conversations as documents up to the last token in the loss.

    Raises `Fault`, also if the chat template refuses one.
    """
    form, ignored, chats = understand(record_format, row)
    said = [[m["role"], m["content"]] for chat in chats for m in chat.messages]
    content = json.dumps(said, ensure_ascii=False).encode()
    documents = []
    for chat in chats:
        ids, marks = encoder.encode(chat)
        end = len(ids)  # of a prompt without an answer
        if any(chat.in_loss):
            end = int(np.flatnonzero(marks & IN_LOSS)[-1]) + 1
        answers = itertools.compress(chat.messages, chat.in_loss)
        sizes = [_count_bytes(answer) for answer in answers]
        documents.append(Document(content, ids[:end], marks[:end], sizes))
    return Understood(form, ignored | _unwritten(chats, encoder), documents)


def _unwritten(chats: Sequence[Chat], encoder: ChatEncoder) -> set[str]:
    """Return what conversations have and the chat template does not write."""
    keys = {key for chat in chats for message in chat.messages for key in message}
    keys = keys.intersection(PASSED_ON) | {"tools" for chat in chats if chat.tools}
    return {key for key in keys if not encoder.writes(key)}


def _count_bytes(answer: Message) -> int:
    """Return the UTF-8 bytes of an answer, with its thought and tool calls."""
    texts = [answer["content"], answer.get("reasoning_content") or ""]
    if calls := answer.get("tool_calls"):
        texts.append(json.dumps(calls, ensure_ascii=False))
    return sum(len(text.encode()) for text in texts)
