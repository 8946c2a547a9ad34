"""Training within the test's own process, and looking at what it leaves."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind_nb.config import TrainConfig
from minimind_nb.launch.cancellation import StopRequest
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.storage.run_folder import RunFolder
from minimind_nb.storage.verified import hash_file
from minimind_nb.training import api, worker
from minimind_nb.training.loop import Trainer
from minimind_nb.training.preparation import Prepared, prepare

Settings = dict[str, Any]


class HeldStop(StopRequest):
    """A wish to stop that a test makes, deaf to signals."""

    def __init__(self) -> None:
        self.reason = None


Change = Callable[[Trainer], None]


def prepare_here(
    settings: Settings, on_note: Callable[[str], None] = lambda _: None
) -> Prepared:
    """A prepared run, whose folder is free again."""
    with prepare(TrainConfig(**settings), on_note) as prepared:
        return prepared


def train_here(
    settings: Settings,
    stop_at: int | None = None,
    reason: str = "interrupted",
    change: Change | None = None,
) -> tuple[str, RunFolder]:
    """Run the worker of one process in this process; `change` gets its parts first."""
    prepared = prepare_here(settings)
    payload = {**api.training_job(prepared, {}).payload, "threads": 1, "store": ""}
    stop = HeldStop()
    record = RankRecord(prepared.folder.record_file(0), 0)
    real_fit = worker.fit

    def fit(trainer: Trainer) -> str:
        trainer.record = StoppingRecord(record, stop, stop_at, reason)  # pyright: ignore[reportAttributeAccessIssue]
        if change:
            change(trainer)
        return real_fit(trainer)

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "fit", fit)
        try:
            ending = worker.run(0, payload, record, stop)
            record.update(status=ending)
        finally:
            torch.set_num_threads(threads)
    return ending, prepared.folder


class StoppingRecord:
    """A rank's record that wishes to stop during a given step."""

    def __init__(
        self, record: RankRecord, stop: HeldStop, stop_at: int | None, reason: str
    ) -> None:
        self.record = record
        self.stop = stop
        self.stop_at = stop_at
        self.reason = reason

    def beat(self) -> None:
        self.record.beat()

    def update(self, **changes: Any) -> None:
        self.record.update(**changes)
        if self.stop_at is not None and changes.get("step") == self.stop_at - 1:
            self.stop.reason = self.reason


def state_hashes(folder: RunFolder) -> tuple[int, str, str]:
    """Step, weights and moments of the newest checkpoint."""
    checkpoint = folder.newest_good_checkpoint()
    assert checkpoint is not None
    files = ("model.safetensors", "optimizer.safetensors")
    weights, moments = (hash_file(checkpoint.folder / name) for name in files)
    return checkpoint.step, weights, moments


def metric_rows(folder: RunFolder, kind: str, *names: str) -> list[tuple[Any, ...]]:
    """Columns of the metrics, of one kind of row."""
    lines = folder.metrics_file.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [tuple(row[n] for n in names) for row in rows if row["kind"] == kind]


def tree(path: Path) -> dict[str, bytes]:
    """All files below a folder with their bytes."""
    return {
        os.fspath(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
