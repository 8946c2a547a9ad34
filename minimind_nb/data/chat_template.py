"""Render conversations with a chat template, and find their turns and answers.

Begin and end of a turn or an answer are read off what the template does, never searched
for in what was said.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .jsonl import Fault
from .tokenizer import TokenizerSpec

Message = dict[str, str]

ESCAPE = "\ufdd0"
"""Begins what stands in a message for a special string; a noncharacter, in no text."""

_FIRST_STAND_IN = 0xF0000  # private use, plane 15
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# A template is a program from a stranger. Two messages take 0.2 ms of processor time.
_SECONDS = 1.0
_MORE_SECONDS = 0.02  # times the square of a conversation's messages
_BYTES = 1 << 27
_BYTES_A_CHARACTER = 32

Segment = tuple[str, str | None, bool]
"""A part of a rendered conversation: text, role, and whether it is in the loss.

Special strings in messages are escaped. The role is that of the turn which begins here,
None inside a turn. What closes an answer is in the loss with it.
"""


class ChatTemplate:
    """The chat template of a tokenizer.

    Answers are what it marks by `{% generation %}`; without that, what it adds to the
    prompt. Raises `ValueError` for a tokenizer without a template, or with one that
    could take all memory.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        from jinja2 import Environment, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        if not spec.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: put one beside its tokenizer.json "
                "as chat_template.jinja, or set tokenizer.chat_template"
            )
        with contextlib.suppress(TemplateSyntaxError):  # which rendering reports
            lexed = Environment().lex(spec.chat_template)
            tokens = [token[1:] for token in lexed if token[1] != "whitespace"]
            # A power can take all memory in one call into C. `f(**more)` is none.
            if any(
                token == ("operator", "**") and before not in "(,"
                for (_, before), token in itertools.pairwise(tokens)
            ):
                raise ValueError(
                    "the tokenizer's chat template computes a power, which no "
                    "conversation needs: give the tokenizer another template"
                )
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
        self.special = re.compile(f"({'|'.join(map(re.escape, special)) or '(?!)'})")
        self._stand_ins = [
            (each, ESCAPE + chr(_FIRST_STAND_IN + n))
            for n, each in enumerate([ESCAPE, *special])
        ]

    def escape(self, content: str) -> str:
        """Return a message's content with nothing in it that could be a special string."""
        for each, stand_in in self._stand_ins:
            content = content.replace(each, stand_in)
        return content

    def unescape(self, text: str) -> str:
        """Return what was said, of an escaped text."""
        for each, stand_in in reversed(self._stand_ins):
            text = text.replace(stand_in, each)
        return text

    def render(
        self, messages: Sequence[Message], context: int = 0, answered: bool = True
    ) -> list[Segment]:
        """Render a conversation, or a prompt, which ends where an answer begins.

        The answers among the first `context` messages are not in the loss. Raises
        `Fault` if the template fails, or does not show where the answers are.
        """
        messages = [
            {"role": one["role"], "content": self.escape(one["content"])}
            for one in messages
        ]
        roles = [one["role"] for one in messages]
        answering = [n for n, role in enumerate(roles) if role == "assistant"]
        roles += [] if answered else ["assistant"]
        text, answers = self._render(messages, not answered, self._marks_answers)
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
        role_at = dict(zip(turns, roles, strict=True))
        segments: list[Segment] = []
        end = 0
        cuts = sorted({0, len(text), *turns, *in_loss, *in_loss.values()})
        for a, b in itertools.pairwise(cuts):
            end = in_loss.get(a, end)
            segments.append((text[a:b], role_at.get(a), a < end))
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

        Alone they may be written in another way, without a thought, say: then it is
        after as many special strings, and the lines after these that both have.
        """
        alone, _ = self._render(first, prompt)
        if text.startswith(alone):
            return len(alone)
        found = list(self.special.finditer(alone))
        same = list(self.special.finditer(text))[: len(found)]
        if not found or [one[0] for one in found] != [one[0] for one in same]:
            raise _refusal("it writes messages in another way when others follow")
        rest, end = alone[found[-1].end() :], same[-1].end()
        shared = os.path.commonprefix([rest, text[end:]])
        return end + (len(rest) if shared == rest else shared.rfind("\n") + 1)

    def _render(
        self, messages: list[Message], prompt: bool = False, answers: bool = False
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


@contextlib.contextmanager
def limited(conversations: Sequence[Sequence[Message]]) -> Iterator[None]:
    """Limit the time and memory of rendering conversations, on the main thread.

    Other threads receive no signals. Time grows with the square of the messages, since a
    template without marks is rendered once for each. Raises `TimeoutError`, or
    `MemoryError` on Linux.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(
            "rendering the chat template timed out: give the tokenizer another template"
        )

    seconds = _SECONDS + _MORE_SECONDS * sum(len(one) ** 2 for one in conversations)
    messages = itertools.chain(*conversations)
    size = sum(len(text) for message in messages for text in message.values())
    statm = Path("/proc/self/statm")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGVTALRM, stop)
    try:
        if limits[0] == resource.RLIM_INFINITY and statm.exists():
            held = int(statm.read_text().split()[0]) * resource.getpagesize()
            most = held + _BYTES + _BYTES_A_CHARACTER * size
            resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _refusal(what: str) -> Fault:
    return Fault(
        "chat_template",
        f"the tokenizer's chat template hides where the answers are ({what}): put "
        "{% generation %} and {% endgeneration %} around them in it",
    )
