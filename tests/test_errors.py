"""A user's mistake is shown briefly to whoever looks, and in full to everyone else."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from IPython.core.interactiveshell import InteractiveShell

from minimind_nb import errors, session
from minimind_nb.data import jsonl
from minimind_nb.launch.outcome import TrainingFailed
from minimind_nb.monitor.metrics import History
from minimind_nb.session import Session
from minimind_nb.training.runs import runs

HINT = "Type %tb for the full traceback."


@pytest.fixture(autouse=True)
def shell(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    yield InteractiveShell.instance(colors="nocolor")
    InteractiveShell.clear_instance()


@pytest.fixture
def show(shell, capsys):
    """A function that runs a cell with the names given, and returns what it showed."""

    def run(code, **names):
        shell.push(names)
        shell.run_cell(code)
        return capsys.readouterr().out

    return run


def test_a_mistake_is_one_line_and_tb_has_the_rest(show):
    shown = show("runs('nowhere')", runs=errors.concise(runs))
    assert shown.startswith("FileNotFoundError: nowhere is not a folder; expected the ")
    assert shown.strip().endswith(HINT)
    assert "Traceback" not in shown and len(shown.strip().splitlines()) == 3
    traceback = show("%tb")
    assert "Traceback" in traceback and "root.is_dir()" in traceback
    assert HINT not in traceback


CELLS = {
    "mm.TrainConfig(epoch=3)": "ValueError: the configuration has a problem:\n",
    "mm.TrainConfig(epochs=-1)": "ValueError: the configuration has a problem:\n",
    "mm.Run('nowhere')": "FileNotFoundError: nowhere does not exist",
    "mm.train('a.jsonl', wiew=1)": "ValueError: the configuration has a problem:\n",
    "mm.train()": "TypeError: train() missing 1 required positional argument",
    "mm.runs(folder=1)": "TypeError: runs() got an unexpected keyword argument",
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


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), AttributeError("x"), AssertionError("x"), ZeroDivisionError("x")],
)
def test_errors_of_other_kinds_keep_their_traceback(show, monkeypatch, error):
    monkeypatch.setitem(fail.__globals__, "__name__", "minimind_nb.data.jsonl")
    assert "Traceback" in show("fail(error)", fail=errors.concise(fail), error=error)
    shown = show("fail(error)", fail=errors.concise(fail), error=TrainingFailed("x"))
    assert shown.startswith("TrainingFailed: x\n"), "the same place, a known kind"


def test_what_python_raises_inside_of_the_package_keeps_its_traceback(show):
    broken = errors.concise(jsonl.read_rows)
    assert "Traceback" in show("broken(1, 2)", broken=broken)
    assert "Traceback" in show("other(1)", other=errors.concise(fail))


def test_a_batch_run_and_a_script_show_the_traceback(show, monkeypatch):
    batch = Session("kaggle", batch=True)
    kernel = SimpleNamespace(get_parent=lambda: {"content": {"allow_stdin": False}})
    concise = errors.concise(runs)
    for place, parent in ((batch, None), (Session("plain"), kernel)):
        monkeypatch.setattr(session, "current_session", lambda place=place: place)
        monkeypatch.setattr(session, "running_kernel", lambda parent=parent: parent)
        assert "Traceback" in show("runs('nowhere')", runs=concise)
    monkeypatch.setattr(session, "current_session", lambda: Session("colab"))
    assert "Traceback" not in show("runs('nowhere')", runs=concise)


def test_classes_with_a_base_and_functions_keep_their_names():
    assert errors.concise(TrainingFailed) is TrainingFailed
    assert not hasattr(TrainingFailed.__init__, "__wrapped__")
    assert errors.concise(runs).__name__ == "runs"
    copy = errors.concise(type("History", (), dict(vars(History))))
    assert hasattr(copy.select, "__wrapped__") and copy.stage is History.stage


def test_a_script_gets_the_functions_themselves():
    code = "import minimind_nb as mm; print(hasattr(mm.runs, '__wrapped__'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
