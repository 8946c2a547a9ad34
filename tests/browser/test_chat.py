"""A chat in JupyterLab, as a user has it: the line, the buttons, ■, and the saved notebook."""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
# A model of random weights, hot enough that no two answers are equal.
CHAT = f"""
import sys; sys.path.insert(0, {str(TESTS)!r})
from support.small_models import make_model, make_tokenizer
import minimind_nb as mm
tokenizer = make_tokenizer()
pair = make_model(tokenizer), tokenizer
"""
OPEN = (
    "chat = mm.chat(pair, temperature=2, max_new_tokens=1024, seed=1)\nchat._ends = ()"
)


def test_a_chat_streams_stops_answers_again_and_is_saved(lab, chromium):
    file = lab.open_notebook([CHAT, OPEN, "chat.history"])
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
    lab.interrupt()
    lab.page.wait_for_timeout(400)
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
