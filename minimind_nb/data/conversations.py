"""Rows of every usual form become texts, or conversations as chat templates take them.

`FORMS` has the forms. Each key of a row or a message is used, or named as ignored.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from .jsonl import Fault, Row

Message = dict[str, Any]
"""`role` and `content`, a string; `tool_calls` and `PASSED_ON` if a row has them."""

IN_LOSS, TURN, USER = 1, 2, 4
"""Bits of a token's mark: it is in the loss; a turn begins here; it is the user's."""

PASSED_ON = ("reasoning_content", "name", "tool_call_id")
"""Keys of a message that go to the chat template as they are."""

_CHATS = (
    "conversations",
    "messages",
    "instruction output",
    "prompt completion",
    "question answer",
)
FORMS = {
    "pretrain": ("text", "content"),
    "sft": _CHATS,
    "dpo": (
        "chosen_messages rejected_messages",
        "conversations chosen rejected",
        "prompt chosen rejected",
        "chosen rejected",
    ),
    "rlaif": _CHATS,
}
"""The keys of each form of rows by record format: the stages, and "rlaif" for other
programs. The last key has the answer, or the last two a pair of them."""

_MORE = {"instruction": ("input", "history")}  # keys that a form may have as well
_WEIGHTS = ("weight", "loss_weight", "train")  # 0 keeps an answer out of the loss
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


def understand(record_format: str, row: Row) -> Understood:
    """Read a row for a record format. Raises `Fault` saying what to write instead.

    In the loss are every answer of "sft", the last one of "rlaif", and of pairs the
    answers after the messages that both share; never an answer of weight 0.
    """
    keys = _recognise(record_format, row)
    if isinstance(row.get("label"), bool):
        reason = 'rated answers ("label"): make pairs of "chosen" and "rejected"'
        raise Fault("rated_answer", reason, '"label"')
    form, ignored = ", ".join(keys), row.keys() - {*keys, *_MORE.get(keys[0], ())}
    if record_format == "pretrain":
        return Understood(form, ignored, _text(row, keys[0]))
    ignored -= {"system", "tools"}
    count = 2 if record_format == "dpo" else 1
    asked, answers = _read_question(row, keys[:-count]), keys[-count:]
    chats = []
    for key in answers:
        try:
            messages = _answered(asked, row[key]) if asked else row[key]
            if row.get("system") and isinstance(messages, list):
                messages = [*_said("system", row["system"]), *messages]
            chat, unused = read_chat(
                messages, row.get("tools"), record_format == "rlaif"
            )
            _check_answers(record_format, chat)
        except Fault as fault:
            mark = fault.mark or f'"{key}"'
            raise Fault(fault.kind, f'in "{key}", {fault.reason}', mark) from None
        ignored |= unused
        chats.append(chat)
    first = 0  # message that may be in the loss
    if record_format == "dpo":
        first = _count_shared(*chats)
    elif record_format == "rlaif":
        first = len(chats[0].messages) - 1
    chats = [
        chat._replace(in_loss=[*[False] * first, *chat.in_loss[first:]])
        for chat in chats
    ]
    return Understood(form, ignored, chats)


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
            weights = [left.pop(key, None) for key in _WEIGHTS]
            weights = [weight for weight in weights if weight is not None]
            if odd := [weight for weight in weights if weight not in (0, 1)]:
                found = f"has the weight {_show(odd[0])}; expected is 0 or 1"
                raise Fault("weight", found)
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
        if any(row.keys() >= {*form.split()} for form in FORMS[stage]):
            return stage
    return None


def _recognise(record_format: str, row: Row) -> list[str]:
    """Return the keys of the first form that a row has all keys of."""
    forms = [form.split() for form in FORMS[record_format]]
    missing = [[key for key in form if key not in row] for form in forms]
    if [] in missing:
        return forms[missing.index([])]
    near = [lack for lack, form in zip(missing, forms, strict=True) if lack != form]
    if stage := find_stage(row):
        hint = f'these rows are for stage="{stage}"'
    elif near:
        hint = f'"{min(near, key=len)[0]}" is missing'
    else:
        hint = f"expected {' or '.join(map(' + '.join, forms))}"
    found = _show(list(row), 80)
    raise Fault("unknown_form", f"the keys of the row are {found}: {hint}")


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
    return message | _read_more(left)


def _read_more(left: dict[str, Any]) -> Message:
    """Return what is passed on, and remove it from `left`."""
    found = {key: left.pop(key, None) for key in PASSED_ON}
    # pandas writes NaN for nothing.
    given = {k: v for k, v in found.items() if v is not None and repr(v) != "nan"}
    for key, value in given.items():
        if not isinstance(value, str):
            raise Fault("not_a_string", f'has "{key}" {_show(value)}, not a string')
    return given


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
        call = (each.get("function") or each) if isinstance(each, dict) else {}
        call = call if isinstance(call, dict) else {}
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


def _check_answers(record_format: str, chat: Chat) -> None:
    """Check that there is something to learn, and at the end if it must be there."""
    roles = [message["role"] for message in chat.messages]
    if record_format == "sft" and not any(chat.in_loss):
        reason = "no turn is the assistant's: there is nothing to learn"
        if "assistant" in roles:
            reason = "every answer has the weight 0"
        raise Fault("no_answer", reason)
    if record_format == "dpo" and (last := roles[-1]) != "assistant":
        reason = f"the last turn is the {last}'s, not the assistant's"
        raise Fault("no_last_answer", reason, f'"{last}"')


def _count_shared(chosen: Chat, rejected: Chat) -> int:
    """Return how many messages a pair has in common, its prompt."""
    both = zip(chosen.messages, rejected.messages, strict=False)
    shared = len(list(itertools.takewhile(lambda each: each[0] == each[1], both)))
    if not shared:
        reason = '"chosen" and "rejected" have no prompt in common'
        raise Fault("no_common_prompt", reason, '"rejected"')
    if shared == min(len(chosen.messages), len(rejected.messages)):
        reason = 'of "chosen" and "rejected" one is the other, or its beginning'
        raise Fault("no_difference", reason, '"rejected"')
    return shared


def _said(role: str, value: Any) -> list[Any]:
    """Return what was said as messages: a string of a role, a message, or several."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return value if isinstance(value, list) else [value]


def _answered(asked: list[Any], answer: Any) -> list[Any]:
    """Return messages with an answer, which may be the whole conversation already."""
    answer = _said("assistant", answer)
    first = answer[0] if answer else None
    given = first.get("role", first.get("from")) if isinstance(first, dict) else None
    whole = _ROLES.get(str(given), "assistant") != "assistant"
    return answer if whole else [*asked, *answer]


def _read_question(row: Row, keys: list[str]) -> list[Any]:
    """Return the messages before an answer; none if its key has them, too."""
    if keys != ["instruction"]:
        return [*itertools.chain(*(_said("user", row[key]) for key in keys))]
    asked = _text(row, "instruction")
    if row.get("input"):
        asked = f"{asked}\n{_text(row, 'input')}"
    before = []
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or [type(said) for said in turn] != [str, str]:
            reason = f'"history" has {_show(turn)}, not [question, answer]'
            raise Fault("not_a_list", reason, '"history"')
        before += [*_said("user", turn[0]), *_said("assistant", turn[1])]
    return [*before, *_said("user", asked)]


def _text(row: Row, key: str) -> str:
    if not isinstance(row[key], str):
        found = f'"{key}" is {_show(row[key])}, not a string'
        raise Fault("not_a_string", found, f'"{key}"')
    return row[key]


def _show(value: Any, length: int | None = 40) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)[:length]
