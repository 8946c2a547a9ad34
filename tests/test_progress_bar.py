"""Bars of progress, by whoever looks: a terminal, a cell, the log of a batch run."""

import io
import json
import sys
from typing import Any, NoReturn

import IPython.display
import pytest

from minimind_nb import progress_bar
from minimind_nb.config import TrainConfig
from minimind_nb.data.token_cache import Source, open_cache
from minimind_nb.data.tokenizer import read_tokenizer
from minimind_nb.model import generation
from minimind_nb.progress_bar import hidden, open_bar
from minimind_nb.session import Session
from minimind_nb.training import api


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(progress_bar, "_DELAY", 1e-9)
    monkeypatch.setattr(progress_bar, "_REDRAW_SECONDS", 0.0)


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    """What a cell shows, each update of its one output."""
    texts: list[str] = []

    class Handle:
        def update(self, bundle: dict[str, str], raw: bool) -> None:
            texts.append(bundle["text/plain"])

    def display(bundle: dict[str, str], **_: Any) -> Handle:
        assert not texts
        texts.append(bundle["text/plain"])
        return Handle()

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(progress_bar, "running_kernel", object)
    return texts


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


def test_a_cell_shows_one_line_that_is_gone_at_the_end(shown):
    work()
    assert [text[:14] for text in filter(None, shown)] == [
        f"Counting: {share:3}%" for share in (25, 50, 75, 100)
    ]
    assert shown[-1] == ""
    assert max(map(len, shown)) <= 100


def test_without_a_total_the_time_is_shown(shown):
    with open_bar("Evaluating") as bar:
        bar.update(0)
    assert [*filter(None, shown)] == ["Evaluating 00:00"] and shown[-1] == ""


def test_a_bar_may_be_hidden(shown):
    with hidden():
        work()
        with hidden(False):
            work()
    assert not shown
    work()
    assert shown


@pytest.mark.parametrize("view", [None, False, print])
def test_a_silent_training_shows_no_bar_either(shown, view, monkeypatch):
    def prepare(_: TrainConfig) -> NoReturn:
        work()
        raise RuntimeError("stop here")

    monkeypatch.setattr(api, "prepare", prepare)
    with pytest.raises(RuntimeError, match="stop here"):
        api.train(TrainConfig(data_path="demo"), view=view)
    assert bool(shown) == (view is None)


def test_a_batch_run_logs_a_line_now_and_then(shown, monkeypatch, tmp_path):
    place = Session("kaggle", batch=True, log_seconds=0.0)
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        monkeypatch.setattr(progress_bar, "current_session", lambda: place)
        work()
        monkeypatch.setattr(
            progress_bar, "current_session", lambda: Session("kaggle", batch=True)
        )
        work()
    lines = (tmp_path / "log").read_text().splitlines()
    assert not shown
    assert [line[:14] for line in lines] == [
        f"Counting: {share:3}%" for share in (25, 50, 75, 100)
    ]


def test_tokenising_shows_how_far_it_is(shown, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n}"}) + "\n" for n in range(9)))
    open_cache(Source(str(file), "pretrain", read_tokenizer(None)), tmp_path / "cache")
    assert shown[0].startswith("Tokenising a.jsonl: 100%|") and shown[-1] == ""


def test_many_prompts_show_how_many_tokens_are_made(shown, monkeypatch):
    steps = [[5] * 8] * 3
    monkeypatch.setattr(generation, "decode", lambda *_, **__: iter(steps))
    for count, expected in ((7, 0), (8, 1)):
        rows: Any = [[1]] * count
        found = generation.continue_ids(None, rows, ends={9}, max_new_tokens=4)  # pyright: ignore[reportArgumentType]
        assert found == [[5, 5, 5]] * 8
        assert bool(shown) == expected
    assert shown[0].startswith("Answering 8 prompts:  25%|") and shown[-1] == ""
