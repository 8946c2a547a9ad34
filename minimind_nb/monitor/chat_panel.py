"""Views of a chat: lines in a terminal, bubbles and controls in a cell."""

import asyncio
import html
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ..data.conversations import Message
from ..session import running_kernel
from .page import show

_MARKS = {"user": "> ", "assistant": ""}
_REDRAW_SECONDS = 0.125


def _parts(messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of each part of messages that is not empty."""
    for message in messages:
        if thought := message.get("reasoning_content"):
            yield "thought", thought
        if message["content"]:
            yield message["role"], message["content"]
        for call in message.get("tool_calls", ()):
            given = json.dumps(call["arguments"], ensure_ascii=False)
            yield "call", f"{call['name']} {given}"


def as_text(messages: Sequence[Message]) -> str:
    """Return messages as lines; when the last message grows, this only gets longer."""
    parts = [(_MARKS.get(kind, "| "), text) for kind, text in _parts(messages)]
    return "\n".join(mark + text.replace("\n", f"\n{mark}") for mark, text in parts)


def as_html(messages: Sequence[Message], live: bool = False) -> str:
    """Return messages as bubbles; if `live`, the last one is still being generated."""
    bubbles, shown = "", [*_parts(messages)]
    for number, (kind, text) in enumerate(shown, start=1):
        said = html.escape(text.strip())
        opened = " open" * (live and number == len(shown))
        if kind == "thought":
            said = f"<details{opened}><summary>Thought</summary>{said}</details>"
        else:
            said = f"<b>{kind.title()}: </b>{said}"
        bubbles += f'<div class="bubble {kind}">{said}</div>'
    return f'<div class="chat"><div>{bubbles}{"…" * live}</div></div>'


class Transcript:
    """Shows messages as they grow: as one output of a cell, or printed in a terminal."""

    _display: Any = None
    _next, _printed = 0.0, 0

    def show(self, messages: Sequence[Message], live: bool = True) -> None:
        """Show messages; in a terminal without the first, which was typed there."""
        if running_kernel() is None:
            text = as_text(messages[1:])
            print(text[self._printed :], end="" if live else "\n", flush=True)
            self._printed = len(text)
        elif not live or time.monotonic() > self._next:
            shown = as_html(messages, live), as_text(messages)
            self._display = show(*shown, self._display)
            self._next = time.monotonic() + _REDRAW_SECONDS


class Panel:
    """A chat in a cell: what was said, a line to write in, buttons and sliders.

    An answer is a task of the kernel's event loop, which sees to buttons between two
    tokens. So all happens in the main thread, and nothing needs a lock.
    """

    def __init__(self, chat: Any) -> None:
        import ipywidgets as widgets
        from IPython.display import display

        self._chat, self._view = chat, Transcript()
        self._pieces: Any = (None for _ in ())  # of the answer that is being generated
        self._loop = asyncio.get_running_loop()
        self._view.show(chat.history, live=False)
        # If keys were told one by one, Enter would be told before the last of them.
        self._line = widgets.Text(placeholder="Say something", continuous_update=False)
        self._line.layout = {"flex": "1 1 300px", "width": "auto"}
        self._line.on_msg(self._on_key)
        buttons = []
        for act in (self.send, self.stop, self.again, self.clear):
            button = widgets.Button(description=act.__name__.title())
            button.layout.width = "76px"
            button.on_click(lambda _, act=act: self._loop.call_soon_threadsafe(act))
            buttons.append(button)
        self._sliders = {
            "temperature": widgets.FloatSlider(max=2, step=0.05),
            "max_new_tokens": widgets.IntSlider(min=1, max=1024),
        }
        for name, slider in self._sliders.items():
            slider.max = max(slider.max, chat.settings[name])
            slider.value, slider.description = chat.settings[name], name
            slider.style.description_width = "auto"
        controls = [self._line, *buttons, *self._sliders.values()]
        box = widgets.HBox(controls, layout={"max_width": "860px", "flex_flow": "wrap"})
        shown = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
        kind = "application/vnd.jupyter.widget-view+json"
        display({kind: shown, "text/plain": ""}, raw=True)  # a saved cell shows nothing

    def _on_key(self, _: object, content: dict[str, Any], __: object) -> None:
        if content.get("event") == "submit":  # Enter; the text comes right behind it
            later = self._loop.call_later
            self._loop.call_soon_threadsafe(later, 0.05, self.send)

    def send(self) -> None:
        self.stop()
        if text := self._line.value.strip():
            self._line.value, self._pieces = "", self._chat.take(text)
            self._task = self._loop.create_task(self._answer(text, self._pieces))

    def stop(self) -> None:
        """End the answer that is being generated, and keep what was said."""
        self._pieces.close()

    def again(self) -> None:
        """Replace the last turn by another answer to its question."""
        self.stop()
        history = self._chat.history
        if asked := [n for n, one in enumerate(history) if one["role"] == "user"]:
            self._line.value = history[asked[-1]]["content"]
            del history[asked[-1] :]
            self.send()

    def clear(self) -> None:
        self.stop()
        self._chat.clear()
        self._view.show(self._chat.history, live=False)

    async def _answer(self, text: str, pieces: Any) -> None:
        self._chat.settings |= {name: one.value for name, one in self._sliders.items()}
        turn, note = [], []
        try:
            for turn in pieces:
                self._view.show([*self._chat.history, *turn])
                await asyncio.sleep(0)
            if not as_text(turn[1:]).strip():
                note = [{"role": "note", "content": f"No answer to “{text}”"}]
        except Exception as error:
            self._line.value, note = text, [{"role": "note", "content": str(error)}]
        self._view.show([*self._chat.history, *note], live=False)
