import gc
import math
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest

from minimind_nb.monitor.charts import Chart, choose_smoothing, plot_history, smooth

PNG = b"\x89PNG\r\n\x1a\n"


def line(figure, start):
    """The first curve whose legend entry starts so, as matplotlib has it."""
    lines = figure.axes[0].get_lines()
    return next(one for one in lines if str(one.get_label()).startswith(start))


def points(figure, start):
    """Its x and y values."""
    return line(figure, start).get_xydata().T


@pytest.fixture(autouse=True)
def warnings_are_errors():
    gc.collect()  # what earlier tests left open is theirs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_smoothing_is_corrected_for_its_short_start():
    assert smooth([4.0, 2.0], 0.5).tolist() == [4.0, pytest.approx(8 / 3)]
    assert smooth([3.0, 1.0], 0.0).tolist() == [3.0, 1.0]
    assert smooth([5.0] * 50, 0.99).tolist() == pytest.approx([5.0] * 50)


def test_smoothing_never_averages_past_what_is_not_finite():
    averages = smooth([4.0, 2.0, math.nan, 1.0, math.inf, 7.0], 0.9)
    assert np.isnan(averages[[2, 4]]).all()
    assert averages[3] == pytest.approx(1.0) and averages[5] == pytest.approx(7.0)


def test_the_smoothing_grows_with_the_rows_unless_it_is_set(make_history):
    history = make_history()
    for rows, weight in ((0, 0.0), (89, 0.0), (120, 0.5), (600, 0.9), (10**4, 0.99)):
        history.rows = [{"kind": "train"}] * rows
        assert choose_smoothing(history) == weight
    assert choose_smoothing(history, 0.3) == 0.3


def test_the_chart_shows_training_validation_and_perplexity(make_history):
    figure = plot_history(make_history([4.0, 3.0, 2.0], [(0, 4.5), (3, 2.5)]))
    axes: Any = figure.axes[0]
    assert points(figure, "training").tolist() == [[1, 2, 3], [4, 3, 2]]
    assert points(figure, "validation").tolist() == [[0, 3], [4.5, 2.5]]
    assert axes.get_xlabel() == "optimizer step"
    assert axes.get_ylabel() == "loss (nats per token)"
    assert axes.get_title(loc="left") == "pretrain_64"
    assert axes.texts[0].get_text().startswith("step 3 of 100 · loss 2.000")
    assert isinstance(figure, Chart) and figure._repr_png_().startswith(PNG)


@pytest.mark.parametrize(
    ("losses", "perplexities"),
    [([2.5, 2.0], [8, 9, 10, 11, 12]), ([8.8, 1.0], [5, 10, 1000, 2000, 5000])],
)
def test_the_second_scale_has_round_perplexities(make_history, losses, perplexities):
    figure = plot_history(make_history(losses))
    figure.png(40)
    second: Any = figure.axes[0].child_axes[0]
    assert second.get_ylabel().startswith("perplexity")
    assert set(perplexities) <= set(np.round(second.get_yticks(), 6))


def test_each_choice_of_x_and_y_draws_its_own_column(make_history):
    history = make_history([4.0, 3.0], [(2, 2.5)])
    tokens = plot_history(history, x="tokens")
    assert points(tokens, "training")[0].tolist() == [4000, 8000]
    minutes = plot_history(history, x="minutes", y="perplexity")
    assert points(minutes, "training")[0] == pytest.approx([2 / 60, 4 / 60])
    assert points(minutes, "training")[1] == pytest.approx(np.exp([4, 3]))


def test_preferences_have_a_loss_of_pairs_without_perplexity(preferences):
    axes: Any = plot_history(preferences).axes[0]
    assert axes.get_ylabel() == "loss (nats per pair)"
    assert not axes.child_axes
    assert (
        axes.texts[0].get_text().startswith("step 3 of 100 · loss 0.600 · validation")
    )


@pytest.mark.parametrize(
    ("y", "trained", "validated", "label"),
    [
        ("reward_margin", [0.1, 0.3, 0.5], 0.434, "reward margin (nats)"),
        ("accuracy", [0.3, 0.5, 0.7], 0.71, "accuracy (share of pairs"),
        ("kl", [0.01, 0.03, 0.05], -0.0123, "KL divergence, estimated"),
    ],
)
def test_preferences_have_curves_of_their_own(
    preferences, y, trained, validated, label
):
    figure = plot_history(preferences, y=y)
    assert points(figure, "training")[1] == pytest.approx(trained)
    assert points(figure, "validation").T.tolist() == [[3, validated]]
    axes: Any = figure.axes[0]
    assert axes.get_ylabel().startswith(label) and not axes.child_axes


