"""Runs that the code of earlier states made and left interrupted are resumed today.

`tools/make_run_fixtures.py` made them, and wrote down how that code itself resumed them.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.runs import metric_rows

import minimind_nb as mm
from minimind_nb.storage.run_folder import RunFolder

STATES = Path(__file__).parents[1] / "fixtures" / "runs"


def read_expected(state: str) -> dict[str, Any]:
    """What is known of a state's runs, by their stage."""
    return json.loads((STATES / state / "expected.json").read_text(encoding="utf-8"))


RUNS = [
    pytest.param(state.name, stage, id=f"{state.name}-{stage}")
    for state in sorted(STATES.iterdir())
    for stage in read_expected(state.name)
]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: None) -> None:
    """A folder of the test's own: paths of a fixture are relative."""
    monkeypatch.chdir(tmp_path)


def resume(state: str, stage: str, settings: dict[str, Any]) -> None:
    """Resume a copy of a run, and compare the losses with those of its own code.

    Not bit for bit: processors and versions of torch differ.
    """
    shutil.copytree(STATES / state, ".", dirs_exist_ok=True)
    expected = read_expected(state)[stage]
    folder = RunFolder(Path("runs", f"{stage}_8"))
    assert folder.status() == "interrupted"
    run = mm.train(mm.TrainConfig(**settings), view=False)
    assert run.status == "finished"
    assert Path(run.folder).resolve() == folder.root.resolve()
    resumed = [row for row in run.history.select("event") if row["event"] == "resume"]
    assert [row["step"] for row in resumed] == [expected["step"]]
    for kind in ("train", "eval"):
        rows = metric_rows(folder, kind, "step", "loss")
        found = [row for row in rows if row[0] > expected["step"]]
        assert found == [pytest.approx(row, abs=1e-4) for row in expected[kind]]


@pytest.mark.parametrize(("state", "stage"), RUNS)
def test_a_run_of_an_earlier_state_is_resumed(state: str, stage: str) -> None:
    resume(state, stage, read_expected(state)[stage]["settings"])


@pytest.mark.parametrize(("state", "stage"), RUNS)
def test_settings_that_are_left_out_are_those_of_the_run(
    state: str, stage: str
) -> None:
    names = (
        "stage",
        "out_dir",
        "hidden_size",
        "num_attention_heads",
        "device",
        "dtype",
    )
    given = read_expected(state)[stage]["settings"]
    resume(state, stage, {name: given[name] for name in names})


def test_another_number_of_processes_keeps_the_global_batch_of_the_run() -> None:
    settings = read_expected("cb07cc1")["pretrain"]["settings"]
    resume("cb07cc1", "pretrain", {**settings, "num_processes": 2})
