import json
import math
import os

import pytest

from minimind_nb.config import PRESETS, TrainConfig, resolve
from minimind_nb.monitor.charts import Chart
from minimind_nb.monitor.metrics import MetricsLog
from minimind_nb.training.runs import (
    Run,
    result_facts,
    runs,
    save_chart,
    write_summary,
)

SETTINGS = json.loads(json.dumps(vars(resolve(TrainConfig(hidden_size=64)))))
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
        "validation 2.000 (perplexity 7.389) · 12,000 text tokens · 0:00:06"
    )
    add_rows(run.history, 4, loss=1.0)
    assert again.history.column("train", "loss") == [5.0, 4.0, 3.0, 1.0]


def test_a_save_that_failed_is_in_the_summary(run):
    assert "failed" not in str(result_facts(run.history))
    with MetricsLog(run.history.path) as log:
        log.append("event", event="save_failed", step=3, error="the disk is full")
    line = "at step 3: the disk is full"
    assert result_facts(run.history)["save that failed"] == line


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


def test_the_summary_says_what_came_of_it_and_how_to_resume(run):
    weights = run.folder.parent / "pretrain_64.pth"
    for file in (weights, weights.with_name("other.pth")):
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
        "| training time | 0:00:06 |",
        "| text tokens per second | 2,000 |",
        "| peak memory (GiB, each process) | 0.50, 0.25 |",
        "| resumed at step | 2 |",
        "![loss](loss.png)",
        "| hidden_size | `64` |",
        "| weights | `../pretrain_64.pth` |",
        f'mm.load("{run.folder}")',
        "raise `epochs`",
    ):
        assert line in text
    assert "preset" not in text and "other.pth" not in text


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {},
            "| for MiniMind's scripts | set intermediate_size=1,536; theirs is 1,408 |",
        ),
        ({"qk_norm": True}, "set intermediate_size=1,536; theirs is 1,664"),
        *(({"preset": name}, None) for name in PRESETS),
    ],
)
def test_the_summary_says_where_minimind_s_scripts_build_another_width(
    settings, told, run
):
    shape = vars(resolve(TrainConfig(**settings)))
    (run.folder / "config.json").write_text(json.dumps({**CONFIG, "settings": shape}))
    write_summary(run, "finished", run.folder / "rank0.json")
    text = (run.folder / "summary.md").read_text()
    assert told in text if told else "MiniMind's scripts" not in text


def test_the_summary_of_a_stopped_run_without_rows(make_history, run):
    run.history.path.unlink()
    make_history()
    write_summary(run, "time_budget", run.folder / "none.pth")
    text = (run.folder / "summary.md").read_text()
    assert "Stopped: the session's time was used up, 20" in text
    assert "`mm.train(cfg)` resumes from the newest good checkpoint" in text
    assert "| optimizer steps | 0 of 100 |" in text
    assert "none.pth" not in text


def test_the_summary_of_preferences_has_no_perplexity(preferences):
    folder = preferences.path.parent
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_summary(Run(folder), "finished", folder / "none.pth")
    text = (folder / "summary.md").read_text()
    for line in (
        "| training loss, last logged | 0.600 (accuracy 70 %, margin 0.5) |",
        "| validation loss | 0.612 (accuracy 71 %, margin 0.434) |",
        "| KL divergence, estimated (nats per answer token) | -0.012 |",
    ):
        assert line in text
    assert "perplexity" not in text and "bits per byte" not in text


def test_the_answers_are_a_table_of_steps_and_prompts(run, add_answers):
    add_answers(run.history, 1, 2)
    table = run.samples()
    assert table.title == "How the answers of pretrain_64 change"
    assert table.columns == ["step", "Q0", "Q1"]
    assert table.rows == [["1", "A0, 1", "A1, 1"], ["2", "A0, 2", "A1, 2"]]


def test_of_many_steps_some_at_even_distances_are_shown(run, add_answers):
    add_answers(run.history, *range(0, 1001, 10))
    steps = [row[0] for row in run.samples(most=5).rows]
    assert steps == ["0", "250", "500", "750", "1,000"]
    assert len(run.samples().rows) == 8
    assert [row[0] for row in run.samples(most=1).rows] == ["0", "1,000"]


