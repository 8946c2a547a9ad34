"""What became of each rank, by its own word, and the one error for all of them.

torch's spawn wrapper exits with 0 on an interrupt and its `join()` calls that a
success, so exit codes are read only for ranks that left without a word.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..lifetime import identify_process
from ..storage.run_folder import RunFolder

ENDINGS = ("finished", "time_budget", "interrupted", "terminated")
_LOG_TAIL_LINES = 15
_LOG_TAIL_BYTES = 1 << 18
_BEAT_SECONDS = 1.0
_RECORD_BYTES = 1 << 14
_SHORT_ERROR = 1 << 10
_STACK = "Stack (most recent call first):"  # what faulthandler writes before one
_STACK_LINES = 8
SESSION = "--- pid "
"""What each session of a rank begins its log with."""
WAITING = ("launch/process_group.py", "in norm_and_slots")
"""In the stack of a rank that waits for the others: it is in `launch.distributed`, or,
on CUDA, where the host first needs what a sum gives."""
_HINTS: dict[int, str] = {
    signal.SIGKILL: "Something outside killed it; when nobody did, the machine ran out "
    "of memory.",
    signal.SIGBUS: "/dev/shm or the disk is full: make room and start again; or a file "
    "that was being read, such as the token cache, was cut: `minimind-nb verify` tells.",
    signal.SIGSEGV: "A native library crashed; its stack is in the log.",
    signal.SIGABRT: "A native library gave up; its message is in the log.",
}


class TrainingFailed(RuntimeError):
    """A run that did not end by itself: who failed first, why, and what to do.

    `rank` is the rank that failed first; `phase` is how far it came: "startup",
    "meeting" (the ranks' first all-reduce), "training".
    """

    def __init__(self, text: str, rank: int, phase: str) -> None:
        super().__init__(text)
        self.rank = rank
        self.phase = phase

    def __reduce__(self) -> tuple[type[TrainingFailed], tuple[str, int, str]]:
        """Exceptions are pickled with `args`, which hold the text alone."""
        return type(self), (str(self), self.rank, self.phase)


@dataclass
class RankRecord:
    """One rank's word on itself, kept in a file of the run folder.

    `status` is "running", "failed" or one of `ENDINGS`; `process` and `parent` say which
    processes of all these are, as `lifetime.identify_process` does.
    """

    file: Path
    rank: int
    pid: int = dataclasses.field(default_factory=os.getpid)
    process: str = dataclasses.field(
        default_factory=lambda: identify_process(os.getpid())
    )
    parent: str = dataclasses.field(
        default_factory=lambda: identify_process(os.getppid())
    )
    phase: str = "startup"
    status: str = "running"
    step: int = 0
    total_steps: int = 0
    time: float = 0.0
    error: str = ""
    traceback: str = ""

    def update(self, **changes: Any) -> None:
        """Set fields and write them down, as well as a full or failing disk lets it."""
        for name, value in changes.items():
            setattr(self, name, value)
        self.time = time.time()
        aside = self.file.with_name(f".{self.file.name}.tmp")
        # No fsync: the reader is a process of this machine, not the next boot.
        try:
            aside.write_bytes(self._encode())
            os.replace(aside, self.file)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            try:
                self._overwrite()
            except OSError:
                print(f"{self.file} cannot be written: {error}", file=sys.stderr)

    def beat(self) -> None:
        """Show that this rank gets on, between steps too; at most once a second."""
        if abs(time.time() - self.time) >= _BEAT_SECONDS:
            self.update()

    def is_orphan(self) -> bool:
        """Whether the parent that this rank names is not there any more."""
        _, number, _ = [*self.parent.split("/"), "", ""][:3]
        return number.isdecimal() and identify_process(int(number)) != self.parent

    def fail(self, error: BaseException) -> None:
        """Record an exception, with its traceback, as the end of this rank."""
        text = "".join(traceback.format_exception(error))
        self.update(
            status="failed", error=f"{type(error).__name__}: {error}", traceback=text
        )

    def _encode(self) -> bytes:
        """The fields as JSON, and blanks that make room for what there may be to say."""
        fields = dataclasses.asdict(self)
        del fields["file"]
        return json.dumps(fields, ensure_ascii=False).encode().ljust(_RECORD_BYTES)

    def _overwrite(self) -> None:
        """Write into the file's own bytes, which most full disks still have."""
        while len(self._encode()) > _RECORD_BYTES:
            self.traceback = self.traceback[len(self.traceback) // 2 + 1 :]
            self.error = self.error[: max(_SHORT_ERROR, len(self.error) // 2)]
        with self.file.open("r+b") as file:
            file.write(self._encode())
            file.truncate()

    @classmethod
    def read(cls, file: Path) -> RankRecord | None:
        """The record in a file, or None where none was written."""
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            record = cls(file=file, **fields)
        except (OSError, ValueError, TypeError):
            return None
        kinds = ((record.parent, str), (record.pid, int), (record.process, str))
        return record if all(isinstance(v, kind) for v, kind in kinds) else None


@dataclass(frozen=True)
class Exit:
    """How a process left: its exit code (negative: a signal), when, by whose will.

    `time` is when it was last seen alive, in seconds since 1970; `reason` is the
    parent's, when the parent killed it.
    """

    code: int | None
    time: float
    reason: str = ""


def judge(
    folder: RunFolder,
    exits: list[Exit],
    logs: bool = True,
    less_memory: str = "",
) -> str:
    """Return how a run ended, or raise `TrainingFailed` for its first failure.

    `logs` tells whether the ranks have logs of their own; `less_memory` what to do
    where memory ran out.
    """
    records = [RankRecord.read(folder.record_file(rank)) for rank in range(len(exits))]
    statuses = {record.status if record else "silent" for record in records}
    if len(statuses) == 1 and (status := statuses.pop()) in ENDINGS:
        return status
    stacks = [
        _stack(folder.log_file(rank)) if logs else "" for rank in range(len(exits))
    ]
    rank = _first_failure(records, exits, stacks)
    phase = record.phase if (record := records[rank]) else "startup"
    text = _explain(folder, rank, records, exits[rank], stacks if logs else [])
    if exits[rank].code == -signal.SIGKILL and not exits[rank].reason:
        text = f"{text}\n{less_memory}".rstrip()
    raise TrainingFailed(text, rank, phase)


def _first_failure(
    records: list[RankRecord | None], exits: list[Exit], stacks: list[str]
) -> int:
    """The rank at the root: the earliest error, or an earlier or silent death.

    Who failed while it waited for the others, its connection closed, is not it, unless
    all did: a process that is killed closes its connections before it is seen dead. Nor
    is, of ranks that the parent ended because they hung, one that waited.
    """
    moments = []
    for rank, (record, end) in enumerate(zip(records, exits, strict=True)):
        if record and record.status == "failed":
            waited = any(place in record.traceback for place in WAITING)
            moments.append((record.time + 1e9 * waited, rank))
        elif not (record and record.status in ENDINGS):
            waits = any(place in stacks[rank] for place in WAITING)
            moments.append((end.time + 1e9 * bool(end.reason) + 1e9 * waits, rank))
    return min(moments)[1] if moments else 0


def _explain(
    folder: RunFolder,
    rank: int,
    records: list[RankRecord | None],
    end: Exit,
    stacks: list[str],
) -> str:
    """The failure of a rank in words; `stacks` is empty where there are no logs."""
    record = records[rank]
    hint = "No checkpoint was written yet: the same call starts anew."
    if folder.checkpoint_folders():
        hint = "The same call goes on from the newest checkpoint that verifies."
    if not folder.root.exists():
        hint = f"{folder.root} is gone: it was moved or deleted. Put it back to go on."
    where = "before its first step"
    if record and record.step:
        where = f"at step {record.step} of {record.total_steps}"
    body = ""
    if record and record.status == "failed":
        head = f"rank {rank} failed {where}: {record.error}"
        body = record.traceback.rstrip()
    elif end.reason:
        head = f"rank {rank} was ended {where}: {end.reason}"
    elif end.code is not None and end.code < 0:
        names = {int(known): known.name for known in signal.Signals}
        name = names.get(-end.code, f"signal {-end.code}")
        head = f"rank {rank} was killed by {name} {where}"
        hint = f"{_HINTS.get(-end.code, '')} {hint}".strip()
    else:
        head = f"rank {rank} left {where} (exit code {end.code})"
    others = [
        f"rank {r.rank} failed too: {r.error}"
        for r in records
        if r and r.rank != rank and r.status == "failed"
    ]
    if end.reason and any(stacks):
        nowhere = (
            "  no line of Python: it is stopped, or in a call that does not return"
        )
        others += [f"rank {n} was in:\n{s or nowhere}" for n, s in enumerate(stacks)]
    tail = _tail(folder.log_file(rank)) if stacks else ""
    parts = [head, body, *others, tail, hint]
    return "\n".join(part for part in parts if part)


def _stack(log: Path) -> str:
    """The Python stack that a hung rank wrote when it was asked to; "" if none."""
    _, found, stack = _end_of(log).rpartition(SESSION)[2].rpartition(_STACK)
    lines = [line for line in stack.splitlines() if line.startswith("  File ")]
    return "\n".join(lines[:_STACK_LINES]) if found else ""


def _end_of(log: Path) -> str:
    """As much of a log's end as is of use; it may be longer than the memory."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.path.getsize(log) - _LOG_TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _tail(log: Path) -> str:
    if not log.exists():
        return ""
    tail = "\n  ".join(_end_of(log).splitlines()[-_LOG_TAIL_LINES:])
    return f"The end of {log}:\n  {tail}" if tail else f"{log} is empty."
