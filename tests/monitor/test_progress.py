import math

from minimind_nb.config import flops_per_token
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.monitor.metrics import MetricsLog
from minimind_nb.monitor.progress import (
    activity,
    duration,
    figures,
    loss_text,
    outcome,
    position,
    result,
    seconds_left,
    what_next,
)
from minimind_nb.storage.run_folder import RunFolder


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


def test_what_is_next_says_what_is_saved_and_how_it_goes_on(make_history):
    history = make_history([2.0], total=3000)
    assert what_next(history, "killed") == (
        "Nothing is saved yet; train again with the same settings to start."
    )
    folder = RunFolder(history.path.parent)
    for step in (7, 2000):
        folder.checkpoint_folder(step).mkdir(parents=True)
    for status in ("time_budget", "interrupted", "terminated", "killed", "failed"):
        assert what_next(history, status, "run this cell again") == (
            "Saved at step 2,000 of 3,000; run this cell again to resume."
        )
    assert "run.plot()" in what_next(history, "running")
    assert what_next(history, "finished").startswith('Try it with run.generate("…")')
    chats = make_history(stage="sft", name="out/sft_64")
    assert what_next(chats, "finished").startswith('Try it with run.chat("…")')


def test_what_a_run_is_at_is_read_off_its_record(make_history):
    history = make_history()
    assert activity(history) == "starting the processes"
    record = RankRecord(RunFolder(history.path.parent).record_file(0), 0)
    told = {"meeting": "starting the processes", "training": "validating"}
    for phase, text in told.items():
        record.update(phase=phase, doing="validating")
        assert activity(history) == text
    record.update(status="interrupted")
    assert activity(history) == "starting the processes", "of the session before"


def test_durations():
    assert duration(59.6) == "0:01:00"
    assert duration(183_600) == "2 days, 3:00:00"


def test_perplexity_never_overflows():
    losses = [0.0, 8.8, 20.0, 1e4, math.inf]
    texts = [loss_text({"loss": loss}).partition(" ")[2] for loss in losses]
    numbers = ["1", "6,634", "4.852e+08", "inf", "inf"]
    assert texts == [f"(perplexity {number})" for number in numbers]


def test_the_plain_line(make_history, add_rows):
    assert outcome(make_history(total=None)) == "step 0"
    history = make_history([5.0, 3.2109], [(2, 3.5)], total=1800, name="out/other")
    assert outcome(history) == (
        "step 2 of 1,800 · loss 3.211 (perplexity 24.8) · validation loss 3.500 "
        "(perplexity 33.12) · time left 0:59:56 · text tokens/s 2,000"
    )
    add_rows(history, 3, loss=math.nan)
    assert "loss nan (perplexity nan)" in outcome(history)


def test_the_result_has_every_known_figure_and_what_is_next(make_history):
    evals = [(0, 5.0), (1, 1.5), (2, 2.0)]
    history = make_history([5.0, 3.0], evals, total=2, resume=1)
    with MetricsLog(history.path) as log:
        log.append("event", event="save_failed", step=2, error="the disk is full")
        log.append("event", event="compile_failed", step=2, error="no compiler")
    history.refresh()
    facts = result(history, "interrupted", "run this cell again")
    assert facts.title == "pretrain_64"
    assert facts.note == (
        "Stopped: interrupted. Nothing is saved yet; run this cell again to start."
    )
    assert facts == figures(history)
    assert facts == {
        "step": "2 of 2",
        "loss": "3.000 (perplexity 20.09)",
        "validation loss": "2.000 (perplexity 7.389)",
        "lowest validation loss": "1.500 at step 1",
        "bits per byte": "1.250",
        "text tokens": "8,000 in 0:00:04",
        "text tokens/s": "2,000",
        "GiB of memory, each process": "0.50, 0.25",
        "skipped steps": "0",
        "resumed at step": "1",
        "not saved": "at step 2: the disk is full",
        "not compiled": "no compiler",
    }


def test_the_share_of_the_machine_s_rate_is_told_where_it_is_known(
    make_history, add_rows, write_config
):
    history = make_history([3.0], machine_flops=1e12)
    assert "of the machine's rate" not in figures(history), "without settings"
    settings = write_config(history, hidden_size=512)
    add_rows(history, 2, fill=0.984)
    share = 2000.4 * flops_per_token(settings) / 1e12
    assert figures(history)["of the machine's rate"] == f"{share:.0%}"
    assert figures(history)["fill of the rows"] == "98%"


def test_preferences_have_accuracy_and_margin_and_no_perplexity(preferences):
    shown = figures(preferences)
    assert shown["loss"] == "0.600 (accuracy 70 %, margin 0.5)"
    assert shown["validation loss"] == "0.612 (accuracy 71 %, margin 0.434)"
    assert shown["KL (nats per answer token)"] == "-0.012"
