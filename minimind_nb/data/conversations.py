"""Rows of every usual form become texts, or conversations as chat templates take them.

`FORMS` has the forms. Each key of a row or a message is used, or named as ignored.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .jsonl import Fault, Row

Message = dict[str, Any]
"""`role` and `content`, a string; `tool_calls` and `PASSED_ON` if a row has them."""

IN_LOSS, TURN, USER = 1, 2, 4
"""Bits of a token's mark: it is in the loss; a turn begins here; it is the user's."""

PASSED_ON = ("reasoning_content", "name", "tool_call_id")
"""Keys of a message that go to the chat template as they are."""

_WEIGHTS = (
    "weight",
    "loss_weight",
    "train",
)  # 0 or 1: whether an answer is in the loss
_ROLES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "function_call": "assistant"},
    **{"function": "tool", "observation": "tool"},
}
_FOLLOWERS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


class Chat(NamedTuple):
    """A conversation: messages, which of them are in the loss, and the tools offered."""

    messages: Sequence[Message]
    in_loss: Sequence[bool]
    tools: Sequence[Any] = ()


class Understood(NamedTuple):
    """A row that was read: its form, the keys that mean nothing here, and its content:
    a text, the conversation, or chosen and rejected."""

    form: str
    ignored: set[str]
    content: Any


class Form(NamedTuple):
    """A form of rows: the keys that it must have and may have, and how it is read."""

    keys: str
    read: Callable[[Row], Any]
    optional: str = ""


def understand(record_format: str, row: Row) -> Understood:
    """Read a row for a record format. Raises `Fault` saying what to write instead.

    In the loss are every answer of "sft", the last one of "rlaif", and of pairs the
    answers after the messages that both share; never an answer of weight 0.
    """
    form = _recognise(record_format, row)
    if isinstance(row.get("label"), bool):
        reason = (
            'answers rated by "label" are not supported: make pairs of "chosen" and '
        )
        raise Fault("rated_answer", f'{reason}"rejected" of them', '"label"')
    named = form.keys.replace(" ", ", ")
    ignored = row.keys() - {*form.keys.split(), *form.optional.split()}
    content = form.read(row)
    if record_format == "pretrain":
        if not isinstance(content, str):
            found = f'"{named}" is {_show(content)}, not a string'
            raise Fault("not_a_string", found, f'"{named}"')
        return Understood(named, ignored, content)
    ignored -= {"system", "tools"}
    chats = []
    system = _said("system", row["system"]) if row.get("system") else []
    for key, said in zip(form.keys.split()[-len(content) :], content, strict=True):
        messages = [*system, *said] if system and isinstance(said, list) else said
        try:
            chat, unused = read_chat(
                messages, row.get("tools"), open_end=record_format == "rlaif"
            )
            _check_answers(record_format, chat)
        except Fault as fault:
            mark = fault.mark or f'"{key}"'
            raise Fault(fault.kind, f'in "{key}", {fault.reason}', mark) from None
        ignored |= unused
        chats.append(chat)
    if record_format == "dpo":
        chats = _compare(*chats)
    elif record_format == "rlaif":
        (chat,) = chats
        last = [False] * (len(chat.messages) - 1) + [chat.in_loss[-1]]
        chats = [chat._replace(in_loss=last)]
    return Understood(named, ignored, chats)


def read_chat(
    messages: Any, tools: Any = None, open_end: bool = False
) -> tuple[Chat, set[str]]:
    """Read a conversation, answered or not, and the keys in it that mean nothing.

    `tools` is a list of schemas, or its JSON; a system message may have it, too. With
    `open_end` an empty last answer stands for one that is still to be written. Raises
    `Fault`.
    """
    if not isinstance(messages, list | tuple):
        raise Fault("not_a_list", f"{_show(messages)} is not a list of messages")
    if not messages:
        raise Fault("no_messages", "the list of messages is empty")
    read: list[Message] = []
    in_loss, ignored = [], set()
    for number, given in enumerate(messages, 1):
        left = dict(given) if isinstance(given, dict) else given
        try:
            message = _read_message(left, read[-1]["role"] if read else None)
            role, tools = message["role"], left.pop("tools", None) or tools
            if not (message["content"].strip() or "tool_calls" in message):
                if open_end and role == "assistant" and number == len(messages):
                    break
                if role != "tool" and not (role == "system" and tools):
                    kind = "empty_answer" if role == "assistant" else "empty_content"
                    raise Fault(kind, f"is the {role}'s and empty")
            weights = [_read_weight(left.pop(key)) for key in _WEIGHTS if key in left]
        except Fault as fault:
            mark = fault.mark or _show(given, None)
            raise Fault(fault.kind, f"message {number} {fault.reason}", mark) from None
        read.append(message)
        in_loss.append(role == "assistant" and all(weights))
        ignored |= left.keys()
    tools = _parse(tools or [], '"tools"')
    if not isinstance(tools, list):
        raise Fault("tools", f'"tools" is {_show(tools)}, not a list of schemas')
    return Chat(read, in_loss, tools), ignored


def find_stage(row: Row) -> str | None:
    """Return the stage that a row's keys are for, or None."""
    for stage in ("dpo", "sft", "pretrain"):
        if any(row.keys() >= {*form.keys.split()} for form in FORMS[stage]):
            return stage
    return None


