"""Where this code runs, which folders are whose, and when the session ends."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import glob
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from .config import TrainConfig

KAGGLE_SESSION_HOURS = 12.0
KAGGLE_MARGIN_HOURS = 0.5
_PARENT_CHECK_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
# Settings that name files, values of them that name none, and who goes before whom.
_SOURCES = ("data_path", "val_path", "tokenizer", "init_from", "resume")
_WORDS = ("demo", "auto", "none")
_BEFORE = {"sft": "pretrain", "dpo": "sft"}
_Path = TypeVar("_Path")


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
        """The folder for what can be made again: token caches, the demo corpus.

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

        On Kaggle and Colab the clock started with the kernel; elsewhere a session is
        one call of `train`, which began `call_seconds` ago.
        """
        hours = self.hours(max_session_hours)
        if hours is None:
            return None
        age = call_seconds if self.kind == "plain" else process_age_seconds()
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


def find_input(path: _Path) -> _Path | str:
    """The file or folder of this name below the mounted inputs.

    `path` is returned as it is where it exists, is absolute or no path ("demo", "auto",
    "none"), where nothing is mounted, and where nothing of that name is there. Several
    parts, `"minimind-sft/out"`, choose among several places. Raises `ValueError` where
    several remain.
    """
    inputs = current_session().inputs
    if inputs is None or not isinstance(path, str | os.PathLike) or path in _WORDS:
        return path
    if Path(path).is_absolute() or Path(path).exists():
        return path
    found = sorted(inputs.rglob(glob.escape(os.fspath(Path(path)))))
    return _only(found, os.fspath(path)) if found else path


def input_runs(stage: str | None = None, run_name: str | None = None) -> list[Path]:
    """The run folders below the mounted inputs, of a stage and a name if given."""
    inputs = current_session().inputs
    return _runs_below(inputs, stage, run_name) if inputs else []


def find_inputs(cfg: TrainConfig) -> TrainConfig:
    """The same configuration, its files and runs found below the mounted inputs.

    Where `out_dir` has no run of this stage, resume="auto" becomes the run that a
    previous version of the notebook left; and where there is none either, init_from
    becomes the run of the stage before, unless `out_dir` has one. Where nothing is
    mounted, nothing changes. Raises `ValueError` where there are several to choose from.
    """
    if current_session().inputs is None:
        return cfg
    found = {name: find_input(getattr(cfg, name)) for name in _SOURCES}
    own = _runs_below(Path(cfg.out_dir), cfg.stage, cfg.run_name)
    runs = input_runs(cfg.stage, cfg.run_name)
    if cfg.resume == "auto" and runs and not own:
        found["resume"] = _only(runs, 'resume="auto"')
    before = _BEFORE.get(cfg.stage)
    goes_on = found["resume"] != cfg.resume or (own and cfg.resume is not False)
    if before and cfg.init_from in (None, "auto") and not goes_on:
        earlier = input_runs(before)
        if earlier and not _runs_below(Path(cfg.out_dir), before, None):
            found["init_from"] = _only(earlier, 'init_from="auto"')
    return dataclasses.replace(cfg, **found)


def _runs_below(root: Path, stage: str | None, run_name: str | None) -> list[Path]:
    found = []
    for file in sorted(root.rglob("config.json")):
        if not (file.parent / "checkpoints").is_dir():
            continue
        with contextlib.suppress(ValueError, AttributeError):
            settings = json.loads(file.read_bytes()).get("settings", {})
            if stage in (None, settings.get("stage")) and run_name in (
                None,
                file.parent.name,
            ):
                found.append(file.parent)
    return found


def _only(found: list[Path], what: str) -> str:
    if len(found) > 1:
        listing = "\n  ".join(map(str, found))
        raise ValueError(
            f"{what} may mean several of the inputs; name one of them:\n  {listing}"
        )
    return str(found[0])


def process_age_seconds() -> float:
    """Seconds since this process started (0.0 where /proc does not say)."""
    try:
        started = int(_read_stat(os.getpid())[19]) / os.sysconf("SC_CLK_TCK")
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    return max(0.0, uptime - started)


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


def _read_stat(pid: int) -> list[str]:
    """The fields of `/proc/{pid}/stat` behind the name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


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
