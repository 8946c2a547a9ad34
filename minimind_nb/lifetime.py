"""The lifetime of processes: their age, and children that end with us."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import ModuleType

_PARENT_CHECK_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_ALONE = threading.RLock()


def die_with_parent(parent_pid: int) -> None:
    """Make this process end when `parent_pid` ends, for whatever reason."""
    # Within milliseconds, but only on Linux, and when the *thread* ends that forked us.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(_PARENT_CHECK_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


@contextlib.contextmanager
def without_main_script() -> Iterator[None]:
    """Keep processes spawned in this block from running the main script again."""
    with _ALONE:  # one of two threads would restore the other's stand-in
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def oldest_age_seconds() -> float:
    """Return the seconds since the oldest of this process and its ancestors started."""
    import psutil  # takes 14 ms, which no rank needs

    process: psutil.Process | None = psutil.Process()
    oldest = process.create_time()
    with contextlib.suppress(psutil.Error):  # a container may hide its host's
        while process := process.parent():
            oldest = min(oldest, process.create_time())
    return max(0.0, time.time() - oldest)
