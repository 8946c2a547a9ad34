"""Training within the test's own process, and looking at what it leaves."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind_nb.config import TrainConfig
from minimind_nb.launch.cancellation import StopRequest
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.launch.spawn import Job
from minimind_nb.storage.run_folder import RunFolder, step_of
from minimind_nb.storage.verified import hash_file
from minimind_nb.training import worker
from minimind_nb.training.loop import Trainer
from minimind_nb.training.preparation import prepare
from minimind_nb.training.run_plan import RunPlan

Settings = dict[str, Any]


class HeldStop(StopRequest):
    """A wish to stop that a test makes, deaf to signals."""

    def __init__(self) -> None:
        self.reason = None


Change = Callable[[Trainer], None]


class Messages(logging.Handler):
    """Collects what the package logs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """The messages that the package logs in the block."""
    logger, handler = logging.getLogger("minimind_nb"), Messages()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.texts
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def notes_of(settings: Settings) -> tuple[list[str], bool]:
    """What planning a run logs, and whether nothing is left to do."""
    with logged() as texts:
        complete = prepare_here(settings).complete
    return texts, complete


def prepare_here(settings: Settings) -> RunPlan:
    """Plan a run, and let its folder go."""
    with prepare(TrainConfig(**settings)) as (plan, _):
        return plan


def train_here(
    settings: Settings,
    stop_at: int | None = None,
    reason: str = "interrupted",
    change: Change | None = None,
) -> tuple[str, RunFolder]:
    """Run the worker of one process in this process; `change` gets its parts first."""
    plan = prepare_here(settings)
    folder = plan.folder
    if plan.complete:
        return folder.status(), folder
    stop = HeldStop()
    record = RankRecord(folder.record_file(0), 0)
    real_fit = worker.fit

    def fit(trainer: Trainer) -> str:
        trainer.record = StoppingRecord(record, stop, stop_at, reason)  # pyright: ignore[reportAttributeAccessIssue]
        if change:
            change(trainer)
        return real_fit(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "fit", fit)
        status = run_here(worker.run, folder, record, stop)
    record.update(status=status)
    return status, folder


def run_here(
    target: Callable[..., str], folder: RunFolder, record: RankRecord, stop: StopRequest
) -> str:
    """Run a worker function as the only rank, with one thread."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "choose_threads", lambda *_: 1)
        try:
            return target(Job("", folder, 1), "", record, stop)
        finally:
            torch.set_num_threads(threads)


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
    weights, moments = (hash_file(checkpoint / name) for name in files)
    return step_of(checkpoint), weights, moments


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
