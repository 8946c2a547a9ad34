"""What processes that were killed left behind: other processes, temporary folders."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..lifetime import identify_process
from ..storage.run_folder import RunFolder, RunLocked
from .outcome import RankRecord

_GRACE_SECONDS = 5.0
_SCRATCH = "minimind_nb_"


@contextlib.contextmanager
def scratch_folder(within: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """A temporary folder; those of processes that died here go, too.

    Their names tell the boot and the container, since others may share the place, and
    number and start of the process.
    """
    me = identify_process(os.getpid())
    prefix = _SCRATCH
    if me:  # else /proc tells of nobody
        boot, pid, started = me.split("/")
        place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        prefix += f"{hashlib.sha256(place.encode()).hexdigest()[:12]}_"
        for left in Path(tempfile.gettempdir()).glob(f"{prefix}*_*_*"):
            owner = left.name.removeprefix(prefix).split("_")[:2]
            alive = owner[0].isdecimal() and identify_process(int(owner[0]))
            if alive != "/".join([boot, *owner]):
                shutil.rmtree(left, ignore_errors=True)
        prefix += f"{pid}_{started}_"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=within) as folder:
        yield Path(folder)


def end_orphans(folder: RunFolder) -> list[int]:
    """End ranks of an earlier run here whose parent is gone, and return their pids.

    A number alone proves nothing: the process, and that its parent is another one, are
    told by when they started. Others are never touched. Raises `RunLocked` where a rank
    is at work whose parent lives, as it is where somebody deleted the lock's file.
    """
    ended, ours = [], identify_process(os.getppid())
    for file in folder.root.glob("rank*.json"):
        record = RankRecord.read(file)
        if not record or not record.process:
            continue
        alive = identify_process(record.pid) == record.process
        under_torchrun = record.parent == ours or record.pid == os.getpid()
        if not alive or under_torchrun:
            continue
        if not record.is_orphan() and record.status == "running":
            raise RunLocked(
                f"{folder.root} is in use by pid {record.pid}, rank {record.rank} of a run "
                "that is at work; its lock file was deleted, which does not end it. Wait "
                "for that run, stop it, or take another run_name."
            )
        if record.is_orphan():
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, signal.SIGKILL)
                ended.append(record.pid)
    end = time.monotonic() + _GRACE_SECONDS
    while any(map(identify_process, ended)) and time.monotonic() < end:
        time.sleep(0.02)
    return ended
