import math

from minimind_nb.monitor.metrics import MetricsLog
from minimind_nb.monitor.progress import (
    duration,
    loss_text,
    outcome,
    position,
    progress_line,
    seconds_left,
)


def test_time_left_is_steps_left_at_the_recent_speed(make_history, add_rows):
    history = make_history([3.0] * 40, total=100)
    assert position(history) == (40, 100)
    assert seconds_left(history) == 60 * 2.0
    for step in range(41, 61):
        add_rows(history, step, seconds=80.0 + 10.0 * (step - 40))
    assert seconds_left(history) == 40 * 10.0


def test_the_speed_before_a_resume_does_not_count(make_history, add_rows):
    history = make_history([3.0] * 10, total=20, resume=10)
    assert seconds_left(history) is None
    add_rows(history, 11, seconds=25.0)
    assert seconds_left(history) == 9 * 5.0


def test_before_the_first_row_there_is_no_total(make_history):
    history = make_history(total=None)
    assert progress_line(history) == outcome(history) == "step 0"


def test_the_plain_line(make_history, add_rows):
    history = make_history([5.0, 3.2109], [(2, 3.5)], total=1800)
    assert progress_line(history) == (
        "step 2/1,800 (0%)  time left 0:59:56  loss 3.211 (perplexity 24.8)  "
        "validation 3.500 (perplexity 33.12)  text tokens/s 2,000"
    )
    add_rows(history, 3, loss=math.nan, skipped_steps=2)
    assert "loss nan (perplexity nan)" in progress_line(history)
    assert progress_line(history).endswith("skipped steps 2")


def test_the_last_line(make_history):
    history = make_history([2.0], [(0, 4.0), (1, 3.0)], total=1)
    assert outcome(history, "time_budget") == (
        "stopped: the session's time was used up · step 1 of 1 · loss 2.000 · "
        "validation 3.000 (perplexity 20.09) · 4,000 text tokens · 0:00:02"
    )


def test_the_last_line_of_a_run_that_was_killed_says_what_is_saved(make_history):
    history = make_history([2.0], total=3)
    assert outcome(history, "killed").endswith(" · 0:00:02 · not saved")
    with MetricsLog(history.path) as log:
        log.append("event", event="save", step=1)
        log.append("event", event="save_failed", step=2, error="the disk is full")
    history.refresh()
    assert outcome(history, "killed").startswith("killed · step 2 of 3 · loss")
    assert outcome(history, "killed").endswith(" · last save at step 1")


def test_preferences_have_accuracy_and_margin_and_no_perplexity(preferences):
    assert progress_line(preferences) == (
        "step 3/100 (3%)  time left 0:03:14  loss 0.600 (accuracy 70 %, margin 0.5)  "
        "validation 0.612 (accuracy 71 %, margin 0.434)  text tokens/s 2,000"
    )
    assert outcome(preferences) == (
        "step 3 of 100 · loss 0.600 · validation 0.612 (accuracy 71 %, margin 0.434) · "
        "12,000 text tokens · 0:00:06"
    )


def test_durations():
    assert duration(59.6) == "0:01:00"
    assert duration(183_600) == "2 days, 3:00:00"


def test_perplexity_never_overflows():
    losses = [0.0, 8.8, 20.0, 1e4, math.inf]
    texts = [loss_text({"loss": loss}).partition(" ")[2] for loss in losses]
    numbers = ["1", "6,634", "4.852e+08", "inf", "inf"]
    assert texts == [f"(perplexity {number})" for number in numbers]