def test_a_prompt_that_came_later_has_a_column_of_its_own(run, add_answers):
    add_answers(run.history, 1, prompts=["a\nlong " + "x" * 50])
    add_answers(run.history, 2, prompts=["new"])
    table = run.samples()
    assert table.columns == ["step", "a\nlong " + "x" * 50, "new"]
    assert table.rows == [["1", "A0, 1", ""], ["2", "", "A0, 2"]]


def test_a_run_without_answers_says_so(run):
    assert repr(run.samples()).startswith("pretrain_64 has no sampled answers; every")


def test_the_metrics_of_a_run_become_a_table(run, tmp_path):
    table = run.export_csv(tmp_path / "curve.csv")
    head, *lines = table.read_text().splitlines()
    assert head.startswith("kind,step,samples,tokens,seconds,loss,")
    assert [line.split(",")[0] for line in lines] == ["train"] * 3 + ["eval"] * 2


def test_training_and_validation_rows_become_one_table(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append("event", event="start", step=0)
        log.append("eval", step=0, loss=2.5)
        log.append("sample", step=0, answer="a, b")
        log.append("train", step=1, loss=math.nan, memory=[0.5, 1], scale=None)
        log.append("train", step=2, loss=2, load=[[0.25, 0.75], [0.5, 0.5]])
    table = tmp_path / "new" / "curve.csv"
    assert Run(tmp_path).export_csv(table) == table
    columns = "memory_0,memory_1,scale,load_0_0,load_0_1,load_1_0,load_1_1"
    expected = (
        f"kind,step,loss,{columns}\neval,0,2.5,,,,,,,\ntrain,1,nan,0.5,1,,,,,\n"
        "train,2,2,,,,0.25,0.75,0.5,0.5\n"
    )
    assert table.read_text() == expected
    Run(tmp_path).export_csv(str(table))
    assert table.read_text() == expected
    assert [file.name for file in table.parent.iterdir()] == ["curve.csv"]


def test_the_runs_of_a_folder_are_listed_with_the_last_changed_first(
    run, preferences, tmp_path
):
    for folder, when in ((run.folder, 1e9), (preferences.path.parent, 1e9 + 90)):
        for file in folder.iterdir():
            os.utime(file, (when, when))
    (run.folder / "checkpoints").mkdir()
    with open(run.folder / "checkpoints" / "weights", "wb") as file:
        file.truncate(5 * 2**20)
    os.utime(file.name, (1e9, 1e9))
    table = runs(tmp_path / "out")
    assert table.title == f"Runs in {tmp_path / 'out'}"
    first, second = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (first["name"], second["name"]) == ("dpo_64", "pretrain_64")
    assert first | {"last change": ""} == {
        "name": "dpo_64", "stage": "dpo", "status": "not started", "step": "3 of 100",
        "loss": "0.600", "validation loss": "0.612", "size": "0.0 MiB",
        "last change": "",
    }  # fmt: skip
    assert second["status"] == "finished" and second["size"] == "5.0 MiB"
    assert second["last change"].startswith("2001-09-0")


def test_what_is_no_run_is_not_listed(run, tmp_path):
    out = tmp_path / "out"
    (out / "cache").mkdir()
    (out / "pretrain_64.pth").touch()
    (out / "exported").mkdir()
    (out / "exported" / "config.json").write_text('{"model_type": "llama"}')
    assert [row[0] for row in runs(out).rows] == ["pretrain_64"]


def test_a_run_without_a_row_yet_or_with_damage_is_listed(run, tmp_path):
    run.history.path.unlink()
    (run.folder / "plan.json").touch()
    (run.folder / "config.json").write_text("{")
    (row,) = runs(tmp_path / "out").rows
    assert row[:6] == ["pretrain_64", "", "finished", "0", "", ""]


def test_a_folder_without_runs_says_so(tmp_path):
    assert (
        repr(runs(tmp_path)) == f"Runs in {tmp_path}: none yet; mm.train(cfg) makes one"
    )


def test_a_folder_that_does_not_exist_says_what_to_type(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'for example mm\.runs\("out"\)'):
        runs(tmp_path / "gone")
