"""Worker processes: spawned from a cell, watched, reaped; none outlives its parent.

Imports no torch: a worker must watch its parent before that long import.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from multiprocessing.context import get_spawning_popen
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from ..lifetime import die_with_parent, identify_process, without_main_script
from ..storage.run_folder import RunFolder, RunLocked
from .cancellation import SIGNALS, StopRequest
from .outcome import SESSION, Exit, RankRecord, collect_outcome, read_records

POLL_SECONDS = 0.5
MEETING_SECONDS = 60.0
IMPORT_SECONDS = 300.0
GRACE_SECONDS = 5.0
STACK_SECONDS = 1.0  # for ranks that hang to write down where
_LONGEST_LOOK = 10 * POLL_SECONDS
_SPAWN = multiprocessing.get_context("spawn")  # a fork is lost once CUDA was touched


class RankInfo(NamedTuple):
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
        names = [name.upper() for name in cls._fields]
        needed = (*names, "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in needed if not environ.get(name)]:
            raise RuntimeError(
                f"RANK is set, as torchrun does, but not {', '.join(missing)}: start "
                "with torchrun, or unset RANK"
            )
        return cls(*(int(environ[name]) for name in names))


@dataclass(frozen=True)
class Job:
    """The work of each process.

    `target` names a function, "package.module:function", that takes (info, folder,
    store, record, stop) and returns the status; its instructions are in `folder`.
    `environment` is set in each process before `target` is imported. Under torchrun
    every machine must see `paths`. A rank that makes no progress for `hang_timeout` seconds hangs;
    `less_memory` says what to do if one runs out of memory. `lock` is the descriptor of
    the folder's lock, which the ranks inherit: it is free when the last has left.
    """

    target: str
    folder: RunFolder
    num_processes: int
    environment: Mapping[str, str] = field(default_factory=dict)
    paths: Sequence[str] = ()
    hang_timeout: float = math.inf
    less_memory: str = ""
    lock: int | None = None

    def run(
        self, info: RankInfo, store: Any, record: RankRecord, stop: StopRequest
    ) -> None:
        """Run the part of one rank in this process, and record how it ended.

        The ranks meet in `store`, a file or a store of torch.
        """
        record.update()
        module, _, name = self.target.partition(":")
        try:
            run = getattr(importlib.import_module(module), name)
            status = run(info, self.folder, store, record, stop)
        except BaseException as error:
            record.fail(error)
            raise
        record.update(status=status)


def run_processes(job: Job, on_poll: Callable[[], None]) -> str:
    """Run a job to its end and return how it ended, calling `on_poll` twice a second.

    An interrupt, SIGTERM or SIGHUP of this process is passed on, and the ranks stop at
    the end of a step; a second interrupt kills them and raises `KeyboardInterrupt`.
    One that arrives while they start waits until they listen. Raises `TrainingFailed`
    if a rank failed, died or hung.
    """
    for rank in range(job.num_processes):
        job.folder.record_file(rank).unlink(missing_ok=True)
    processes: list[BaseProcess] = []
    with tempfile.TemporaryDirectory(prefix="minimind_nb_") as meeting:
        stop = StopRequest()
        try:
            _start(job, f"{meeting}/store", processes)
            exits = _watch(job, processes, stop, on_poll)
        finally:
            for process in processes:
                process.kill()
                process.join()
                process.close()
            stop.restore()
    if stop.interrupts > 1:
        raise KeyboardInterrupt
    return collect_outcome(job.folder, exits, less_memory=job.less_memory)


def _start(job: Job, store: str, processes: list[BaseProcess]) -> None:
    """Start the ranks, each added to `processes` as soon as it runs.

    Not by torch's wrapper, which leaves a temporary file for each rank that fails.
    """
    lock = None if job.lock is None else _Inherited(job.lock)
    with _signals_held_back(), without_main_script():
        for rank in range(job.num_processes):
            info = RankInfo(rank, job.num_processes, rank, job.num_processes)
            arguments = (info, job, store, os.getpid(), lock)
            process = _SPAWN.Process(target=_enter, args=arguments)
            process.start()
            processes.append(process)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Block signals in this thread, and in the ranks that it starts until they listen.

    An interrupt of the kernel, a closing terminal and a scheduler's SIGTERM reach the
    whole process group, and would kill a rank that still imports.
    """
    resource_tracker.ensure_running()  # starting it would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
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
    stop: StopRequest,
    on_poll: Callable[[], None],
) -> list[Exit]:
    """Wait until all processes have left; end the rest if one failed or hung."""
    exits: dict[int, Exit] = {}
    hang_watch = HangWatch(job.hang_timeout)
    give_up_at = math.inf
    reason = ""
    while len(exits) < len(processes):
        living = [p for rank, p in enumerate(processes) if rank not in exits]
        connection.wait([p.sentinel for p in living], timeout=POLL_SECONDS)
        for rank, process in enumerate(processes):
            if rank not in exits and not process.is_alive():
                exits[rank] = Exit(process.exitcode, time.time(), reason)
        on_poll()
        records = read_records(job.folder, len(processes))
        if stop.number:
            _send(
                stop.number,
                [p for p, r in zip(processes, records, strict=True) if r.time],
            )
        if stop.interrupts > 1:
            give_up_at, reason = 0.0, "a second interrupt"
        elif give_up_at == math.inf and is_decided(records, exits):
            give_up_at = time.monotonic() + GRACE_SECONDS
        elif give_up_at == math.inf and (reason := hang_watch.check(records)):
            give_up_at = time.monotonic() + STACK_SECONDS
            _send(signal.SIGUSR1, living)  # they write their stacks, unless stopped
        if time.monotonic() > give_up_at:
            reason = reason or "another rank failed"
            for process in living:
                process.kill()
    return [exits[rank] for rank in range(len(processes))]


