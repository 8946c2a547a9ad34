"""The outcome of each rank, and one `TrainingFailed` for the root cause.

Ranks record how they ended. Exit codes count only for those that did not.
"""

import json
import logging
import os
import signal
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..storage.run_folder import RunFolder

logger = logging.getLogger(__name__)

ENDINGS = ("finished", "time_budget", "interrupted", "terminated")
SESSION = "--- pid "
"""Each session of a rank begins its log with this."""
_WAITING = ("launch/process_group.py", "in grad_norm_and_sums")
"""In the stack of a rank that waits for the others: it is in a collective or, on CUDA,
where the host first needs the result of one."""
_LOG_LINES = 15
_BEAT_SECONDS = 1.0
_RECORD_BYTES = 1 << 15
_ERROR_CHARACTERS, _TRACEBACK_CHARACTERS = 1000, 6000  # of up to 4 bytes
_STACK = "Stack (most recent call first):"  # faulthandler writes this before one
_STACK_LINES = 8
LESS_MEMORY = (
    "halve batch_size and double accumulation_steps, which keeps the global batch; if "
    "it is 1 already, lower max_seq_len or the model size, or use fewer processes"
)
_HINTS: dict[int, str] = {
    signal.SIGKILL: "If nobody killed it, the machine ran out of memory: "
    f"{LESS_MEMORY}.",
    signal.SIGBUS: "/dev/shm or the disk is full: make room and start again. Or a file "
    "that was being read, such as the token cache, was cut: run `minimind-nb verify`.",
    signal.SIGSEGV: "A native library crashed; its stack is in the log.",
    signal.SIGABRT: "A native library gave up; its message is in the log.",
}


class TrainingFailed(RuntimeError):
    """A run failed: the text holds the root cause, its traceback, and what to do.

    `rank` is the rank that failed first; `phase` is how far it came: "startup",
    "meeting" (the ranks' first all-reduce), "training", "out_of_memory", or "stopping" if
    the run was asked to stop before.
    """

    # Defaults, because an exception is unpickled with its text alone, then its fields.
    def __init__(self, text: str, rank: int = 0, phase: str = "") -> None:
        super().__init__(text)
        self.rank = rank
        self.phase = phase


