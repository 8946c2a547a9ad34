"""Worker processes: spawned from a cell, watched, reaped; none outlives its parent."""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import importlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, cast

from ..session import die_with_parent
from ..storage.runs import RunFolder
from .stopping import StopRequest
from .verdict import Exit, RankRecord, judge

POLL_SECONDS = 0.5
MEETING_SECONDS = 60.0
IMPORT_SECONDS = 300.0
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """What to run in each process.

    `target` names a function, "package.module:function", that takes (rank, payload,
    record, stop) and returns how it ended; `payload` is plain data.
    """

    target: str
    payload: Mapping[str, Any]
    num_processes: int
    folder: RunFolder
    environment: Mapping[str, str] = field(default_factory=dict)


def run_processes(job: Job, on_poll: Callable[[], None]) -> str:
    """Run a job to its end and return how it ended, calling `on_poll` twice a second.

    An interrupt or SIGTERM of this process is passed on, and the ranks stop at the
    end of a step; a second one kills them and raises `KeyboardInterrupt`. Raises
    `TrainingFailed` when a rank failed, died or hung, and `RuntimeError` for a script
    without its `__main__` guard.
    """
    refuse_unguarded_script()
    for rank in range(job.num_processes):
        job.folder.record_file(rank).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="minimind_nb_") as meeting:
        with _relayed_signals() as signals:
            processes = _start(job, {**job.payload, "store": f"{meeting}/store"})
            try:
                exits = _watch(job, processes, signals, on_poll)
            finally:
                for process in processes:
                    process.kill()
                    process.join()
    if signals.impatient:
        raise KeyboardInterrupt
    return judge(job.folder, exits, signals.reason)


def refuse_unguarded_script() -> None:
    """Raise where spawned processes would run the calling script again.

    Spawned processes import the main script; a `train` call at its top level, outside
    `if __name__ == "__main__":`, would start processes from there without end.
    """
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if file is None or getattr(main, "__spec__", None) is not None:
        return
    path = Path(file)
    if not path.is_file():
        raise RuntimeError(
            f"the main script {file} cannot be read again by worker processes; save "
            "it as a file and run that, or use a notebook or the command line"
        )
    line = _line_in(main.__dict__)
    if line is not None and not _is_guarded(path, line):
        raise RuntimeError(
            f"{path}:{line} calls train at the top level of a script, and every worker "
            "process would run that line again. Put it under a guard:\n\n"
            '    if __name__ == "__main__":\n'
            "        run = mm.train(cfg)\n"
        )


@contextlib.contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside the block."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Signals:
    """Interrupts and SIGTERMs that came to this process while a job ran."""

    def __init__(self) -> None:
        self.number = 0
        self.count = 0

    @property
    def reason(self) -> str:
        names = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
        return names.get(signal.Signals(self.number), "") if self.number else ""

    @property
    def impatient(self) -> bool:
        return self.count > 1

    def handle(self, number: int, _frame: FrameType | None) -> None:
        self.number = self.number or number
        self.count += 1


@contextlib.contextmanager
def _relayed_signals() -> Iterator[_Signals]:
    """Count signals instead of raising, so that no line of ours is cut in two."""
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals  # only the main thread may set handlers, and only it gets them
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(job: Job, payload: dict[str, Any]) -> list[BaseProcess]:
    from torch.multiprocessing.spawn import start_processes

    on_main = threading.current_thread() is threading.main_thread()
    # A kernel interrupt reaches the whole process group. A worker that still imports
    # would die of it, so children inherit SIG_IGN until they can listen.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if on_main else None
    try:
        with environment(job.environment):
            context = start_processes(
                _enter,
                args=(job.target, payload, str(job.folder.root), os.getpid()),
                nprocs=job.num_processes,
                join=False,
                start_method="spawn",
            )
    finally:
        if on_main:
            signal.signal(signal.SIGINT, handler)
    assert context is not None
    return list(cast("list[BaseProcess]", context.processes))