def _recognise(record_format: str, row: Row) -> Form:
    """Return the first form whose keys a row has."""
    forms = FORMS[record_format]
    for form in forms:
        if row.keys() >= {*form.keys.split()}:
            return form
    hint = f'these rows are for stage="{stage}"' if (stage := find_stage(row)) else ""
    named = [form.keys.split() for form in forms]
    near = [keys for keys in named if row.keys() & {*keys}]
    if not hint and near:
        missing = min(([k for k in keys if k not in row] for keys in near), key=len)
        hint = f'"{missing[0]}" is missing'
    listed = " or ".join(form.keys.replace(" ", " + ") for form in forms)
    found = _show(list(row), 80)
    reason = f"the keys of the row are {found}: {hint or f'expected {listed}'}"
    raise Fault("unknown_form", reason)


def _read_message(left: Any, before: str | None) -> Message:
    """Read a message, and remove from `left` what is used."""
    if not isinstance(left, dict):
        wanted = "an object with role and content"
        raise Fault("not_a_message", f"is {_show(left)}, not {wanted}")
    shown = _show(list(left))
    given = left.pop("role" if "role" in left else "from", None)
    if given is None:
        raise Fault("missing_role", f'has no "role", its keys: {shown}')
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        reason = f"has the role {_show(given)}, not system, user, assistant or tool"
        raise Fault("unknown_role", reason, _show(given, None))
    if role not in _FOLLOWERS[before]:
        place = f"after the {before}'s" if before else "at the beginning"
        wanted = f"there must be {' or '.join(_FOLLOWERS[before])}"
        raise Fault("role_order", f"is the {role}'s {place}, where {wanted}")
    calls = left.pop("tool_calls", None) or left.pop("function_call", None)
    key = "content" if "content" in left else "value"
    if key not in left and not calls:
        raise Fault("missing_content", f'has no "content", its keys: {shown}')
    content = left.pop(key, None)
    if given == "function_call":
        calls, content = content, None
    message: Message = {"role": role, "content": _read_content(content)}
    if calls:
        message["tool_calls"] = _read_calls(calls)
    passed_on = {key: left.pop(key) for key in PASSED_ON if key in left}
    return message | {key: v for key, v in passed_on.items() if v is not None}


def _read_content(content: Any) -> str:
    """Return a message's text: a string, nothing, or a list of parts with text."""
    parts = content if isinstance(content, list) else [content or ""]
    texts: list[Any] = [
        part.get("text", part.get("value")) if isinstance(part, dict) else part
        for part in parts
    ]
    if not all(isinstance(text, str) for text in texts):
        found = f"has the content {_show(content)}, not a string or text parts"
        raise Fault("content_not_a_string", found)
    return "".join(texts)


def _read_calls(calls: Any) -> list[Any]:
    """Return tool calls, each with a name and arguments: an object, or its JSON."""
    calls = _parse(calls, "tool_calls")
    calls = calls if isinstance(calls, list) else [calls]
    for each in calls:
        call = each.get("function", each) if isinstance(each, dict) else {}
        arguments = _parse(call.get("arguments"), "arguments of a tool call")
        if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
            wanted = 'each needs "name" and "arguments", an object'
            raise Fault("tool_calls", f"has the tool_calls {_show(calls)}: {wanted}")
    return calls


