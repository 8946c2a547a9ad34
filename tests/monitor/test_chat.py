"""Chats: the prompts of a model, the history, and where answers are shown."""

import asyncio
import builtins
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ipywidgets.widgets import widget
from jupyter_client.manager import start_new_kernel
from support.small_models import make_model, make_tokenizer, teach

from minimind_nb.data.tokenizer import read_tokenizer
from minimind_nb.model.generation import generate
from minimind_nb.monitor import chat as chat_module
from minimind_nb.monitor import chat_panel
from minimind_nb.monitor.chat import Chat, chat
from minimind_nb.monitor.chat_panel import as_html, as_text

SECONDS = 120
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A model that has learnt one question, and its tokenizer."""
    tokenizer = make_tokenizer()
    turns = "<|im_start|>user\nsix<|im_end|>\n<|im_start|>assistant\nfive<|im_end|>\n"
    return teach(tokenizer, turns), tokenizer


@pytest.fixture
def answers(monkeypatch) -> Any:
    """A function that sets what the model says: pieces, or an error to raise."""

    def lay_down(*pieces: Any) -> None:
        def say(*_: Any, **__: Any) -> Iterator[str]:
            for piece in pieces:
                if not isinstance(piece, str):
                    raise piece
                yield piece

        monkeypatch.setattr(chat_module, "stream_ids", say)

    return lay_down


@pytest.fixture
def turns(monkeypatch) -> Any:
    """A function that sets what the model says one time after the other.

    The list that it returns gets the prompts.
    """

    def lay_down(*texts: Any) -> list[str]:
        rest, prompts = iter(texts), []

        def say(_: Any, tokenizer: Any, ids: list[int], **__: Any) -> Iterator[str]:
            prompts.append(tokenizer.decode(ids))
            for piece in next(rest):
                if not isinstance(piece, str):
                    raise piece
                yield piece

        monkeypatch.setattr(chat_module, "stream_ids", say)
        return prompts

    return lay_down


@pytest.fixture
def types(monkeypatch) -> Any:
    """A function that sets what is typed at a terminal: lines, or an error."""

    def lay_down(*lines: Any) -> None:
        rest = iter(lines)

        def read(prompt: str) -> str:
            line = next(rest)
            if not isinstance(line, str):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)

    return lay_down


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_an_answer_is_printed_returned_kept_and_ends_at_its_end_token(pair, capsys):
    talk = chat(pair, "six", **GREEDY)
    assert capsys.readouterr().out == "five\n"
    assert talk.history == [said("user", "six"), said("assistant", "five")]
    assert repr(talk) == "Chat of 2 messages"


def test_the_next_turn_is_answered_in_view_of_those_before(pair):
    talk = Chat(*pair, system="two", **GREEDY)
    talk.say("one")
    before = [*talk.history, said("user", "six")]
    assert before[0] == said("system", "two")
    assert talk.say("six") == generate(pair[0], pair[1], before, **GREEDY)
    assert len(talk.history) == 5
    talk.clear()
    assert talk.history == [said("system", "two")]


def test_a_seed_makes_a_chat_reproducible_and_each_of_its_answers_different(pair):
    # So hot that the draws alone decide, whatever the prompt.
    hot: dict[str, Any] = {"temperature": 1e6, "top_p": 1, "max_new_tokens": 20}
    hot["seed"] = 7
    talk = chat(pair, "one", **hot)
    first = generate(pair[0], pair[1], [said("user", "one")], **hot)
    assert talk.history[1]["content"] == first
    second = talk.say("one")
    assert second != first
    again = chat(pair, "one", **hot)
    assert (again.history[1]["content"], again.say("one")) == (first, second)


def test_an_empty_answer_leaves_no_turn(pair, answers):
    answers()
    talk = Chat(*pair)
    assert talk.say("six") == ""
    assert talk.history == []


def test_an_interrupt_ends_the_answer_and_keeps_what_was_said(pair, answers, capsys):
    answers("one ", "two", KeyboardInterrupt())
    talk = Chat(*pair)
    assert talk.say("six") == "one two"
    assert capsys.readouterr().out == "one two\n"
    assert talk.history[1] == said("assistant", "one two")


@pytest.mark.parametrize("system", [None, "two"])
@pytest.mark.filterwarnings("ignore:older turns are left out")
def test_a_chat_that_outgrows_the_model_forgets_its_oldest_turns(pair, system):
    model = make_model(pair[1], max_position_embeddings=130)
    talk = Chat(model, pair[1], system=system, **GREEDY)
    with pytest.warns(UserWarning, match="older turns are left out"):
        for _ in range(6):
            talk.say("one")
    assert len(talk.history) == 12 + (system is not None)
    asked = [*talk.history, said("user", "six")]
    start = 1 if system else 0
    expected = None
    while expected is None:
        try:
            expected = generate(model, pair[1], asked, **GREEDY)
        except ValueError:
            del asked[start : start + 2]
    assert start < len(asked) < len(talk.history)
    assert talk.say("six") == expected


def test_a_message_that_is_too_long_alone_is_refused(pair):
    talk = Chat(make_model(pair[1], max_position_embeddings=130), pair[1], **GREEDY)
    with pytest.raises(
        ValueError, match=r"prompt of \d+ tokens.*room for 118: say less"
    ):
        talk.say("one " * 200)
    assert talk.history == []


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "message 1.*user's.*empty"), (" \n", "message 1"), (5, "message 1.* 5")],
)
def test_what_is_nothing_to_say_is_refused(pair, text, message):
    with pytest.raises(ValueError, match=message):
        chat(pair, text)


def test_a_foreign_tokenizer_and_wrong_settings_are_refused(pair):
    with pytest.raises(ValueError, match="load both from one run"):
        chat((make_model(pair[1], vocab_size=50), pair[1]), "six")
    with pytest.raises(ValueError, match="top_p is 2"):
        chat(pair, "six", top_p=2)


def test_rope_scaling_goes_to_the_model_that_is_loaded(pair, tmp_path):
    for one in pair:
        one.save_pretrained(tmp_path)
    asked = {"factor": 2, "original_max_position_embeddings": 100}
    talk = chat(tmp_path, "six", rope_scaling=asked, **GREEDY)
    assert talk._model.config.max_position_embeddings == 200


def test_a_pair_takes_no_options_of_loading(pair):
    with pytest.raises(
        ValueError, match=r"pass tokenizer and rope_scaling to mm\.load"
    ):
        chat(pair, "six", rope_scaling=2)


def test_a_terminal_is_read_until_an_empty_line(pair, types, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    types("six", "one " * 200, "")
    model = make_model(pair[1], max_position_embeddings=130)
    talk = chat((model, pair[1]), **GREEDY)
    assert len(talk.history) == 2
    assert "say less" in capsys.readouterr().out


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt()])
def test_the_keys_that_end_a_terminal_end_the_chat(pair, types, end):
    types("six", end)
    talk = Chat(*pair, **GREEDY)
    talk.converse()
    assert len(talk.history) == 2


def test_where_nobody_can_write_a_text_is_asked_for(pair, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match=r'nobody can write here.*mm\.chat\(…, "…"\)'):
        chat(pair)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    with pytest.raises(ValueError, match="nobody can write here, in a batch run"):
        chat(pair)


class Output:
    """An output of a cell: what it shows, and how often that was replaced."""

    def __init__(self, bundle: dict[str, Any]) -> None:
        self.updates = -1
        self.update(bundle)

    def update(self, bundle: dict[str, Any], raw: bool = True) -> None:
        self.bundle, self.updates = bundle, self.updates + 1

    @property
    def text(self) -> str:
        return self.bundle["text/plain"]

    @property
    def html(self) -> str:
        return self.bundle["text/html"].partition("</style>")[2]


@pytest.fixture
def outputs(monkeypatch) -> list[Output]:
    """What is shown in a cell: instead of a kernel's front end, this list gets it."""
    shown: list[Output] = []

    def display(bundle: dict[str, Any], **_: Any) -> Output:
        shown.append(Output(bundle))
        return shown[-1]

    monkeypatch.setattr("IPython.display.display", display)
    kernel = SimpleNamespace(execution_count=7)
    monkeypatch.setattr(chat_module, "running_kernel", lambda: kernel)
    monkeypatch.setattr(chat_panel, "running_kernel", lambda: kernel)
    return shown


