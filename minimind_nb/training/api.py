"""`train`: from a configuration to a finished run, from a cell, script or shell."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable

from ..config import TrainConfig
from ..hardware import choose_threads
from ..launch.processes import Job, refuse_unguarded_script, run_processes
from ..launch.verdict import TrainingFailed
from ..monitor.live import choose_view
from ..monitor.metrics import History
from ..monitor.report import Run, save_chart, write_summary
from ..session import current_session
from .preparation import Prepared, prepare

_Callback = Callable[[History], object]
# On two T4 over PCIe hangs were reported until peer-to-peer, or shared memory, was off.
# A file store without a cause times out once in some 2,000 starts; a fresh one helps.
_ENVIRONMENTS: dict[str, list[dict[str, str]]] = {
    "cpu": [{}, {}],
    "cuda": [
        {},
        {"NCCL_P2P_DISABLE": "1"},
        {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
    ],
}


def train(cfg: TrainConfig, view: bool | _Callback | None = None) -> Run:
    """Train in worker processes, show progress, and return the run when it ended.

    A run found in `out_dir` under the same name goes on where it stood; a finished one
    is returned as it is. `view` is None for the cell's or the terminal's view, False
    for none, or a function that gets each `History` update. An interrupt saves and
    returns with `run.status == "interrupted"`; a second one kills at once and raises
    `KeyboardInterrupt`.

    Raises `ValueError`, `FileNotFoundError`, `DataError`, `OSError` or `RuntimeError`
    before anything is started, saying what to change; `TrainingFailed` when the run
    failed, with the traceback of the rank that failed first.
    """
    refuse_unguarded_script()
    shown = choose_view(view)
    prepared = prepare(cfg, shown.note)
    run = Run(prepared.folder.root)
    if prepared.complete:
        shown.start(run.history)
        shown.note(f"{run.folder} is finished; raise epochs to train longer")
        shown.finish(run.history, run.status)
        return run
    shown.start(run.history, {"total_steps": prepared.total_steps})
    status = "failed"
    try:
        status = _launch(prepared, lambda: shown.update(run.history), shown.note)
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        shown.finish(run.history, status)
        shown.attempt(save_chart, run)
        shown.attempt(write_summary, run, status, prepared.weights_file)
    return run


def _launch(
    prepared: Prepared, on_poll: Callable[[], None], on_note: Callable[[str], None]
) -> str:
    """Start the workers; again under other conditions where they did not meet."""
    environments = _ENVIRONMENTS[prepared.cfg.device or "cpu"]
    for environment, following in itertools.pairwise(environments):
        try:
            return run_processes(_job(prepared, environment), on_poll)
        except TrainingFailed as failure:
            if failure.phase != "meeting":
                raise
            changes = " ".join(f"{k}={v}" for k, v in following.items())
            on_note(f"the processes did not meet; once more {changes}".rstrip())
    return run_processes(_job(prepared, environments[-1]), on_poll)


def _job(prepared: Prepared, environment: dict[str, str]) -> Job:
    cfg = prepared.cfg
    assert cfg.num_processes
    threads = choose_threads(cfg.num_processes, prepared.settled.hardware.cpu_cores)
    left = current_session().seconds_left(cfg.max_session_hours)
    checkpoint = prepared.checkpoint
    payload = {
        "settings": dataclasses.asdict(cfg),
        "config": prepared.config,
        "folder": str(prepared.folder.root),
        "weights_file": str(prepared.weights_file),
        "corpus": prepared.corpus.describe(),
        "total_steps": prepared.total_steps,
        "checkpoint": str(checkpoint.folder) if checkpoint else None,
        "threads": threads,
        # The monotonic clock of Linux is one for all processes.
        "deadline": None if left is None else time.monotonic() + left,
    }
    threading = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return Job(
        target="minimind_nb.training.worker:run",
        payload=payload,
        num_processes=cfg.num_processes,
        folder=prepared.folder,
        environment={**threading, **environment},
    )