@dataclass
class RankRecord:
    """The state of one rank, which it keeps in a file of the run folder.

    `status` is "running", "failed" or one of `ENDINGS`; `doing` names what it does
    in addition to steps, such as "saving".
    """

    file: Path
    rank: int
    pid: int = field(default_factory=os.getpid)
    phase: str = "startup"
    status: str = "running"
    doing: str = ""
    step: int = 0
    total_steps: int = 0
    time: float = 0.0
    error: str = ""
    traceback: str = ""

    def update(self, **changes: Any) -> None:
        """Set fields and write all of them, padded, over the file's own bytes.

        So there is room for an error on a disk that is full by then.
        """
        vars(self).update(changes, time=time.time())
        fields = {k: v for k, v in vars(self).items() if k != "file"}
        text = json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace")
        try:
            descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT, 0o666)
            with open(descriptor, "wb", buffering=0) as file:
                file.write(text.ljust(_RECORD_BYTES))
        except OSError as error:
            # Logging survives a full disk under the log, which `print` does not.
            logger.warning("%s cannot be written: %s", self.file, error)

    def beat(self) -> None:
        """Show progress between two steps, at most once a second."""
        if abs(time.time() - self.time) >= _BEAT_SECONDS:
            self.update()

    def fail(self, error: BaseException) -> None:
        """Record the exception that ended this rank, with the end of its traceback."""
        text = "".join(traceback.format_exception(error))
        self.update(
            status="failed",
            error=f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS],
            traceback=text[-_TRACEBACK_CHARACTERS:],
        )

    @classmethod
    def read(cls, file: Path) -> "RankRecord | None":
        """Return the record in a file, or None if there is no valid one."""
        try:
            return cls(file=file, **json.loads(file.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None


def read_records(folder: RunFolder, size: int) -> list[RankRecord]:
    """Return the record of each rank; "startup" at time 0 if it wrote none yet."""
    none = [RankRecord(folder.record_file(n), n, 0) for n in range(size)]
    return [RankRecord.read(record.file) or record for record in none]


class Exit(NamedTuple):
    """The exit code of a process (negative: a signal), and when that was seen.

    `reason` is the parent's, if the parent killed it.
    """

    code: int
    time: float
    reason: str = ""


def collect_outcome(
    folder: RunFolder, exits: list[Exit], stopping: bool = False
) -> str:
    """Return how a run ended, or raise `TrainingFailed` for the root cause.

    `stopping` says that the run was to stop.
    """
    records = read_records(folder, len(exits))
    statuses = {record.status for record in records}
    if len(statuses) == 1 and (status := statuses.pop()) in ENDINGS:
        return status
    logs = [_read_log(folder.log_file(record.rank), record.pid) for record in records]
    stacks = [_find_stack(log) for log in logs]
    rank = _root_cause(records, exits, stacks)
    cause, end = records[rank], exits[rank]
    parts = [_first_line(cause, end), cause.traceback.rstrip()]
    parts += [
        f"rank {record.rank} failed too: {record.error}"
        for record in records
        if record is not cause and record.status == "failed"
    ]
    if end.reason and any(stacks):
        nowhere = "  no line of Python: it is stopped, or in a native call"
        parts += [f"rank {n} was in:\n{s or nowhere}" for n, s in enumerate(stacks)]
    if lines := logs[rank].splitlines()[-_LOG_LINES:]:
        parts.append("\n  ".join([f"The end of {folder.log_file(rank)}:", *lines]))
    if not end.reason and cause.status == "running":
        parts.append(_HINTS.get(-end.code, ""))
    if folder.checkpoint_folders():
        parts.append("The same call resumes from the newest checkpoint that verifies.")
    else:
        parts.append("No checkpoint was written yet: the same call starts over.")
    phase = "stopping" if stopping else cause.phase
    raise TrainingFailed("\n".join(filter(None, parts)), rank, phase)


def _root_cause(records: list[RankRecord], exits: list[Exit], stacks: list[str]) -> int:
    """Return the rank that failed or died first, not as a consequence of another.

    Consequences are failing or hanging while waiting for the others, whose connections
    close long before they are seen dead, and being ended by the parent.
    """

    def consequences_and_time(rank: int) -> tuple[int, float]:
        record, end = records[rank], exits[rank]
        failed = record.status == "failed"
        where = record.traceback if failed else stacks[rank]
        waited = any(place in where for place in _WAITING)
        if failed:
            return waited, record.time
        return waited + bool(end.reason), end.time

    failures = [n for n, record in enumerate(records) if record.status not in ENDINGS]
    return min(failures, key=consequences_and_time, default=0)


def _first_line(record: RankRecord, end: Exit) -> str:
    rank, at = f"rank {record.rank}", f"at step {record.step} of {record.total_steps}"
    where = at if record.step else "before its first step"
    if record.status == "failed":
        return f"{rank} failed {where}: {record.error}"
    if end.reason:
        return f"{rank} was ended {where}: {end.reason}"
    if end.code >= 0:
        return f"{rank} left {where} (exit code {end.code})"
    return f"{rank} was killed by {signal.Signals(-end.code).name} {where}"


def _find_stack(log: str) -> str:
    """Return the Python stack that a rank that hung wrote when asked to; "" if none."""
    _, found, stack = log.rpartition(_STACK)
    lines = [line for line in stack.splitlines() if line.startswith("  File ")]
    return "\n".join(lines[:_STACK_LINES]) if found else ""


def _read_log(file: Path, pid: int) -> str:
    """Return what a process printed into its log; "" if it has none."""
    try:
        log = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    _, found, text = log.rpartition(f"{SESSION}{pid},")
    return text if found else ""
