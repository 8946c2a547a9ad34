"""Bars of progress, by whoever looks: a terminal, a cell, the log of a batch run."""

import io
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from minimind_nb import progress_bar
from minimind_nb.data.token_cache import Source, open_cache
from minimind_nb.data.tokenizer import read_tokenizer
from minimind_nb.model import generation
from minimind_nb.progress_bar import hidden, open_bar
from minimind_nb.session import Session


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(progress_bar, "_DELAY", 1e-9)
    monkeypatch.setattr(progress_bar, "_REDRAW_SECONDS", 0.0)


def work(**more: Any) -> None:
    with open_bar("Counting", 4, **more) as bar:
        for _ in range(4):
            bar.update()


def test_a_terminal_shows_a_bar_and_other_places_nothing(monkeypatch):
    for stream, expected in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        work(mininterval=0)
        assert ("Counting:  50%|" in stream.getvalue()) == expected
        assert "\n" not in stream.getvalue()


@pytest.fixture
def shown(monkeypatch, capsys) -> Callable[[], list[str]]:
    """A function that returns what a cell has shown since, each state of its line."""
    monkeypatch.setattr(progress_bar, "running_kernel", object)
    monkeypatch.setattr(progress_bar, "current_session", lambda: Session("plain"))
    return lambda: capsys.readouterr().out.split("\r")[1:-2]


def test_a_bar_may_be_hidden(shown):
    with hidden():
        work()
    assert not shown()
    work()
    assert shown()


COUNTED = [f"Counting: {share:3}%" for share in (25, 50, 75, 100)]


def test_a_cell_shows_one_line_that_is_gone_at_the_end(shown):
    work()
    texts = shown()
    assert [text[:14] for text in texts] == COUNTED
    assert max(map(len, texts)) <= 100


def test_without_a_total_the_time_is_shown(shown):
    with open_bar("Evaluating") as bar:
        bar.update(0)
    assert shown() == ["Evaluating 00:00"]


def test_a_batch_run_logs_a_line_now_and_then(shown, monkeypatch, tmp_path):
    place = Session("kaggle", batch=True)
    monkeypatch.setattr(progress_bar, "current_session", lambda: place)
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        work()
        assert not log.tell() and not (tmp_path / "log").read_text()
        monkeypatch.setattr(progress_bar, "LOG_SECONDS", 0.0)
        work()
    lines = (tmp_path / "log").read_text().splitlines()
    assert not shown()
    assert [line[:14] for line in lines] == COUNTED


def test_tokenising_shows_how_far_it_is(shown, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n}"}) + "\n" for n in range(9)))
    open_cache(Source(str(file), "pretrain", read_tokenizer(None)), tmp_path / "cache")
    assert shown()[0].startswith("Tokenising a.jsonl: 100%|")


def test_many_prompts_show_how_many_tokens_are_made(shown, monkeypatch):
    steps = [[5] * 8] * 3
    monkeypatch.setattr(generation, "decode", lambda *_, **__: iter(steps))
    for count in (7, 8):
        rows: Any = [[1]] * count
        found = generation.continue_ids(None, rows, ends={9}, max_new_tokens=4)  # pyright: ignore[reportArgumentType]
        assert found == [[5, 5, 5]] * 8
        texts = shown()
        assert bool(texts) == (count == 8)
    assert texts[0].startswith("Answering 8 prompts:  25%|")