def test_a_mixture_has_a_line_for_each_expert_and_the_range_over_layers(mixture):
    figure = plot_history(mixture, y="expert_load", x="tokens")
    shares = [points(figure, f"expert {number}")[1].tolist() for number in range(4)]
    assert [one[0] for one in shares] == [0.25] * 4
    assert [one[1] for one in shares] == pytest.approx([0.175, 0.225, 0.275, 0.325])
    assert points(figure, "even share")[1].tolist() == [0.25, 0.25]
    (band,) = figure.axes[0].collections
    (path,) = band.get_paths()
    assert set(np.asarray(path.vertices)[:, 1]) == {0.1, 0.25, 0.4}
    assert figure.png(30).startswith(PNG)


def test_the_load_of_a_single_row_is_drawn(make_history, add_rows):
    history = make_history()
    add_rows(history, 1, expert_load=[[0.5, 0.5]])
    assert line(plot_history(history, y="expert_load"), "expert 1").get_marker() == "o"


def test_an_infinite_loss_has_an_infinite_perplexity(make_history):
    figure = plot_history(make_history([2.0, math.inf, 1.0]), y="perplexity")
    assert points(figure, "loss not finite (1 rows)")[0].tolist() == [2]
    assert points(figure, "training")[1, [0, 2]] == pytest.approx(np.exp([2, 1]))


def test_raw_rows_stay_visible_behind_the_smoothed_curve(make_history):
    figure = plot_history(make_history([4.0, 2.0, 3.0]), smoothing=0.5)
    raw, smoothed = figure.axes[0].get_lines()
    assert np.asarray(raw.get_ydata()).tolist() == [4, 2, 3]
    assert raw.get_linewidth() < smoothed.get_linewidth()
    assert smoothed.get_label() == "training, smoothed 0.5"


def test_rows_that_are_not_finite_are_marked_and_break_the_curve(make_history):
    figure = plot_history(make_history([4.0, math.nan, 3.0, math.inf]))
    assert points(figure, "loss not finite (2 rows)")[0].tolist() == [2, 4]
    assert np.isnan(points(figure, "training")[1, [1, 3]]).all()


def test_a_resume_is_a_faint_line(make_history):
    history = make_history([4.0, 3.0, 2.0, 1.0], resume=2)
    assert points(plot_history(history), "resumed")[0].tolist() == [2, 2]
    tokens = plot_history(history, x="tokens")
    assert points(tokens, "resumed")[0].tolist() == [8000, 8000]


@pytest.mark.parametrize("losses", [[], [3.0], [math.nan], [0.0]])
def test_odd_histories_draw_without_a_warning(make_history, losses):
    history = make_history(losses, [(0, 8.8)] if losses else [])
    plot_history(history).png(30)
    plot_history(history, y="perplexity", log_x=True, log_y=True).png(30)


def test_log_axes_leave_out_step_zero(make_history):
    history = make_history([4.0, 3.0], [(0, 5.0), (2, 3.0)])
    axes = plot_history(history, log_x=True, log_y=True).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlim()[0] > 0.5


@pytest.mark.parametrize("title", ["预训练 512", "a_$_b"])
def test_titles_in_chinese_or_with_dollar_signs_do_not_warn(make_history, title):
    plot_history(make_history([3.0, 2.0]), title).png(30)


def test_choices_that_do_not_exist_are_refused(make_history, preferences):
    history = make_history([3.0])
    with pytest.raises(ValueError, match="x='epoch' is not a choice of this chart"):
        plot_history(history, x="epoch")
    with pytest.raises(ValueError, match="expected y='loss' or 'perplexity'"):
        plot_history(history, y="bits")
    with pytest.raises(ValueError, match="y='kl' is not .* y='loss' or 'perplexity'"):
        plot_history(history, y="kl")
    expected = "expected y='loss' or 'reward_margin' or 'accuracy' or 'kl'"
    with pytest.raises(ValueError, match=expected):
        plot_history(preferences, y="perplexity")
    for smoothing in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="is out of range; expected 0"):
            plot_history(history, smoothing=smoothing)


def test_a_chart_is_drawn_without_pyplot():
    code = (
        "import sys; from minimind_nb.monitor import charts, metrics\n"
        "charts.plot_history(metrics.History('none')).png()\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