class Hand:
    """Uses the controls of a chat that a cell shows."""

    def __init__(self, talk: Chat, outputs: list[Output]) -> None:
        self.panel = chat_panel.Panel(talk)
        self.transcript, controls = outputs[-2:]
        (view,) = [one for kind, one in controls.bundle.items() if "widget" in kind]
        box: Any = widget._instances[view["model_id"]]
        self.line, *buttons = box.children
        self.warmth, self.length = buttons[-2:]
        self.buttons = {button.description: button for button in buttons[:-2]}

    async def press(self, name: str, seconds: float = 0.02) -> None:
        self.buttons[name].click()
        await asyncio.sleep(seconds)

    async def send(self, text: str) -> None:
        self.line.value = text
        await self.press("Send")

    async def enter(self, text: str) -> None:
        self.line._handle_custom_msg({"event": "submit"}, [])
        self.line.value = text  # comes behind
        await asyncio.sleep(0.1)


def use(talk: Chat, outputs: list[Output], act: Callable[[Hand], Any]) -> Hand:
    """Let a hand act in a running event loop, as a kernel has one."""

    async def run() -> Hand:
        hand = Hand(talk, outputs)
        await act(hand)
        return hand

    return asyncio.run(run())


def endless(word: str) -> Iterator[str]:
    return itertools.repeat(f"{word} ")


