"""Worker processes: spawned from a cell, watched, reaped; none outlives its parent.

Imports no torch: a worker must watch its parent before that long import.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import io
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from ..session import die_with_parent, identify_process
from ..storage.runs import RunFolder
from .stopping import SIGNALS, StopRequest
from .verdict import SESSION, Exit, RankRecord, judge

POLL_SECONDS = 0.5
MEETING_SECONDS = 60.0
IMPORT_SECONDS = 300.0
GRACE_SECONDS = 5.0
STACK_SECONDS = 1.0  # for ranks that hang to write down where
_SCRATCH = "minimind_nb_"
_SPAWN = multiprocessing.get_context("spawn")  # a fork is lost once CUDA was touched


@dataclass(frozen=True)
class Job:
    """What to run in each process.

    `target` names a function, "package.module:function", that takes (rank, payload,
    record, stop) and returns how it ended; `payload` is plain data. `environment` is
    set in each process before `target` is imported. `paths` are what each machine must
    see beside the folder. A rank that gets nowhere for `hang_timeout` seconds hangs;
    `less_memory` says what to do where one runs out of memory.
    """

    target: str
    payload: Mapping[str, Any]
    num_processes: int
    folder: RunFolder
    environment: Mapping[str, str] = field(default_factory=dict)
    paths: Sequence[str] = ()
    hang_timeout: float = math.inf
    less_memory: str = ""

    def run(self, rank: int, record: RankRecord, stop: StopRequest) -> None:
        """Do the part of one rank in this process, and record how it ended."""
        record.update()
        module, _, name = self.target.partition(":")
        try:
            run = getattr(importlib.import_module(module), name)
            status = run(rank, self.payload, record, stop)
        except BaseException as error:
            record.fail(error)
            raise
        record.update(status=status)


def run_processes(job: Job, on_poll: Callable[[], None]) -> str:
    """Run a job to its end and return how it ended, calling `on_poll` twice a second.

    An interrupt or SIGTERM of this process is passed on, and the ranks stop at the
    end of a step; a second one kills them and raises `KeyboardInterrupt`. Raises
    `TrainingFailed` when a rank failed, died or hung.
    """
    for rank in range(job.num_processes):
        job.folder.record_file(rank).unlink(missing_ok=True)
    processes: list[BaseProcess] = []
    with scratch_folder() as meeting, _relayed_signals() as signals:
        try:
            _start(job, f"{meeting}/store", processes)
            exits = _watch(job, processes, signals, on_poll)
        finally:
            for process in processes:
                process.kill()
                process.join()
                process.close()
    if signals.count > 1:
        raise KeyboardInterrupt
    asked = SIGNALS.get(signals.number, "")
    return judge(job.folder, exits, asked, less_memory=job.less_memory)


@contextlib.contextmanager
def scratch_folder(within: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """A temporary folder; those of processes of this machine that died go, too."""
    if within is None:
        for left in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*_*"):
            pid = left.name.removeprefix(_SCRATCH).partition("_")[0]
            if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(left, ignore_errors=True)
    prefix = f"{_SCRATCH}{os.getpid()}_"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=within) as folder:
        yield Path(folder)


def end_orphans(folder: RunFolder) -> list[int]:
    """End ranks of an earlier run here whose parent is gone, and return their pids.

    A number alone proves nothing: the process, and that its parent is another one, are
    told by when they started. Others are never touched.
    """
    ended = []
    for file in folder.root.glob("rank*.json"):
        record = RankRecord.read(file)
        if not (record and record.process and record.parent):
            continue
        parent = int(record.parent.split("/")[1])
        alive = identify_process(record.pid) == record.process
        if alive and identify_process(parent) != record.parent:
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, signal.SIGKILL)
                ended.append(record.pid)
    end = time.monotonic() + GRACE_SECONDS
    while any(map(identify_process, ended)) and time.monotonic() < end:
        time.sleep(0.02)
    return ended


class _Signals:
    """Interrupts and SIGTERMs that came to this process while a job ran."""

    number = 0
    count = 0

    def handle(self, number: int, _frame: FrameType | None) -> None:
        self.number = self.number or number
        self.count += 1


@contextlib.contextmanager
def _relayed_signals() -> Iterator[_Signals]:
    """Count signals instead of raising, so that no line of ours is cut in two."""
    signals = _Signals()
    # Only the main thread may set handlers, and only it gets the signals.
    numbers = SIGNALS if _on_main_thread() else ()
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _start(job: Job, store: str, processes: list[BaseProcess]) -> None:
    """Start the ranks, each added to `processes` as soon as it runs.

    Without torch's wrapper, which leaves a file in the temporary folder for each rank
    that fails.
    """
    # A kernel interrupt reaches the whole process group. A worker that still imports
    # would die of it, so children inherit SIG_IGN until they can listen.
    on_main = _on_main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if on_main else None
    job = dataclasses.replace(job, payload={**job.payload, "store": store})
    try:
        for rank in range(job.num_processes):
            process = _SPAWN.Process(target=_enter, args=(rank, job, os.getpid()))
            process.start()
            processes.append(process)
    finally:
        if on_main:
            signal.signal(signal.SIGINT, handler)


def _watch(
    job: Job,
    processes: list[BaseProcess],
    signals: _Signals,
    on_poll: Callable[[], None],
) -> list[Exit]:
    """Wait until all processes have left; end the rest when one failed or hung."""
    exits: dict[int, Exit] = {}
    hearts = _Heartbeats(job.hang_timeout)
    started = time.monotonic()
    give_up_at = math.inf
    reason = ""
    while len(exits) < len(processes):
        living = [p for rank, p in enumerate(processes) if rank not in exits]
        connection.wait([p.sentinel for p in living], timeout=POLL_SECONDS)
        on_poll()
        for rank, process in enumerate(processes):
            if rank not in exits and not process.is_alive():
                exits[rank] = Exit(process.exitcode, time.time(), reason)
        ranks = range(len(processes))
        records = [RankRecord.read(job.folder.record_file(rank)) for rank in ranks]
        _relay(signals, processes, records)
        if signals.count > 1:
            give_up_at, reason = 0.0, "a second interrupt"
        elif give_up_at == math.inf and _is_decided(records, exits):
            give_up_at = time.monotonic() + GRACE_SECONDS
        elif give_up_at == math.inf and _is_stuck(records, time.monotonic() - started):
            give_up_at, reason = 0.0, "the ranks did not meet in time"
        elif give_up_at == math.inf and hearts.stand_still(records):
            reason = (
                f"no step was made for {job.hang_timeout:g} s (hang_timeout_seconds)"
            )
            give_up_at = time.monotonic() + STACK_SECONDS
            _ask_for_stacks(living)
        if time.monotonic() > give_up_at:
            reason = reason or "another rank failed"
            for process in living:
                process.kill()
    return [exits[rank] for rank in range(len(processes))]


class _Heartbeats:
    """Notices that a rank stands still, by a clock that no other one can mislead."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._heard: dict[int, tuple[float, float]] = {}

    def stand_still(self, records: Sequence[RankRecord | None]) -> bool:
        """Whether the record of some rank that trains is as it was for too long."""
        now = time.monotonic()
        for rank, record in enumerate(records):
            if not record or record.status != "running" or record.phase != "training":
                self._heard.pop(rank, None)
            elif self._heard.get(rank, (math.nan,))[0] != record.time:
                self._heard[rank] = record.time, now
        return any(now - heard > self._timeout for _, heard in self._heard.values())