def _parse(value: Any, what: str) -> Any:
    """Return a value that may be given as its JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        reason = f"has {what} that are no JSON ({error}): {_show(value)}"
        raise Fault("broken_json", reason, _show(value, None)) from None


def _read_weight(weight: Any) -> bool:
    if weight not in (0, 1):
        raise Fault("weight", f"has the weight {_show(weight)}; expected is 0 or 1")
    return bool(weight)


def _check_answers(record_format: str, chat: Chat) -> None:
    """Check that there is something to learn, and at the end if it must be there."""
    roles = [message["role"] for message in chat.messages]
    if record_format == "sft":
        if "assistant" not in roles:
            reason = "no turn is the assistant's: there is nothing to learn"
            raise Fault("no_answer", reason)
        if not any(chat.in_loss):
            raise Fault("no_answer", "every answer has the weight 0")
    elif record_format == "dpo" and (last := roles[-1]) != "assistant":
        reason = f"the last turn is the {last}'s, not the assistant's"
        raise Fault("no_last_answer", reason, f'"{last}"')


def _compare(chosen: Chat, rejected: Chat) -> list[Chat]:
    """Return a pair whose loss begins after the messages that both share."""
    both = zip(chosen.messages, rejected.messages, strict=False)
    shared = len(list(itertools.takewhile(lambda each: each[0] == each[1], both)))
    if not shared:
        reason = '"chosen" and "rejected" have no prompt in common'
        raise Fault("no_common_prompt", reason, '"rejected"')
    if shared == min(len(chosen.messages), len(rejected.messages)):
        reason = 'of "chosen" and "rejected" one is the other, or its beginning'
        raise Fault("no_difference", reason, '"rejected"')
    return [
        chat._replace(
            in_loss=[n >= shared and one for n, one in enumerate(chat.in_loss)]
        )
        for chat in (chosen, rejected)
    ]


def _said(role: str, value: Any) -> list[Any]:
    """Return what was said as messages: a string of a role, a message, or several."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return value if isinstance(value, list) else [value]


def _answered(prompt: Any, answer: Any) -> list[Any]:
    """Return a prompt with its answer, which may be the whole conversation already."""
    answer = _said("assistant", answer)
    first = answer[0] if answer else None
    given = first.get("role", first.get("from")) if isinstance(first, dict) else None
    whole = _ROLES.get(str(given), "assistant") != "assistant"
    return answer if whole else [*_said("user", prompt), *answer]


def _read_alpaca(row: Row) -> list[list[Any]]:
    asked, more = row["instruction"], row.get("input") or ""
    if not isinstance(more, str):
        raise Fault(
            "not_a_string", f'"input" is {_show(more)}, not a string', '"input"'
        )
    try:
        before = [_answered(*turn) for turn in row.get("history") or []]
    except TypeError:
        reason = '"history" is not a list of [question, answer]'
        raise Fault("not_a_list", reason, '"history"') from None
    asked = f"{asked}\n{more}" if more else asked
    return [[*itertools.chain(*before), *_answered(asked, row["output"])]]


def _read_pair(row: Row) -> list[list[Any]]:
    prompt = row.get("conversations") or row.get("prompt") or []
    return [_answered(prompt, row[key]) for key in ("chosen", "rejected")]


_CHATS = [
    Form("conversations", lambda row: [row["conversations"]]),
    Form("messages", lambda row: [row["messages"]]),
    Form("instruction output", _read_alpaca, optional="input history"),
    Form(
        "prompt completion", lambda row: [_answered(row["prompt"], row["completion"])]
    ),
    Form("question answer", lambda row: [_answered(row["question"], row["answer"])]),
]
_PAIRS = [
    Form(
        "chosen_messages rejected_messages",
        lambda row: [row["chosen_messages"], row["rejected_messages"]],
    ),
    Form("conversations chosen rejected", _read_pair),
    Form("prompt chosen rejected", _read_pair),
    Form("chosen rejected", _read_pair),
]
FORMS: dict[str, list[Form]] = {
    "pretrain": [
        Form("text", lambda row: row["text"]),
        Form("content", lambda row: row["content"]),
    ],
    "sft": _CHATS,
    "dpo": _PAIRS,
    "rlaif": _CHATS,
}
"""The forms of rows by record format: the stages, and "rlaif" for other programs."""


def _show(value: Any, length: int | None = 40) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)[:length]
