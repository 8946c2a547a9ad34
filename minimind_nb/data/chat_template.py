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
"""Stands, in a message, before the character that stands for a special string.

It is a Unicode noncharacter: for internal use, in no text.
"""

_FIRST_STAND_IN = 0xF0000  # private use, plane 15
# Of processor time, for one conversation: a template is a program from a stranger.
_MOST_SECONDS = 1.0  # for a conversation of few messages
_MESSAGES = 50  # from so many on it takes longer
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_ANSWERS = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
_MOST_BYTES = 1 << 27  # of memory
_BYTES_A_CHARACTER = 32
_MOST = 1_000_000  # a number in a template
_WIDE = re.compile(r"[%:<>^]0?\d{5,}")  # in what formats a number


Segment = tuple[str, str | None, bool]
"""A part of a rendered conversation: text, role, and whether it counts in the loss.

Special strings in messages are escaped. The role is that of the turn which begins here,
None inside of a turn. With an answer counts what the template closes it by.
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
                "the tokenizer has no chat template, which says how turns are written: "
                "put one beside its tokenizer.json as chat_template.jinja, or set "
                "tokenizer.chat_template before you give it"
            )
        _refuse_bombs(spec.chat_template)
        self._render_template: Any = render_jinja_template
        self._template = spec.chat_template
        self._marks_answers = bool(_GENERATION.search(spec.chat_template))
        roles = ("bos_token", "eos_token", "pad_token")
        self._names = {role: getattr(spec, role) for role in roles}
        self._heads = re.compile(rf"{re.escape(spec.bos_token)}(\w*)")
        added = json.loads(spec.json)["added_tokens"]
        special = [one["content"] for one in added if one["special"]]
        special.sort(key=len, reverse=True)  # a longer one goes before its beginning
        self.special = re.compile(f"({'|'.join(map(re.escape, special)) or '(?!)'})")
        escaped = [*special, ESCAPE]
        self._escaped = re.compile("|".join(map(re.escape, escaped)))
        stand_ins = {each: _FIRST_STAND_IN + n for n, each in enumerate(escaped)}
        self._escapes = {each: ESCAPE + chr(n) for each, n in stand_ins.items()}
        self._meant = {escape: each for each, escape in self._escapes.items()}
        self._unescaped = re.compile("|".join(self._meant))

    def escape(self, content: str) -> str:
        """Return a message's content with nothing in it that could be a special string."""
        return self._escaped.sub(lambda found: self._escapes[found[0]], content)

    def unescape(self, text: str) -> str:
        """Return what was said, of an escaped text."""
        return self._unescaped.sub(lambda found: self._meant[found[0]], text)

    def render(
        self, messages: Sequence[Message], untrained: int = 0, answered: bool = True
    ) -> list[Segment]:
        """Render a conversation, or a prompt, which ends where an answer begins.

        The answers among the first `untrained` messages do not count in the loss. Raises
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
                (self._find_start(text, messages[:n]), ends[n]) for n in answering
            ]
        if len(answers) != len(answering) or not all(0 < a < b for a, b in answers):
            raise _refusal(
                f"it shows {len(answers)} of {len(answering)}, or empty ones"
            )
        ends = {
            start: end
            for (start, end), number in zip(answers, answering, strict=True)
            if number >= untrained
        }
        role_at = dict(zip(turns, roles, strict=True))
        end = 0
        segments: list[Segment] = []
        cuts = sorted({0, len(text), *turns, *ends, *ends.values()})
        for a, b in itertools.pairwise(cuts):
            end = ends.get(a, end)
            segments.append((text[a:b], role_at.get(a), a < end))
        return segments

    def _find_turns(
        self, messages: list[Message], text: str, roles: list[str]
    ) -> list[int]:
        """Return where turns begin: at ChatML's heads, else where shorter ones end."""
        heads = list(self._heads.finditer(text))
        if [head[1] for head in heads] == roles:
            return [0, *(head.start() for head in heads[1:])]
        places = [0]
        for count in range(1, len(roles)):
            shorter, _ = self._render(messages[:count])
            places.append(self._find_end(text, shorter, places[-1]))
        return places

    def _find_end(self, text: str, shorter: str, after: int) -> int:
        """Return where the first messages end, which alone are rendered as `shorter`."""
        if text.startswith(shorter):
            return len(shorter)
        ends = [found.start() for found in self.special.finditer(shorter)]
        closing = shorter[ends[-1] :] if ends else ""
        place = text.find(closing, after) if closing else -1
        if place < 0 and self._marks_answers:
            return after  # a turn that merges with the one before hides no answer
        if place < 0:
            raise _refusal("it writes a turn in another way when others follow")
        return place + len(closing)

    def _find_start(self, text: str, asking: list[Message]) -> int:
        """Return where the answer to some messages begins.

        A template may end their prompt in another way when an answer follows, by an
        empty thought, say: then it is after the last line that both have in common.
        """
        prompt, _ = self._render(asking, True)
        if text.startswith(prompt):
            return len(prompt)
        shared = len(os.path.commonprefix([text, prompt]))
        ends = [found.end() for found in self.special.finditer(prompt)]
        if not ends or ends[-1] > shared:
            raise _refusal("it writes a prompt in another way when the answer follows")
        return max(ends[-1], text.rfind("\n", 0, shared) + 1)

    def _render(
        self, messages: list[Message], prompt: bool = False, answers: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and if asked for, begin and end of the marked answers."""
        try:
            texts, spans = self._render_template(
                [messages],
                chat_template=self._template,
                return_assistant_tokens_mask=answers,
                add_generation_prompt=prompt,
                **self._names,
            )
        except (ImportError, TimeoutError):
            raise
        except MemoryError:
            raise Fault(
                "chat_template",
                "the tokenizer's chat template takes more memory than its limit "
                f"({_MOST_BYTES >> 20} MiB and more): give the tokenizer another one",
            ) from None
        except Exception as error:  # a template may fail in any way that Python does
            raise Fault(
                "chat_template", f"the tokenizer's chat template fails: {error}"
            ) from error
        return texts[0], spans[0] if answers else []


@contextlib.contextmanager
def limited(characters: int) -> Iterator[Callable[[int], object]]:
    """Limit time and memory of rendering; yield a function that restarts the time.

    It takes the number of messages: templates that mark no answers are rendered for each
    of them, so the time grows with their square. `TimeoutError` is raised when it is
    over, `MemoryError` when the memory for so many characters in all is. Both on the main
    thread only: signals arrive there, and two threads could not restore a process's one
    limit in order.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda messages: None
        return

    def stop(*_: object) -> None:
        raise TimeoutError(
            "rendering the chat template timed out after a thousand times the usual time: "
            "give the tokenizer another template"
        )

    before = signal.signal(signal.SIGVTALRM, stop)
    start = functools.partial(signal.setitimer, signal.ITIMER_VIRTUAL)
    try:
        with _limited_memory(_MOST_BYTES + _BYTES_A_CHARACTER * characters):
            yield lambda count: start(_MOST_SECONDS * (1 + (count / _MESSAGES) ** 2))
    finally:
        start(0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _limited_memory(more: int) -> Iterator[None]:
    """Limit the memory that the block may add, in bytes; on Linux only."""
    if not sys.platform.startswith("linux"):
        yield
        return
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + more
    if before != resource.RLIM_INFINITY:
        most = min(most, before)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def _refuse_bombs(template: str) -> None:
    """Raise `ValueError` for arithmetic by which some characters become gigabytes.

    It is one call into C, which no time limit interrupts. What this overlooks ends at the
    memory limit.
    """
    import jinja2
    from jinja2 import nodes

    grammar = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = grammar.parse(_ANSWERS.sub("", template))
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
