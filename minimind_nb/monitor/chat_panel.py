"""How a chat is shown: as lines in a terminal, as bubbles in a cell, with controls."""

import asyncio
import html
import json
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from ..data.conversations import Message
from ..session import running_kernel
from .page import page

_MARKS = {"user": "> ", "assistant": ""}
_REDRAW_SECONDS = 0.125


def _parts(messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of each part of messages; a text may be empty."""
    for message in messages:
        yield "thought", message.get("reasoning_content", "")
        yield message["role"], message["content"]
        for call in message.get("tool_calls", ()):
            given = json.dumps(call["arguments"], ensure_ascii=False)
            yield "call", f"{call['name']} {given}"
        yield "note", message.get("note", "")


def as_text(messages: Sequence[Message]) -> str:
    """Return messages as lines; when the last message grows, this only gets longer."""
    parts = [(_MARKS.get(kind, "| "), text) for kind, text in _parts(messages) if text]
    return "\n".join(mark + text.replace("\n", f"\n{mark}") for mark, text in parts)


def as_html(messages: Sequence[Message], live: bool = False) -> str:
    """Return messages as bubbles; if `live`, the last one is still being generated."""
    shown = [(kind, html.escape(text)) for kind, text in _parts(messages) if text]
    bubbles = ""
    for number, (kind, text) in enumerate(shown, start=1):
        name, opened = kind.title(), " open" if live and number == len(shown) else ""
        said = f"<b>{name}: </b>{text.strip()}"
        if kind == "thought":
            said = f"<details{opened}><summary>{name}</summary>{text}</details>"
        bubbles += f'<div class="bubble {kind}">{said}</div>'
    state = "live" if live else ""
    return page(f'<div class="chat"><div class="{state}">{bubbles}</div></div>')


class View:
    """Shows messages as they grow: as one output of a cell, or printed in a terminal."""

    _display: Any = None
    _next, _printed = 0.0, 0

    def show(self, messages: Sequence[Message], live: bool = True) -> None:
        """Show messages; in a terminal, where it was typed, without what the user said."""
        if running_kernel() is None:
            text = as_text([{**messages[0], "content": ""}, *messages[1:]])
            print(text[self._printed :], end="" if live else "\n", flush=True)
            self._printed = len(text)
        elif not live or time.monotonic() > self._next:
            from IPython.display import display

            bundle = {
                "text/html": as_html(messages, live),
                "text/plain": as_text(messages),
            }
            if self._display:
                self._display.update(bundle, raw=True)
            else:
                self._display = display(bundle, raw=True, display_id=True)
            self._next = time.monotonic() + _REDRAW_SECONDS


class Panel:
    """A chat in a cell: what was said, a line to write in, buttons and sliders.

    An answer is a task of the kernel's event loop, which sees to buttons and interrupts
    between two tokens. So all happens in the main thread, and nothing needs a lock.
    """

    _newest: ClassVar[Any] = None

    def __init__(self, chat: Any) -> None:
        import ipywidgets as widgets
        from IPython.display import display

        if Panel._newest:  # perhaps this cell's, which is run again
            Panel._newest.stop()
        Panel._newest = self._chat = chat
        self._loop, self._view = asyncio.get_running_loop(), View()
        self._view.show(chat.history, live=False)
        # If keys were told one by one, Enter would be told before the last of them.
        self._line = widgets.Text(placeholder="Say something", continuous_update=False)
        self._line.layout = {"flex": "1 1 300px", "width": "auto"}
        self._line.on_msg(self._on_key)
        buttons = []
        for act in (self.send, chat.stop, self.again, self.clear):
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
        rows = [self._line, *buttons[:2]], [*buttons[2:], *self._sliders.values()]
        row = {"max_width": "860px", "flex_flow": "row wrap"}
        box = widgets.VBox([widgets.HBox(one, layout=row) for one in rows])
        shown = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
        kind = "application/vnd.jupyter.widget-view+json"
        display({kind: shown, "text/plain": ""}, raw=True)  # a saved cell shows nothing

    def _on_key(self, _: object, content: dict[str, Any], __: object) -> None:
        if content.get("event") == "submit":  # Enter; the text comes right behind it
            later = self._loop.call_later
            self._loop.call_soon_threadsafe(later, 0.05, self.send)

    def send(self) -> None:
        if text := self._line.value.strip():
            self._line.value = ""
            self._chat.stop()
            self._task = self._loop.create_task(self._answer(text))

    def again(self) -> None:
        """Replace the last turn by another answer to its question."""
        self._chat.stop()
        history = self._chat.history
        asked = [n for n, one in enumerate(history) if one["role"] == "user"]
        if asked:
            text, self._chat.history = (
                history[asked[-1]]["content"],
                history[: asked[-1]],
            )
            self._task = self._loop.create_task(self._answer(text))

    def clear(self) -> None:
        self._chat.clear()
        # Behind what is left of a task.
        self._loop.call_soon(self._view.show, self._chat.history, False)

    async def _answer(self, text: str) -> None:
        # An idle kernel ignores interrupts. This is not taken back, since by then a cell
        # may run; while no answer is being generated it does nothing.
        signal.signal(signal.SIGINT, lambda *_: self._chat.stop())
        self._chat.settings |= {name: one.value for name, one in self._sliders.items()}
        before, turn = self._chat.history, [{"role": "user", "content": text}]
        try:
            for _ in self._chat.take(turn):
                self._view.show([*before, *turn])
                await asyncio.sleep(0)
        except (Exception, KeyboardInterrupt) as error:
            self._line.value, turn = text, [{"role": "note", "content": str(error)}]
        self._view.show([*before, *turn], live=False)