def _ask_for_stacks(living: Sequence[BaseProcess]) -> None:
    """Have ranks write where they are into their logs; one that is stopped cannot."""
    for process in living:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid or 0, signal.SIGUSR1)


def _relay(
    signals: _Signals,
    processes: list[BaseProcess],
    records: Sequence[RankRecord | None],
) -> None:
    """Pass a signal on, at every poll again, to the ranks that listen by now."""
    for process, record in zip(processes, records, strict=True):
        if signals.number and record and process.is_alive() and process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signals.number)


def _is_decided(
    records: Sequence[RankRecord | None], exits: Mapping[int, Exit]
) -> bool:
    """Whether a rank failed, or all said how they ended; some may hang in leaving."""
    statuses = [record.status if record else "running" for record in records]
    died = any(statuses[rank] == "running" for rank in exits)
    return died or "failed" in statuses or "running" not in statuses


def _is_stuck(records: Sequence[RankRecord | None], waited: float) -> bool:
    """Whether some rank waits for the others longer than a meeting may take."""
    if len(records) == 1:
        return False
    if any(record is None or record.phase == "startup" for record in records):
        return waited > IMPORT_SECONDS
    meeting = [r.time for r in records if r and r.phase == "meeting"]
    return bool(meeting) and time.time() - max(meeting) > MEETING_SECONDS


def _enter(rank: int, job: Job, parent_pid: int) -> None:
    """The first lines of every worker process."""
    die_with_parent(parent_pid)
    if os.getppid() != parent_pid:
        return
    os.environ.update(job.environment)
    _redirect_output(job.folder.log_file(rank))
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    stop = StopRequest()
    job.run(rank, RankRecord(job.folder.record_file(rank), rank), stop)


class _Log(io.FileIO):
    """A log whose disk may be full, which must not end what writes into it."""

    def write(self, data: Any, /) -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return len(data)


def _redirect_output(log: Path) -> None:
    """Send everything this process prints, native libraries too, to its log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = io.TextIOWrapper(
        _Log(1, "w", closefd=False), "utf-8", line_buffering=True
    )
    sys.stderr = io.TextIOWrapper(
        _Log(2, "w", closefd=False), "utf-8", line_buffering=True
    )
    print(f"{SESSION}{os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}")