def test_a_cell_answers_what_is_sent_or_entered(pair, turns, outputs):
    prompts = turns(["fi", "ve"], "2")
    talk = Chat(*pair)

    async def act(hand: Hand) -> None:
        await hand.press("Send")
        assert talk.history == [], "an empty line is not sent"
        await hand.send("six")
        assert hand.line.value == ""
        assert hand.transcript.text == "> six\nfive"
        hand.warmth.value, hand.length.value = 1.5, 20
        await hand.enter("one")

    hand = use(talk, outputs, act)
    assert hand.transcript.text == "> six\nfive\n> one\n2"
    assert len(prompts) == 2
    assert (talk.settings["temperature"], talk.settings["max_new_tokens"]) == (1.5, 20)
    assert outputs[1].text == "", "a saved notebook shows no controls"


def test_a_cell_tells_why_a_message_is_refused_and_gives_it_back(pair, outputs):
    talk = Chat(make_model(pair[1], max_position_embeddings=130), pair[1], **GREEDY)
    long = "one " * 200

    async def act(hand: Hand) -> None:
        await hand.send(long)
        assert hand.line.value == long.strip()

    hand = use(talk, outputs, act)
    assert "say less" in hand.transcript.text
    assert talk.history == []


def test_a_cell_says_that_there_was_no_answer(pair, turns, outputs):
    turns(" ")

    async def act(hand: Hand) -> None:
        await hand.send("six")

    hand = use(Chat(*pair), outputs, act)
    assert hand.transcript.text == "| No answer to “six”"


def test_stop_ends_an_answer_and_keeps_what_was_said(pair, turns, outputs):
    turns(endless("one"), "two")
    talk = Chat(*pair)

    async def act(hand: Hand) -> None:
        await hand.send("six")
        assert talk.history == []
        await hand.press("Stop")
        assert talk.history[1]["content"].startswith("one one")
        await hand.press("Stop")
        await hand.send("six")

    use(talk, outputs, act)
    assert [message["content"] for message in talk.history[2:]] == ["six", "two"]


def test_again_gives_another_answer_to_the_last_question(pair, turns, outputs):
    prompts = turns("1", "2", endless("3"), "4")
    talk = Chat(*pair, seed=1)

    async def act(hand: Hand) -> None:
        await hand.press("Again")
        assert talk.history == []
        await hand.send("six")
        await hand.send("six")
        await hand.press("Again")
        await hand.press("Again")

    hand = use(talk, outputs, act)
    assert hand.transcript.text == "> six\n1\n> six\n4"
    assert prompts[1] == prompts[2] == prompts[3] != prompts[0]


def test_clear_ends_the_answer_and_forgets_it(pair, turns, outputs):
    turns(endless("one"))
    talk = Chat(*pair, system="two")

    async def act(hand: Hand) -> None:
        await hand.send("six")
        await hand.press("Clear")

    hand = use(talk, outputs, act)
    assert talk.history == [said("system", "two")]
    assert hand.transcript.text == "| two"


def test_bubbles_show_text_as_it_is_and_parts_apart():
    messages = [
        said("system", "Be kind."),
        said("user", "<script>1</script>\n你好 **b**"),
        said("assistant", "") | {"reasoning_content": "<i>", "tool_calls": [CALL]},
        said("tool", "<42>"),
        said("assistant", " six"),
    ]
    html = as_html(messages)
    assert re.findall(r'class="bubble (\w+)"', html) == [
        *("system", "user", "thought", "call", "tool", "assistant")
    ]
    assert "&lt;script&gt;1&lt;/script&gt;\n你好 **b**" in html
    assert "&lt;i&gt;" in html
    assert "&lt;42&gt;" in html
    assert not re.search("<(script|i|42)>", html)
    text = '> <script>1</script>\n> 你好 **b**\n| <i>\n| multiply {"a": 6, "b": 7}'
    assert as_text(messages) == f"| Be kind.\n{text}\n| <42>\n six"


