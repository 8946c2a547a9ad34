import logging
import re
import subprocess
import sys

import nbformat
import papermill
import pytest

from minimind_nb.monitor import live
from minimind_nb.monitor.live import (
    CellView,
    TerminalView,
    View,
    choose_view,
)
from minimind_nb.monitor.metrics import History, MetricsLog
from minimind_nb.storage.run_folder import RunFolder


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


def test_the_view_is_chosen_by_what_is_asked_for(monkeypatch):
    assert type(choose_view(False)) is View
    assert isinstance(choose_view(None), TerminalView)
    assert isinstance(choose_view(True), TerminalView)
    assert type(choose_view(print)) is View
    monkeypatch.setattr(live, "running_kernel", object)
    assert isinstance(choose_view(None), CellView)
    with pytest.raises(TypeError, match=r"view=3; expected None"):
        choose_view(3)


def test_a_callback_gets_the_history_when_it_has_new_rows(make_history, add_rows):
    history, got = make_history([3.0]), []
    view = View(lambda seen: got.append(len(seen.rows)))
    view.update(history)
    add_rows(history, 2)
    view.update(history)
    view.finish(history, "finished")
    assert got == [2, 3]


@pytest.mark.fault("F113")
def test_a_failing_view_never_reaches_the_training(make_history, add_rows, capsys):
    history, calls = make_history([3.0]), []

    def broken(_):
        calls.append(1)
        raise ZeroDivisionError("no luck")

    view = View(broken)
    for step in range(2, 12):
        add_rows(history, step)
        view.attempt(view.update, history)
    assert len(calls) == 10
    error = "View.update failed (ZeroDivisionError: no luck); the training"
    assert capsys.readouterr().err.count(error) == 1


def test_what_follows_a_run_cannot_fail_it(capsys):
    def save_picture(folder):
        raise OSError(f"{folder} is full")

    View().attempt(save_picture, "out")
    assert "save_picture failed (OSError: out is full)" in capsys.readouterr().err


def test_log_messages_of_the_package_are_notes_while_a_view_is_attached(capsys, caplog):
    package, logger = (logging.getLogger(f"minimind_nb{n}") for n in ("", ".training"))
    before = package.level, package.propagate, [*package.handlers]
    with TerminalView().attached():
        logger.info("%d rows were left out", 3)
        logger.debug("never shown")
        logging.getLogger("other").warning("not ours")
    assert capsys.readouterr().err == "3 rows were left out\n"
    assert (package.level, package.propagate, package.handlers) == before
    logger.info("nobody asked for it")
    logger.warning("shown as logging is set up")
    assert caplog.messages == ["not ours", "shown as logging is set up"]
    assert capsys.readouterr().err == ""


def test_a_silent_view_keeps_log_messages_to_itself(caplog, capsys):
    view = View()
    with pytest.raises(ZeroDivisionError), view.attached():
        logging.getLogger("minimind_nb.data").warning("3 rows were left out")
        raise ZeroDivisionError
    assert view.notes == ["3 rows were left out"]
    assert (caplog.messages, capsys.readouterr().err) == ([], "")
    assert not logging.getLogger("minimind_nb").handlers


def test_an_interrupt_passes_through_a_view(make_history):
    def interrupted(_):
        raise KeyboardInterrupt

    view = View(interrupted)
    with pytest.raises(KeyboardInterrupt):
        view.attempt(view.update, make_history([3.0]))


def test_a_terminal_without_a_screen_gets_one_line_for_each_row(
    make_history, add_rows, capsys
):
    history, view = make_history(total=10), TerminalView()
    view.note("3 rows were left out")
    view.update(history)
    add_rows(history, 2)
    view.update(history)
    view.update(history)
    view.finish(history, "interrupted")
    line = (
        "step 2 of 10 · loss 3.000 (perplexity 20.09) · time left 0:00:16 · "
        "text tokens/s 2,000"
    )
    assert capsys.readouterr().err.splitlines() == [
        "3 rows were left out",
        *2 * [line],
        "Stopped: interrupted. Nothing is saved yet; train again with the same "
        "settings to start.",
    ]


