"""Encode conversations with a tokenizer's chat template, and a mark for each token.

Begin and end of a turn or an answer are read off what the template does, never searched
for in what was said. Special strings in a message are encoded as ordinary text, so no
message can forge a turn.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .conversations import IN_LOSS, TURN, USER, Chat, Message
from .fast_encoding import BulkEncoder
from .jsonl import Fault
from .tokenizer import TokenizerSpec

# What stands in a message for a special string: a noncharacter, which is in no text, and
# a character of private use.
_ESCAPE, _FIRST_STAND_IN = "\ufdd0", 0xF0000
_PROBE: list[Message] = [
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
]
_SWITCHES = ("open_thinking", "enable_thinking", "thinking")
_THOUGHT = "<think>\n"
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# A template is a program from a stranger. Two messages take 0.2 ms of processor time.
_SECONDS = 1.0
_MORE_SECONDS = 0.02  # times the square of a conversation's messages

Encoded = tuple[np.ndarray, np.ndarray]
"""Ids (uint32) and marks (uint8) of a conversation."""
_Segment = tuple[str, int, int]  # text, the mark of its first token, and of all


class ChatEncoder:
    """Encodes conversations with a tokenizer's chat template.

    The ids are those of transformers' `apply_chat_template`, but for special strings in
    what was said, which stay ordinary text, and answers that begin with white space,
    which are encoded apart. Answers are what the template marks by `{% generation %}`;
    without that, what it adds to the prompt. What closes an answer is in the loss with
    it, and `end_id` is the special token in that: there a generated answer ends.

    Raises `ValueError` for a tokenizer without a template, or whose template fails or
    closes an answer without a special token; `RuntimeError` for one that runs out of
    memory, `TimeoutError` for one that takes too long.
    """

    def __init__(self, spec: TokenizerSpec, encoder: BulkEncoder | None = None) -> None:
        if not spec.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: put one beside its tokenizer.json "
                "as chat_template.jinja, or set tokenizer.chat_template"
            )
        # Before any limit of time, since it takes seconds.
        from transformers.utils import chat_template_utils

        self._render_template: Any = chat_template_utils.render_jinja_template
        self.spec = spec
        self._encoder = encoder or BulkEncoder(spec)
        self._template = spec.chat_template
        self._marks_answers = bool(_MARK.search(self._template))
        self._heads = re.compile(rf"{re.escape(spec.bos_token)}(\w*)")
        added = json.loads(spec.json)["added_tokens"]
        special = {one["content"]: one["id"] for one in added if one["special"]}
        # A longer one goes before its beginning.
        names = sorted(special, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        self._stand_ins = [
            (each, _ESCAPE + chr(_FIRST_STAND_IN + n))
            for n, each in enumerate([_ESCAPE, *names])
        ]
        with _limited(_PROBE):
            asked, _ = self._apply(_PROBE[:1], prompt=False)
            opened, _ = self._apply(_PROBE[:1], prompt=True)
            answered, _ = self._apply(_PROBE, prompt=False)
        self._opening = opened.removeprefix(asked)
        closing = answered.rpartition(_PROBE[1]["content"])[2]
        if not (found := self._special.search(closing)):
            raise ValueError(
                f"the tokenizer's chat template closes an answer with {closing!r}, so its "
                "end cannot be learned: write eos_token behind it in the template"
            )
        self.end_id: int = special[found[0]]

    def writes(self, key: str) -> bool:
        """Return whether the template uses a key of a message, or an argument."""
        return key in self._template

    def encode(self, chat: Chat, **switches: bool) -> Encoded:
        """Return the ids and marks of a conversation, whose end may be open.

        `switches` are further arguments of the template. Raises `Fault` if the template
        refuses the conversation.
        """
        with _limited(chat.messages):
            segments = self._render(chat, switches)
        texts: list[list[str]] = [[]]
        for text, _, in_loss in segments:
            if in_loss and text[:1].isspace():
                texts.append([])  # encoded apart, as when the answer is generated
            texts[-1].append(text)
        ids = [*itertools.chain(*map(self._encode_parts, texts))]
        marks = []
        for part, (_, first, mark) in zip(ids, segments, strict=True):
            marks.append(np.full(len(part), mark, np.uint8))
            marks[-1][:1] |= first
        return np.concatenate(ids), np.concatenate(marks)

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] = (),
        thinking: bool | None = None,
    ) -> np.ndarray:
        """Return the ids (uint32) of messages up to the assistant's next answer.

        `tools` are functions or schemas; `thinking` sets the template's own switch.
        Raises `Fault`, a `ValueError`.
        """
        if tools and not self.writes("tools"):
            raise ValueError(
                "the tokenizer's chat template does not write tools: leave them out"
            )
        switches = {}
        if thinking is not None:
            switches = {name: thinking for name in _SWITCHES if self.writes(name)}
            if not switches:
                raise ValueError(
                    "the tokenizer's chat template has no switch for thinking "
                    f"({', '.join(_SWITCHES)}): leave thinking out"
                )
        chat = Chat(messages, [False] * len(messages), tools)
        return self.encode(chat, **switches)[0]

    def _encode_parts(self, parts: list[str]) -> list[np.ndarray]:
        if any(_ESCAPE in part for part in parts):
            return [self._encode_escaped(part) for part in parts]
        return [*self._encoder.encode_parts(parts)]

    def _encode_escaped(self, text: str) -> np.ndarray:
        parts = self._special.split(text)  # every second one is special
        ids = self._encoder.encode(parts)
        said = [self._unescape(part) for part in parts[::2]]
        ids[::2] = self._encoder.encode(said, ordinary=True)
        return np.concatenate(ids)

    def _escape(self, value: Any) -> Any:
        """Replace special strings in all that was said, however deep."""
        if isinstance(value, str):
            for each, stand_in in self._stand_ins:
                value = value.replace(each, stand_in)
        elif isinstance(value, Mapping):
            return {key: self._escape(one) for key, one in value.items()}
        elif isinstance(value, list | tuple):
            return [self._escape(one) for one in value]
        return value

    def _unescape(self, text: str) -> str:
        for each, stand_in in reversed(self._stand_ins):
            text = text.replace(stand_in, each)
        return text

    def _render(self, chat: Chat, switches: Mapping[str, bool]) -> list[_Segment]:
        """Render a conversation, cut where its turns and answers begin and end."""
        messages: list[Message] = self._escape(chat.messages)
        calls = any("tool_calls" in one for one in messages)
        if calls and not self.writes("tool_calls"):
            raise _fault("does not write tool_calls: name another tokenizer")
        tools = [one if callable(one) else self._escape(one) for one in chat.tools]
        roles = [one["role"] for one in messages]
        answering = [n for n, role in enumerate(roles) if role == "assistant"]
        asks = roles[-1] != "assistant"
        roles += ["assistant"] if asks else []
        text, answers = self._apply(messages, asks, tools, switches)
        turns = self._find_turns(messages, tools, text, roles)
        ends = [*turns[1:], len(text)]
        if not self._marks_answers:
            answers = [(self._find_answer(text, turns[n]), ends[n]) for n in answering]
        if len(answers) != len(answering) or not all(0 < a < b for a, b in answers):
            found = f"it shows {len(answers)} of {len(answering)}, or empty ones"
            raise _refusal(found)
        in_loss = {}
        for (start, end), number in zip(answers, answering, strict=True):
            closed = self._special.search(text, start, end)
            if chat.in_loss[number]:
                in_loss[start] = end if closed else ends[number]
        first = {
            turn: TURN | USER * (role == "user")
            for turn, role in zip(turns, roles, strict=True)
        }
        segments: list[_Segment] = []
        end = 0
        cuts = sorted({0, len(text), *turns, *in_loss, *in_loss.values()})
        for a, b in itertools.pairwise(cuts):
            end = in_loss.get(a, end)
            segments.append((text[a:b], first.get(a, 0), IN_LOSS * (a < end)))
        return segments

    def _find_answer(self, text: str, turn: int) -> int:
        """Return where the answer of an assistant's turn begins.

        That is after the generation prompt; but if the answer has a thought where the
        prompt has an empty one, the thought is a part of the answer.
        """
        shared = os.path.commonprefix([self._opening, text[turn:]])
        if shared != self._opening:
            shared = shared[: shared.rfind("\n") + 1].removesuffix(_THOUGHT)
            if not shared:
                raise _refusal("an answer does not begin with the generation prompt")
        return turn + len(shared)

    def _find_turns(
        self, messages: list[Message], tools: list[Any], text: str, roles: list[str]
    ) -> list[int]:
        """Return where turns begin: at ChatML's heads, else where fewer messages end."""
        heads = list(self._heads.finditer(text))
        if self._heads.match(self._opening) and [head[1] for head in heads] == roles:
            return [0, *(head.start() for head in heads[1:])]
        counts = range(1, len(roles))
        return [0, *(self._find_end(text, messages[:count], tools) for count in counts)]

    def _find_end(self, text: str, first: list[Message], tools: list[Any]) -> int:
        """Return where the first messages end in the text of all of them.

        A template may render them differently alone, with a thought that it drops
        later: then it is after as many special strings, and the lines after these that
        both texts share.
        """
        alone, _ = self._apply(first, prompt=False, tools=tools)
        if text.startswith(alone):
            return len(alone)
        found = list(self._special.finditer(alone))
        same = list(self._special.finditer(text))[: len(found)]
        if not found or [one[0] for one in found] != [one[0] for one in same]:
            raise _refusal("it writes messages in another way when others follow")
        rest, end = alone[found[-1].end() :], same[-1].end()
        shared = os.path.commonprefix([rest, text[end:]])
        return end + (len(rest) if shared == rest else shared.rfind("\n") + 1)

    def _apply(
        self,
        messages: Sequence[Message],
        prompt: bool,
        tools: Sequence[Any] = (),
        switches: Mapping[str, bool] | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and where the answers that the template marks begin and end."""
        try:
            texts, spans = self._render_template(
                [list(messages)],
                tools=list(tools) or None,
                chat_template=self._template,
                return_assistant_tokens_mask=self._marks_answers,
                add_generation_prompt=prompt,
                bos_token=self.spec.bos_token,
                eos_token=self.spec.eos_token,
                pad_token=self.spec.pad_token,
                **(switches or {}),
            )
        except (ImportError, TimeoutError):
            raise
        except MemoryError as error:  # no fault of the row: the next one fails, too
            raise RuntimeError(
                "rendering the chat template ran out of memory: give the tokenizer "
                "another template"
            ) from error
        except Exception as error:  # a template may fail in any way that Python does
            what = str(error) or type(error).__name__
            raise _fault(f"fails: {what}") from error
        return texts[0], spans[0] if self._marks_answers else []


@contextlib.contextmanager
def _limited(messages: Sequence[Message]) -> Iterator[None]:
    """Raise `TimeoutError` when the block has used too much processor time.

    A template without marks is rendered once a message, so time grows with its square.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # other threads receive no signals
        return

    def stop(*_: object) -> None:
        raise TimeoutError(
            "rendering the chat template timed out: give the tokenizer another template"
        )

    seconds = _SECONDS + _MORE_SECONDS * len(messages) ** 2
    handler = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)


def _refusal(what: str) -> Fault:
    return _fault(
        f"hides where the answers are ({what}): put "
        "{% generation %} and {% endgeneration %} around them in it"
    )


def _fault(what: str) -> Fault:
    return Fault("chat_template", f"the tokenizer's chat template {what}")
