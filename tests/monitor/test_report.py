import json
import os

import pytest

from minimind_nb.monitor.plots import Chart
from minimind_nb.monitor.report import Run, save_chart, write_summary

SETTINGS = {"stage": "pretrain", "hidden_size": 64, "preset": None}
CONFIG = {"settings": SETTINGS, "explicit": ["hidden_size"]}


@pytest.fixture
def run(make_history):
    history = make_history([5.0, 4.0, 3.0], [(0, 5.0), (3, 2.0)], total=3, resume=2)
    folder = history.path.parent
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "rank0.json").write_text(json.dumps({"status": "finished"}))
    return Run(folder)


def test_a_run_opens_by_its_folder(run, add_rows):
    again = Run(run)
    assert os.fspath(again) == str(run.folder)
    assert (again.status, again.config) == ("finished", CONFIG)
    assert isinstance(again.plot(x="tokens", smoothing=0.5), Chart)
    assert repr(again) == (
        f"Run('{run.folder}'): finished · step 3 of 3 · loss 3.000 · "
        "validation 2.000 (perplexity 7.389) · 0.01 M text tokens · 0:00:06"
    )
    add_rows(run.history, 4, loss=1.0)
    assert again.history.column("train", "loss") == [5.0, 4.0, 3.0, 1.0]


def test_a_run_without_a_row_yet_is_a_run(run):
    run.history.path.unlink()
    assert Run(run.folder).history.rows == []


def test_metrics_alone_are_enough_to_look_at(run):
    (run.folder / "config.json").unlink()
    assert Run(run.folder / "metrics.jsonl").folder == run.folder


def test_a_folder_that_is_no_run_is_refused(run):
    with pytest.raises(FileNotFoundError, match=r"Runs in .*out: .*/pretrain_64\."):
        Run(run.folder.parent)


def test_the_chart_is_written_whole(run):
    save_chart(run)
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not list(run.folder.glob(".*"))


def test_the_summary_says_what_came_of_it_and_how_to_go_on(run):
    weights = run.folder.parent / "pretrain_64.pth"
    for file in (weights, weights.with_name("other.pth"), run.folder / "loss.png"):
        file.touch()
    write_summary(run, "finished", weights)
    text = (run.folder / "summary.md").read_text()
    for line in (
        "# pretrain_64\n",
        "Finished, 20",
        "| optimizer steps | 3 of 3 |",
        "| training loss, last logged | 3.000 (perplexity 20.09) |",
        "| validation loss | 2.000 (perplexity 7.389) |",
        "| lowest validation loss | 2.000 at step 3 |",
        "| bits per byte (validation) | 1.250 |",
        "| text tokens | 12,000 |",
        "| training time | 0:00:06 (0.00 hours) |",
        "| text tokens per second | 2,000 |",
        "| peak memory (GiB, each process) | 0.50, 0.25 |",
        "| resumed at step | 2 |",
        "![loss](loss.png)",
        "| hidden_size | `64` |",
        "`metrics.jsonl`, `rank0.json`, `../pretrain_64.pth`\n",
        f'mm.load("{run.folder}")',
        "raise `epochs`",
    ):
        assert line in text
    assert "preset" not in text and "other.pth" not in text


def test_the_summary_of_a_stopped_run_without_rows(make_history, run):
    run.history.path.unlink()
    make_history()
    write_summary(run, "time_budget", run.folder / "none.pth")
    text = (run.folder / "summary.md").read_text()
    assert "Stopped: the session's time was used up, 20" in text
    assert "`mm.train(cfg)` goes on from the newest good checkpoint" in text
    assert "| optimizer steps | 0 of 100 |" in text
    assert "![loss]" not in text and "none.pth" not in text
