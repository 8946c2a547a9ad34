"""Chat with a model: answers appear as they are generated, and turns are kept."""

import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Generator, Mapping
from functools import partial
from typing import Any

from ..data.chat_template import ChatEncoder
from ..data.conversations import Message, read_chat
from ..data.tokenizer import read_tokenizer
from ..model.generation import Sampling, check_tokenizer, stream_ids
from ..model.loading import load
from ..session import current_session, running_kernel
from .chat_panel import Panel, Transcript

_ASKED: Message = {"role": "user", "content": "?"}
_ROUNDS = 4  # of tools' calls, before the answer is the last
_THOUGHT = re.compile(r"\s*<think>(.*?)(?:</think>\s*|\Z)", re.DOTALL)
_CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>\s*", re.DOTALL)
# What is shown only when more has come: white space, calls, and what may become a tag.
_UNSETTLED = re.compile(r"\s*(<tool_call>.*|<[/a-z_]*)?\Z", re.DOTALL)


class Answer(str):
    """An answer, which a cell has shown already, and does not as its value."""

    def _ipython_display_(self) -> None:
        pass


class Chat:
    """A conversation with a model that streams its answers; `chat` makes one.

    `history` holds the messages: {"role", "content"}, an answer's thought as
    "reasoning_content", its calls as "tool_calls", and their results in the role "tool".
    `settings` are those of `generate`, by default with 256 new tokens; a `seed` is
    raised by one for each answer. An interrupt ends the answer, not the chat. A prompt
    that outgrows the model's positions leaves out the oldest turns, with a warning.

    Functions among `tools` are run when the model calls them, four times before it must
    answer; their results, or errors, go back to it as JSON. Other calls are shown only.
    """

    def __init__(
        self, model: Any, tokenizer: Any, system: str | None = None, **settings: Any
    ) -> None:
        check_tokenizer(model, tokenizer)
        defaults = {"max_new_tokens": 256, "temperature": Sampling.temperature}
        self.settings: dict[str, Any] = {**defaults, **settings}
        self._sampling = Sampling(**self.settings)  # raises for an invalid setting
        self._model, self._tokenizer, self._system = model, tokenizer, system
        encoder = ChatEncoder(read_tokenizer(tokenizer))
        self._ends = {tokenizer.eos_token_id, encoder.end_id}
        tools: Any = filter(callable, self._sampling.tools)
        self._functions = {tool.__name__: tool for tool in tools}
        options = {"tools": self._sampling.tools, "thinking": self._sampling.thinking}
        self._encode = partial(encoder.prompt, **options)
        self._encode([_ASKED])  # raises for a poor template
        self.clear()

    def clear(self) -> None:
        """Forget all turns but the system turn."""
        system: Message = {"role": "system", "content": self._system}
        self.history: list[Message] = [] if self._system is None else [system]

    def say(self, text: str) -> Answer:
        """Show the answer as it is generated, and return it.

        In a terminal, thoughts, calls of tools and their results are behind bars. Raises
        `ValueError` if `text` is empty, too long or not a string.
        """
        view, pieces = Transcript(), self.take(text)
        turn: list[Message] = [{"role": "assistant", "content": ""}]
        try:
            for turn in pieces:
                view.show(turn)
        except KeyboardInterrupt:
            pieces.close()
        view.show(turn, live=False)
        return Answer(turn[-1]["content"])

    def take(self, text: str) -> Generator[list[Message]]:
        """Answer, and yield the turn, one list that grows, with each piece.

        When this is closed or interrupted, what was said is kept.
        """
        turn: list[Message] = [{"role": "user", "content": text}]
        read_chat([*self.history, *turn])  # raises for a poor message
        try:
            yield from self._answer(turn)
            for _ in range(_ROUNDS):
                calls = turn[-1].get("tool_calls", [])
                if not calls or {one["name"] for one in calls} - self._functions.keys():
                    break
                turn += [{"role": "tool", "content": self._run(**one)} for one in calls]
                yield from self._answer(turn)
        finally:
            said = turn[-1]["content"].strip() or "tool_calls" in turn[-1]
            if said and turn[-1]["role"] == "assistant":
                self.history += turn  # an empty answer would be invalid

    def _answer(self, turn: list[Message]) -> Generator[list[Message]]:
        """Add an answer to a turn, and replace it as it grows."""
        ids = self._fit([*self.history, *turn])
        turn.append({"role": "assistant", "content": ""})
        thinks = str(self._tokenizer.decode(ids)).rstrip().endswith("<think>")
        text, complete = "<think>" * thinks, False
        settings = {**self.settings, "ends": self._ends}
        if settings.get("seed") is not None:
            self.settings["seed"] += 1
        try:
            yield turn
            for piece in stream_ids(self._model, self._tokenizer, ids, **settings):
                text += piece
                turn[-1] = self._read(_UNSETTLED.sub("", text))
                yield turn
            complete = True
        except KeyboardInterrupt:
            pass
        finally:
            turn[-1] = self._read(text, complete)
        yield turn

    def _read(self, text: str, complete: bool = False) -> Message:
        """Return the text of an answer as a message; only a complete one calls tools."""
        found = _THOUGHT.match(text)
        thought, said = (found[1].strip(), text[found.end() :]) if found else ("", text)
        message: Message = {"role": "assistant", "content": said}
        if thought:
            message["reasoning_content"] = thought
        if self._sampling.tools and complete and (calls := _CALL.findall(said)):
            # Text that is not the JSON of calls stays text.
            with contextlib.suppress(ValueError, TypeError, KeyError):
                read = [json.loads(call) for call in calls]
                read = [
                    {key: one[key] for key in ("name", "arguments")} for one in read
                ]
                called = message | {"content": _CALL.sub("", said), "tool_calls": read}
                message = read_chat([_ASKED, called])[0].messages[1]
        return message

    def _run(self, name: str, arguments: dict[str, Any]) -> str:
        """Return what a call gives, or how it fails, as JSON."""
        try:
            result = self._functions[name](**arguments)
            return json.dumps(result, ensure_ascii=False, default=str)
        except Exception as error:  # whatever it raises
            return json.dumps({"error": repr(error)}, ensure_ascii=False)

    def _fit(self, messages: list[Message]) -> list[int]:
        """Return the prompt's ids, without the oldest turns if there is no room."""
        positions = self._model.config.max_position_embeddings
        room, ids = positions - self.settings["max_new_tokens"], []
        turns = [n for n, one in enumerate(messages) if one["role"] == "user"]
        for turn in turns:
            ids = self._encode([*messages[: turns[0]], *messages[turn:]])
            if len(ids) <= room:
                if turn > turns[0]:
                    dropped = "older turns are left out: the chat outgrew the model"
                    warnings.warn(dropped, stacklevel=2)
                return ids.tolist()
        raise ValueError(
            f"this message makes a prompt of {len(ids)} tokens, and beside max_new_tokens "
            f"the model has room for {room}: say less, or chat with fewer max_new_tokens"
        )

    def converse(self) -> None:
        """Ask in the terminal and answer, until an empty line, Ctrl-D or Ctrl-C."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lets input() edit a line
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while text := input("> ").strip():
                try:
                    self.say(text)
                except ValueError as error:
                    print(error)
        print()

    def __repr__(self) -> str:
        return f"Chat of {len(self.history)} messages"

    def _ipython_display_(self) -> None:
        """Show nothing as the value of a cell, which has the bubbles already."""


def chat(
    source: str | os.PathLike[str] | tuple[Any, Any],
    text: str | None = None,
    *,
    system: str | None = None,
    which: str = "last",
    tokenizer: Any = None,
    rope_scaling: float | Mapping[str, Any] | None = None,
    **settings: Any,
) -> Chat:
    """Chat with a model: `chat = mm.chat(run, "你好")`, then `chat.say("…")`.

    `source` is a pair of a model and its tokenizer, or with `which`, `tokenizer` and
    `rope_scaling` that of `load`; `system` is a system turn; `settings` those of `Chat`.
    Without a `text`, a terminal reads line by line and a cell shows a widget. Raises
    what `load` and `Chat` raise, and `ValueError` if nobody can write a `text`.
    """
    if not isinstance(source, tuple):
        source = load(source, which, tokenizer, rope_scaling)
    elif tokenizer is not None or rope_scaling is not None:
        raise ValueError(
            "pass tokenizer and rope_scaling to mm.load, which made the pair"
        )
    kernel = running_kernel()
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if text is None and (current_session().batch or not (kernel or terminal)):
        raise ValueError(
            "nobody can write here, in a batch run or without a terminal: pass the text, "
            'mm.chat(…, "…")'
        )
    talk = Chat(*source, system, **settings)
    if text is not None:
        talk.say(text)
    elif kernel is None:
        talk.converse()
    else:
        Panel(talk)
    return talk
