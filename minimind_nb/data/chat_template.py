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
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .jsonl import Fault
from .tokenizer import TokenizerSpec

Message = dict[str, str]

ESCAPE = "\ufdd0"
"""Begins, in a message, what stands for a special string or for this character.

It is a Unicode noncharacter: for internal use, in no text.
"""

_FIRST_STAND_IN = 0xF0000  # private use, plane 15
# Of processor time, for one conversation: a template is a program from a stranger.
_MOST_SECONDS = 1.0  # for a conversation of few messages
_MESSAGES = 50  # from so many on it takes longer
_MOST_BYTES = 1 << 27  # of memory
_BYTES_A_CHARACTER = 32
_ANSWER_MARKS = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
_MOST = 1_000_000  # a number in a template
_WIDE = re.compile(r"[%:<>^]0?\d{5,}")  # in what formats a number

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
        from transformers.utils.chat_template_utils import render_jinja_template

        if not spec.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: put one beside its tokenizer.json "
                "as chat_template.jinja, or set tokenizer.chat_template"
            )
        _refuse_bombs(spec.chat_template)
        self._marks_answers = bool(_ANSWER_MARKS.search(spec.chat_template))
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
            raise _refusal(
                f"it shows {len(answers)} of {len(answering)}, or empty ones"
            )
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
            what = f"fails: {error}"
            if isinstance(error, MemoryError):
                what = f"takes more memory than its limit ({_MOST_BYTES >> 20} MiB and more)"
            raise Fault(
                "chat_template", f"the tokenizer's chat template {what}"
            ) from error
        return texts[0], spans[0] if answers else []


@contextlib.contextmanager
def limited(
    conversations: Sequence[Sequence[Message]],
) -> Iterator[Callable[[int], object]]:
    """Limit time and memory of rendering; yield a function that restarts the time.

    It takes the number of messages: templates that mark no answers are rendered for each
    of them, so the time grows with their square. Raises `TimeoutError` when it is over,
    `MemoryError` when the memory for all conversations is (Linux). On the main thread
    only: signals arrive there, and two threads could not restore a process's one limit
    in order.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda messages: None
        return

    def stop(*_: object) -> None:
        raise TimeoutError(
            "rendering the chat template timed out after a thousand times the usual time: "
            "give the tokenizer another template"
        )

    handler = signal.signal(signal.SIGVTALRM, stop)
    start = functools.partial(signal.setitimer, signal.ITIMER_VIRTUAL)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if sys.platform.startswith("linux"):
            with open("/proc/self/statm", "rb") as file:
                held = int(file.read().split()[0]) * resource.getpagesize()
            messages = itertools.chain(*conversations)
            characters = sum(len(text) for one in messages for text in one.values())
            most = held + _MOST_BYTES + _BYTES_A_CHARACTER * characters
            most = most if soft == resource.RLIM_INFINITY else min(most, soft)
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        yield lambda count: start(_MOST_SECONDS * (1 + (count / _MESSAGES) ** 2))
    finally:
        start(0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _refuse_bombs(template: str) -> None:
    """Raise `ValueError` for arithmetic by which some characters become gigabytes.

    No time limit interrupts a call into C. What this overlooks ends at the memory limit.
    """
    import jinja2
    from jinja2 import nodes

    grammar = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = grammar.parse(_ANSWER_MARKS.sub("", template))
    except jinja2.TemplateSyntaxError:
        return  # rendering reports it
    for node in tree.find_all((nodes.Pow, nodes.Mul, nodes.Const)):
        value = getattr(node, "value", None)
        if (
            isinstance(node, nodes.Pow)
            or (isinstance(node, nodes.Mul) and node.find(nodes.Mul))
            or (isinstance(value, int) and abs(value) > _MOST)
            or (isinstance(value, str) and _WIDE.search(value))
        ):
            raise ValueError(
                f"the tokenizer's chat template computes, in line {node.lineno}, what "
                "no conversation needs and could take all memory (a power, a product of "
                "products, a huge number): give the tokenizer another template"
            )


def _refusal(what: str) -> Fault:
    return Fault(
        "chat_template",
        f"the tokenizer's chat template hides where the answers are ({what}): put "
        "{% generation %} and {% endgeneration %} around them in it",
    )
