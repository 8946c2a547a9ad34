"""The chain of sessions, with a stand-in for Kaggle that keeps versions and outputs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chain_state
import kernels
import pytest
from support.kaggle import metadata

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "support" / "kaggle_stand_in.py"
TIME_BUDGET = {"states": "QRC", "gain": 10, "status": "time_budget"}
FINISHED = {"states": "RC", "gain": 10, "status": "finished"}


@pytest.fixture
def site(tmp_path, monkeypatch, built):
    """Kaggle, to which these sessions will come; gives a function that runs a chain."""
    command = tmp_path / "bin" / "kaggle"
    command.parent.mkdir()
    code = STAND_IN.read_text()
    command.write_text(f"#!{sys.executable}\n{code}")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("KAGGLE_STAND_IN", str(tmp_path))
    copy = lambda options: shutil.copytree(built, options.out, dirs_exist_ok=True)  # noqa: E731
    monkeypatch.setattr(chain_state, "run_build", copy)
    return Site(tmp_path)


class Site:
    def __init__(self, folder):
        self.folder = folder
        self.change(kernels={}, sessions=[], quota=[30], unreadable=[])

    def change(self, **values):
        file = self.folder / "site.json"
        now = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(now | values))

    def arguments(self, *more):
        out = ["--out", str(self.folder / "out"), "--user", "ann"]
        return ["run", *out, "--poll", "0", "--wait", "0", *more]

    def run(self, *sessions, arguments=(), **values):
        """Run a chain; gives what it called, without datasets and states."""
        self.change(sessions=sessions, **values)
        kernels.main(self.arguments(*arguments))
        return self.pushes()

    def pushes(self):
        calls = (self.folder / "calls.txt").read_text().splitlines()
        assert not [line for line in calls if "SECOND" in line]
        return [Path(c.split()[3]).name for c in calls if c.startswith("kernels push")]

    def state(self):
        return json.loads((self.folder / "out" / "chain.json").read_text())

    def next(self, slug):
        folder = self.folder / "out" / "chain" / "next" / slug
        return metadata(folder), (folder / "pretrain.ipynb").read_text()


A, B = "minimind-pretrain", "minimind-pretrain-b"


def test_a_run_is_resumed_in_turns_until_it_is_finished(site, capsys):
    assert site.run(TIME_BUDGET, TIME_BUDGET, FINISHED) == [A, B, A]
    told = capsys.readouterr().out
    assert f"{B} version 1: RUNNING, 0.0 of 30 h used" in told
    assert "pretrain is finished at step 30" in told
    assert f"kaggle kernels output ann/{A} -p" in told
    values, notebook = site.next(A)
    assert values["kernel_sources"] == [f"ann/{A}", f"ann/{B}"]
    assert f"resume = '{B}/out/pretrain_32'" in notebook
    assert "min(max_session_hours or 11.5, 29.80)" in notebook
    kernels.main(site.arguments())
    assert len(site.pushes()) == 3
