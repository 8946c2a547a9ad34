import os
import re
import subprocess
import sys

import nbformat
import papermill
import pytest

from minimind_nb.monitor import live
from minimind_nb.monitor.live import (
    CallbackView,
    CellView,
    SilentView,
    TerminalView,
    View,
    choose_view,
    progress_html,
    write_to_log,
)
from minimind_nb.monitor.metrics import History, MetricsLog
from minimind_nb.monitor.progress import measure


class Handle:
    """A display handle that keeps what it was given."""

    def __init__(self):
        self.shown = []

    def update(self, bundle, raw):
        assert raw
        self.shown.append(bundle)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def cell(monkeypatch):
    """A cell view with a clock set by hand, and the bundles that its output held."""
    handle, clock, displays = Handle(), Clock(), []

    def display(bundle, raw, display_id):
        assert raw and display_id is True
        displays.append(bundle)
        handle.shown.append(bundle)
        return handle

    monkeypatch.setattr("IPython.display.display", display)
    view = CellView(clock)
    yield view, clock, handle.shown
    assert len(displays) <= 1


def add_rows(history, *steps):
    with MetricsLog(history.path) as log:
        for step in steps:
            log.append("train", step=step, seconds=2.0 * step, loss=3.0)
    history.refresh()


def test_the_view_is_chosen_by_what_is_asked_for(monkeypatch):
    assert isinstance(choose_view(False), SilentView)
    assert isinstance(choose_view(None), TerminalView)
    assert isinstance(choose_view(True), TerminalView)
    assert isinstance(choose_view(print), CallbackView)
    view = View()
    assert choose_view(view) is view
    monkeypatch.setattr(live, "_in_kernel", lambda: True)
    assert isinstance(choose_view(None), CellView)
    with pytest.raises(TypeError, match=r"view=3 is a int; expected None"):
        choose_view(3)


def test_a_silent_view_says_nothing(make_history, capfd):
    history, view = make_history([3.0]), choose_view(False)
    view.start(history, {"total_steps": 3})
    view.update(history)
    view.finish(history, "finished")
    assert capfd.readouterr() == ("", "")


def test_a_callback_gets_the_history_when_it_has_new_rows(make_history):
    history, got = make_history([3.0]), []
    view = CallbackView(lambda seen: got.append(len(seen.rows)))
    view.start(history)
    view.update(history)
    view.update(history)
    add_rows(history, 2)
    view.update(history)
    view.finish(history, "finished")
    assert got == [2, 3]


def test_a_failing_view_never_reaches_the_training(make_history, capsys):
    history, calls = make_history([3.0]), []

    def broken(_):
        calls.append(1)
        raise ZeroDivisionError("no luck")

    view = CallbackView(broken)
    for step in range(2, 12):
        add_rows(history, step)
        view.update(history)
    view.finish(history, "finished")
    assert view.failures == len(calls) == live.MOST_FAILURES + 1  # and the finish
    told = capsys.readouterr().err
    assert told.count("CallbackView failed (ZeroDivisionError: no luck)") == 1
    assert "training goes on" in told


def test_an_interrupt_passes_through_a_view(make_history):
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CallbackView(interrupted).update(make_history([3.0]))


def test_a_terminal_without_a_screen_gets_one_line_for_each_row(make_history, capsys):
    history = make_history([5.0], [(0, 6.0)], total=10)
    view = TerminalView()
    view.start(history)
    view.update(history)
    assert capsys.readouterr().err == ""
    add_rows(history, 2)
    view.update(history)
    view.update(history)
    assert capsys.readouterr().err == (
        "step 2/10 (20 %)  loss 3.000  ppl 20.1  16 s left\n"
    )
    with MetricsLog(history.path) as log:
        log.append("eval", step=2, loss=2.0)
    history.refresh()
    view.finish(history, "interrupted")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "step 2  validation loss 2.000  ppl 7.39"
    assert second.startswith("stopped: interrupted · step 2 of 10 (20 %) · loss 3.000")


