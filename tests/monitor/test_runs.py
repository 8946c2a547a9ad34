import json
import os
from types import SimpleNamespace

import pytest

from minimind_nb.config import PRESETS, TrainConfig, resolve
from minimind_nb.monitor.charts import Chart
from minimind_nb.training.runs import Run, runs, save_chart, write_summary

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
    title, note, step, *_ = repr(again).splitlines()
    assert title == f"Run('{run.folder}')"
    assert note == "finished"
    assert step.split() == ["step", "3", "of", "3"]
    add_rows(run.history, 4, loss=1.0)
    assert again.history.column("train", "loss") == [5.0, 4.0, 3.0, 1.0]


def test_a_run_is_a_card_in_a_cell_without_its_chart(run):
    card = run._repr_html_()
    assert card.count("pretrain_64") == 1
    assert "Finished. Try it with run.generate(&quot;…&quot;)" in card
    for name, text in run.summary().items():
        assert f'<div class="faint">{name}</div>{text}</div>' in card
    assert "<img" not in card and "<script" not in card


@pytest.mark.parametrize(
    ("place", "call", "passed"),
    [
        (
            "monitor.chat.chat",
            lambda run: run.chat("hi", top_k=1),
            ("hi", {"top_k": 1}),
        ),
        (
            "training.measurement.evaluate",
            lambda run: run.evaluate("a.jsonl", which="best"),
            ("a.jsonl", {"which": "best"}),
        ),
        (
            "model.export.export",
            lambda run: run.export("x.gguf", dtype="float16"),
            ("x.gguf", None, {"dtype": "float16"}),
        ),
        (
            "model.generation.generate",
            lambda run: run.generate(["a", "b"], seed=1),
            (["a", "b"], {"seed": 1}),
        ),
    ],
)
def test_a_run_passes_itself_to_the_package_s_functions(
    place, call, passed, run, monkeypatch
):
    def record(*given, **settings):
        return *given, settings

    monkeypatch.setattr("minimind_nb.model.loading.load", lambda source: [source])
    monkeypatch.setattr(f"minimind_nb.{place}", record)
    assert call(run) == (run, *passed)


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
    write_summary(run, "finished")
    text = (run.folder / "summary.md").read_text()
    for line in (
        "# pretrain_64\n",
        'Finished. Try it with run.generate("…"); raise epochs or max_steps',
        "- step: 3 of 3\n",
        "- loss: 3.000 (perplexity 20.09)\n",
        "- validation loss: 2.000 (perplexity 7.389)\n",
        "- bits per byte: 1.250\n",
        "- text tokens: 12,000 in 0:00:06\n",
        "- text tokens/s: 2,000\n",
        "- GiB of memory, each process: 0.50, 0.25\n",
        "- resumed at step: 2\n",
        "![loss](loss.png)",
        "- hidden_size: `64`\n",
        f"- weights: {weights}\n",
        f'`mm.Run("{run.folder}")`',
    ):
        assert line in text
    assert "preset" not in text and "other.pth" not in text


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {},
            "- for MiniMind's scripts: set intermediate_size=1,536; theirs is 1,408\n",
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
    (run.folder.parent / resolve(TrainConfig(**settings)).weights_name).touch()
    write_summary(run, "finished")
    text = (run.folder / "summary.md").read_text()
    assert told in text if told else "MiniMind's scripts" not in text


def test_the_summary_of_a_stopped_run_without_rows(make_history, run):
    run.history.path.unlink()
    make_history()
    write_summary(run, "time_budget")
    text = (run.folder / "summary.md").read_text()
    assert (
        "Stopped: the session's time was used up. Nothing is saved yet; train" in text
    )
    assert "- step: 0 of 100\n" in text
    assert ".pth" not in text


def test_the_summary_of_preferences_has_no_perplexity(preferences):
    folder = preferences.path.parent
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_summary(Run(folder), "finished")
    text = (folder / "summary.md").read_text()
    for line in (
        "- loss: 0.600 (accuracy 70 %, margin 0.5)\n",
        "- validation loss: 0.612 (accuracy 71 %, margin 0.434)\n",
        "- KL (nats per answer token): -0.012\n",
    ):
        assert line in text
    assert "perplexity" not in text and "bits per byte" not in text


def test_the_answers_are_a_table_of_steps_and_prompts(run, add_answers):
    add_answers(run.history, 1, 2)
    table = run.samples()
    assert table.title == "Answers"
    assert table.columns == ["step", "Q0", "Q1"]
    assert table.rows == [["1", "A0, 1", "A1, 1"], ["2", "A0, 2", "A1, 2"]]


def test_of_many_steps_some_at_even_distances_are_shown(run, add_answers):
    add_answers(run.history, *range(0, 1001, 10))
    steps = [row[0] for row in run.samples(most=5).rows]
    assert steps == ["160", "370", "580", "790", "1,000"]
    assert len(run.samples().rows) == 8
    assert [row[0] for row in run.samples(most=1).rows] == ["1,000"]


def test_a_prompt_that_came_later_has_a_column_of_its_own(run, add_answers):
    add_answers(run.history, 1, prompts=["a\nlong " + "x" * 50])
    add_answers(run.history, 2, prompts=["new"])
    table = run.samples()
    assert table.columns == ["step", "a\nlong " + "x" * 50, "new"]
    assert table.rows == [["1", "A0, 1", ""], ["2", "", "A0, 2"]]


def test_a_run_without_answers_says_so(run):
    assert repr(run.samples()).startswith(
        "Answers: none, since validations make them unless"
    )


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


def test_a_card_that_the_cell_has_already_is_not_shown_twice(run, monkeypatch):
    kernel = SimpleNamespace(execution_count=7)
    monkeypatch.setattr("minimind_nb.training.runs.running_kernel", lambda: kernel)
    with pytest.raises(NotImplementedError):
        run._ipython_display_()
    run.shown_in = 7
    assert run._ipython_display_() is None
    kernel.execution_count = 8
    with pytest.raises(NotImplementedError):
        run._ipython_display_()
