"""Conversations become token ids, each marked: is it learned from, does a turn begin.

What a message says stays ordinary text: none can forge a turn, or move a mark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .chat_template import ESCAPE, ChatTemplate, Layout, Message, limited
from .fast_encoding import BulkEncoder
from .jsonl import Fault
from .tokenizer import TokenizerSpec

TRAINED, TURN, USER = 1, 2, 4
"""Bits of a token's mark: it is learned from; a turn begins here; it is the user's."""

_FOLLOWERS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_ROLES = ("system", "user", "assistant", "tool")


def check_conversation(row: dict[str, Any]) -> Fault | None:
    """Check `{"conversations": [{"role", "content"}, …]}` with an answer at least."""
    return next(_row_faults(row, "conversations", ended=False), None)


def check_prompt(row: dict[str, Any]) -> Fault | None:
    """Check a conversation whose last turn is the assistant's, to be held back."""
    return next(_row_faults(row, "conversations", ended=True), None)


def check_pair(row: dict[str, Any]) -> Fault | None:
    """Check `{"chosen": […], "rejected": […]}`: one prompt, and two ways to go on."""
    return next(_pair_faults(row), None)


def check_messages(messages: Any) -> str | None:
    """Say what is wrong with a conversation, answered or not; None if nothing is."""
    fault = next(_faults(messages), None)
    return fault.reason if fault else None


def plain(messages: Sequence[dict[str, Any]]) -> list[Message]:
    """What is used of messages that were checked: role and content."""
    return [{"role": one["role"], "content": one["content"]} for one in messages]


def count_shared(a: Sequence[Message], b: Sequence[Message]) -> int:
    """How many first messages two conversations have in common."""
    same = [x == y for x, y in zip(a, b, strict=False)]
    return same.index(False) if False in same else len(same)


def _pair_faults(row: dict[str, Any]) -> Iterator[Fault]:
    yield from _row_faults(row, "chosen", ended=True)
    yield from _row_faults(row, "rejected", ended=True)
    chosen, rejected = plain(row["chosen"]), plain(row["rejected"])
    shared = count_shared(chosen, rejected)
    if chosen == rejected:
        yield Fault("equal_pair", '"chosen" and "rejected" are equal', '"rejected"')
    if not shared:
        reason = (
            '"chosen" and "rejected" have no prompt in common: they begin otherwise'
        )
        yield Fault("no_common_prompt", reason, '"rejected"')
    if shared == min(len(chosen), len(rejected)):
        reason = 'of "chosen" and "rejected" one is the beginning of the other'
        yield Fault("no_difference", reason, '"rejected"')


def _row_faults(row: dict[str, Any], key: str, ended: bool) -> Iterator[Fault]:
    if key not in row:
        keys = _show(list(row)[:5], 80)
        yield Fault(f"missing_{key}", f'no "{key}" in the row, its keys: {keys}')
    for fault in _faults(row[key]):
        yield Fault(fault.kind, f'in "{key}", {fault.reason}', fault.mark or f'"{key}"')
    roles = [message["role"] for message in row[key]]
    if "assistant" not in roles:
        reason = f'in "{key}", no turn is the assistant\'s: there is nothing to learn'
        yield Fault("no_answer", reason, f'"{key}"')
    if ended and roles[-1] != "assistant":
        reason = (
            f"in \"{key}\", the last turn is the {roles[-1]}'s, not the assistant's"
        )
        yield Fault("no_last_answer", reason, f'"{roles[-1]}"')


def _faults(messages: Any) -> Iterator[Fault]:
    """What is wrong; only the first is sure, the rest follow from a wrong beginning."""
    if not isinstance(messages, list | tuple):
        yield Fault("not_a_list", f"{_show(messages)} is not a list of messages")
    if not messages:
        yield Fault("no_messages", "the list of messages is empty")
    before = None
    for number, message in enumerate(messages, 1):
        for kind, found in _message_faults(message, before):
            at = message["role"] if kind == "unknown_role" else message
            yield Fault(kind, f"message {number} {found}", _show(at, None))
        before = message["role"]