def test_a_thought_is_open_while_it_is_thought():
    thinking = [said("user", "six"), said("assistant", "") | {"reasoning_content": "h"}]
    answering = [thinking[0], thinking[1] | {"content": "five"}]
    assert "<details open>" in as_html(thinking, live=True)
    assert "<details>" in as_html(answering, live=True)
    assert "<details>" in as_html(thinking)


def test_an_answer_in_a_cell_is_one_output_that_a_saved_notebook_has(
    pair, answers, outputs, monkeypatch
):
    seconds = itertools.count(1)
    monkeypatch.setattr("time.monotonic", lambda: next(seconds) / 20)
    answers(*["one "] * 20)
    chat(pair, "six")
    (output,) = outputs
    assert output.text == "> six\n" + "one " * 20
    assert output.html.count("bubble") == 2
    assert 5 < output.updates < 15


def multiply(a: int, b: int) -> int:
    """Multiply.

    Args:
        a: factor
        b: factor
    """
    return a * b


WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "multiply", "arguments": {"a": 6, "b": 7}}


def calling(*calls: Any) -> str:
    texts = [one if isinstance(one, str) else json.dumps(one) for one in calls]
    return "".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


def test_functions_that_are_called_are_run_and_their_results_answered(
    pair, turns, capsys
):
    prompts = turns(f"Well:\n{calling(CALL, CALL)}", "It is 42.", "You too.")
    talk = Chat(*pair, tools=[multiply])
    assert talk.say("6 times 7?") == "It is 42."
    asked = said("assistant", "Well:") | {"tool_calls": [CALL, CALL]}
    results = [said("tool", "42")] * 2
    final = said("assistant", "It is 42.")
    assert talk.history == [said("user", "6 times 7?"), asked, *results, final]
    written = f"Well:\n{calling(CALL)}\n{calling(CALL)}<|im_end|>\n"
    call = '| multiply {"a": 6, "b": 7}'
    shown = ["Well:", call, call, "| 42", "| 42", "It is 42.", ""]
    assert capsys.readouterr().out.split("\n") == shown
    assert '"name": "multiply"' in prompts[0]
    assert written in prompts[1]
    talk.say("Thank you.")
    assert prompts[2].startswith(prompts[1])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ({"name": "multiply", "arguments": {"a": 6}}, "TypeError.*missing 1 required"),
        ({"name": "fail", "arguments": {}}, "ZeroDivisionError.*by zero"),
    ],
)
def test_a_call_that_fails_gives_its_error_to_the_model(pair, turns, call, error):
    def fail() -> float:
        """Fail."""
        return 1 / 0

    turns(calling(call), "Sorry.")
    talk = Chat(*pair, tools=[multiply, fail])
    assert talk.say("Go.") == "Sorry."
    assert re.search(error, json.loads(talk.history[2]["content"])["error"])


def test_rounds_of_calls_have_a_limit(pair, turns):
    turns(*[calling(CALL)] * 9)
    talk = Chat(*pair, tools=[multiply])
    assert talk.say("Go.") == ""
    roles = [message["role"] for message in talk.history]
    assert roles == ["user", *["assistant", "tool"] * 4, "assistant"]
    assert talk.history[-1]["tool_calls"] == [CALL]


def test_a_call_of_a_schema_is_shown_and_left_to_the_caller(pair, turns, capsys):
    calls = [CALL, {"name": "weather", "arguments": {}}]
    turns(calling(*calls))
    talk = Chat(*pair, tools=[multiply, WEATHER])
    talk.say("Go.")
    assert talk.history[1]["tool_calls"] == calls
    assert len(talk.history) == 2
    shown = '| multiply {"a": 6, "b": 7}\n| weather {}\n'
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    "text",
    [
        calling("multiply(6, 7)"),
        calling("{'name': 'multiply', 'arguments': {}}"),
        calling('{"name": "multiply", "arguments": "dict()"}'),
        calling('{"function": {"name": "multiply", "arguments": {}}}'),
        calling("5"),
        calling('{"name": ["multiply"], "arguments": {}}'),
        calling(CALL, "multiply(6, 7)"),
        f"<tool_call>{json.dumps(CALL)}",
        "```python\nmultiply(6, 7)\n```",
    ],
)
def test_text_that_is_not_the_json_of_a_call_stays_text(pair, turns, text):
    turns([text])  # a second time it would not answer
    talk = Chat(*pair, tools=[multiply])
    assert talk.say("Go.") == text
    assert "tool_calls" not in talk.history[1]


