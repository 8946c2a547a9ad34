"""Chat with a model: answers appear as they are generated, and turns are kept."""

import bisect
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ..data.chat_template import ChatEncoder
from ..data.conversations import Message, read_chat
from ..data.tokenizer import load_tokenizer, read_tokenizer
from ..model.generation import Sampling, check_tokenizer, stream_ids
from ..model.loading import load
from ..session import current_session, running_kernel

_THOUGHT = re.compile(r"\s*<think>(.*?)(?:</think>\s*|\Z)", re.DOTALL)
_CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>\s*", re.DOTALL)
# What is shown only when more has come: white space, and what may become a tag.
_UNSETTLED = re.compile(r"\s*(<[/a-z]*)?\Z")


class Answer(str):
    """An answer, already printed: a cell does not show it again as its value.

    `thought` is what the model thought before it, and `calls` are the calls of its turn,
    each {"name", "arguments"}.
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
    `settings` are those of `generate`, by default with 256 new tokens; a `seed` is raised
    by one for each answer, so a question asked twice has two answers. An interrupt ends
    the answer, not the chat. A prompt that outgrows the model's positions leaves out the
    oldest turns.

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
        self._settings = {"max_new_tokens": 256, **settings}
        self._sampling = Sampling(**self._settings)  # raises for an invalid setting
        self._model, self._tokenizer = model, tokenizer
        self._encoder = ChatEncoder(read_tokenizer(tokenizer))
        self._ends = {tokenizer.eos_token_id, self._encoder.end_id}
        self._tools: Any = {_name(tool): tool for tool in self._sampling.tools}
        self._encode([{"role": "user", "content": "?"}])  # raises for a poor template
        self._system, self._max_rounds = system, max_rounds
        self.clear()

    def clear(self) -> None:
        """Forget all turns but the system turn."""
        self.history: list[Message] = []
        if self._system is not None:
            self.history.append({"role": "system", "content": self._system})
        self._shortened = False

    def say(self, text: str) -> Answer:
        """Print the answer as it is generated, and return it.

        Thoughts are printed behind bars, results of tools in brackets. Raises
        `ValueError` if `text` is empty, too long or not a string.
        """
        messages = [*self.history, {"role": "user", "content": text}]
        try:
            read_chat(messages)
        except ValueError as reason:
            raise ValueError(f"invalid message: {reason}") from None
        messages.append(self._answer(messages))
        for _ in range(self._max_rounds):
            if not (results := self._run_calls(messages[-1])):
                break
            messages += results
            messages.append(self._answer(messages))
        message, turn = messages[-1], messages[len(self.history) :]
        if message["content"].strip() or "tool_calls" in message:
            self.history = messages  # an empty turn is invalid in the next prompt
        answer = Answer(message["content"])
        answer.thought = message.get("reasoning_content", "")
        answer.calls = [call for one in turn for call in one.get("tool_calls", [])]
        return answer

    def _answer(self, messages: list[Message]) -> Message:
        """Print an answer as it is generated; return it as a message."""
        ids, left_out = self._fit(messages)
        if left_out and not self._shortened:
            self._shortened = True
            print("[The chat outgrew the model: its oldest turns are left out.]")
        settings = {**self._settings, "ends": self._ends}
        if settings.get("seed") is not None:
            settings["seed"] += sum(one["role"] == "assistant" for one in messages)
        opened = str(self._tokenizer.decode(ids)).rstrip().endswith("<think>")
        text, shown, complete = "<think>" * opened, 0, False
        pieces = stream_ids(self._model, self._tokenizer, ids, **settings)
        with contextlib.suppress(KeyboardInterrupt):
            for piece in pieces:
                text += piece
                view = _view(_UNSETTLED.sub("", text))
                print(view[shown:], end="", flush=True)
                shown = len(view)
            complete = True
        print(_view(text)[shown:])
        thought, said = _split(text)
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
        results = [self._run(call) for call in calls]
        print("".join(f"[{result}]\n" for result in results), end="")
        return [{"role": "tool", "content": result} for result in results]

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

    def _fit(self, messages: list[Message]) -> tuple[list[int], int]:
        """Return the prompt's ids, and the number of turns that it leaves out."""
        positions = self._model.config.max_position_embeddings
        room = positions - self._settings["max_new_tokens"]
        turns = [n for n, one in enumerate(messages) if one["role"] == "user"]

        def encode(turn: int) -> list[int]:
            return self._encode([*messages[: turns[0]], *messages[turn:]])

        first = bisect.bisect_left(turns, True, key=lambda n: len(encode(n)) <= room)
        if first == len(turns):
            raise ValueError(
                f"this message makes a prompt of {len(encode(turns[-1]))} tokens; the "
                f"model's {positions} positions less max_new_tokens leave room for "
                f"{room}: say less, or chat with fewer max_new_tokens"
            )
        return encode(turns[first]), first

    def converse(self) -> None:
        """Ask in the terminal and answer, until an empty line, Ctrl-D or Ctrl-C."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lets input() edit a line
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while text := input("> ").strip():
                self._try(text)
        print()

    def panel(self) -> Any:
        """Return the chat as a widget: transcript, a line to write in, a button."""
        import ipywidgets as widgets

        transcript = widgets.Output()
        line = widgets.Text(placeholder="Say something", layout={"width": "80%"})
        button = widgets.Button(description="Send")

        def send() -> None:
            text, line.value = line.value.strip(), ""
            if text:
                with transcript:
                    print(f"> {text}")
                    self._try(text)

        def receive(_: object, content: dict[str, Any], __: object) -> None:
            if content.get("event") == "submit":  # the key Enter
                send()

        button.on_click(lambda _: send())
        line.on_msg(receive)
        return widgets.VBox([transcript, widgets.HBox([line, button])])

    def _try(self, text: str) -> None:
        try:
            self.say(text)
        except ValueError as error:
            print(error)

    def __repr__(self) -> str:
        return f"Chat of {len(self.history)} messages"


def _split(text: str) -> tuple[str, str]:
    """Return the thought and the rest of an answer, also of one that is not complete."""
    found = _THOUGHT.match(text)
    return (found[1].strip(), text[found.end() :]) if found else ("", text)


def _view(text: str) -> str:
    """Return an answer as it is printed, with a bar before each line of its thought."""
    thought, said = _split(text)
    lines = [f"| {line}" for line in thought.splitlines()]
    return "\n".join([*lines, *([said] if said else [])])


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
        from IPython.display import display

        display(talk.panel())
    return talk


def _is_interactive(kernel: Any) -> bool:
    session = current_session()
    if session.batch or kernel is None:
        return not session.batch and sys.stdin is not None and sys.stdin.isatty()
    # A program that executes whole notebooks does not answer `input()`; hosted front
    # ends have their own ways for that.
    request = kernel.get_parent().get("content", {})
    return session.kind != "plain" or request.get("allow_stdin", True)
