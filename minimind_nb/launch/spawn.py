"""Worker processes: spawned from a cell, watched, reaped; none outlives its parent.

Imports no torch: a worker must watch its parent before that long import.
"""

import faulthandler
import functools
import importlib
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

from ..lifetime import die_with_parent, without_main_script
from ..storage.run_folder import RunFolder
from .cancellation import SIGNALS, StopRequest
from .outcome import SESSION, Exit, RankRecord, collect_outcome, read_records

POLL_SECONDS = 0.5
MEETING_SECONDS = 60.0
IMPORT_SECONDS = 300.0
GRACE_SECONDS = 5.0
STACK_SECONDS = 1.0  # for ranks that hang to write down where
_LONGEST_LOOK = 10 * POLL_SECONDS
_SPAWN = multiprocessing.get_context("spawn")  # a fork is lost once CUDA was touched


@dataclass(frozen=True)
class Job:
    """The work of each process.

    `target` names a function, "package.module:function", that takes (job, store,
    record, stop) and returns the status. `environment` is set before it is imported.
    The ranks inherit `lock`, the descriptor of the folder's lock.
    """

    target: str
    folder: RunFolder
    num_processes: int
    environment: Mapping[str, str] = field(default_factory=dict)
    hang_timeout: float = math.inf
    lock: int | None = None


@functools.cache
def enter_torchrun() -> int | None:
    """Return the number of processes that torchrun started, or None without it.

    All but rank 0, which starts the workers itself, end here with status 0. Raises
    `RuntimeError` on several machines.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    if not all(map(os.environ.get, names)):
        return None
    rank, size, here = (int(os.environ[name]) for name in names)
    if size != here:
        raise RuntimeError(
            f"torchrun started {size} processes, of which {here} are here: training on "
            "several machines is not supported; leave --nnodes out"
        )
    if rank:
        print(f"minimind_nb: rank {rank} leaves, since rank 0 starts the workers")
        raise SystemExit(0)
    die_with_parent(os.getppid())
    return size


def run_processes(job: Job, on_poll: Callable[[], None]) -> str:
    """Run a job to its end and return how it ended, calling `on_poll` twice a second.

    An interrupt, SIGTERM or SIGHUP is passed on as soon as the ranks listen, and they
    stop at the end of a step; a later interrupt kills them and raises
    `KeyboardInterrupt`. Raises `TrainingFailed` if a rank failed, died or hung.
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
    return collect_outcome(job.folder, exits, stop.signal > 0)


def _start(job: Job, store: str, processes: list[BaseProcess]) -> None:
    """Start the ranks, each added to `processes` as soon as it runs.

    Signals are blocked until a rank listens: those for the whole process group (a
    kernel's interrupt, a closing terminal) would kill a rank that still imports.
    """
    # A `Connection` is a descriptor that a spawned process inherits.
    lock = None if job.lock is None else connection.Connection(os.dup(job.lock))
    resource_tracker.ensure_running()  # starting it would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with without_main_script():
            for rank in range(job.num_processes):
                arguments = (rank, job, store, os.getpid(), lock)
                process = _SPAWN.Process(target=_enter, args=arguments)
                process.start()
                processes.append(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch(
    job: Job,
    processes: list[BaseProcess],
    stop: StopRequest,
    on_poll: Callable[[], None],
) -> list[Exit]:
    """Wait until all processes have left; end the rest if one failed or hung.

    Raises `KeyboardInterrupt` if a later interrupt means to kill them.
    """
    exits: dict[int, Exit] = {}
    hang_watch = HangWatch(job.hang_timeout)
    give_up_at = math.inf
    reason = ""
    while len(exits) < len(processes):
        living = [p for rank, p in enumerate(processes) if rank not in exits]
        connection.wait([p.sentinel for p in living], timeout=POLL_SECONDS)
        for rank, process in enumerate(processes):
            if rank not in exits and not process.is_alive():
                exits[rank] = Exit(process.exitcode or 0, time.time(), reason)
        on_poll()
        records = read_records(job.folder, len(processes))
        if stop.signal:
            listening = [p for p, r in zip(processes, records, strict=True) if r.time]
            _send(stop.signal, listening)
        if stop.kill:
            raise KeyboardInterrupt
        if give_up_at == math.inf and is_decided(records, exits):
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
    for process in processes:
        if process.is_alive() and process.pid:
            os.kill(process.pid, number)


def is_decided(records: Sequence[RankRecord], exits: Mapping[int, Exit]) -> bool:
    """Return whether a rank failed, or all have ended; some may hang while they leave."""
    died = any(records[rank].status == "running" for rank in exits)
    statuses = {record.status for record in records}
    return died or "failed" in statuses or "running" not in statuses


class HangWatch:
    """Notices that the records of running ranks stay the same for too long.

    Counts time only while the parent looks: a machine may sleep.
    """

    def __init__(self, timeout: float) -> None:
        self._limits = {
            "startup": (IMPORT_SECONDS, "it was not ready in {:g} s"),
            "meeting": (MEETING_SECONDS, "the ranks did not meet in {:g} s"),
            "training": (timeout, "no step was made for {:g} s (hang_timeout_seconds)"),
        }
        self._silence = 0.0
        self._looked = time.monotonic()
        self._seen: list[RankRecord] = []

    def check(self, records: Sequence[RankRecord]) -> str:
        """Return why a rank is considered to hang, or "".

        The limit is that of the least advanced rank: the others wait for it.
        """
        now = time.monotonic()
        self._silence += min(now - self._looked, _LONGEST_LOOK)
        self._looked = now
        running = [record for record in records if record.status == "running"]
        if running != self._seen:
            self._seen, self._silence = running, 0.0
        phases = {record.phase for record in running}
        for phase, (limit, text) in self._limits.items():
            if phase in phases:
                return text.format(limit) if self._silence > limit else ""
        return ""


def _enter(rank: int, job: Job, store: str, parent_pid: int, _lock: Any) -> None:
    """Set up a worker process, in which signals are still blocked, run its part of the
    job, and record how it ended."""
    die_with_parent(parent_pid)
    if os.getppid() != parent_pid:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(job.environment)
    # What native libraries print goes to the log, too.
    log = job.folder.log_file(rank).open("a", encoding="utf-8", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    print(f"{SESSION}{os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}")
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    stop = StopRequest()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    record = RankRecord(job.folder.record_file(rank), rank)
    record.update()
    module, _, name = job.target.partition(":")
    try:
        run = getattr(importlib.import_module(module), name)
        status = run(job, store, record, stop)
    except BaseException as error:
        record.fail(error)
        raise
    record.update(status=status)
