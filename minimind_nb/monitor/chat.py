"""Chat with a model: answers appear as they are generated, and turns are kept."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Generator, Mapping
from typing import Any

from ..data.chat_template import ChatEncoder
from ..data.conversations import Message, read_chat
from ..data.tokenizer import load_tokenizer, read_tokenizer
from ..model.generation import Sampling, check_tokenizer, stream_ids
from ..model.loading import load
from ..session import current_session, running_kernel
from .chat_panel import Panel, View, as_html

_THOUGHT = re.compile(r"\s*<think>(.*?)(?:</think>\s*|\Z)", re.DOTALL)
_CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>\s*", re.DOTALL)
# What is shown only when more has come: white space, calls, and what may become a tag.
_UNSETTLED = re.compile(r"\s*(<tool_call>.*|<[/a-z_]*)?\Z", re.DOTALL)


class Answer(str):
    """An answer with the `thought` before it, and the `calls` of its turn, each
    {"name", "arguments"}. A cell has shown it already, and does not as its value.
    """

    thought: str
    calls: list[dict[str, Any]]

    def _ipython_display_(self) -> None:
        pass


class Chat:
    """A conversation with a model that streams its answers; `chat` makes one.

    `say` adds a turn; `history` holds the messages of the system turn, if any, and the
    answered turns: {"role", "content"}, an answer's thought as "reasoning_content", its
    calls as "tool_calls", and their results in the role "tool". `clear` forgets these.
    A cell that ends with a chat shows it. `settings` are those of `generate`, by default
    with 256 new tokens; a `seed` is raised by one for each answer, so a question asked
    twice has two answers. An interrupt ends the answer, not the chat. A prompt that
    outgrows the model's positions leaves out the oldest turns.

    Functions among `tools` are run when the model calls them, at most `max_rounds` times
    before it must answer; their results, or errors, go back to it as JSON. Calls of a
    tool that is only a schema are shown and returned.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        system: str | None = None,
        *,
        max_rounds: int = 4,
        **settings: Any,
    ) -> None:
        check_tokenizer(model, tokenizer)
        defaults = {"max_new_tokens": 256, "temperature": Sampling.temperature}
        self.settings: dict[str, Any] = {**defaults, **settings}
        self._sampling = Sampling(**self.settings)  # raises for an invalid setting
        self._model, self._tokenizer = model, tokenizer
        if not (spec := read_tokenizer(tokenizer)).chat_template:
            raise ValueError(
                "this model continues texts but does not chat, since its tokenizer has no "
                'chat template: mm.generate(model, tokenizer, "Once upon a time")'
            )
        self._encoder = ChatEncoder(spec)
        self._ends = {tokenizer.eos_token_id, self._encoder.end_id}
        self._tools: Any = {_name(tool): tool for tool in self._sampling.tools}
        self._encode([{"role": "user", "content": "?"}])  # raises for a poor template
        self._system, self._max_rounds = system, max_rounds
        self._running: Any = (None for _ in ())  # the answer that is being generated
        self._shown_by = 0  # the number of the cell that has shown all of it
        self.clear()

    def clear(self) -> None:
        """Forget all turns but the system turn."""
        self.stop()
        self.history: list[Message] = []
        if self._system is not None:
            self.history.append({"role": "system", "content": self._system})
        self._answers, self._shortened = 0, False

    def say(self, text: str) -> Answer:
        """Show the answer as it is generated, and return it.

        In a terminal, thoughts, calls of tools and their results are behind bars. Raises
        `ValueError` if `text` is empty, too long or not a string.
        """
        view = View()
        turn: list[Message] = [{"role": "user", "content": text}]
        try:
            for _ in self.take(turn):
                view.show(turn)
        except KeyboardInterrupt:
            self.stop()
        view.show(turn, live=False)
        message = turn[-1]
        answer = Answer(message["content"])
        answer.thought = message.get("reasoning_content", "")
        answer.calls = [call for one in turn for call in one.get("tool_calls", [])]
        return answer

    def take(self, turn: list[Message]) -> Generator[None]:
        """Answer the user's message in `turn`, which grows, and yield after each piece.

        A chat answers one at a time: an answer that is still being generated ends.
        """
        self.stop()
        self._running = self._take(turn)
        return self._running

    def stop(self) -> None:
        """End the answer that is being generated, and keep what was said."""
        if self._running.gi_running:  # a handler of signals calls this
            raise KeyboardInterrupt
        with contextlib.suppress(KeyboardInterrupt, StopIteration):
            self._running.throw(KeyboardInterrupt)

    def _take(self, turn: list[Message]) -> Generator[None]:
        read_chat([*self.history, *turn])  # raises for a poor message
        yield from self._answer(turn)
        for _ in range(self._max_rounds):
            if not (results := self._run_calls(turn[-1])):
                break
            turn += results
            yield from self._answer(turn)
        if turn[-1]["content"].strip() or "tool_calls" in turn[-1]:
            self.history = [*self.history, *turn]  # an empty one would be invalid

    def _answer(self, turn: list[Message]) -> Generator[None]:
        """Add an answer to a turn, and replace it as it grows."""
        turn.append({"role": "assistant", "content": ""})
        ids, shortened = self._fit([*self.history, *turn[:-1]])
        if shortened and not self._shortened:
            turn[-2]["note"] = "Older turns are left out: the chat outgrew the model."
            self._shortened = True
        settings = {**self.settings, "ends": self._ends}
        if settings.get("seed") is not None:
            settings["seed"] += self._answers
        self._answers += 1
        thinks = str(self._tokenizer.decode(ids)).rstrip().endswith("<think>")
        text = "<think>" * thinks
        try:
            yield
            for piece in stream_ids(self._model, self._tokenizer, ids, **settings):
                text += piece
                turn[-1] = self._read(_UNSETTLED.sub("", text))
                yield
            turn[-1] = self._read(text, complete=True)
            yield
        except KeyboardInterrupt:
            turn[-1] = self._read(text)

    def _read(self, text: str, complete: bool = False) -> Message:
        """Return the text of an answer as a message; only a complete one calls tools."""
        found = _THOUGHT.match(text)
        thought, said = (found[1].strip(), text[found.end() :]) if found else ("", text)
        message: Message = {"role": "assistant", "content": said}
        if thought:
            message["reasoning_content"] = thought
        calls = [_read_call(found) for found in _CALL.findall(said)]
        if self._tools and calls and all(calls) and complete:
            message |= {"content": _CALL.sub("", said), "tool_calls": calls}
        return message

    def _run_calls(self, message: Message) -> list[Message]:
        """Return the results of an answer's calls, or nothing if the caller has to."""
        calls = message.get("tool_calls", [])
        if any(isinstance(self._tools.get(call["name"]), dict) for call in calls):
            return []
        return [{"role": "tool", "content": self._run(call)} for call in calls]

    def _run(self, call: dict[str, Any]) -> str:
        """Return what a call gives, or how it fails, as JSON."""
        try:
            result = self._tools[call["name"]](**call["arguments"])
            return json.dumps(result, ensure_ascii=False, default=str)
        except (Exception, KeyboardInterrupt) as error:  # whatever it raises
            return json.dumps({"error": repr(error)}, ensure_ascii=False)

    def _encode(self, messages: list[Message]) -> list[int]:
        tools, thinking = self._sampling.tools, self._sampling.thinking
        return self._encoder.prompt(messages, tools, thinking).tolist()

    def _fit(self, messages: list[Message]) -> tuple[list[int], bool]:
        """Return the prompt's ids, and whether it leaves out turns to have room."""
        room = self._model.config.max_position_embeddings
        room, ids = room - self.settings["max_new_tokens"], []
        turns = [n for n, one in enumerate(messages) if one["role"] == "user"]
        for turn in turns:
            ids = self._encode([*messages[: turns[0]], *messages[turn:]])
            if len(ids) <= room:
                return ids, turn > turns[0]
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

    def _repr_html_(self) -> str | None:
        cell = getattr(running_kernel(), "execution_count", None)
        return None if cell == self._shown_by else as_html(self.history)

    def __repr__(self) -> str:
        return f"Chat of {len(self.history)} messages"


