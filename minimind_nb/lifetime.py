"""Which process is whose: who lives, since when, and children that end with us."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from types import ModuleType

_PARENT_CHECK_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_ALONE = threading.RLock()


def die_with_parent(parent_pid: int) -> None:
    """Make this process end when `parent_pid` ends, however that one died.

    The kernel's parent-death signal acts within milliseconds but belongs to the
    *thread* that created this process, so a thread also looks once a second.
    """
    # Elsewhere than on Linux the thread below is all there is.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(_PARENT_CHECK_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


@contextlib.contextmanager
def without_main_script() -> Iterator[None]:
    """Processes spawned in this block import nothing of the script that calls.

    They need nothing of it: a script without `if __name__ == "__main__":` would run
    again in each of them, and its imports could take longer than a parent lives that
    nobody watches yet.
    """
    with _ALONE:  # of two threads one would put the other's stand-in back
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def identify_process(pid: int) -> str:
    """What tells a living process from every other, of any boot of any machine.

    "" where there is none of this number, or /proc does not say.
    """
    try:
        state, started = itemgetter(0, 19)(_read_stat(pid))
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return "" if state == "Z" else f"{boot}/{pid}/{started}"


def oldest_age_seconds() -> float:
    """Seconds since the oldest of this process and those above it started.

    0.0 where /proc does not say.
    """
    pid, started = os.getpid(), []
    try:
        while pid:
            parent, ticks = itemgetter(1, 19)(_read_stat(pid))
            started.append(int(ticks) / os.sysconf("SC_CLK_TCK"))
            pid = int(parent)
    except OSError:
        pass  # what is above belongs to somebody else
    if not started:
        return 0.0
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return max(0.0, uptime - min(started))


def _read_stat(pid: int) -> list[str]:
    """The fields of `/proc/{pid}/stat` behind the name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
