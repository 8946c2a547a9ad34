"""A user's mistake is shown briefly to whoever looks, and in full to everyone else."""

import subprocess
import sys

import pytest
from IPython.core.interactiveshell import InteractiveShell

from minimind_nb import errors
from minimind_nb.data import jsonl
from minimind_nb.launch.outcome import TrainingFailed
from minimind_nb.session import Session
from minimind_nb.training.runs import runs

HINT = "Type %tb for the full traceback."


@pytest.fixture
def show(tmp_path, monkeypatch, capsys):
    """A function that runs a cell with the names given, and returns what it showed."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shell = InteractiveShell.instance(colors="nocolor")
    errors.show_briefly()

    def run(code, **names):
        shell.push(names)
        shell.run_cell(code)
        return capsys.readouterr().out

    yield run
    InteractiveShell.clear_instance()


def test_a_mistake_is_one_line_and_tb_has_the_rest(show):
    shown = show("runs('nowhere')", runs=runs)
    assert shown.startswith("FileNotFoundError: nowhere is not a folder; expected the ")
    assert shown.strip().endswith(HINT)
    assert "Traceback" not in shown and len(shown.strip().splitlines()) == 3
    traceback = show("%tb")
    assert "Traceback" in traceback and "root.is_dir()" in traceback
    assert HINT not in traceback


CELLS = {
    "mm.TrainConfig(epoch=3)": "ValueError: the configuration has a problem:\n",
    "mm.TrainConfig(epochs=-1)": "ValueError: the configuration has a problem:\n",
    "mm.Run('nowhere')": "FileNotFoundError: ",
    "mm.train('a.jsonl', wiew=1)": "ValueError: the configuration has a problem:\n",
    "mm.load('nowhere')": "FileNotFoundError: ",
}


def test_every_public_name_does_so_in_a_shell_of_its_own():
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance(colors='nocolor')\n"
        "shell.run_cell('import minimind_nb as mm')\n"
        f"for cell in {[*CELLS]}:\n"
        "    shell.run_cell(cell)\n"
        "    print('=' * 9)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shown = done.stdout.split("=" * 9 + "\n")[:-1]
    for text, begin in zip(shown, CELLS.values(), strict=True):
        assert text.startswith(begin)
        assert text.strip().endswith(HINT)


def fail(error):
    raise error


def test_errors_of_other_kinds_and_places_keep_their_traceback(show, monkeypatch):
    assert "Traceback" in show("fail(error)", fail=fail, error=ValueError("x"))
    monkeypatch.setitem(fail.__globals__, "__name__", "minimind_nb.data.jsonl")
    for error in (KeyError("x"), AssertionError("x"), ZeroDivisionError("x")):
        assert "Traceback" in show("fail(error)", fail=fail, error=error)
    shown = show("fail(error)", fail=fail, error=TrainingFailed("x"))
    assert shown.startswith("TrainingFailed: x\n"), "the same place, a known kind"


def test_what_python_raises_inside_of_the_package_keeps_its_traceback(show):
    assert "Traceback" in show("broken(1, 2)", broken=jsonl.read_rows)


def test_a_batch_run_shows_the_traceback(show, monkeypatch):
    batch = Session("kaggle", batch=True)
    monkeypatch.setattr(errors, "current_session", lambda: batch)
    assert "Traceback" in show("runs('nowhere')", runs=runs)
