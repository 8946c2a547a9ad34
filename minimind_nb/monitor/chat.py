"""Talking to a model: answers that appear as they are written, and a history."""

import bisect
import contextlib
import html
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from ..data.conversations import ChatEncoder, Message, check_messages
from ..data.tokenizer import load_tokenizer, read_tokenizer
from ..model.decoding import Sampling
from ..model.generation import check_tokenizer, stream_ids
from ..model.loading import load
from ..session import current_session, running_kernel

UPDATE_SECONDS = 0.25  # between two states of an answer in a notebook


class Answer(str):
    """An answer; as the value of a cell, which has shown it, it is not shown again."""

    def _ipython_display_(self) -> None:
        pass


class Chat:
    """A conversation with a model, which streams its answers; `chat` makes one.

    `say` goes on; `history` holds the messages ({"role", "content"}) of the turns that
    were answered, after the system turn where there is one; `clear` begins anew;
    `converse` reads from the terminal; `panel` is a widget. `settings` are those of
    `generate`, with 256 new tokens at most; with a `seed` the n-th answer since the
    beginning is drawn from `seed` + n, the first being the one that `generate` gives. An
    interrupt ends the answer, not the chat, and what was said until then stays.

    Where the history outgrows the model's positions, the oldest turns (but the
    system's) are left out of the prompt, which is said once; `history` keeps them.
    """

    def __init__(
        self, model: Any, tokenizer: Any, system: str | None = None, **settings: Any
    ) -> None:
        check_tokenizer(model, tokenizer)
        self._settings = {"max_new_tokens": 256, **settings}
        self._sampling = Sampling(**self._settings)
        self._model, self._tokenizer = model, tokenizer
        self._encoder = ChatEncoder(read_tokenizer(tokenizer))
        first: Message = {"role": "system", "content": system or ""}
        self._beginning = [] if system is None else [first]
        self.clear()

    def clear(self) -> None:
        """Forget what was said, but for the system turn."""
        self.history: list[Message] = [*self._beginning]
        self._told = False

    def say(self, text: str) -> str:
        """Say something; the answer is shown as it comes, and returned.

        A cell shows it as one output, a terminal prints it. Raises `TypeError` for what
        is not a string, `ValueError` for an empty or too long one.
        """
        return self._answer(text, _Cell() if running_kernel() else _Terminal())

    def _answer(self, text: str, view: "_View") -> Answer:
        """`say`, shown in a view."""
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is a {type(text).__name__}: say a string")
        asked = [*self.history, {"role": "user", "content": text}]
        if reason := check_messages(asked):
            raise ValueError(f"this cannot be said: {reason}")
        ids, left_out = self._fit(asked)
        if left_out and not self._told:
            self._told = True
            view.note("The chat outgrew the model: its oldest turns are left out.")
        seed = self._sampling.seed
        if seed is not None:
            seed += sum(one["role"] == "assistant" for one in self.history)
        settings = {**self._settings, "seed": seed}
        said = view.follow(stream_ids(self._model, self._tokenizer, ids, **settings))
        if said.strip():  # an empty turn could not be told in the next prompt
            self.history = [*asked, {"role": "assistant", "content": said}]
        return Answer(said)

    def _fit(self, messages: list[Message]) -> tuple[list[int], int]:
        """The prompt's ids, and how many of the user's turns it leaves out."""
        positions = self._model.config.max_position_embeddings
        room = positions - self._sampling.max_new_tokens
        turns = [n for n, one in enumerate(messages) if one["role"] == "user"]

        def encode(turn: int) -> list[int]:
            kept = [*messages[: turns[0]], *messages[turn:]]
            return self._encoder.prompt(kept).tolist()

        first = bisect.bisect_left(turns, True, key=lambda n: len(encode(n)) <= room)
        if first == len(turns):
            raise ValueError(
                f"this message makes a prompt of {len(encode(turns[-1]))} tokens; with "
                f"max_new_tokens={positions - room} the model's {positions} positions "
                f"leave room for {room}: say less, or chat with fewer max_new_tokens"
            )
        return encode(turns[first]), first

    def converse(self) -> None:
        """Ask in the terminal and answer, until an empty line, Ctrl-D or Ctrl-C."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lets input() edit a line
        while True:
            try:
                text = input("> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if not text.strip():
                return
            try:
                self.say(text)
            except ValueError as error:
                print(error)

    def panel(self) -> Any:
        """The chat as a widget: what was said, a line to write in, a button."""
        return _Panel(self).box

    def __repr__(self) -> str:
        return f"Chat of {len(self.history)} messages"


def chat(
    source: "str | os.PathLike[str] | tuple[Any, Any]",
    text: str | None = None,
    *,
    system: str | None = None,
    which: str = "last",
    tokenizer: Any = None,
    **settings: Any,
) -> Chat:
    """Talk to a model: `chat = mm.chat(run, "你好")`, then `chat.say("…")`.

    `source`, `which` and `tokenizer` are those of `load`, or `source` is a pair of a
    model and its tokenizer; `system` is a system turn; `settings` those of `generate`
    (max_new_tokens, 256 here, temperature, top_p, top_k, repetition_penalty, seed).
    Without a `text` you write yourself: in a terminal line by line, in a cell in a
    widget.

    Raises what `load` and `Chat` raise, and `ValueError` without a `text` where nobody
    can write: in a batch run (papermill, nbconvert, a Kaggle commit), without terminal.
    """
    kernel = running_kernel()
    if text is None and not _attended(kernel):
        raise ValueError(
            "nobody can write here, in a batch run or without a terminal: give what is "
            'to be said, mm.chat(…, "…")'
        )
    if isinstance(source, tuple):
        model, own = source
        tokenizer = own if tokenizer is None else load_tokenizer(tokenizer)
    else:
        model, tokenizer = load(source, which, tokenizer)
    talk = Chat(model, tokenizer, system, **settings)
    if text is not None:
        talk.say(text)
    elif kernel is None:
        talk.converse()
    else:
        from IPython.display import display

        display(talk.panel())
    return talk


def _attended(kernel: Any) -> bool:
    """Whether somebody is there who can write.

    What executes whole notebooks tells the kernel that it cannot answer `input()`;
    hosted front ends have ways of their own for that.
    """
    session = current_session()
    if kernel is None or session.batch:
        return not session.batch and sys.stdin is not None and sys.stdin.isatty()
    request = kernel.get_parent().get("content", {})
    return session.kind != "plain" or request.get("allow_stdin", True)


class _View:
    """Shows an answer in a notebook, where `draw` gets it as far as it is known."""

    seconds = UPDATE_SECONDS

    def __init__(self) -> None:
        self.notes = ""

    def draw(self, text: str) -> None:
        raise NotImplementedError

    def note(self, text: str) -> None:
        self.notes = text

    def follow(self, pieces: Iterator[str]) -> str:
        """What came until the end or an interrupt; drawn on the way and once more."""
        text, due = "", 0.0
        with contextlib.suppress(KeyboardInterrupt):
            for piece in pieces:
                text += piece
                if time.monotonic() >= due:
                    self.draw(text)
                    due = time.monotonic() + self.seconds
        self.draw(text)
        return text


class _Terminal(_View):
    seconds = 0.0

    def __init__(self) -> None:
        super().__init__()
        self._printed = 0

    def draw(self, text: str) -> None:
        print(text[self._printed :], end="", flush=True)
        self._printed = len(text)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def follow(self, pieces: Iterator[str]) -> str:
        text = super().follow(pieces)
        print()
        return text


class _Cell(_View):
    """One output, updated in place, so that it works without widgets."""

    def __init__(self) -> None:
        super().__init__()
        self._display: Any = None

    def draw(self, text: str) -> None:
        from IPython.display import display

        words = "\n\n".join(filter(None, [self.notes, text]))
        page = f"{_small(self.notes)}{_paragraph(text)}"
        bundle = {"text/plain": words, "text/html": page}
        if self._display is None:
            self._display = display(bundle, raw=True, display_id=True)
        else:
            self._display.update(bundle, raw=True)


class _Panel(_View):
    """A widget: the transcript, a line to write in, a button."""

    def __init__(self, talk: Chat) -> None:
        import ipywidgets as widgets

        super().__init__()
        self._chat, self._asked = talk, ""
        self.transcript = widgets.HTML()
        self.line = widgets.Text(placeholder="Say something", layout={"width": "80%"})
        self.button = widgets.Button(description="Send")
        self.button.on_click(lambda _: self._send())
        self.line.on_msg(self._receive)
        writing = widgets.HBox([self.line, self.button])
        self.box = widgets.VBox([self.transcript, writing])
        self.draw("")

    def draw(self, text: str) -> None:
        messages = [*self._chat.history]
        if self._asked:
            messages += [{"role": "user", "content": self._asked}]
            messages += [{"role": "assistant", "content": text}]
        turns = (_small(m["role"]) + _paragraph(m["content"]) for m in messages)
        self.transcript.value = "".join([*turns, _small(self.notes)])

    def _receive(self, _: object, content: dict[str, Any], __: object) -> None:
        if content.get("event") == "submit":  # the key Enter
            self._send()

    def _send(self) -> None:
        self._asked, self.line.value, self.notes = self.line.value, "", ""
        if not self._asked.strip():
            return
        try:
            self._chat._answer(self._asked, self)
        except ValueError as error:
            self.note(str(error))
        self._asked = ""
        self.draw("")


def _paragraph(text: str) -> str:
    return f'<div style="white-space:pre-wrap">{html.escape(text)}</div>'


def _small(text: str) -> str:
    style = "opacity:.65;font-size:85%"
    return f'<div style="{style}">{html.escape(text)}</div>' if text else ""
