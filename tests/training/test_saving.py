"""Saves that fail: told, tried again, and at last the end of the run."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.runs import Settings, metric_rows, state_hashes, train_here

from minimind_nb.storage import verified
from minimind_nb.storage.run_folder import RunFolder
from minimind_nb.storage.verified import verify
from minimind_nb.training import checkpoint
from minimind_nb.training.trainer import Trainer


class FailingWriter:
    """Stands for `save_file` on a disk that is full at some calls."""

    def __init__(self, fails: set[int]) -> None:
        self.real = checkpoint.save_file
        self.fails = fails
        self.calls = 0

    def __call__(self, tensors: Any, path: Path) -> None:
        self.calls += 1
        if self.calls in self.fails:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        self.real(tensors, path)


@pytest.mark.fault("F27")
def test_a_save_that_fails_is_tried_again_at_the_next_interval(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", FailingWriter({1}))
    ending, folder = train_here(settings)
    assert ending == "finished"
    events = metric_rows(folder, "event", "event", "step")
    assert ("save_failed", 4) in events
    assert ("save", 8) in events
    names = [path.name for path in folder.checkpoints.iterdir()]
    assert sorted(names) == ["step_00000008", "step_00000012"], "no half folder is left"


@pytest.mark.fault("F21")
def test_what_cannot_be_made_a_file_ends_the_run_and_leaves_no_half_of_one(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.save_file

    def save_file(tensors: Any, path: Path) -> None:
        real(tensors, path)
        if path.parent.name.startswith(".step_00000008") and "optimizer" in path.name:
            raise TypeError("cannot pickle a generator")

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(TypeError, match="cannot pickle"):
        train_here(settings)
    folder = RunFolder(Path(settings["out_dir"]) / "pretrain_32")
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step_00000004"]
    assert state_hashes(folder)[0] == 4


@pytest.mark.fault("F27")
def test_a_save_that_does_not_fit_is_not_begun(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(_: Trainer) -> None:
        left = SimpleNamespace(free=1 << 10, total=1 << 20)
        monkeypatch.setattr(verified.shutil, "disk_usage", lambda _: left)

    needs = r"the disk is full: step_\d+ needs at least \d\.\d MiB, and 0.0 MiB are free; make"
    with pytest.raises(OSError, match=needs):
        train_here(settings, change=fill)
    folder = RunFolder(Path(settings["out_dir"]) / "pretrain_32")
    assert not [*folder.checkpoints.iterdir()]


@pytest.mark.fault("F27")
def test_three_in_a_row_end_the_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", FailingWriter({3, 4, 5}))
    with pytest.raises(OSError, match=r"failed \(3 in a row\): .* the disk is full"):
        train_here({**settings, "save_interval": 2})
    folder = RunFolder(Path(settings["out_dir"]) / "pretrain_32")
    assert state_hashes(folder)[0] == 2, "the last good one is kept"


def test_the_save_at_the_end_must_succeed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", FailingWriter({1}))
    with pytest.raises(OSError, match="saving at step 2 failed"):
        train_here({**settings, "max_steps": 2, "schedule": "cosine"})


def test_two_newest_checkpoints_and_the_best_are_kept(settings: Settings) -> None:
    _, folder = train_here({**settings, "save_interval": 1, "eval_interval": 1})
    kept = {path.name for path in folder.checkpoints.iterdir()}
    assert {"step_00000012", "step_00000011"} <= kept
    assert len(kept) <= 4
    best = folder.best_checkpoint()
    assert best is not None
    scores = metric_rows(folder, "eval", "loss", "step")
    found = verify(best)["val_loss"]
    assert found == pytest.approx(min(scores[1:])[0])


def test_a_checkpoint_states_the_loss_of_its_own_weights_only(
    settings: Settings,
) -> None:
    every = {"save_interval": 1, "eval_interval": 2, "max_steps": 4}
    _, folder = train_here({**settings, **every, "keep_checkpoints": 4})
    facts = [verify(path) for path in folder.checkpoint_folders()]
    assert [f["step"] for f in facts if f["val_loss"] is not None] == [4, 2]