def test_a_step_has_one_line_and_the_last_one_only_the_outcome(
    make_history, add_rows, capsys
):
    history, view = make_history([], [(0, 5.0)], total=2), TerminalView()
    view.update(history)
    for step in (1, 2):
        add_rows(history, step)
        view.update(history)
        with MetricsLog(history.path) as log:
            log.append("eval", step=step, loss=4.0 - step)
        history.refresh()
        view.update(history)
    view.finish(history, "finished")
    lines = capsys.readouterr().err.splitlines()
    starts = ["step 0 of 2", "step 1 of 2", "step 2 of 2", "Finished. T"]
    assert [line[:11] for line in lines] == starts
    assert "validation loss 2.000" in lines[-2]


@pytest.mark.fault("F27")
def test_a_save_that_fails_is_shown_until_one_succeeds(make_history, add_rows, capsys):
    history, view = make_history(), TerminalView()
    for step, event in enumerate(("save", "save_failed", "save"), start=1):
        with MetricsLog(history.path) as log:
            error = {"error": "the disk is full"} if event == "save_failed" else {}
            log.append("event", event=event, step=step, **error)
        add_rows(history, step)
        view.update(history)
    _, second, third = capsys.readouterr().err.splitlines()
    assert second.endswith(" · not saved at step 2: the disk is full")
    assert "saved" not in third


