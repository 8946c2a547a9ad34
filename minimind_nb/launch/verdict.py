"""What became of each rank, by its own word, and the one error for all of them.

torch's spawn wrapper exits with 0 on an interrupt and its `join()` calls that a
success, so exit codes are read only for ranks that left without a word.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage.runs import RunFolder

ENDINGS = ("finished", "time_budget", "interrupted", "terminated")
_LOG_TAIL_LINES = 15
_HINTS: dict[int, str] = {
    signal.SIGKILL: "Something outside killed it; when nobody did, the machine ran out "
    "of memory: take a smaller batch_size or fewer processes.",
    signal.SIGBUS: "/dev/shm or the disk is full: make room and start again.",
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


@dataclass
class RankRecord:
    """One rank's word on itself, kept in a file of the run folder.

    `status` is "running", "failed" or one of `ENDINGS`.
    """

    file: Path
    rank: int
    pid: int = dataclasses.field(default_factory=os.getpid)
    phase: str = "startup"
    status: str = "running"
    step: int = 0
    total_steps: int = 0
    time: float = 0.0
    error: str = ""
    traceback: str = ""

    def update(self, **changes: Any) -> None:
        """Set fields and write them down."""
        for name, value in changes.items():
            setattr(self, name, value)
        self.time = time.time()
        fields = dataclasses.asdict(self)
        del fields["file"]
        aside = self.file.with_name(f".{self.file.name}.tmp")
        # No fsync: the reader is a process of this machine, not the next boot.
        aside.write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
        os.replace(aside, self.file)

    def fail(self, error: BaseException) -> None:
        """Record an exception, with its traceback, as the end of this rank."""
        text = "".join(traceback.format_exception(error))
        self.update(
            status="failed", error=f"{type(error).__name__}: {error}", traceback=text
        )

    @classmethod
    def read(cls, file: Path) -> RankRecord | None:
        """The record in a file, or None where none was written."""
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            return cls(file=file, **fields)
        except (OSError, ValueError, TypeError):
            return None


@dataclass(frozen=True)
class Exit:
    """How a process left: its exit code (negative: a signal), when, by whose will.

    `reason` is the parent's, when the parent killed it.
    """

    code: int | None
    time: float
    reason: str = ""


def judge(
    folder: RunFolder, exits: list[Exit], asked_to_stop: str = "", logs: bool = True
) -> str:
    """Return how a run ended, or raise `TrainingFailed` for its first failure.

    `asked_to_stop` is what the parent passed on ("interrupted" or "terminated"): a
    rank that left before it could listen then counts as stopped, not as failed.
    `logs` tells whether the ranks have logs of their own.
    """
    records = [RankRecord.read(folder.record_file(rank)) for rank in range(len(exits))]
    statuses = {record.status if record else "silent" for record in records}
    if len(statuses) == 1 and (status := statuses.pop()) in ENDINGS:
        return status
    if asked_to_stop and not any(r and r.phase == "training" for r in records):
        return asked_to_stop
    rank = _first_failure(records, exits)
    phase = record.phase if (record := records[rank]) else "startup"
    text = _explain(folder, rank, records, exits[rank], logs)
    raise TrainingFailed(text, rank, phase)


def _first_failure(records: list[RankRecord | None], exits: list[Exit]) -> int:
    """The rank at the root: the earliest error, or an earlier or silent death.

    Survivors of a dead peer record "connection closed" at almost the same moment as
    the parent sees the death, so the silent one goes first within a second.
    """
    moments = []
    for rank, (record, end) in enumerate(zip(records, exits, strict=True)):
        if record and record.status == "failed":
            moments.append((record.time, rank))
        elif not (record and record.status in ENDINGS):
            killed_by_us = 1e9 if end.reason else 0.0
            moments.append((end.time - 1.0 + killed_by_us, rank))
    return min(moments)[1] if moments else 0


def _explain(
    folder: RunFolder,
    rank: int,
    records: list[RankRecord | None],
    end: Exit,
    logs: bool,
) -> str:
    record = records[rank]
    hint = "No checkpoint was written yet: the same call starts anew."
    if folder.checkpoint_folders():
        hint = "The last checkpoint is intact: the same call goes on from there."
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
    tail = _tail(folder.log_file(rank)) if logs else ""
    parts = [head, body, *others, tail, hint]
    return "\n".join(part for part in parts if part)


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    tail = "\n  ".join(lines[-_LOG_TAIL_LINES:])
    return f"The end of {log}:\n  {tail}" if tail else f"{log} is empty."
