import json
import warnings
from typing import Any

import pytest

from minimind_nb.monitor.comparison import compare
from minimind_nb.monitor.picture import COLORS, LONGEST
from minimind_nb.training.runs import Run


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def make_run(make_history):
    """A function that makes a run of the given name and settings."""

    def make(name, losses=(3.0, 2.0), explicit=(), **settings):
        history = make_history(losses, [(0, 4.0), (2, 2.5)], name=name)
        settings = {"stage": "pretrain", "out_dir": name, "epochs": 1} | settings
        config = {"settings": settings, "explicit": list(explicit)}
        (history.path.parent / "config.json").write_text(json.dumps(config))
        return Run(history.path.parent)

    return make


def legend(chart):
    return [text.get_text().strip() for text in chart.figure.legends[0].get_texts()]


def curves(chart, y="loss"):
    """The mean values of each curve."""
    return [curve["mean"].tolist() for curve in chart.data()["ys"][y]["curves"]]


def finals(chart):
    """The rows of the table, by run."""
    return {row[0]: row[1:] for row in chart._table.rows}


def test_every_run_has_a_training_and_a_validation_curve(make_run):
    chart = compare(make_run("a"), make_run("b", [5.0, 4.0]).folder)
    assert curves(chart) == [[3, 2], [4, 2.5], [5, 4], [4, 2.5]]
    drawn: Any = chart.figure.axes[0].get_lines()
    validation = [line.get_color() for line in drawn if line.get_marker() == "o"]
    assert validation == [*COLORS[:2]]
    assert repr(chart).startswith("2 runs: with dots: validation\n")


def test_the_legend_tells_what_was_set_differently(make_run):
    first = make_run("a", learning_rate=5e-4, dim=64)
    second = make_run("b", explicit=["learning_rate"], learning_rate=0.3, dim=128)
    lines = ["a: learning_rate 0.0005", "b: learning_rate 0.3"]
    assert legend(compare(first, second)) == lines


def test_a_long_list_of_differences_is_cut_in_the_picture(make_run):
    names = [f"setting_{number}" for number in range(20)]
    first = make_run("a", explicit=names, **dict.fromkeys(names, 1))
    second = make_run("b", **dict.fromkeys(names, 2))
    line = legend(compare(first, second))[0]
    assert line.startswith("a: setting_0 1, setting_1 1, ") and line.endswith("…")
    assert len(line) == LONGEST


def test_runs_of_one_name_and_equal_settings_are_told_apart_by_their_paths(make_run):
    runs = make_run("out/pretrain_64"), make_run("other/pretrain_64")
    assert legend(compare(*runs)) == ["out/pretrain_64", "other/pretrain_64"]
    assert compare(runs[0]).title == "pretrain_64"


def test_metrics_alone_are_enough_to_compare(make_history):
    history = make_history([6.0], name="bare")
    chart = compare(history, history.path)
    assert legend(chart) == ["bare"]
    assert curves(chart) == [[6], [6]]


def test_the_table_has_the_ends_and_the_losses_at_what_all_have_reached(make_history):
    first = make_history([3.0] * 4, [(0, 9.0), (4, 1.0)], name="a")
    second = make_history([3.0] * 3, [(0, 8.0), (2, 5.0)], name="b")
    chart = compare(first, second)
    assert chart._table is not None
    assert chart._table.columns[-2:] == [
        "≈ loss at 8,000 tokens",
        "≈ loss at 0.1 minutes",
    ]
    assert finals(chart) == {
        "a": ["4", "16,000", "0.1", "1", "2.718", "1.25", "5", "5"],
        "b": ["3", "12,000", "0.1", "5", "148.4", "1.25", "5", "5"],
    }
    assert "loss at 8,000 tokens" in repr(chart)
    assert "loss at 8,000 tokens" in chart.html()


def test_the_table_says_nothing_of_what_was_not_validated(make_history):
    chart = compare(make_history([3.0], name="a"), make_history(name="b"))
    assert finals(chart)["a"] == ["1", "4,000", "0.0", *"–" * 5]
    assert finals(chart)["b"] == ["0", "0", "0.0", *"–" * 5]


def test_different_stages_tokenizers_and_validation_data_are_said(
    make_run, preferences
):
    chart = compare(make_run("a"), preferences)
    assert "different stages: compare bits per byte" in chart.subtitle
    assert curves(chart, "kl") == [pytest.approx([0.01, 0.03, 0.05]), [-0.0123]]

    def make(name, tokenizer, validation, text):
        run = make_run(name)
        file = run.folder / "config.json"
        hashes = {"tokenizer": tokenizer, "validation": validation}
        file.write_text(json.dumps(run.config | {"hashes": hashes}))
        (run.folder / "tokenizer").mkdir()
        (run.folder / "tokenizer/tokenizer.json").write_text(text)
        return run

    first, other = make("b", "1", "v", "{}"), make("c", "2", "w", "[]")
    template = make("d", "3", "v", "{}")  # differs, its vocabulary does not
    subtitle = compare(first, other).subtitle
    assert "different tokenizers and validation data: compare bits per" in subtitle
    assert compare(first, template).subtitle.endswith("dots: validation")


def test_what_no_run_has_cannot_be_compared(make_run, mixture):
    with pytest.raises(ValueError, match="y='kl' is not a choice"):
        compare(make_run("a"), mixture, y="kl")
    chart = compare(make_run("a"), mixture)
    names = [curve["name"] for curve in chart.data()["ys"]["expert_load"]["curves"]]
    assert names == [f"out/pretrain_64_moe, expert {n}" for n in range(4)]


def test_twelve_runs_are_told_apart(make_run):
    chart = compare(*(make_run(f"run{number}") for number in range(12)))
    lines: Any = chart.figure.legends[0].get_lines()
    looks = {(line.get_color(), str(line._dash_pattern)) for line in lines}
    assert len(looks) == len(legend(chart)) == 12


def test_to_compare_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"No run to compare; .*mm\.compare\(\"out"):
        compare()


@pytest.mark.parametrize("name", ["_hidden", "a_$_b$", "预训练"])
def test_odd_names_stand_in_the_legend(make_run, name):
    chart = compare(make_run(name), make_run("b"))
    chart.png(30)
    assert legend(chart) in ([name, "b"], ["?" * len(name), "b"])


def test_runs_without_rows_yet_say_so(make_history):
    chart = compare(make_history(name="a"), make_history(name="b"))
    assert "no rows yet" in [text.get_text() for text in chart.figure.axes[0].texts]
    chart.png(30)
