import math

import numpy as np
import pytest

from minimind_nb.monitor.charts import Chart
from minimind_nb.monitor.curves import choose_smoothing, smooth


def curves(history, y, most=2_000):
    """Mean values by name."""
    found = Chart([history]).data(most)["ys"][y]["curves"]
    return {curve["name"]: curve["mean"].tolist() for curve in found}


def test_smoothing_is_corrected_for_its_short_start_and_ends_at_gaps():
    one = np.ones(6, int)
    mean = np.array([4.0, 2.0, math.inf, 1.0, math.nan, 7.0])
    averages = smooth(mean, one, 0.5)
    assert averages[:2].tolist() == [4.0, pytest.approx(8 / 3)]
    np.testing.assert_equal(averages[[2, 4]], [math.inf, math.nan])
    assert averages[[3, 5]].tolist() == [1.0, 7.0]
    assert smooth(mean[:2], one[:2], 0.0).tolist() == [4.0, 2.0]
    in_buckets = smooth(np.array([4.0, 2.0]), np.array([2, 3]), 0.5)
    apart = smooth(np.array([4.0, 4, 2, 2, 2]), np.ones(5, int), 0.5)
    assert in_buckets[-1] == pytest.approx(apart[-1])


def test_the_smoothing_grows_with_the_rows_unless_it_is_set():
    for rows, weight in ((0, 0.0), (89, 0.0), (120, 0.5), (600, 0.9), (10**4, 0.99)):
        assert choose_smoothing(rows) == weight
    assert choose_smoothing(10, 0.3) == 0.3
    for asked in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="is out of range; expected 0"):
            choose_smoothing(10, asked)


def test_each_quantity_has_its_curves(make_history):
    history = make_history([4.0, 3.0], [(0, 4.5), (2, 2.5)])
    assert curves(history, "loss") == {"training": [4, 3], "validation": [4.5, 2.5]}
    perplexity = curves(history, "perplexity")["training"]
    assert perplexity == pytest.approx(np.exp([4, 3]).tolist())
    assert curves(history, "bits_per_byte") == {"validation": [1.25, 1.25]}
    memory = {"process 0": [0.5, 0.5], "process 1": [0.25, 0.25]}
    assert curves(history, "peak_memory_gib") == memory
    grid = Chart([history]).data()["runs"][0]["train"]
    assert grid["step"].tolist() == [1, 2]
    assert grid["tokens"].tolist() == [4000, 8000]
    assert grid["minutes"].tolist() == pytest.approx([2 / 60, 4 / 60])


def test_processes_may_come_and_go(make_history, add_rows):
    history = make_history([4.0])
    add_rows(history, 2, peak_memory_gib=[0.75])
    np.testing.assert_equal(
        curves(history, "peak_memory_gib"),
        {"process 0": [0.5, 0.75], "process 1": [0.25, math.nan]},
    )


def test_a_mixture_has_a_curve_for_each_expert(mixture):
    experts = Chart([mixture]).data()["ys"]["expert_load"]["curves"]
    assert [one["name"] for one in experts] == [f"expert {n}" for n in range(4)]
    last = [one["mean"][1] for one in experts]
    assert last == pytest.approx([0.175, 0.225, 0.275, 0.325])


def test_losses_by_file_have_the_numbers_of_the_files(make_history):
    history = make_history([4.0])
    history.rows.append(
        {"kind": "eval", "step": 1, "loss": 2.5, "loss_by_file": [2.0, 3.0]}
    )
    assert curves(history, "loss_by_file") == {"file 0": [2.0], "file 1": [3.0]}


def test_values_that_are_not_finite_are_gaps_and_are_counted(make_history):
    history = make_history([4.0, math.nan, 3.0, math.inf, 1e308])
    (curve,) = Chart([history]).data()["ys"]["loss"]["curves"]
    np.testing.assert_equal(curve["mean"], [4, math.inf, 3, math.inf, math.inf])
    overflow = make_history([1.0, math.inf, 800.0], name="overflow")
    (perplexity,) = curves(overflow, "perplexity").values()
    assert perplexity == [pytest.approx(math.e), math.inf, math.inf]


def test_long_runs_keep_the_least_and_the_greatest_of_each_bucket(make_history):
    history = make_history()
    losses = np.linspace(3, 2, 9_000)
    losses[[1234, 6000, 7000]] = 50, -7, math.nan
    history.rows = [
        {"kind": "train", "step": n, "tokens": 9 * n, "seconds": n, "loss": float(loss)}
        for n, loss in enumerate(losses, 1)
    ]
    history.rows[-1] |= {"tokens_per_second": 9.0, "skipped_steps": 0}
    history.rows[-1] |= {"peak_memory_gib": [0.1], "fill": 1.0}
    (curve,) = Chart([history]).data(600)["ys"]["loss"]["curves"]
    grid = Chart([history]).data(600)["runs"][0]["train"]
    assert len(curve["mean"]) == 300 and grid["rows"].sum() == 9_000
    assert (
        np.nanmin(curve["low"]),
        curve["high"][np.isfinite(curve["high"])].max(),
    ) == (-7, 50)
    (gap,) = np.flatnonzero(np.isinf(curve["mean"]))
    assert abs(grid["step"][gap] - 7000) <= grid["rows"][gap]