def test_a_terminal_with_a_screen_gets_a_bar(make_history, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    history, view = make_history([5.0], total=10), TerminalView()
    view.start(history)
    add_rows(history, 2)
    view.update(history)
    view.finish(history, "finished")
    shown = capsys.readouterr().err
    assert re.search(r"\r█+ +step 2/10 \(20 %\)  loss 3.000", shown)
    assert shown.endswith("4 s of training\n") and "finished · step 2 of 10" in shown
    assert view.failures == 0


def test_a_cell_has_one_output_that_ends_as_a_picture(make_history, cell):
    view, clock, shown = cell
    history = make_history([], total=10)
    view.start(history, {"total_steps": 10})
    add_rows(history, 1, 2)
    clock.now += 1
    view.update(history)
    assert set(shown[-1]) == {"text/html", "text/plain"}
    assert '<img alt="loss so far"' in shown[-1]["text/html"]
    assert "step 2/10 (20 %)" in shown[-1]["text/html"]
    view.finish(history, "finished")
    assert set(shown[-1]) == {"image/png", "text/plain"}
    assert shown[-1]["text/plain"].startswith("finished · step 2 of 10")
    assert shown[-1]["image/png"].startswith("iVBORw0KGgo")
    assert view.failures == 0


def test_a_cell_is_not_redrawn_without_need(make_history, cell, monkeypatch):
    view, clock, shown = cell
    history, draws = make_history([4.0], total=10), []
    monkeypatch.setattr(view, "_draw", lambda *_: draws.append(clock.now))
    view.start(history)
    for tick in range(201):
        clock.now = 100.0 + tick / 10
        if tick == 100:
            add_rows(history, 2)
        view.update(history)
    assert draws == [100.0, 110.0]
    assert len(shown) == 4  # the start, the first row, the second, and ten idle seconds


def test_updates_of_a_long_run_grow_rarer(make_history, cell, monkeypatch):
    view, clock, shown = cell
    history = make_history([4.0], total=10)
    monkeypatch.setattr(view, "_draw", lambda *_: None)
    view.start(history)
    clock.now += 3600
    for tick in range(100):
        clock.now += 0.5
        add_rows(history, tick + 2)
        view.update(history)
    assert len(shown) == 1 + 5


def test_time_left_counts_down_between_rows(make_history, cell):
    view, clock, shown = cell
    history = make_history([4.0, 3.0], total=100)
    view.start(history)
    view.update(history)
    assert ">time left</div>3 min 16 s<" in shown[-1]["text/html"]
    clock.now += 60
    view.update(history)
    assert ">time left</div>2 min 16 s<" in shown[-1]["text/html"]


def test_a_cell_goes_on_without_pictures_when_drawing_fails(
    make_history, cell, monkeypatch, capsys
):
    def broken(*_):
        raise RuntimeError("no fonts")

    view, clock, shown = cell
    history = make_history([4.0], total=10)
    monkeypatch.setattr("minimind_nb.monitor.plots.plot_history", broken)
    view.start(history)
    for step in range(2, 10):
        clock.now += 10
        add_rows(history, step)
        view.update(history)
    assert "step 9/10 (90 %)" in shown[-1]["text/html"]
    view.finish(history, "finished")
    assert set(shown[-1]) == {"text/plain"}
    assert capsys.readouterr().err.count("no fonts") == 1


def test_a_stopped_run_says_so_in_its_picture(make_history, cell, monkeypatch):
    view, _, shown = cell
    history, titles = make_history([4.0]), []
    monkeypatch.setattr(view, "_draw", lambda _history, *given: titles.append(given))
    view.start(history)
    view.finish(history, "interrupted")
    assert titles[-1][0] == "pretrain_64 (stopped: interrupted)"
    view.finish(history, "finished")
    assert titles[-1][0] == "pretrain_64"


def test_a_run_without_rows_ends_as_text(tmp_path, cell):
    view, _, shown = cell
    history = History(tmp_path / "run" / "metrics.jsonl")
    view.start(history)
    view.update(history)
    view.finish(history, "failed")
    assert shown[-1] == {"text/plain": "failed · step 0"}


def test_a_batch_run_also_writes_plain_lines_to_the_log(
    make_history, monkeypatch, cell
):
    _, clock, _ = cell
    lines = []
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(live, "write_to_log", lines.append)
    view, history = CellView(clock), make_history([4.0], total=10)
    monkeypatch.setattr(view, "_draw", lambda *_: None)
    view.start(history)
    for _ in range(13):
        clock.now += 10
        view.update(history)
    view.finish(history, "finished")
    assert [line.partition(" (")[0] for line in lines] == [
        "step 1/10", "step 1/10", "finished · step 1 of 10"
    ]  # fmt: skip


def test_the_log_is_the_real_stderr_and_may_be_missing(capfd, monkeypatch):
    with open(os.dup(2), "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        write_to_log("step 1")
        assert capfd.readouterr().err == "step 1\n"
    write_to_log("the stream is closed now")


def test_names_are_escaped_in_html(make_history):
    page = progress_html("<b>&", measure(make_history([3.0])), elapsed=1.0)
    assert "<b>&lt;b&gt;&amp;</b>" in page


def test_the_terminal_view_loads_no_matplotlib():
    code = (
        "import sys; from minimind_nb.monitor import live\n"
        "view = live.choose_view(None); view.start(live.History('none'))\n"
        "print({'torch', 'matplotlib', 'IPython', 'ipywidgets'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


CELL = """
from minimind_nb.monitor.live import choose_view
from minimind_nb.monitor.metrics import History, MetricsLog

view, history = choose_view(), History({path!r})
view.start(history, {{"total_steps": 3}})
with MetricsLog({path!r}) as log:
    for step in (1, 2, 3):
        log.append("train", step=step, seconds=float(step), loss=4.0 - step)
        history.refresh()
        view.update(history)
view.finish(history, "finished")
assert (type(view).__name__, view.failures) == ("CellView", 0)
"""
CHARTS = """
from minimind_nb.monitor.plots import plot_history
plot_history(history)
---
from minimind_nb.monitor.inspector import inspect
inspect(history)
"""


def test_each_cell_of_an_executed_notebook_holds_one_picture(tmp_path):
    path = str(tmp_path / "metrics.jsonl")
    sources = [CELL.format(path=path), *CHARTS.split("---")]
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in sources]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(
        cells=cells,
        metadata={"kernelspec": kernel, "language_info": {"name": "python"}},
    )
    nbformat.write(notebook, tmp_path / "in.ipynb")
    executed = papermill.execute_notebook(
        tmp_path / "in.ipynb", tmp_path / "out.ipynb", progress_bar=False
    )
    for cell in executed.cells:
        (output,) = cell.outputs
        assert output["data"]["image/png"].startswith("iVBORw0KGgo")
    live_output = executed.cells[0].outputs[0]
    assert live_output["output_type"] == "display_data"
    assert live_output["data"]["text/plain"].startswith("finished · step 3 of 3")
