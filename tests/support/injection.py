"""Faults at named points of a run: at which, on which rank, after which step, and what.

`injection:run` in place of the worker wraps the functions that stand at these points and
is the worker of always otherwise. Where no test asks for it, none of this is loaded.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minimind_nb.launch.cancellation import StopRequest
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.launch.spawn import Job
from minimind_nb.training import launching

# The function that a point is in front of (or behind): of a step, then of a save, then
# what else there is.
POINTS = {
    "batch": ("data.batches", "TrainingStream.next_step", "before"),
    "after_backward": ("training.optim", "FlatGradients.add_stop_flags", "before"),
    "before_step": ("training.loop", "update_weights", "before"),
    "after_step": ("training.loop", "record_step", "after"),
    "before_save": ("training.loop", "save_checkpoint", "before"),
    "half_a_file": ("training.checkpoint", "save_file", "half"),
    "after_a_file": ("training.checkpoint", "save_file", "after"),
    "before_manifest": ("storage.verified", "_write_manifest", "before"),
    "before_rename": ("storage.verified", "rename_flushed", "before"),
    "after_rename": ("storage.verified", "rename_flushed", "after"),
    "prune": ("storage.run_folder", "RunFolder.prune_checkpoints", "before"),
    "weights_file": ("training.loop", "write_pth", "before"),
    "exit": ("launch.process_group", "Group.close", "before"),
    "validation": ("training.evaluation", "Evaluator.evaluate", "before"),
    "answer": ("training.loop", "answer_prompts", "before"),
    "reference": ("training.evaluation", "with_reference", "before"),
}
SAVING: list[str] = [
    *("before_save", "half_a_file", "after_a_file", "before_manifest"),
    *("before_rename", "after_rename", "prune", "weights_file"),
]
VALIDATING = ["validation", "answer"]


@dataclass(frozen=True)
class Fault:
    """What happens at a point on a rank once it has made `step` steps; only once.

    At points after a function, the steps made before it count. `marker` is the file
    that says that it has happened. With `above_rows` it happens in every session whose
    micro-batches have more rows.
    """

    point: str
    action: str
    marker: str
    rank: int = 0
    step: int = 5
    above_rows: int = 0


def inject(monkeypatch: pytest.MonkeyPatch, *faults: Fault) -> None:
    """Have the next runs of `train` meet these faults, each once."""
    real = launching.run_processes

    def run_processes(job: Job, on_poll: Callable[[], None]) -> str:
        return real(with_faults(job, *faults), on_poll)

    monkeypatch.setattr(launching, "run_processes", run_processes)


def with_faults(job: Job, *faults: Fault) -> Job:
    """The same job, with faults."""
    plain = {"target": job.target, "faults": [dataclasses.asdict(f) for f in faults]}
    (job.folder.root / "faults.json").write_text(json.dumps(plain))
    return dataclasses.replace(job, target=f"{__name__}:run")


def run(job: Job, store: str, record: RankRecord, stop: StopRequest) -> str:
    """The worker of always, with the faults of this rank in it."""
    plan = json.loads((job.folder.root / "faults.json").read_text())
    for fields in plan["faults"]:
        fault = Fault(**fields)
        if fault.above_rows:
            Path(fault.marker).unlink(missing_ok=True)
        large = job.folder.settings()["batch_size"] > fault.above_rows
        if fault.rank == record.rank and large:
            _wrap(fault, record, stop)
    module, _, name = plan["target"].partition(":")
    target = getattr(importlib.import_module(module), name)
    return target(job, store, record, stop)


def _wrap(fault: Fault, record: RankRecord, stop: StopRequest) -> None:
    module, path, place = POINTS[fault.point]
    owner: Any = importlib.import_module(f"minimind_nb.{module}")
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    real = getattr(owner, name)

    def wrapped(*given: Any, **named: Any) -> Any:
        due = record.step == fault.step and not Path(fault.marker).exists()
        if due and place == "before":
            _strike(fault, given, stop)
        answer = real(*given, **named)
        if due and place == "half":
            os.truncate(given[1], os.path.getsize(given[1]) // 2)
        if due and place != "before":
            _strike(fault, given, stop)
        return answer

    setattr(owner, name, wrapped)


def _strike(fault: Fault, given: tuple[Any, ...], stop: StopRequest) -> None:
    Path(fault.marker).write_text(json.dumps(time.time()))
    if fault.action == "sigterm_to_parent":
        _stop_the_parent(stop)
    else:
        _ACTIONS[fault.action](given)


def _fail(_: Any) -> None:
    raise ValueError(f"injected on purpose in {os.getpid()}")


def _run_out_of_memory(_: Any) -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _hang(_: Any) -> None:
    while True:
        pass


def _sleep_deaf(_: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(600)


def _spoil_gradients(given: tuple[Any, ...]) -> None:
    given[0].flat[0] = float("nan")


def _drift(given: tuple[Any, ...]) -> None:
    """Change one weight, as a device that computes wrongly does."""
    next(given[0].model.parameters()).data[0, 0] += 1e-4


def _skew_clock(_: Any) -> None:
    wall, steady = time.time, time.monotonic
    time.time = lambda: wall() + 3600
    time.monotonic = lambda: steady() + 3600


def _stop_the_parent(stop: StopRequest) -> None:
    """Go no step further before the parent has passed its signal on."""
    os.kill(os.getppid(), signal.SIGTERM)
    while not stop.reason:
        time.sleep(0.02)


def _fill_disk(given: tuple[Any, ...]) -> None:
    fill_disk(given[0].folder.root.parent / "filler")


def _corrupt(given: tuple[Any, ...]) -> None:
    """Flip a bit in the largest file of the folder that has just got its name."""
    largest = max(given[1].iterdir(), key=os.path.getsize)
    with largest.open("r+b") as file:
        file.seek(os.path.getsize(largest) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def fill_disk(filler: Path) -> None:
    """Write into a file until its file system takes no byte more."""
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


def _signal(number: int, whom: Callable[[], int] = os.getpid) -> Callable[[Any], None]:
    return lambda _: os.kill(whom(), number)


_ACTIONS: dict[str, Callable[[Any], None]] = {
    "raise": _fail,
    "out_of_memory": _run_out_of_memory,
    "exit": lambda _: sys.exit(0),
    "leave": lambda _: os._exit(0),
    "kill": _signal(signal.SIGKILL),
    "stop": _signal(signal.SIGSTOP),
    "sigterm": _signal(signal.SIGTERM),
    "kill_parent": _signal(signal.SIGKILL, os.getppid),
    "hang": _hang,
    "sleep_deaf": _sleep_deaf,
    "nan": _spoil_gradients,
    "drift": _drift,
    "corrupt": _corrupt,
    "fill_disk": _fill_disk,
    "skew": _skew_clock,
}
