"""The notebooks as a user clicks through them, and what a saved one still shows."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from support.lab import CURVES, PATIENCE, PICTURE, save_picture

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
STEPS = 160
SMALL = {
    "out_dir": "out",
    "num_processes": 1,
    "settings": {"device": "cpu", "log_interval": 2},
}


QUESTIONS = ["How many days are there in 3 weeks?", "今天是星期一，2 天以后是星期几？"]
CHAT_PICTURES = {
    "chat": "talk = mm.chat(",
    "surprise": "mm.surprise",
    "vocabulary": "mm.vocabulary",
}


def numbers(pattern: str, text: str) -> list[int]:
    return [int(found.replace(",", "")) for found in re.findall(pattern, text)]


def watch(lab, output, until: int, seconds: float = 300) -> list[int]:
    """Return the different steps that a running cell tells until it reaches one."""
    seen = [0]
    end = time.monotonic() + seconds
    while seen[-1] < until and time.monotonic() < end:
        step = numbers(rf"([\d,]+) of {STEPS}", output.inner_text())
        seen += step[:1] if step and step[0] != seen[-1] else []
        assert_nothing_failed(lab)
        lab.page.wait_for_timeout(200)
    return seen


def assert_nothing_failed(lab) -> None:
    """Fail with the text of the first cell that raised."""
    failed = lab.page.locator('[data-mime-type="application/vnd.jupyter.stderr"]')
    assert not failed.all_inner_texts()


def write_page(file: Path) -> str:
    """Write a saved notebook as a web page without a kernel; return its address."""
    no_network = [
        f"--HTMLExporter.{name}_url=" for name in ("mathjax", "require_js", "jquery")
    ]
    command = [sys.executable, "-m", "nbconvert", "--to", "html", *no_network]
    subprocess.run([*command, str(file)], check=True, capture_output=True)
    return file.with_suffix(".html").as_uri()


def assert_a_page_shows_all(chromium: Any, file: Path) -> None:
    page = chromium.new_page()
    page.goto(write_page(file))
    heights = page.evaluate(
        """[...document.querySelectorAll(".jp-OutputArea-output")]
        .map(output => output.getBoundingClientRect().height)"""
    )
    assert heights and min(heights) > 10
    chart = page.locator(PICTURE).last
    chart.scroll_into_view_if_needed()
    chart.hover()
    assert page.locator(".hover .dots").count() > 0
    save_picture(page, "saved", full_page=True)
    page.close()


def assert_a_page_without_scripts_shows_all(chromium: Any, file: Path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(write_page(file))
    pictures = page.locator(".minimind-chart img")
    assert pictures.count() >= 2
    for picture in pictures.all():
        assert picture.bounding_box()["height"] > 200
    save_picture(page, "saved-without-scripts", full_page=True)
    context.close()


def test_a_training_is_watched_stopped_and_resumed(lab):
    lab.open_notebook(
        NOTEBOOKS / "pretrain.ipynb", trial=False, max_steps=STEPS, **SMALL
    )
    lab.run_all()
    cell = lab.find("mm.train(cfg)")
    output = lab.output(cell)
    seen = watch(lab, output, until=STEPS // 4)
    assert len(seen) > 1 and seen == sorted(seen)
    curves = output.locator(CURVES).count()
    assert curves and output.locator(PICTURE).is_visible()
    lab.interrupt()
    lab.wait_idle(300)
    output = lab.output(cell)
    (saved,) = numbers(rf"Saved at step ([\d,]+) of {STEPS}", output.inner_text())
    assert saved >= seen[-1]
    lab.picture("stopped", lab.cell(cell))
    lab.run_cell(cell, wait=False)
    output.locator("progress").wait_for(timeout=PATIENCE)
    watch(lab, output, until=3 * STEPS // 4)
    lab.picture("live", lab.cell(cell))
    lab.wait_idle(300)
    said = output.inner_text()
    assert "Finished" in said and f"{STEPS} of {STEPS}" in said
    assert re.search(rf"resumed at step\s+{saved}\b", said)
    lab.picture("card", output.locator(".card"))
    answer = output.locator("td").last
    assert answer.evaluate("cell => getComputedStyle(cell).textAlign") == "left"


def test_curves_are_compared_kept_and_exported(lab, chromium, out_dir):
    file = lab.open_notebook(NOTEBOOKS / "curves.ipynb", out_dir=out_dir)
    lab.run_all()
    lab.wait_idle(300)
    assert_nothing_failed(lab)
    compared = lab.output(lab.find("mm.compare"))
    name, curves = (
        compared.locator("tr[data-key] button").first,
        compared.locator(CURVES),
    )
    drawn = curves.count()
    name.click()
    assert curves.count() < drawn
    name.click()
    assert curves.count() == drawn
    lab.picture("curves", compared.locator(".jp-OutputArea-child").last)
    lab.save()
    assert_a_page_shows_all(chromium, file)
    assert_a_page_without_scripts_shows_all(chromium, file)


def test_a_model_is_talked_to_and_looked_into(lab, out_dir):
    lab.open_notebook(NOTEBOOKS / "chat.ipynb", out_dir=out_dir)
    lab.run_all()
    lab.wait_idle(300)
    assert_nothing_failed(lab)
    cell = lab.find("chat.say(")
    lab.write(cell, "talk = mm.chat((model, text_tokenizer), seed=1)")
    panel = lab.run_cell(cell)
    line = panel.locator("input[type=text]").first
    for question in QUESTIONS:
        line.fill(question)
        line.press("Enter")
        panel.locator(".bubble.user", has_text=question).wait_for(timeout=PATIENCE)
        lab.wait_idle()
    assert panel.locator(".bubble.assistant").count()
    for name, code in CHAT_PICTURES.items():
        lab.picture(name, lab.output(lab.find(code)))


def test_a_mistake_is_answered_in_a_sentence(lab):
    lab.open_notebook(
        ["import minimind_nb as mm", 'mm.TrainConfig(stage="pretran")', "%tb"]
    )
    lab.run_cell(0)
    said = lab.run_cell(1).inner_text()
    assert "pretran" in said and "did you mean" in said
    assert "most recent call last" not in said
    lab.picture("error", lab.cell(1))
    assert "most recent call last" in lab.run_cell(2).inner_text()
