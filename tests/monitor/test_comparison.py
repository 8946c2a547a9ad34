import json
import math
import warnings
from typing import Any

import pytest

from minimind_nb.monitor.charts import Chart
from minimind_nb.monitor.comparison import LEGEND_COLUMNS, STYLES, compare
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


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def curves(figure):
    """The y values of each line, thin ones and those with markers in turn."""
    return [line.get_xydata().T[1].tolist() for line in figure.axes[0].get_lines()]


def test_every_run_has_a_training_and_a_validation_curve(make_run):
    figure = compare(make_run("a"), make_run("b", [5.0, 4.0]).folder)
    assert isinstance(figure, Chart)
    assert curves(figure) == [[3, 2], [4, 2.5], [5, 4], [4, 2.5]]
    axes: Any = figure.axes[0]
    colors = [line.get_color() for line in axes.get_lines()]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    markers = [line.get_marker() for line in axes.get_lines()]
    assert markers[1] != markers[3]
    assert axes.get_title(loc="left") == "loss of 2 runs"
    assert axes.get_ylabel() == "loss (nats per token)"
    subtitle = "with markers: validation · thin: training"
    assert axes.texts[0].get_text() == subtitle


def test_the_legend_tells_what_was_set_differently(make_run):
    first = make_run("a", learning_rate=5e-4, dim=64)
    second = make_run("b", explicit=["learning_rate"], learning_rate=0.1 + 0.2, dim=128)
    lines = ["a: learning_rate 0.0005", "b: learning_rate 0.3"]
    assert legend(compare(first, second)) == lines


def test_a_long_list_of_differences_is_cut(make_run):
    names = [f"setting_{number}" for number in range(20)]
    first = make_run("a", explicit=names, **dict.fromkeys(names, 1))
    second = make_run("b", **dict.fromkeys(names, 2))
    line = legend(compare(first, second))[0]
    assert line.startswith("a: setting_0 1, setting_1 1, ") and line.endswith("…")
    assert len(line) == LEGEND_COLUMNS


def test_runs_of_one_name_and_equal_settings_are_told_apart_by_their_paths(make_run):
    runs = make_run("out/pretrain_64"), make_run("other/pretrain_64")
    assert legend(compare(*runs)) == ["out/pretrain_64", "other/pretrain_64"]
    assert legend(compare(runs[0])) == ["pretrain_64"]


def test_metrics_alone_are_enough_to_compare(make_history):
    history = make_history([6.0], name="bare")
    figure = compare(history, history.path)
    assert legend(figure) == ["bare", "bare"]
    assert curves(figure)[:3] == [[6], [], [6]]
    assert figure.axes[0].get_lines()[0].get_marker() == "o"


def test_each_choice_of_x_and_y_draws_its_own_column(make_run):
    runs = make_run("a"), make_run("b")
    figure = compare(*runs, x="minutes", y="perplexity", log_x=True, log_y=True)
    axes: Any = figure.axes[0]
    assert curves(figure)[0] == pytest.approx([math.exp(3), math.exp(2)])
    assert list(axes.get_lines()[0].get_xydata().T[0]) == pytest.approx(
        [2 / 60, 4 / 60]
    )
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    smoothed = compare(*runs, smoothing=0.5)
    assert curves(smoothed)[0] == pytest.approx([3, 7 / 3])
    assert smoothed.axes[0].texts[0].get_text().endswith("thin: training")


def test_preferences_are_compared_by_their_margins(preferences):
    figure = compare(preferences, preferences, y="reward_margin")
    assert curves(figure)[1] == [0.434]
    assert figure.axes[0].get_ylabel() == "reward margin (nats)"


def test_different_stages_are_drawn_and_said(make_run, preferences):
    axes: Any = compare(make_run("a"), preferences).axes[0]
    assert "stages pretrain, dpo: their values do not" in axes.texts[0].get_text()
    assert axes.get_ylabel() == "loss (nats per token)"


def test_only_what_every_run_has_can_be_compared(make_run, preferences, mixture):
    with pytest.raises(ValueError, match=r"y='perplexity' is .*expected y='loss'\."):
        compare(make_run("a"), preferences, y="perplexity")
    with pytest.raises(ValueError, match="y='expert_load' is not .*'perplexity'"):
        compare(mixture, y="expert_load")
    with pytest.raises(ValueError, match="x='epoch' is not a choice of this chart"):
        compare(mixture, x="epoch")


def test_eight_runs_are_told_apart_and_nine_are_too_many(make_run):
    runs = [make_run(f"run{number}") for number in range(9)]
    figure = compare(*runs[:8])
    styles = {
        (line.get_color(), line.get_marker())
        for line in figure.axes[0].get_lines()[1::2]
    }
    assert len(styles) == len(STYLES) == 8
    with pytest.raises(ValueError, match="9 runs to compare; expected 1 to 8"):
        compare(*runs)


def test_to_compare_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"0 runs to compare; .*mm\.compare\(\"out"):
        compare()


@pytest.mark.parametrize("name", ["_hidden", "a_$_b$", "预训练"])
def test_odd_names_stand_in_the_legend(make_run, name):
    figure = compare(make_run(name), make_run("b"))
    figure.png(30)
    (shown, _) = legend(figure)
    assert shown in (name, "?" * len(name))


def test_runs_without_rows_yet_say_so(make_history):
    figure = compare(make_history(name="a"), make_history(name="b"))
    assert "no rows yet" in [text.get_text() for text in figure.axes[0].texts]
    figure.png(30)