def test_a_terminal_with_a_screen_gets_a_bar(
    make_history, add_rows, monkeypatch, capsys
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    history, view = make_history([5.0], total=10), TerminalView()
    view.update(history)
    add_rows(history, 2)
    view.update(history)
    view.finish(history, "finished")
    shown = capsys.readouterr().err
    assert re.search(r"\r█+ +step 2 of 10 · loss 3", shown)
    assert "\nFinished. Try it" in shown
    assert not view.failures


def test_a_cell_has_one_output_that_ends_as_the_result(
    make_history, add_rows, add_answers, cell
):
    view, clock, shown = cell
    history = make_history(total=10)
    view.note("an <earlier> run")
    view.update(history)
    add_rows(history, 1, 2)
    clock.now += live.REDRAW_SECONDS
    view.update(history)
    page = shown[-1]["text/html"]
    assert '<progress value="2" max="10">' in page and "starting the processes" in page
    assert "2 of 10" in page and "0.50, 0.25" in page
    assert "an &lt;earlier&gt; run" in page
    RunFolder(history.path.parent).checkpoint_folder(2).mkdir(parents=True)
    add_answers(history, 1, 2, 3, prompts=["<q>"])
    view.finish(history, "interrupted")
    assert "<th>&lt;q&gt;</th>" in shown[-1]["text/html"]
    assert "<td>A0, 2</td>" in shown[-1]["text/html"], "beside the newest"
    assert "A0, 1<" not in shown[-1]["text/html"]
    *live_bundles, final = [bundle.keys() for bundle in shown]
    assert all(kinds == {"text/html", "text/plain"} for kinds in live_bundles)
    assert final == {"text/html", "text/plain", "image/png"}
    page, text = shown[-1]["text/html"], shown[-1]["text/plain"]
    said = "Stopped: interrupted. Saved at step 2 of 10; run this cell again to resume."
    assert text.splitlines()[0] == "an <earlier> run"
    assert text.splitlines()[1:3] == ["pretrain_64", said]
    assert page.count(f"</div>{said}<div") == 1 and "<progress" not in page
    assert page.count('class="faint">loss') == 1
    assert "data:image/png;base64,iVBORw0KGgo" in page
    assert not view.failures


def test_a_cell_is_not_redrawn_without_need(make_history, add_rows, cell, monkeypatch):
    view, clock, shown = cell
    history, draws = make_history(), []
    monkeypatch.setattr(view, "_chart", lambda *_: draws.append(clock.now))
    view.update(history)
    for tick in range(40):
        clock.now = 100.0 + tick / 2
        if tick <= 20:
            add_rows(history, tick + 1)
        view.update(history)
    assert draws == [100.0, 105.0, 110.0]
    assert len(shown) == len(draws)


def test_updates_that_take_long_are_made_less_often(make_history, add_rows, cell):
    view, clock, shown = cell
    history = make_history(total=1000)

    def slow(*_):
        clock.now += 1.0

    view._chart = slow
    began = clock.now
    while clock.now < began + 200:
        add_rows(history, int(clock.now))
        view.update(history)
        clock.now += 1.0
    assert len(shown) == 200 * live.LARGEST_SHARE


def test_a_batch_run_also_writes_plain_lines_to_the_log(
    make_history, add_rows, monkeypatch, cell
):
    _, clock, _ = cell
    lines = []
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr("os.write", lambda _, line: lines.append(line.decode()))
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    view, history = CellView(clock), make_history(total=20)
    monkeypatch.setattr(view, "_chart", lambda *_: None)
    for step in range(1, 13):
        add_rows(history, step)
        view.update(history)
        clock.now += 10
    view.finish(history, "finished")
    starts = ["step 1 of 20", "step 7 of 20", "pretrain_64\nFin"]
    assert [
        line[: len(start)] for line, start in zip(lines, starts, strict=True)
    ] == starts


def test_a_cell_goes_on_without_a_chart_when_drawing_fails(
    make_history, add_rows, cell, monkeypatch, capsys
):
    def broken(*_, **__):
        raise RuntimeError("no fonts")

    view, clock, shown = cell
    history = make_history([4.0], total=10)
    for name in ("png", "html"):
        monkeypatch.setattr(f"minimind_nb.monitor.charts.Chart.{name}", broken)
    view.update(history)
    for step in range(2, 10):
        clock.now += 10
        add_rows(history, step)
        view.update(history)
    assert "9 of 10" in shown[-1]["text/html"]
    view.finish(history, "finished")
    assert "9 of 10" in shown[-1]["text/html"] and "Try it" in shown[-1]["text/html"]
    assert capsys.readouterr().err.count("no fonts") == 2


def test_a_run_without_rows_ends_as_text(tmp_path, cell):
    view, _, shown = cell
    history = History(tmp_path / "run" / "metrics.jsonl")
    view.update(history)
    view.finish(history, "failed")
    said = "Nothing is saved yet; run this cell again to start."
    assert shown[-1]["text/plain"] == f"run\nFailed. {said}\n  step  0"
    assert said in shown[-1]["text/html"] and "<img" not in shown[-1]["text/html"]


def test_log_terminal_view_and_follower_load_no_heavy_library():
    code = (
        "import sys; from minimind_nb.monitor import live, metrics, wandb_follower\n"
        "view = live.choose_view(None); view.update(metrics.History('none'))\n"
        "heavy = {'torch', 'matplotlib', 'IPython', 'ipywidgets', 'numpy', 'wandb'}\n"
        "print(heavy & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


CELL = """
import sys
from minimind_nb.monitor.live import choose_view
from minimind_nb.monitor.metrics import History, MetricsLog

view, history = choose_view(), History({path!r})
view.update(history)
with MetricsLog({path!r}) as log:
    for step in (1, 2, 3):
        log.append(
            "train", step=step, seconds=float(step), tokens=step, loss=4.0 - step,
            tokens_per_second=1.0, skipped_steps=0, peak_memory_gib=[0.5],
        )
        history.refresh()
        view.update(history)
assert "matplotlib" not in sys.modules
view.finish(history, "finished")
assert (type(view).__name__, view.failures) == ("CellView", [])
"""


def test_the_cell_of_an_executed_notebook_holds_one_output(tmp_path):
    path = str(tmp_path / "metrics.jsonl")
    cells = [nbformat.v4.new_code_cell(CELL.format(path=path).strip())]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(
        cells=cells,
        metadata={"kernelspec": kernel, "language_info": {"name": "python"}},
    )
    nbformat.write(notebook, tmp_path / "in.ipynb")
    executed = papermill.execute_notebook(
        tmp_path / "in.ipynb", tmp_path / "out.ipynb", progress_bar=False
    )
    (output,) = executed.cells[0].outputs
    assert output["output_type"] == "display_data"
    assert output["data"].keys() == {"text/html", "text/plain", "image/png"}
    assert output["data"]["text/html"].count("data:image/png;base64,iVBORw0KGgo") == 1
    assert output["data"]["text/plain"].splitlines()[1].startswith("Finished. Try it")
