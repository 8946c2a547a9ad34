"""`train` as a user calls it: spawned ranks, one and several."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import Settings, metric_rows, state_hashes

import minimind_nb as mm
from minimind_nb.launch.processes import Job
from minimind_nb.launch.verdict import RankRecord
from minimind_nb.monitor.metrics import History
from minimind_nb.storage.runs import RunFolder
from minimind_nb.training import api

REPORTED = ("step", "samples", "tokens", "loss", "aux_loss", "learning_rate")


def train(settings: Settings, **changes: object) -> RunFolder:
    run = mm.train(mm.TrainConfig(**{**settings, **changes}), view=False)
    assert run.status == "finished"
    return RunFolder(run.folder)


def test_two_ranks_equal_one_over_20_steps(settings: Settings, tmp_path: Path) -> None:
    settings = {**settings, "max_steps": 20, "epochs": 5}
    one = train(settings, out_dir=str(tmp_path / "one"))
    two = train(settings, num_processes=2, batch_size=2, out_dir=str(tmp_path / "two"))
    losses = [
        [loss for (loss,) in metric_rows(folder, "train", "loss")]
        for folder in (one, two)
    ]
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    counts = ("samples", "tokens", "step")
    assert metric_rows(one, "train", *counts) == metric_rows(two, "train", *counts)
    memory = metric_rows(two, "train", "peak_memory_gib")[-1][0]
    assert len(memory) == 2


def test_three_ranks_killed_and_resumed_equal_an_unbroken_run(
    settings: Settings, tmp_path: Path
) -> None:
    """Two ranks could not show an order of additions that changes: two terms commute."""
    settings = {**settings, "num_processes": 3, "batch_size": 1, "dropout": 0.1}
    settings |= {"max_steps": 24, "save_interval": 3, "epochs": 2}
    straight = train(settings, out_dir=str(tmp_path / "straight"))
    folder = RunFolder(Path(settings["out_dir"]) / "pretrain_32")
    killed: list[int] = []

    def kill_rank_1(history: History) -> None:
        last = history.last("train")
        record = RankRecord.read(folder.record_file(1))
        if last and last["step"] >= 4 and record and not killed:
            killed.append(record.pid)
            os.kill(record.pid, signal.SIGKILL)

    with pytest.raises(mm.TrainingFailed, match="rank 1 was killed by SIGKILL at step"):
        mm.train(mm.TrainConfig(**settings), view=kill_rank_1)
    assert mm.Run(folder.root).status in ("failed", "killed")
    step = state_hashes(folder)[0]
    assert 3 <= step < 24
    train(settings)
    assert state_hashes(folder) == state_hashes(straight)
    rows = {row[0]: row for row in metric_rows(folder, "train", *REPORTED)}
    expected = {row[0]: row for row in metric_rows(straight, "train", *REPORTED)}
    assert rows == expected, "the same samples and losses, step by step"


def test_a_failure_in_one_rank_is_the_error_in_the_cell(settings: Settings) -> None:
    cfg = mm.TrainConfig(**{**settings, "max_steps": 3})
    folder = RunFolder(Path(settings["out_dir"]) / "pretrain_32")
    train(settings, max_steps=2)
    state = folder.checkpoint_folder(2) / "state.json"
    assert json.loads(state.read_text())["progress"]["step"] == 2
    weights = Path(settings["out_dir"]) / "pretrain_32.pth"
    weights.unlink()
    weights.mkdir()
    (weights / "in_the_way").touch()
    with pytest.raises(mm.TrainingFailed) as failure:
        mm.train(cfg, view=False)
    text = str(failure.value)
    assert text.startswith("rank 0 failed at step 3 of 3: OSError: saving at step 3")
    assert "Traceback (most recent call last)" in text
    assert "the same call goes on from there" in text
    assert mm.Run(folder.root).status == "failed"


def test_sigterm_saves_and_the_command_line_exits_with_143(settings: Settings) -> None:
    settings = {**settings, "max_steps": 100_000, "epochs": 20_000}
    settings |= {"save_interval": 50_000, "eval_interval": 50_000, "log_interval": 50}
    options = [part for k, v in settings.items() for part in (f"--{k}", str(v))]
    folder = RunFolder(Path(settings["out_dir"]) / "pretrain_32")
    process = subprocess.Popen(
        [sys.executable, "-m", "minimind_nb", "pretrain", *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            process.terminate()
            break
    process.stderr.read()
    assert process.wait(timeout=60) == 143
    record = RankRecord.read(folder.record_file(0))
    assert record is not None
    assert record.status == "terminated"
    assert state_hashes(folder)[0] == record.step, "no step was lost"


@pytest.mark.parametrize(
    ("phase", "starts"), [("meeting", 2), ("training", 1), ("startup", 1)]
)
def test_only_ranks_that_did_not_meet_are_started_once_more(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, phase: str, starts: int
) -> None:
    jobs: list[Job] = []

    def fail(job: Job, on_poll: object) -> str:
        jobs.append(job)
        raise mm.TrainingFailed("no answer", 0, phase)

    monkeypatch.setattr(api, "run_processes", fail)
    with pytest.raises(mm.TrainingFailed, match="no answer"):
        mm.train(mm.TrainConfig(**settings), view=False)
    assert len(jobs) == starts


def test_gpus_that_do_not_meet_are_tried_without_p2p_and_then_without_shm() -> None:
    assert api._ENVIRONMENTS["cuda"] == [
        {},
        {"NCCL_P2P_DISABLE": "1"},
        {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
    ]