def _watch(
    job: Job,
    processes: list[BaseProcess],
    signals: _Signals,
    on_poll: Callable[[], None],
) -> list[Exit]:
    """Wait until all processes have left; end the rest when one failed or hung."""
    exits: dict[int, Exit] = {}
    started = time.monotonic()
    give_up_at: float | None = None
    reason = ""
    while len(exits) < len(processes):
        living = [p for rank, p in enumerate(processes) if rank not in exits]
        connection.wait([p.sentinel for p in living], timeout=POLL_SECONDS)
        on_poll()
        for rank, process in enumerate(processes):
            if rank not in exits and not process.is_alive():
                exits[rank] = Exit(process.exitcode, time.time(), reason)
        _relay(job, signals, processes)
        if signals.impatient:
            give_up_at, reason = 0.0, "a second interrupt"
        elif give_up_at is None and _someone_failed(job, exits):
            give_up_at = time.monotonic() + GRACE_SECONDS
        elif give_up_at is None and _stuck_in_startup(job, started):
            give_up_at, reason = 0.0, "the ranks did not meet in time"
        if give_up_at is not None and time.monotonic() > give_up_at:
            reason = reason or "another rank failed"
            for process in living:
                process.kill()
    return [exits[rank] for rank in range(len(processes))]


def _relay(job: Job, signals: _Signals, processes: list[BaseProcess]) -> None:
    """Pass a signal on, at every poll again, to the ranks that listen by now."""
    if not signals.number:
        return
    for rank, process in enumerate(processes):
        listens = job.folder.record_file(rank).exists()
        if listens and process.is_alive() and process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signals.number)


def _someone_failed(job: Job, exits: Mapping[int, Exit]) -> bool:
    for rank in exits:
        record = RankRecord.read(job.folder.record_file(rank))
        if record is None or record.status in ("running", "failed"):
            return True
    return False


def _stuck_in_startup(job: Job, started: float) -> bool:
    """Whether some rank waits for the others longer than a meeting may take."""
    if job.num_processes == 1:
        return False
    waited = time.monotonic() - started
    ranks = range(job.num_processes)
    records = [RankRecord.read(job.folder.record_file(rank)) for rank in ranks]
    if any(record is None for record in records):
        return waited > IMPORT_SECONDS
    meeting = [r for r in records if r and r.phase == "meeting"]
    return bool(meeting) and all(
        time.time() - record.time > MEETING_SECONDS for record in meeting
    )


def _enter(
    rank: int, target: str, payload: dict[str, Any], root: str, parent_pid: int
) -> None:
    """The first lines of every worker process."""
    die_with_parent(parent_pid)
    if os.getppid() != parent_pid:
        return
    folder = RunFolder(root)
    _redirect_output(folder.log_file(rank))
    faulthandler.enable()
    stop = StopRequest()
    record = RankRecord(folder.record_file(rank), rank)
    record.update()
    module, _, name = target.partition(":")
    try:
        run = getattr(importlib.import_module(module), name)
        status = run(rank, payload, record, stop)
    except BaseException as error:
        record.fail(error)
        print(record.traceback, flush=True)
        raise
    record.update(status=status)


def _redirect_output(log: Path) -> None:
    """Send everything this process prints, native libraries too, to its log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
    print(f"--- pid {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}")


def _line_in(namespace: Mapping[str, Any]) -> int | None:
    """The line of the main script's own body that is being executed, if any."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals is namespace and frame.f_code.co_name == "<module>":
            return frame.f_lineno
        frame = frame.f_back
    return None


def _is_guarded(path: Path, line: int) -> bool:
    """Whether a line of a script stands under `if __name__ == "__main__":`."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return True  # a compiled or zipped launcher: not a script that we can judge
    return any(
        isinstance(node, ast.If)
        and "__name__" in {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
        and node.lineno <= line <= (node.end_lineno or line)
        for node in tree.body
    )
