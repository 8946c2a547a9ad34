"""Where this code runs, which folders are whose, and when the session ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .lifetime import oldest_age_seconds

KAGGLE_SESSION_HOURS = 12.0
KAGGLE_MARGIN_HOURS = 0.5


@dataclass(frozen=True)
class Session:
    """The place a notebook or script runs in: `kind` is "kaggle", "colab" or "plain".

    `batch` tells a Kaggle commit from an interactive session; `scratch` is a folder
    that is thrown away at the end, `inputs` the read-only folder below which data sets
    and other notebooks' outputs are mounted, where there is one.
    """

    kind: str
    batch: bool = False
    scratch: Path | None = None
    inputs: Path | None = None

    def cache_folder(self, out_dir: str | os.PathLike[str]) -> Path:
        """The folder for what can be made again: token caches.

        Kaggle saves `/kaggle/working` with every version, so it goes to scratch there.
        """
        return self.scratch / "minimind_nb" if self.scratch else Path(out_dir) / "cache"

    def hours(self, max_session_hours: float | None) -> float | None:
        """The length of the session in hours, or None where nothing ends it."""
        if max_session_hours is None and self.kind == "kaggle":
            return KAGGLE_SESSION_HOURS - KAGGLE_MARGIN_HOURS
        return max_session_hours

    def seconds_left(
        self, max_session_hours: float | None, call_seconds: float = 0.0
    ) -> float | None:
        """Seconds until the session ends, or None where nothing ends it.

        On Kaggle and Colab the clock started with the session, whose age is that of
        the oldest process above this one: a restarted kernel, or a command started from
        a cell, is younger. Elsewhere a session is one call of `train`, which began
        `call_seconds` ago.
        """
        hours = self.hours(max_session_hours)
        if hours is None:
            return None
        age = call_seconds if self.kind == "plain" else oldest_age_seconds()
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
    variables that start with KAGGLE. MINIMIND_NB_INPUTS names a folder that stands in
    for `/kaggle/input`.
    """
    environ = os.environ if environ is None else environ
    named = environ.get("MINIMIND_NB_INPUTS")
    inputs = Path(named) if named else None
    if run_type := environ.get("KAGGLE_KERNEL_RUN_TYPE"):
        inputs = inputs or Path("/kaggle/input")
        return Session("kaggle", run_type == "Batch", Path("/kaggle/temp"), inputs)
    kind = "colab" if "COLAB_RELEASE_TAG" in environ else "plain"
    return Session(kind, inputs=inputs)
