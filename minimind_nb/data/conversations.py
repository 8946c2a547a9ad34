"""Check conversations, and encode them with marks: in the loss, a turn begins.

What a message says stays ordinary text: none can forge a turn, or move a mark.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .chat_template import ESCAPE, ChatTemplate, Message, Segment, limited
from .fast_encoding import BulkEncoder
from .jsonl import Fault
from .tokenizer import TokenizerSpec

IN_LOSS, TURN, USER = 1, 2, 4
"""Bits of a token's mark: it is in the loss; a turn begins here; it is the user's."""

_ROLES = ("system", "user", "assistant", "tool")
_FOLLOWERS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def check_conversation(
    row: dict[str, Any], key: str = "conversations", answered: bool = False
) -> Fault | None:
    """Check `{"conversations": [{"role", "content"}, …]}` with at least one answer.

    If `answered`, the last turn must be the assistant's.
    """
    if key not in row:
        keys = _show(list(row))
        return Fault(f"missing_{key}", f'no "{key}" in the row, its keys: {keys}')
    fault = check_messages(row[key]) or _check_answers(row[key], answered)
    if fault is None:
        return None
    return Fault(fault.kind, f'in "{key}", {fault.reason}', fault.mark or f'"{key}"')


def check_prompt(row: dict[str, Any]) -> Fault | None:
    """Check a conversation whose last turn, the assistant's, is the answer held back."""
    return check_conversation(row, answered=True)


def check_pair(row: dict[str, Any]) -> Fault | None:
    """Check `{"chosen": […], "rejected": […]}`: one prompt with two continuations."""
    for key in ("chosen", "rejected"):
        if fault := check_conversation(row, key, answered=True):
            return fault
    chosen, rejected = plain(row["chosen"]), plain(row["rejected"])
    shared = count_shared(chosen, rejected)
    if not shared:
        kind = "no_common_prompt"
        reason = '"chosen" and "rejected" have no prompt in common'
        return Fault(kind, reason, '"rejected"')
    if shared == min(len(chosen), len(rejected)):
        reason = 'of "chosen" and "rejected" one is the other, or its beginning'
        return Fault("no_difference", reason, '"rejected"')
    return None


def check_messages(messages: Any) -> Fault | None:
    """Check a conversation, answered or not."""
    if not isinstance(messages, list | tuple):
        return Fault("not_a_list", f"{_show(messages)} is not a list of messages")
    if not messages:
        return Fault("no_messages", "the list of messages is empty")
    before = None
    for number, message in enumerate(messages, 1):
        if wrong := _check_message(message, before):
            kind, found = wrong
            at = message["role"] if kind == "unknown_role" else message
            return Fault(kind, f"message {number} {found}", _show(at, None))
        before = message["role"]
    return None


def plain(messages: Sequence[dict[str, Any]]) -> list[Message]:
    """Return role and content of messages that were checked, without other keys."""
    return [{"role": one["role"], "content": one["content"]} for one in messages]


def count_shared(a: Sequence[Message], b: Sequence[Message]) -> int:
    """Return how many first messages two conversations have in common."""
    both = itertools.takewhile(lambda each: each[0] == each[1], zip(a, b, strict=False))
    return len(list(both))


def _check_answers(messages: Sequence[Message], answered: bool) -> Fault | None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        reason = "no turn is the assistant's: there is nothing to learn"
        return Fault("no_answer", reason)
    if answered and (last := roles[-1]) != "assistant":
        reason = f"the last turn is the {last}'s, not the assistant's"
        return Fault("no_last_answer", reason, f'"{last}"')
    return None


def _check_message(message: Any, before: str | None) -> tuple[str, str] | None:
    """Return the kind of fault and what was found; None for a good message."""
    if not isinstance(message, dict):
        wanted = "an object with role and content"
        return "not_a_message", f"is {_show(message)}, not {wanted}"
    for key in ("role", "content"):
        if key not in message:
            return f"missing_{key}", f'has no "{key}", its keys: {_show(list(message))}'
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        return "unknown_role", f"has the role {_show(role)}, not {' or '.join(_ROLES)}"
    if role not in _FOLLOWERS[before]:
        place = f"after the {before}'s" if before else "at the beginning"
        wanted = f"there must be {' or '.join(_FOLLOWERS[before])}"
        return "role_order", f"is the {role}'s {place}, where {wanted}"
    if not isinstance(content, str):
        found = f"has the content {_show(content)}, not a string"
        return "content_not_a_string", found
    kind = "empty_answer" if role == "assistant" else "empty_content"
    return None if content.strip() else (kind, f"is the {role}'s and empty")


def _show(value: Any, length: int | None = 40) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)[:length]


class ChatEncoder:
    """Encodes conversations with a tokenizer's chat template.

    Template and messages are encoded together, as transformers does it, but cut where a
    turn or an answer begins or ends: there a prompt ends when answers are generated.
    Raises `ValueError` for a tokenizer without a template, `TimeoutError` for a template
    that takes too long. Not covered: descriptions of tools, documents.
    """

    def __init__(self, spec: TokenizerSpec, encoder: BulkEncoder | None = None) -> None:
        self._template = ChatTemplate(spec)
        self._encoder = encoder or BulkEncoder(spec)

    def encode(
        self,
        conversations: Sequence[Sequence[Message]],
        context: Sequence[int] | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray] | Fault]:
        """Return ids (uint32) and marks (uint8) of conversations that were checked.

        The first `context` messages of each are not in the loss. A `Fault` stands in the
        place of a conversation that the template does not take.
        """
        rendered: list[list[Segment] | Fault] = []
        with limited(conversations):
            for number, messages in enumerate(conversations):
                try:
                    first = context[number] if context else 0
                    rendered.append(self._template.render(messages, first))
                except Fault as fault:
                    rendered.append(fault)
        good = [one for one in rendered if not isinstance(one, Fault)]
        ids = iter(self._encode_segments(list(itertools.chain(*good))))
        return [one if isinstance(one, Fault) else _join(one, ids) for one in rendered]

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Return the ids (uint32) of messages up to the assistant's next answer.

        They are those that `encode` gives before that answer. Raises `Fault`, a
        `ValueError`, if the template does not take them.
        """
        with limited([messages]):
            segments = self._template.render(messages, answered=False)
        return np.concatenate(self._encode_segments(segments))

    def _encode_segments(self, segments: list[Segment]) -> list[np.ndarray]:
        texts = [text for text, _, _ in segments]
        usual = iter(self._encoder.encode([one for one in texts if ESCAPE not in one]))
        return [
            self._encode_escaped(one) if ESCAPE in one else next(usual) for one in texts
        ]

    def _encode_escaped(self, text: str) -> np.ndarray:
        parts = self._template.special.split(text)  # every second one is special
        said = [self._template.unescape(part) for part in parts[::2]]
        ids = self._encoder.encode(parts)
        ids[::2] = self._encoder.encode_ordinary(said)
        return np.concatenate(ids)


def _join(
    segments: list[Segment], ids: Iterator[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of the segments, which come next, in one array, and their marks."""
    parts, marks = [], []
    for (_, role, in_loss), part in zip(segments, ids, strict=False):
        parts.append(part)
        marks.append(np.full(len(part), IN_LOSS * in_loss, np.uint8))
        if role:
            marks[-1][:1] |= TURN | USER * (role == "user")
    return np.concatenate(parts), np.concatenate(marks)
