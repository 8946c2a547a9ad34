"""Check conversations: messages whose roles alternate, with whole answers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from .jsonl import Fault

Message = dict[str, str]

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
    """Check `{"conversations": […]}`: it has an answer, or ends with one if `answered`."""
    if key not in row:
        keys = _show(list(row))
        stages = {"text": "pretrain", "conversations": "sft", "chosen": "dpo"}
        stage = next((stages[name] for name in stages if name in row), None)
        hint = f'; these rows are for stage="{stage}"' if stage else ""
        return Fault(f"missing_{key}", f'no "{key}" in the row, its keys: {keys}{hint}')
    fault = check_messages(row[key])
    if fault is None:
        roles = [message["role"] for message in row[key]]
        if "assistant" not in roles:
            reason = "no turn is the assistant's: there is nothing to learn"
            fault = Fault("no_answer", reason)
        elif answered and (last := roles[-1]) != "assistant":
            reason = f"the last turn is the {last}'s, not the assistant's"
            fault = Fault("no_last_answer", reason, f'"{last}"')
    if fault is None:
        return None
    return Fault(fault.kind, f'in "{key}", {fault.reason}', fault.mark or f'"{key}"')


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
