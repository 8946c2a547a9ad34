"""Encode conversations with a tokenizer's chat template, and a mark for each token.

Begin and end of a turn or an answer are read off what the template does, never searched
for in what was said. Special strings in a message are encoded as ordinary text, so no
message can forge a turn.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .conversations import IN_LOSS, TURN, USER, Message
from .fast_encoding import BulkEncoder
from .jsonl import Fault
from .tokenizer import TokenizerSpec

# What stands in a message for a special string: a noncharacter, which is in no text, and
# a character of private use.
_ESCAPE, _FIRST_STAND_IN = "\ufdd0", 0xF0000
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# A template is a program from a stranger. Two messages take 0.2 ms of processor time.
_SECONDS = 1.0
_MORE_SECONDS = 0.02  # times the square of a conversation's messages

Chat = tuple[Sequence[Message], int]
"""A conversation, and how many of its first messages stay out of the loss."""
Encoded = tuple[np.ndarray, np.ndarray]
"""Ids (uint32) and marks (uint8) of a conversation."""
_Segment = tuple[str, int, int]  # text, the mark of its first token, and of all


class ChatEncoder:
    """Encodes conversations with a tokenizer's chat template.

    Template and messages are encoded together, as transformers does it, but cut where a
    turn or an answer begins or ends: there a prompt ends when answers are generated.
    Answers are what the template marks by `{% generation %}`; without that, what it adds
    to the prompt. What closes an answer is in the loss with it.

    Raises `ValueError` for a tokenizer without a template, `TimeoutError` for a template
    that takes too long. Not covered: descriptions of tools, documents.
    """

    def __init__(self, spec: TokenizerSpec, encoder: BulkEncoder | None = None) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        if not spec.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: put one beside its tokenizer.json "
                "as chat_template.jinja, or set tokenizer.chat_template"
            )
        self._encoder = encoder or BulkEncoder(spec)
        self._marks_answers = bool(_MARK.search(spec.chat_template))
        self._render_template: Any = functools.partial(
            render_jinja_template,
            chat_template=spec.chat_template,
            bos_token=spec.bos_token,
            eos_token=spec.eos_token,
            pad_token=spec.pad_token,
        )
        self._heads = re.compile(rf"{re.escape(spec.bos_token)}(\w*)")
        added = json.loads(spec.json)["added_tokens"]
        special = [one["content"] for one in added if one["special"]]
        special.sort(key=len, reverse=True)  # a longer one goes before its beginning
        self._special = re.compile(f"({'|'.join(map(re.escape, special)) or '(?!)'})")
        self._stand_ins = [
            (each, _ESCAPE + chr(_FIRST_STAND_IN + n))
            for n, each in enumerate([_ESCAPE, *special])
        ]

    def encode(
        self, chats: Sequence[Chat], answered: bool = True
    ) -> list[Encoded | Fault]:
        """Encode checked conversations; a `Fault` stands for one that the template fails.

        Unless `answered`, they are prompts, and end where an answer begins.
        """
        rendered: list[list[_Segment] | Fault] = []
        with _limited([messages for messages, _ in chats]):
            for messages, context in chats:
                try:
                    rendered.append(self._render(messages, context, answered))
                except Fault as fault:
                    rendered.append(fault)
        good = [one for one in rendered if not isinstance(one, Fault)]
        ids = iter(self._encode_texts([text for one in good for text, _, _ in one]))
        return [one if isinstance(one, Fault) else _join(one, ids) for one in rendered]

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Return the ids (uint32) of messages up to the assistant's next answer.

        They are those that `encode` gives before it. Raises `Fault`, a `ValueError`.
        """
        (encoded,) = self.encode([(messages, 0)], answered=False)
        if isinstance(encoded, Fault):
            raise encoded
        return encoded[0]

    def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self._encoder.encode(texts)
        for number, text in enumerate(texts):
            if _ESCAPE in text:
                parts = self._special.split(text)  # every second one is special
                ids = self._encoder.encode(parts)
                said = [self._unescape(part) for part in parts[::2]]
                ids[::2] = self._encoder.encode(said, ordinary=True)
                encoded[number] = np.concatenate(ids)
        return encoded

    def _escape(self, content: str) -> str:
        for each, stand_in in self._stand_ins:
            content = content.replace(each, stand_in)
        return content

    def _unescape(self, text: str) -> str:
        for each, stand_in in reversed(self._stand_ins):
            text = text.replace(stand_in, each)
        return text

    def _render(
        self, messages: Sequence[Message], context: int, answered: bool
    ) -> list[_Segment]:
        """Render a conversation, cut where its turns and answers begin and end."""
        messages = [
            {"role": one["role"], "content": self._escape(one["content"])}
            for one in messages
        ]
        roles = [one["role"] for one in messages]
        answering = [n for n, role in enumerate(roles) if role == "assistant"]
        roles += [] if answered else ["assistant"]
        text, answers = self._apply(messages, not answered, self._marks_answers)
        turns = self._find_turns(messages, text, roles)
        if not self._marks_answers:
            ends = [*turns[1:], len(text)]
            answers = [
                (self._find_end(text, messages[:n], prompt=True), ends[n])
                for n in answering
            ]
        if len(answers) != len(answering) or not all(0 < a < b for a, b in answers):
            found = f"it shows {len(answers)} of {len(answering)}, or empty ones"
            raise _refusal(found)
        in_loss = {
            start: end
            for (start, end), number in zip(answers, answering, strict=True)
            if number >= context
        }
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

    def _find_turns(
        self, messages: list[Message], text: str, roles: list[str]
    ) -> list[int]:
        """Return where turns begin: at ChatML's heads, else where fewer messages end."""
        heads = list(self._heads.finditer(text))
        if [head[1] for head in heads] == roles:
            return [0, *(head.start() for head in heads[1:])]
        counts = range(1, len(roles))
        return [0, *(self._find_end(text, messages[:count]) for count in counts)]

    def _find_end(self, text: str, first: list[Message], prompt: bool = False) -> int:
        """Return where the first messages end in the text of all of them.

        A template may render them differently alone, with a thought that it drops
        later: then it is after as many special strings, and the lines after these that
        both texts share.
        """
        alone, _ = self._apply(first, prompt)
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
        self, messages: list[Message], prompt: bool, answers: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and if asked for, begin and end of the marked answers."""
        try:
            texts, spans = self._render_template(
                [messages],
                return_assistant_tokens_mask=answers,
                add_generation_prompt=prompt,
            )
        except (ImportError, TimeoutError):
            raise
        except Exception as error:  # a template may fail in any way that Python does
            what = str(error) or type(error).__name__
            raise Fault(
                "chat_template", f"the tokenizer's chat template fails: {what}"
            ) from error
        return texts[0], spans[0] if answers else []


def _join(segments: list[_Segment], ids: Iterator[np.ndarray]) -> Encoded:
    """Join the segments, whose ids come next."""
    parts, marks = [], []
    for (_, first, mark), part in zip(segments, ids, strict=False):
        parts.append(part)
        marks.append(np.full(len(part), mark, np.uint8))
        marks[-1][:1] |= first
    return np.concatenate(parts), np.concatenate(marks)


@contextlib.contextmanager
def _limited(conversations: list[Sequence[Message]]) -> Iterator[None]:
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

    seconds = _SECONDS + _MORE_SECONDS * sum(len(one) ** 2 for one in conversations)
    handler = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)


def _refusal(what: str) -> Fault:
    return Fault(
        "chat_template",
        f"the tokenizer's chat template hides where the answers are ({what}): put "
        "{% generation %} and {% endgeneration %} around them in it",
    )
