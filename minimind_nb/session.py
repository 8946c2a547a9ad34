"""Where this code runs, which folders are whose, and when the session ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KAGGLE_SESSION_HOURS = 12.0
KAGGLE_MARGIN_HOURS = 0.5
_PARENT_CHECK_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Session:
    """The place a notebook or script runs in: `kind` is "kaggle", "colab" or "plain".

    `batch` tells a Kaggle commit from an interactive session; `scratch` is a folder
    that is thrown away at the end, where there is one.
    """

    kind: str
    batch: bool = False
    scratch: Path | None = None

    def cache_folder(self, out_dir: str | os.PathLike[str]) -> Path:
        """The folder for what can be made again: token caches, the demo corpus.

        Kaggle saves `/kaggle/working` with every version, so it goes to scratch there.
        """
        return self.scratch / "minimind_nb" if self.scratch else Path(out_dir) / "cache"

    def hours(self, max_session_hours: float | None) -> float | None:
        """The length of the session in hours, or None where nothing ends it."""
        if max_session_hours is None and self.kind == "kaggle":
            return KAGGLE_SESSION_HOURS - KAGGLE_MARGIN_HOURS
        return max_session_hours

    def seconds_left(self, max_session_hours: float | None) -> float | None:
        """Seconds until the session ends, or None where nothing ends it.

        On Kaggle and Colab the clock started with the kernel; elsewhere a session is
        one call of `train`, so it starts now.
        """
        hours = self.hours(max_session_hours)
        if hours is None:
            return None
        age = 0.0 if self.kind == "plain" else process_age_seconds()
        return hours * 3600 - age


def running_kernel() -> Any:
    """The Jupyter kernel that this process is, or None."""
    if "ipykernel" not in sys.modules:
        return None
    from IPython.core.getipython import get_ipython

    return getattr(get_ipython(), "kernel", None)


def current_session(environ: Mapping[str, str] | None = None) -> Session:
    """Tell Kaggle, Colab and a plain machine apart.

    Only KAGGLE_KERNEL_RUN_TYPE proves Kaggle: an API key on a laptop sets other
    variables that start with KAGGLE.
    """
    environ = os.environ if environ is None else environ
    if run_type := environ.get("KAGGLE_KERNEL_RUN_TYPE"):
        return Session("kaggle", run_type == "Batch", Path("/kaggle/temp"))
    return Session("colab" if "COLAB_RELEASE_TAG" in environ else "plain")


def process_age_seconds() -> float:
    """Seconds since this process started (0.0 where /proc does not say)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, uptime - started)


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
