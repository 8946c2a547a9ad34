"""Chat with a model: answers appear as they are generated, and turns are kept."""

from __future__ import annotations

import bisect
import contextlib
import os
import sys
from typing import Any

from ..data.chat_template import ChatEncoder
from ..data.conversations import Message, read_chat
from ..data.tokenizer import load_tokenizer, read_tokenizer
from ..model.generation import Sampling, check_tokenizer, stream_ids
from ..model.loading import load
from ..session import current_session, running_kernel


class Answer(str):
    """An answer, already printed: a cell does not show it again as its value."""

    def _ipython_display_(self) -> None:
        pass


class Chat:
    """A conversation with a model that streams its answers; `chat` makes one.

    `say` adds a turn; `history` holds the messages ({"role", "content"}) of the system
    turn, if any, and the answered turns; `clear` forgets these. `settings` are those of
    `generate`, by default with 256 new tokens; a `seed` is raised by one for each turn,
    so a question asked twice has two answers. An interrupt ends the answer, not the
    chat. A prompt that outgrows the model's positions leaves out the oldest turns.
    """

    def __init__(
        self, model: Any, tokenizer: Any, system: str | None = None, **settings: Any
    ) -> None:
        check_tokenizer(model, tokenizer)
        self._settings = {"max_new_tokens": 256, **settings}
        Sampling(**self._settings)  # raises for an invalid setting
        self._model, self._tokenizer = model, tokenizer
        self._encoder = ChatEncoder(read_tokenizer(tokenizer))
        self._system = system
        self.clear()

    def clear(self) -> None:
        """Forget all turns but the system turn."""
        self.history: list[Message] = []
        if self._system is not None:
            self.history.append({"role": "system", "content": self._system})
        self._shortened = False

    def say(self, text: str) -> str:
        """Print the answer as it is generated, and return it.

        Raises `ValueError` if `text` is empty, too long or not a string.
        """
        messages = [*self.history, {"role": "user", "content": text}]
        try:
            read_chat(messages)
        except ValueError as reason:
            raise ValueError(f"invalid message: {reason}") from None
        ids, left_out = self._fit(messages)
        if left_out and not self._shortened:
            self._shortened = True
            print("[The chat outgrew the model: its oldest turns are left out.]")
        settings = dict(self._settings)
        if settings.get("seed") is not None:
            settings["seed"] += len(self.history) // 2
        answer = ""
        with contextlib.suppress(KeyboardInterrupt):
            for piece in stream_ids(self._model, self._tokenizer, ids, **settings):
                answer += piece
                print(piece, end="", flush=True)
        print()
        if answer.strip():  # an empty turn is invalid in the next prompt
            self.history = [*messages, {"role": "assistant", "content": answer}]
        return Answer(answer)

    def _fit(self, messages: list[Message]) -> tuple[list[int], int]:
        """Return the prompt's ids, and the number of turns that it leaves out."""
        positions = self._model.config.max_position_embeddings
        room = positions - self._settings["max_new_tokens"]
        turns = [n for n, one in enumerate(messages) if one["role"] == "user"]

        def encode(turn: int) -> list[int]:
            kept = [*messages[: turns[0]], *messages[turn:]]
            return self._encoder.prompt(kept).tolist()

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


def chat(
    source: str | os.PathLike[str] | tuple[Any, Any],
    text: str | None = None,
    *,
    system: str | None = None,
    which: str = "last",
    tokenizer: Any = None,
    **settings: Any,
) -> Chat:
    """Chat with a model: `chat = mm.chat(run, "你好")`, then `chat.say("…")`.

    `source`, `which` and `tokenizer` are those of `load`, or `source` is a pair of a
    model and its tokenizer; `system` is a system turn; `settings` those of `generate`.
    Without a `text`, a terminal reads line by line and a cell shows a widget. Raises
    what `load` and `Chat` raise, and `ValueError` if nobody can write a `text`.
    """
    if isinstance(source, tuple):
        model, own = source
        tokenizer = own if tokenizer is None else load_tokenizer(tokenizer)
    else:
        model, tokenizer = load(source, which, tokenizer)
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
