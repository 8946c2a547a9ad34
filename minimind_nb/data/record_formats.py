"""A row becomes documents of token ids: one function for each record format.

Change `VERSION` whenever a function here gives other ids for the same row: it is part
of the token cache's key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .conversations import (
    TRAINED,
    ChatEncoder,
    Message,
    check_conversation,
    check_pair,
    check_prompt,
    count_shared,
    plain,
)
from .fast_encoding import BulkEncoder
from .faults import Fault
from .jsonl import Check, check_text_row
from .tokenizer import TokenizerSpec

VERSION = 3

Row = dict[str, Any]


class Document(NamedTuple):
    """Token ids; of a conversation also their marks, and its trained answers' bytes."""

    ids: np.ndarray
    marks: np.ndarray | None = None
    answer_sizes: Sequence[int] = ()


@dataclass(frozen=True)
class RecordFormat:
    """How rows of one kind are checked, read and encoded.

    `text` gives what a row's content hash is made of, empty for a row that has nothing
    to learn from; `encode` gives the documents of each row, `per_row` of them, or why
    there are none.
    """

    check: Check
    text: Callable[[Row], str]
    encode: Callable[
        [list[Row], BulkEncoder, TokenizerSpec], list[list[Document] | Fault]
    ]
    per_row: int = 1


def encode_texts(
    rows: list[Row], encoder: BulkEncoder, spec: TokenizerSpec
) -> list[list[Document] | Fault]:
    """Pretraining documents: begin token, text, end token.

    Neither is doubled where the text has it already, as MiniMind's published rows do.
    Special strings in the text become their special ids.
    """
    begin, end = np.array([[spec.bos_id], [spec.eos_id]], np.uint32)
    documents: list[list[Document] | Fault] = []
    for ids in encoder.encode([row["text"] for row in rows]):
        has_begin = len(ids) and ids[0] == spec.bos_id
        has_end = len(ids) and ids[-1] == spec.eos_id
        parts = [] if has_begin else [begin]
        parts += [ids] if has_end else [ids, end]
        whole = np.concatenate(parts) if len(parts) > 1 else ids
        documents.append([Document(whole)])
    return documents


def encode_conversations(
    rows: list[Row], encoder: BulkEncoder, spec: TokenizerSpec
) -> list[list[Document] | Fault]:
    """Conversations of which every answer is learned from."""
    conversations = [plain(row["conversations"]) for row in rows]
    return _encode_chats([[(one, 0)] for one in conversations], encoder, spec)


def encode_prompts(
    rows: list[Row], encoder: BulkEncoder, spec: TokenizerSpec
) -> list[list[Document] | Fault]:
    """Conversations of which the last answer alone is learned from."""
    conversations = [plain(row["conversations"]) for row in rows]
    return _encode_chats(
        [[(one, len(one) - 1)] for one in conversations], encoder, spec
    )


def encode_pairs(
    rows: list[Row], encoder: BulkEncoder, spec: TokenizerSpec
) -> list[list[Document] | Fault]:
    """Pairs: the chosen, then the rejected, learned from after what they share."""
    chats = []
    for row in rows:
        chosen, rejected = plain(row["chosen"]), plain(row["rejected"])
        shared = count_shared(chosen, rejected)
        chats.append([(chosen, shared), (rejected, shared)])
    return _encode_chats(chats, encoder, spec)


def _encode_chats(
    rows: list[list[tuple[list[Message], int]]],
    encoder: BulkEncoder,
    spec: TokenizerSpec,
) -> list[list[Document] | Fault]:
    """Encode each row's conversations, given with how many messages are untrained.

    What follows the last trained token is left out: nothing is learned from it.
    """
    flat = [chat for row in rows for chat in row]
    encoded = iter(
        ChatEncoder(spec, encoder).encode(
            [messages for messages, _ in flat], [untrained for _, untrained in flat]
        )
    )
    documents: list[list[Document] | Fault] = []
    for row in rows:
        made: list[Document] = []
        faults = []
        for messages, untrained in row:
            one = next(encoded)
            if isinstance(one, Fault):
                faults.append(one)
                continue
            ids, marks = one
            end = int(np.flatnonzero(marks & TRAINED)[-1]) + 1
            sizes = [
                len(message["content"].encode("utf-8"))
                for message in messages[untrained:]
                if message["role"] == "assistant"
            ]
            made.append(Document(ids[:end], marks[:end], sizes))
        documents.append(faults[0] if faults else made)
    return documents


def _join(*conversations: Sequence[Row]) -> str:
    return json.dumps(
        [[one["role"], one["content"]] for each in conversations for one in each],
        ensure_ascii=False,
    )


def _conversation_text(row: Row) -> str:
    return _join(row["conversations"])


RECORD_FORMATS: dict[str, RecordFormat] = {
    "pretrain": RecordFormat(
        check=check_text_row, text=lambda row: row["text"], encode=encode_texts
    ),
    "sft": RecordFormat(check_conversation, _conversation_text, encode_conversations),
    "rlaif": RecordFormat(check_prompt, _conversation_text, encode_prompts),
    "dpo": RecordFormat(
        check=check_pair,
        text=lambda row: _join(row["chosen"], row["rejected"]),
        encode=encode_pairs,
        per_row=2,
    ),
}
"""Record formats by stage; "rlaif" has none, another program trains on it."""