def _send(number: int, processes: Iterable[BaseProcess]) -> None:
    """Send a signal to ranks that live and listen by now; SIGTERM instead of SIGHUP."""
    number = signal.SIGTERM if number == signal.SIGHUP else number
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)


def is_decided(records: Sequence[RankRecord], exits: Mapping[int, Exit]) -> bool:
    """Return whether a rank failed, or all have ended; some may hang while they leave."""
    statuses = [record.status for record in records]
    died = any(statuses[rank] == "running" for rank in exits)
    return died or "failed" in statuses or "running" not in statuses


class HangWatch:
    """Notices ranks whose records stay the same.

    Counts time only while the parent looks: a machine may sleep.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._watched = 0.0
        self._looked = time.monotonic()
        self._seen: dict[int, tuple[float, float]] = {}

    def check(self, records: Sequence[RankRecord]) -> str:
        """Return why a rank is considered to hang, or ""."""
        now = time.monotonic()
        self._watched += min(now - self._looked, _LONGEST_LOOK)
        self._looked = now
        silent: dict[str, list[float]] = {"startup": [], "meeting": [], "training": []}
        for rank, record in enumerate(records):
            if self._seen.get(rank, (-1.0,))[0] != record.time:
                self._seen[rank] = record.time, self._watched
            if record.status == "running":
                silent[record.phase].append(self._watched - self._seen[rank][1])
        if max(silent["startup"], default=0.0) > IMPORT_SECONDS:
            return f"it was not ready in {IMPORT_SECONDS:g} s"
        # All ranks wait for the last one to arrive.
        arrived = not silent["startup"]
        if arrived and min(silent["meeting"], default=0.0) > MEETING_SECONDS:
            return f"the ranks did not meet in {MEETING_SECONDS:g} s"
        if max(silent["training"], default=0.0) > self._timeout:
            return f"no step was made for {self._timeout:g} s (hang_timeout_seconds)"
        return ""


def _enter(
    info: RankInfo, job: Job, store: str, parent_pid: int, _lock: _Inherited | None
) -> None:
    """Set up a worker process, in which signals are still blocked, and run its part."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the parent sends SIGTERM instead
    die_with_parent(parent_pid)
    if os.getppid() != parent_pid:
        return
    os.environ.update(job.environment)
    _redirect_output(job.folder.log_file(info.rank))
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    stop = StopRequest()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    record = RankRecord(job.folder.record_file(info.rank), info.rank)
    job.run(info, store, record, stop)


def _redirect_output(log: Path) -> None:
    """Send everything that this process prints, native libraries too, to its log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if descriptor not in (1, 2):  # it is one of them if these were closed
        os.close(descriptor)
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)
    print(f"{SESSION}{os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}")


def end_orphans(folder: RunFolder) -> list[int]:
    """End the ranks of an earlier run here whose parent has died; return their pids.

    A process is identified by its start time, not by its number alone, and others are
    never touched. Raises `RunLocked` if a rank is running whose parent lives: somebody
    deleted the lock file.
    """
    orphans, ours = [], identify_process(os.getppid())
    for file in folder.root.glob("rank*.json"):
        record = RankRecord.read(file)
        if not record or not record.process or record.pid == os.getpid():
            continue
        under_torchrun = record.parent == ours
        if identify_process(record.pid) != record.process or under_torchrun:
            continue
        if record.is_orphan():
            orphans.append(record.pid)
        elif record.status == "running":
            raise RunLocked(
                f"{folder.root} is in use by pid {record.pid}, rank {record.rank} of a "
                "running run, whose lock file was deleted. Wait for that run, stop it, "
                "or take another run_name."
            )
    for pid in orphans:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + GRACE_SECONDS
    while any(map(identify_process, orphans)) and time.monotonic() < end:
        time.sleep(0.02)
    return orphans
