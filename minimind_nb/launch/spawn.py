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
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from multiprocessing.context import get_spawning_popen
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ..lifetime import die_with_parent, without_main_script
from ..storage.run_folder import RunFolder
from .cancellation import HEARD, Signals, StopRequest, heard_signals
from .leftovers import scratch_folder
from .outcome import SESSION, Exit, RankRecord, judge

POLL_SECONDS = 0.5
MEETING_SECONDS = 60.0
IMPORT_SECONDS = 300.0
GRACE_SECONDS = 5.0
_LONGEST_LOOK = 10 * POLL_SECONDS
STACK_SECONDS = 1.0  # for ranks that hang to write down where
_TORCHRUN_NAMES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
_SPAWN = multiprocessing.get_context("spawn")  # a fork is lost once CUDA was touched


@dataclass(frozen=True)
class RankInfo:
    """The place of one process among all, and among those on its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str] = os.environ
    ) -> RankInfo | None:
        """Return the place that torchrun set, or None if RANK is not set.

        Raises `RuntimeError` if RANK is set and another variable is missing.
        """
        if not environ.get("RANK"):
            return None
        if missing := [name for name in _TORCHRUN_NAMES if not environ.get(name)]:
            raise RuntimeError(
                f"RANK is set, as torchrun does, but not {', '.join(missing)}: start "
                "with torchrun, or unset RANK"
            )
        return cls(*(int(environ[name]) for name in _TORCHRUN_NAMES[:4]))


@dataclass(frozen=True)
class Job:
    """What to run in each process.

    `target` names a function, "package.module:function", that takes (rank, payload,
    record, stop) and returns how it ended; `payload` is plain data. `environment` is
    set in each process before `target` is imported. `paths` are what each machine must
    see beside the folder. A rank that gets nowhere for `hang_timeout` seconds hangs;
    `less_memory` says what to do where one runs out of memory. `lock` is the descriptor
    of the folder's lock, which the ranks inherit: it is free when the last has left.
    """

    target: str
    payload: Mapping[str, Any]
    num_processes: int
    folder: RunFolder
    environment: Mapping[str, str] = field(default_factory=dict)
    paths: Sequence[str] = ()
    hang_timeout: float = math.inf
    less_memory: str = ""
    lock: int | None = None

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

    An interrupt, SIGTERM or SIGHUP of this process is passed on, and the ranks stop at
    the end of a step; a second interrupt kills them and raises `KeyboardInterrupt`.
    One that comes while they start is heard when they are there. Raises
    `TrainingFailed` when a rank failed, died or hung, and `RuntimeError` in a process
    that may have no children.
    """
    if multiprocessing.current_process().daemon:
        raise RuntimeError(
            "this process is a daemon of multiprocessing, which may start none of its "
            "own; train from the main process, or from one with daemon=False"
        )
    for rank in range(job.num_processes):
        job.folder.record_file(rank).unlink(missing_ok=True)
    processes: list[BaseProcess] = []
    with scratch_folder() as meeting, heard_signals() as signals:
        try:
            _start(job, f"{meeting}/store", processes)
            exits = _watch(job, processes, signals, on_poll)
        finally:
            for process in processes:
                process.kill()
                process.join()
                process.close()
    if signals.interrupts > 1:
        raise KeyboardInterrupt
    return judge(job.folder, exits, less_memory=job.less_memory)


def _start(job: Job, store: str, processes: list[BaseProcess]) -> None:
    """Start the ranks, each added to `processes` as soon as it runs.

    Without torch's wrapper, which leaves a file in the temporary folder for each rank
    that fails.
    """
    job = dataclasses.replace(job, payload={**job.payload, "store": store})
    lock = None if job.lock is None else _Inherited(job.lock)
    with _signals_held_back(), without_main_script():
        for rank in range(job.num_processes):
            process = _SPAWN.Process(target=_enter, args=(rank, job, os.getpid(), lock))
            process.start()
            processes.append(process)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Keep signals waiting, in this thread and in ranks that are started in the block.

    An interrupt of the kernel, a closing terminal and a scheduler's SIGTERM reach the
    whole process group, and a rank that still imports would die of them.
    """
    resource_tracker.ensure_running()  # its start would let them through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Inherited:
    """An open descriptor, under the same number in a process that is spawned with it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[type[_Inherited], tuple[int]]:
        spawning: Any = get_spawning_popen()
        return _Inherited, (spawning.duplicate_for_child(self.descriptor),)


