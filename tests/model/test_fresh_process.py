"""Code in a process of its own: what it gets, and what is said where it fails."""

import pytest

from minimind_nb.model import fresh_process
from minimind_nb.model.fresh_process import run_fresh


def test_the_code_gets_its_arguments_and_no_network(tmp_path):
    code = (
        "import os, sys, pathlib\n"
        "said = os.environ['HF_HUB_OFFLINE'] + sys.argv[1]\n"
        "pathlib.Path(sys.argv[2]).write_text(said)"
    )
    run_fresh(code, 7, tmp_path / "said", failed="it failed")
    assert (tmp_path / "said").read_text() == "17"


def test_code_that_fails_is_quoted():
    with pytest.raises(RuntimeError, match="(?s)^it failed:\n.*ZeroDivisionError"):
        run_fresh("1 / 0", failed="it failed")


def test_code_that_never_ends_is_ended(monkeypatch):
    monkeypatch.setattr(fresh_process, "_SECONDS", 0.5)
    with pytest.raises(RuntimeError, match="^it failed: it takes longer than 0 min"):
        run_fresh("import time; time.sleep(60)", failed="it failed")
