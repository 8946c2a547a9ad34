import json
import math

import pytest
from matplotlib.figure import Figure

from minimind_nb.monitor.metrics import MetricsLog
from minimind_nb.monitor.report import Run, save_chart, write_summary

CONFIG = {"settings": {"stage": "pretrain", "hidden_size": 64, "preset": None}}


@pytest.fixture
def run_folder(make_history):
    history = make_history([5.0, 4.0, 3.0], [(0, 5.0), (3, 2.0)], total=3, resume=2)
    folder = history.path.parent
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "rank0.json").write_text(json.dumps({"status": "finished"}))
    return folder


def test_a_run_opens_by_its_folder(run_folder):
    run = Run(run_folder)
    assert run.folder == run_folder
    assert run.status == "finished"
    assert run.config == CONFIG
    assert run.history.column("train", "loss") == [5.0, 4.0, 3.0]
    assert isinstance(run.plot(x="tokens", smoothing=0.5), Figure)
    assert open(f"{run.__fspath__()}/config.json").read() == json.dumps(CONFIG)
    assert repr(run) == (
        f"Run('{run_folder}'): finished · step 3 of 3 (100 %) · loss 3.000 "
        "(perplexity 20.1) · validation 2.000 (perplexity 7.39) · 12 k text tokens · "
        "6 s of training"
    )


def test_a_run_that_grows_is_read_again(run_folder):
    run = Run(run_folder)
    with MetricsLog(run_folder / "metrics.jsonl") as log:
        log.append("train", step=4, loss=1.0)
    assert run.history.column("train", "loss")[-1] == 1.0


def test_a_run_without_a_row_yet_is_a_run(run_folder):
    (run_folder / "metrics.jsonl").unlink()
    assert Run(run_folder).history.rows == []


def test_metrics_alone_are_enough_to_look_at(run_folder):
    (run_folder / "config.json").unlink()
    assert Run(run_folder / "metrics.jsonl").folder == run_folder


def test_a_folder_that_is_no_run_is_refused(run_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'load\(".*pretrain_64"\)'):
        Run(run_folder.parent)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Run(tmp_path / "nowhere")


def test_the_chart_is_written_whole(run_folder):
    path = save_chart(run_folder, Run(run_folder).history)
    assert path == run_folder / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not list(run_folder.glob("*.tmp")) + list(run_folder.glob(".*"))


def test_the_summary_says_what_came_of_it_and_how_to_go_on(run_folder):
    (run_folder.parent / "pretrain_64.pth").write_bytes(bytes(3 * 1024**2))
    history = Run(run_folder).history
    save_chart(run_folder, history)
    path = write_summary(run_folder, history, CONFIG, "finished")
    assert path == run_folder / "summary.md"
    text = path.read_text()
    for line in (
        "# pretrain_64\n",
        "Finished, 20",
        "| optimizer steps | 3 of 3 |",
        "| training loss, last logged | 3.000 (perplexity 20.1) |",
        "| validation loss | 2.000 (perplexity 7.39) |",
        "| bits per byte (validation) | 1.250 |",
        "| text tokens | 12,000 (12 k) |",
        "| training time | 6 s (0.00 hours) |",
        "| text tokens per second | 2,000 |",
        "| peak memory (GiB, each process) | 0.50, 0.25 |",
        "| resumed at step | 2 |",
        "![loss](loss.png)",
        "| hidden_size | `64` |",
        "| `metrics.jsonl` |",
        "| `../pretrain_64.pth` | 3.0 MiB |",
        f'mm.load("{run_folder}")',
        "raise `epochs`",
    ):
        assert line in text
    assert "preset" not in text and "skipped" not in text


def test_the_summary_of_a_stopped_run_says_how_to_continue(run_folder):
    history = Run(run_folder).history
    text = write_summary(
        run_folder, history, CONFIG["settings"], "time_budget"
    ).read_text()
    assert "Stopped: the session's time was used up, 20" in text
    assert "`mm.train(cfg)` with the same configuration goes on" in text
    assert "![loss]" not in text


def test_the_summary_of_a_run_without_rows(tmp_path, make_history):
    history = make_history([])
    text = write_summary(history.path.parent, history, {}, "failed").read_text()
    assert "| optimizer steps | 0 of 100 |" in text and "tokens" not in text


def test_a_loss_that_is_not_finite_is_named(make_history):
    history = make_history([3.0, math.nan])
    text = write_summary(history.path.parent, history, {}, "failed").read_text()
    assert "| training loss, last logged | not finite (perplexity not finite) |" in text