def _watch(
    job: Job,
    processes: list[BaseProcess],
    signals: Signals,
    on_poll: Callable[[], None],
) -> list[Exit]:
    """Wait until all processes have left; end the rest when one failed or hung."""
    exits: dict[int, Exit] = {}
    records: list[RankRecord | None] = [None for _ in processes]
    hearts = _Heartbeats(job.hang_timeout)
    looked = time.time()
    give_up_at = math.inf
    reason = ""
    while len(exits) < len(processes):
        living = [p for rank, p in enumerate(processes) if rank not in exits]
        connection.wait([p.sentinel for p in living], timeout=POLL_SECONDS)
        looks = time.time()  # before it does: one may die in the very moment
        dead = {rank for rank, p in enumerate(processes) if not p.is_alive()}
        for rank in dead - exits.keys():
            exits[rank] = Exit(processes[rank].exitcode, looked, reason)
        looked = looks
        on_poll()
        records = _read_records(job.folder, records)
        _relay(signals, processes, records)
        if signals.interrupts > 1:
            give_up_at, reason = 0.0, "a second interrupt"
        elif give_up_at == math.inf and _is_decided(records, exits):
            give_up_at = time.monotonic() + GRACE_SECONDS
        elif give_up_at == math.inf and (reason := hearts.listen(records)):
            give_up_at = time.monotonic() + STACK_SECONDS
            _ask_for_stacks(living)
        if time.monotonic() > give_up_at:
            reason = reason or "another rank failed"
            for process in living:
                process.kill()
    return [exits[rank] for rank in range(len(processes))]


def _read_records(
    folder: RunFolder, before: Sequence[RankRecord | None]
) -> list[RankRecord | None]:
    """Each rank's word; where it cannot be read just now, the one before."""
    files = [folder.record_file(rank) for rank in range(len(before))]
    return [RankRecord.read(file) or b for file, b in zip(files, before, strict=True)]


class _Heartbeats:
    """Notices that a rank stands still, by a clock that no other one can mislead.

    It counts the seconds in which this process looked: where all were stopped, and went
    on hours later, no rank stood still.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._watched = 0.0
        self._looked = time.monotonic()
        self._heard: dict[int, tuple[object, float]] = {}

    def listen(self, records: Sequence[RankRecord | None]) -> str:
        """Why a rank is taken to hang, whose record is as it was for too long; or ""."""
        now = time.monotonic()
        self._watched += min(now - self._looked, _LONGEST_LOOK)
        self._looked = now
        silent: dict[str, list[float]] = {"startup": [], "meeting": [], "training": []}
        for rank, record in enumerate(records):
            said = record and record.time
            if rank not in self._heard or self._heard[rank][0] != said:
                self._heard[rank] = said, self._watched
            if record is None or record.status == "running":
                phase = record.phase if record else "startup"
                silent[phase].append(self._watched - self._heard[rank][1])
        if max(silent["startup"], default=0.0) > IMPORT_SECONDS:
            return f"it was not ready in {IMPORT_SECONDS:g} s"
        # Whoever meets waits for the last that comes.
        if (
            not silent["startup"]
            and min(silent["meeting"], default=0) > MEETING_SECONDS
        ):
            return f"the ranks did not meet in {MEETING_SECONDS:g} s"
        if max(silent["training"], default=0.0) > self._timeout:
            return f"no step was made for {self._timeout:g} s (hang_timeout_seconds)"
        return ""


def _ask_for_stacks(living: Sequence[BaseProcess]) -> None:
    """Have ranks write where they are into their logs; one that is stopped cannot."""
    for process in living:
        with contextlib.suppress(ProcessLookupError):
            assert process.pid
            os.kill(process.pid, signal.SIGUSR1)


def _relay(
    signals: Signals,
    processes: list[BaseProcess],
    records: Sequence[RankRecord | None],
) -> None:
    """Pass a signal on, at every poll again, to the ranks that listen by now."""
    number = signal.SIGTERM if signals.number == signal.SIGHUP else signals.number
    for process, record in zip(processes, records, strict=True):
        if number and record and process.is_alive() and process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _is_decided(
    records: Sequence[RankRecord | None], exits: Mapping[int, Exit]
) -> bool:
    """Whether a rank failed, or all said how they ended; some may hang in leaving."""
    statuses = [record.status if record else "running" for record in records]
    died = any(statuses[rank] == "running" for rank in exits)
    return died or "failed" in statuses or "running" not in statuses


def _enter(rank: int, job: Job, parent_pid: int, _lock: _Inherited | None) -> None:
    """The first lines of every worker process, in which no signal is heard yet."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the parent passes SIGTERM on for it
    die_with_parent(parent_pid)
    if os.getppid() != parent_pid:
        return
    os.environ.update(job.environment)
    _redirect_output(job.folder.log_file(rank))
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    stop = StopRequest()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
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
    if descriptor not in (1, 2):  # it is one of them where these were closed
        os.close(descriptor)
    sys.stdout = io.TextIOWrapper(
        _Log(1, "w", closefd=False), "utf-8", line_buffering=True
    )
    sys.stderr = io.TextIOWrapper(
        _Log(2, "w", closefd=False), "utf-8", line_buffering=True
    )
    print(f"{SESSION}{os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}")
