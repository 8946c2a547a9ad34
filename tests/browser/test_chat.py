"""A chat in JupyterLab, as a user has it: the line, the buttons, and the saved notebook."""

import subprocess
import sys
from pathlib import Path

# A model of random weights that never ends an answer.
OPEN = """
chat = mm.chat(pair, temperature=2, max_new_tokens=1024, seed=1)
chat._ends = ()
"""
PAIR = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from support.small_models import make_model, make_tokenizer
import minimind_nb as mm
tokenizer = make_tokenizer()
pair = make_model(tokenizer), tokenizer
"""
# What a trained model might say, as slowly.
SCRIPT = [
    "<think>\nA length in feet: the tool has the factor.\n</think>\n\n<tool_call>\n"
    '{"name": "to_millimetres", "arguments": {"amount": 3, "unit": "foot"}}'
    "\n</tool_call>",
    "3 feet are 914.4 millimetres.",
    "3 加 4 等于 7。 😀",
    "<think>\nThe third question asks for reasons, of which there are some",
]
SCRIPTED = f"""
import time
from minimind_nb.monitor import chat as module
script = {SCRIPT!r}
def stream(*_, **__):
    text = script.pop(0)
    for piece in text:
        time.sleep(0.005)
        yield piece
    while not script:
        time.sleep(0.01)
        yield ""
module.stream_ids = stream

def to_millimetres(amount: int, unit: str) -> float:
    \"\"\"Convert.

    Args:
        amount: number
        unit: of length
    \"\"\"
    return round(304.8 * amount, 3)
"""


def test_a_chat_streams_stops_answers_again_and_is_saved(lab, chromium):
    file = lab.open_notebook([PAIR, OPEN, "chat.history"])
    lab.run_cell(0)
    shown = lab.run_cell(1)
    answers = shown.locator(".bubble.assistant")

    def say(text: str) -> None:
        line = shown.locator("input[type=text]").first
        line.click()
        line.press_sequentially(text)
        line.press("Enter")

    def press(name: str) -> None:
        shown.get_by_role("button", name=name).click()

    def grows() -> bool:
        before = answers.last.inner_text()
        lab.page.wait_for_timeout(400)
        return answers.last.inner_text() != before

    say("one <b>two</b> $x$ $y$ 你好")
    answers.first.wait_for()
    assert grows()
    lab.screenshot("chat-streaming")
    asked = shown.locator(".bubble.user")
    assert asked.inner_text().endswith("one <b>two</b> $x$ $y$ 你好")
    press("Stop")
    lab.page.wait_for_timeout(300)
    assert not grows()
    first = answers.last.inner_text()
    press("Again")
    lab.page.wait_for_timeout(600)
    assert grows()
    press("Stop")
    lab.page.wait_for_timeout(300)
    assert not grows()
    assert answers.count() == 1
    assert answers.last.inner_text() != first
    say("two")
    lab.page.wait_for_timeout(600)
    assert grows()
    lab.run_cell(1)
    assert answers.count() == 0, "the cell that is run again shows a new chat"
    say("three")
    lab.page.wait_for_timeout(600)
    lab.run_cell(2)
    assert grows(), "another cell does not end it"
    press("Stop")
    lab.page.wait_for_timeout(300)
    lab.save()
    lab.screenshot("chat")
    saved = file.read_text()
    press("Clear")
    lab.page.wait_for_timeout(300)
    assert asked.count() == answers.count() == 0
    file.write_text(saved)
    subprocess.run(
        [sys.executable, "-m", "nbconvert", "--to", "html", file], check=True
    )
    page = chromium.new_page()
    page.goto(file.with_suffix(".html").as_uri())
    assert "three" in page.locator(".bubble.user").inner_text()
    page.screenshot(path="out/browser/chat-saved.png", full_page=True)


def test_thoughts_calls_and_results_are_parts_of_a_chat(lab):
    lab.open_notebook([PAIR + SCRIPTED, "mm.chat(pair, tools=[to_millimetres])"])
    lab.run_cell(0)
    shown = lab.run_cell(1)
    line = shown.locator("input[type=text]").first
    asked = (
        "How long are 3 feet?",
        "再问一个：3 加 4 等于几？",
        "And <b>why</b> $a$ or $b$?",
    )
    for number, text in enumerate(asked, start=1):
        line.fill(text)
        line.press("Enter")
        if number < len(asked):
            shown.locator(".bubble.assistant").nth(number - 1).wait_for()
            lab.page.wait_for_timeout(1000)
    shown.locator("details[open]", has_text="some").wait_for()
    assert shown.locator(".bubble.tool").inner_text() == "Tool: 914.4"
    assert shown.locator(".bubble.user").last.inner_text().endswith(asked[-1])
    lab.picture("chat-parts", lab.cell(1))
