import math

import pytest

from minimind_nb.monitor.metrics import MetricsLog
from minimind_nb.monitor.progress import (
    count,
    describe,
    describe_end,
    duration,
    measure,
    perplexity,
    perplexity_text,
)


def test_time_left_is_steps_left_at_the_recent_speed(make_history):
    progress = measure(make_history([5.0, 4.0, 3.0, 2.5], total=100))
    assert (progress.step, progress.total_steps) == (4, 100)
    assert progress.seconds_left == 96 * 2.0
    assert progress.fraction == 0.04


def test_only_the_last_rows_count_for_the_speed(make_history):
    history = make_history([3.0] * 40, total=100)
    with MetricsLog(history.path) as log:
        for step in range(41, 61):
            log.append("train", step=step, seconds=80.0 + 10.0 * (step - 40), loss=3.0)
    history.refresh()
    assert measure(history).seconds_left == 40 * 10.0


def test_the_speed_before_a_resume_does_not_count(make_history):
    history = make_history([3.0] * 10, total=20, resume=10)
    assert measure(history).seconds_left is None
    with MetricsLog(history.path) as log:
        log.append("train", step=11, seconds=25.0, loss=2.0)
    history.refresh()
    assert measure(history).seconds_left == 9 * 5.0


def test_before_the_first_row_the_plan_gives_the_total(make_history):
    history = make_history([], total=None)
    progress = measure(history, {"total_steps": 50})
    assert (progress.step, progress.total_steps, progress.loss) == (0, 50, None)
    assert progress.seconds_left is None
    assert describe(progress) == "step 0/50 (0 %)"
    assert measure(history).fraction == 0.0


def test_the_plain_line(make_history):
    history = make_history([5.0, 3.2109], total=1800)
    assert describe(measure(history)) == (
        "step 2/1,800 (0 %)  loss 3.211  ppl 24.8  lr 5.0e-04  2,000 tok/s  "
        "59 min 56 s left"
    )
    with MetricsLog(history.path) as log:
        log.append("train", step=3, loss=math.nan, skipped_steps=2)
    history.refresh()
    assert "loss not finite  ppl not finite  2 skipped" in describe(measure(history))


def test_the_last_line(make_history):
    history = make_history([2.0], [(0, 4.0), (1, 3.0)], total=1)
    assert describe_end(measure(history), "time_budget") == (
        "stopped: the session's time was used up · step 1 of 1 (100 %) · "
        "loss 2.000 (perplexity 7.39) · validation 3.000 (perplexity 20.1) · "
        "4 k text tokens · 2 s of training"
    )


def test_the_lowest_validation_loss_ignores_what_is_not_finite(make_history):
    history = make_history([2.0], [(0, 4.0), (1, 3.0), (2, math.nan), (3, 3.5)])
    assert measure(history).lowest_validation_loss == 3.0
    assert measure(history).validation_loss == 3.5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"), (59.6, "1 min 00 s"), (250, "4 min 10 s"),
        (11_100, "3 h 05 min"), (183_600, "2 d 3 h"), (math.inf, "unknown time"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (999.9, "1 k"), (12_345, "12.3 k"), (3.2e6, "3.2 M"),
     (999_800, "1 M"), (1.5e9, "1.5 B")],
)  # fmt: skip
def test_counts(number, text):
    assert count(number) == text


def test_perplexity_never_overflows():
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf
    assert perplexity_text(1e4) == "not finite"
    assert perplexity_text(8.8) == "6,634"
    assert perplexity_text(20.0) == "4.9e+08"