def _name(tool: Callable[..., Any] | dict[str, Any]) -> str:
    return (
        tool.get("function", tool)["name"] if isinstance(tool, dict) else tool.__name__
    )


def _read_call(text: str) -> dict[str, Any] | None:
    """Return a call, or None for a text that is not the JSON of one."""
    with contextlib.suppress(ValueError, RecursionError):
        match json.loads(text):
            case {"name": str(), "arguments": dict(), **rest} as call if not rest:
                return call
    return None


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

    `source`, `which`, `tokenizer` and `rope_scaling` are those of `load`, or `source` is
    a pair of a model and its tokenizer; `system` is a system turn; `settings` those of `Chat`.
    Without a `text`, a terminal reads line by line and a cell shows a widget. Raises
    what `load` and `Chat` raise, and `ValueError` if nobody can write a `text`.
    """
    if isinstance(source, tuple):
        if rope_scaling is not None:
            raise ValueError("pass rope_scaling to mm.load, which made this model")
        model, own = source
        tokenizer = own if tokenizer is None else load_tokenizer(tokenizer)
    else:
        model, tokenizer = load(source, which, tokenizer, rope_scaling)
    kernel = running_kernel()
    if text is None and not _is_interactive(kernel):
        raise ValueError(
            "nobody can write here, in a batch run or without a terminal: pass the text, "
            'mm.chat(…, "…")'
        )
    talk = Chat(model, tokenizer, system, **settings)
    if text is not None:
        talk.say(text)
    elif kernel is None:
        talk.converse()
    else:
        Panel(talk)
    talk._shown_by = getattr(kernel, "execution_count", 0)
    return talk


def _is_interactive(kernel: Any) -> bool:
    session = current_session()
    if session.batch or kernel is None:
        return not session.batch and sys.stdin is not None and sys.stdin.isatty()
    # A program that executes whole notebooks does not answer `input()`; hosted front
    # ends have their own ways for that.
    request = kernel.get_parent().get("content", {})
    return session.kind != "plain" or request.get("allow_stdin", True)