def _message_faults(message: Any, before: str | None) -> Iterator[tuple[str, str]]:
    if not isinstance(message, dict):
        wanted = "an object with role and content"
        yield "not_a_message", f"is {_show(message)}, not {wanted}"
    for key in ("role", "content"):
        if key not in message:
            keys = _show(list(message)[:5], 80)
            yield f"missing_{key}", f'has no "{key}", its keys: {keys}'
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        yield "unknown_role", f"has the role {_show(role)}, not {_listed(_ROLES)}"
    if role not in _FOLLOWERS[before]:
        where = f"after the {before}'s" if before else "at the beginning"
        wanted = f"there must be {_listed(_FOLLOWERS[before])}"
        yield "role_order", f"is the {role}'s {where}, where {wanted}"
    if not isinstance(content, str):
        yield "content_not_a_string", f"has the content {_show(content)}, not a string"
    if not content.strip():
        kind = "empty_answer" if role == "assistant" else "empty_content"
        yield kind, f"is the {role}'s and empty"


def _listed(words: Sequence[str]) -> str:
    return " or ".join(words)


def _show(value: Any, length: int | None = 40) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)[:length]


class ChatEncoder:
    """Encodes conversations as a tokenizer's chat template lays them out.

    Template and messages are encoded together, as transformers does it, but cut where a
    turn or an answer begins or ends: there a prompt ends when answers are generated.
    Raises `ValueError` for a tokenizer without a template, `TimeoutError` for a template
    that takes more than a second, or some of many turns. Not covered: descriptions of tools, documents.
    """

    def __init__(self, spec: TokenizerSpec, encoder: BulkEncoder | None = None) -> None:
        self._template = ChatTemplate(spec)
        self._encoder = encoder or BulkEncoder(spec, threads=1)

    def encode(
        self,
        conversations: Sequence[Sequence[Message]],
        untrained: Sequence[int] | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray] | Fault]:
        """Ids (uint32) and marks (uint8) of whole conversations, each checked before.

        Nothing is learned from the first `untrained` messages of each. In the place of
        a conversation that the template does not take stands the `Fault`.
        """
        layouts: list[Layout | Fault] = []
        characters = sum(_length(messages) for messages in conversations)
        with limited(characters) as start:
            for number, messages in enumerate(conversations):
                start(len(messages))
                first = untrained[number] if untrained else 0
                try:
                    layouts.append(self._template.lay_out(messages, first))
                except Fault as fault:
                    layouts.append(fault)
        laid_out = [each for each in layouts if isinstance(each, Layout)]
        pieces = [piece for each in laid_out for piece in each.pieces()]
        ids = iter(self._encode_pieces(pieces))
        return [
            layout if isinstance(layout, Fault) else _mark(layout, ids)
            for layout in layouts
        ]

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Ids (uint32) of messages, up to where the assistant's next answer begins.

        They are those that `encode` gives before that answer. Raises `Fault`, a
        `ValueError`, where the template does not take them.
        """
        with limited(_length(messages)) as start:
            start(len(messages))
            layout = self._template.lay_out(messages, answered=False)
        return np.concatenate(self._encode_pieces(layout.pieces()))

    def _encode_pieces(self, pieces: list[str]) -> list[np.ndarray]:
        usual = iter(self._encoder.encode([one for one in pieces if ESCAPE not in one]))
        return [
            self._encode_escaped(one) if ESCAPE in one else next(usual)
            for one in pieces
        ]

    def _encode_escaped(self, piece: str) -> np.ndarray:
        parts = self._template.special.split(piece)
        said = [self._template.unescape(part) for part in parts[::2]]
        ids = [*self._encoder.encode_ordinary(said), *self._encoder.encode(parts[1::2])]
        order = [n // 2 + len(said) * (n % 2) for n in range(len(parts))]
        return np.concatenate([ids[n] for n in order])


def _length(messages: Sequence[Message]) -> int:
    """The characters of a conversation."""
    return sum(len(text) for message in messages for text in message.values())


def _mark(
    layout: Layout, pieces: Iterator[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Put a layout's pieces together, and mark their tokens."""
    begins = layout.cuts()[:-1]
    ids = [next(pieces) for _ in begins]
    ends = dict(layout.answers)
    until = 0
    trained = [
        TRAINED * (begin < (until := ends.get(begin, until))) for begin in begins
    ]
    marks = np.repeat(np.array(trained, np.uint8), [len(each) for each in ids])
    place = 0
    for begin, each in zip(begins, ids, strict=True):
        if begin in layout.turns:
            marks[place : place + 1] |= TURN | USER * (layout.turns[begin] == "user")
        place += len(each)
    return np.concatenate(ids), marks