def test_an_interrupt_ends_calls(pair, turns):
    def stop() -> None:
        """Stop."""
        raise KeyboardInterrupt

    turns([calling(CALL), KeyboardInterrupt()])
    assert Chat(*pair, tools=[multiply]).say("Go.") == calling(CALL)
    turns(calling({"name": "stop", "arguments": {}}))
    talk = Chat(*pair, tools=[stop])
    assert talk.say("Go.") == ""
    assert len(talk.history) == 2
    turns(calling(CALL))
    assert Chat(*pair).say("Go.") == calling(CALL), "without tools it is a text"


def test_a_thought_is_shown_apart_and_kept_apart(pair, turns, capsys):
    prompts = turns("hm\n\nso\n</think>\n\nsix <b", "<think>\nno")
    talk = Chat(*pair, thinking=True)
    assert talk.say("one") == "six <b"
    assert capsys.readouterr().out == "| hm\n| \n| so\nsix <b\n"
    kept = said("assistant", "six <b") | {"reasoning_content": "hm\n\nso"}
    assert talk.history == [said("user", "one"), kept]
    assert prompts[0].endswith("assistant\n<think>\n")
    assert talk.say("two") == "", "a thought alone is no answer"
    assert capsys.readouterr().out.startswith("| ")
    assert talk.history == [said("user", "one"), kept]
    assert "<think>\nhm\n\nso\n</think>\n\nsix <b<|im_end|>" in prompts[1]


def test_a_thought_that_the_model_opens_itself_is_a_thought(pair, turns):
    turns("<think>\nhm\n</think>\n\nsix", "six")
    talk = Chat(*pair)
    assert talk.say("one") == "six"
    assert talk.history[1]["reasoning_content"] == "hm"
    talk = Chat(*pair, thinking=False)
    talk.say("one")
    assert "reasoning_content" not in talk.history[1]


def test_a_model_without_a_chat_template_only_continues_texts(pair, monkeypatch):
    spec = dataclasses.replace(read_tokenizer(pair[1]), chat_template=None)
    monkeypatch.setattr(chat_module, "read_tokenizer", lambda _: spec)
    with pytest.raises(ValueError, match="tokenizer has no chat template: put one"):
        Chat(*pair)


def test_tools_and_thinking_need_a_template_with_them(pair):
    plain = make_tokenizer()
    plain.chat_template = (
        "{% for one in messages %}{{ one.content + eos_token }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="does not write tools: leave them out"):
        Chat(pair[0], plain, tools=[multiply])
    with pytest.raises(ValueError, match="no switch for thinking"):
        Chat(pair[0], plain, thinking=False)
    with pytest.raises(ValueError, match="<lambda> because it has no docstring"):
        Chat(*pair, tools=[lambda: 1])


@pytest.fixture
def run_cell(pair, tmp_path) -> Iterator[Any]:
    """A function that runs a cell in a kernel beside the model, and gives its outputs."""
    model, tokenizer = pair
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    manager, client = start_new_kernel(
        kernel_name="python3", cwd=str(tmp_path), env=environ, startup_timeout=SECONDS
    )

    def run(code: str, allow_stdin: bool = False) -> list[dict]:
        outputs: list[dict] = []
        quiet = ("status", "execute_input", "comm_open", "comm_msg")

        def keep(message: dict) -> None:
            if message["msg_type"] == "update_display_data":  # as notebooks keep it
                shown = [one for one in outputs if one.get("transient")]
                shown[-1]["data"] = message["content"]["data"]
            elif message["msg_type"] not in quiet:
                outputs.append(message["content"])

        client.execute_interactive(
            code,
            timeout=SECONDS,
            output_hook=keep,
            allow_stdin=allow_stdin,
            stop_on_error=False,
        )
        return outputs

    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_a_cell_shows_one_output_an_answer_and_a_widget_only_to_somebody(
    run_cell, tmp_path: Path
):
    load = "from minimind_nb.monitor.chat import chat"
    (shown,) = run_cell(f"{load}\ntalk = chat('.', 'six', temperature=0)")
    assert shown["data"]["text/plain"] == "> six\nfive"
    assert "five</div>" in shown["data"]["text/html"]
    (shown,) = run_cell("talk.say('six')")
    assert "transient" in shown, "the value is not shown a second time"
    (error,) = run_cell("chat('.')")
    assert error["ename"] == "ValueError"
    assert "nobody can write here" in error["evalue"]
    transcript, widget = run_cell("chat('.')", allow_stdin=True)
    assert "text/html" in transcript["data"]
    assert "application/vnd.jupyter.widget-view+json" in widget["data"]
