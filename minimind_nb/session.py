"""The session: where this code runs, when that ends, and what is mounted there."""

import contextlib
import dataclasses
import glob
import itertools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import PATH_FIELDS, STAGE_BEFORE, TrainConfig, change_path
from .lifetime import oldest_age_seconds
from .storage.run_folder import RunFolder

KAGGLE_HOURS = 11.5  # of 12
LOG_SECONDS = 60.0  # between lines in the log of a batch run
GPU_REMEDIES = {  # by the kind of a session
    "kaggle": ": choose Settings → Accelerator → GPU T4 x2",
    "colab": ": choose Runtime → Change runtime type → T4 GPU",
}
_NO_PATHS = ("demo", "auto", "none")  # values that a setting of a path also takes


@dataclass(frozen=True)
class Session:
    """The place that a notebook or script runs in: `kind` is "kaggle", "colab" or "plain".

    `batch` is true if a program executes the notebook, such as a Kaggle commit or
    papermill. `scratch` is thrown away at the end; below the read-only `inputs` data
    sets and other notebooks' outputs are mounted.
    """

    kind: str
    batch: bool = False
    scratch: Path | None = None
    inputs: Path | None = None

    def cache_folder(self, out_dir: str | os.PathLike[str]) -> Path:
        """Return the folder for token caches; Kaggle saves `/kaggle/working` each time."""
        own = Path(out_dir).absolute() / "cache"
        return self.scratch / "minimind_nb" if self.scratch else own

    def seconds_left(
        self, max_session_hours: float | None, call_seconds: float = 0.0
    ) -> float | None:
        """Return the seconds until the session ends, or None if nothing ends it.

        On Kaggle and Colab it is as old as the oldest ancestor of this process, since a
        restarted kernel is younger; elsewhere as the call of `train`, `call_seconds`.
        """
        hours = max_session_hours
        if hours is None and self.kind == "kaggle":
            hours = KAGGLE_HOURS
        if hours is None:
            return None
        age = call_seconds if self.kind == "plain" else oldest_age_seconds()
        return hours * 3600 - age

    def missing_remedy(self) -> str:
        """Return what to do about data that is missing."""
        if self.inputs is None:
            return "check the path"
        return "attach its data set with Add Input, or restart once it is processed"


def running_kernel() -> Any:
    """Return the Jupyter kernel that this process is, or None."""
    if "ipykernel" not in sys.modules:
        return None
    from IPython.core.getipython import get_ipython

    return getattr(get_ipython(), "kernel", None)


def current_session(environ: Mapping[str, str] = os.environ) -> Session:
    """Tell Kaggle, Colab and a plain machine apart.

    MINIMIND_NB_INPUTS names a folder to use instead of `/kaggle/input`.
    """
    # An API key on a laptop sets other variables that start with KAGGLE.
    named = environ.get("MINIMIND_NB_INPUTS")
    inputs = Path(named) if named else None
    if run_type := environ.get("KAGGLE_KERNEL_RUN_TYPE"):
        inputs = inputs or Path("/kaggle/input")
        return Session("kaggle", run_type == "Batch", Path("/kaggle/temp"), inputs)
    if "COLAB_RELEASE_TAG" in environ:
        return Session("colab", inputs=inputs)
    kernel = running_kernel()
    request = kernel.get_parent().get("content", {}) if kernel else {}
    # Programs that execute notebooks do not offer to answer `input()`.
    return Session("plain", not request.get("allow_stdin", True), inputs=inputs)


def find_input(path: Any) -> Any:
    """Find a file or folder by its name below the mounted inputs.

    Returns `path` unchanged if it exists, is absolute, leads out of the inputs, is no
    path ("demo", "auto", "none"), or if nothing is mounted under its name. Several
    parts, `"minimind-sft/out"`, choose among several places. Raises `ValueError` if
    several remain.
    """
    inputs = current_session().inputs
    if inputs is None or not isinstance(path, str | os.PathLike) or path in _NO_PATHS:
        return path
    if Path(path).is_absolute() or Path(path).exists() or ".." in Path(path).parts:
        return path
    name = os.fspath(Path(path))
    found = _only(sorted(inputs.rglob(glob.escape(name))), os.fspath(path))
    if found is None and glob.has_magic(name):
        return tuple(map(str, sorted(inputs.rglob(name)))) or path
    return found or path


def find_inputs(cfg: TrainConfig) -> TrainConfig:
    """Return the configuration with its files and runs found below the mounted inputs.

    If `out_dir` has no run of this stage, resume="auto" becomes the run that a previous
    version of the notebook left; without one, init_from becomes the run of the stage
    before, unless `out_dir` has one. If nothing is mounted, nothing changes. Raises
    `ValueError` if there are several to choose from, or none and an empty input, since
    a version that was cancelled leaves one.
    """
    if (inputs := current_session().inputs) is None:
        return cfg
    out_dir, before = Path(cfg.out_dir), STAGE_BEFORE.get(cfg.stage)
    names = [name for name in PATH_FIELDS if name != "out_dir"]
    found = {name: change_path(find_input, getattr(cfg, name)) for name in names}
    resumes = runs_below(out_dir, cfg.stage, cfg.run_name) and cfg.resume is not False
    if cfg.resume == "auto" and not resumes:
        runs = runs_below(inputs, cfg.stage, cfg.run_name)
        found["resume"] = _only(runs, 'resume="auto"') or "auto"
        mounts = itertools.chain(inputs.glob("*"), inputs.glob("notebooks/*/*"))
        empty = (p for p in mounts if p.is_dir() and not any(p.iterdir()))
        if not runs and (mount := next(empty, None)):
            raise ValueError(
                f"{mount} is empty, and no other input has a run to resume: attach the "
                "output of the last complete version, or remove this input to start over"
            )
    begins = not resumes and found["resume"] == cfg.resume
    auto = before and cfg.init_from in (None, "auto")
    if begins and auto and not runs_below(out_dir, before):
        earlier = _only(runs_below(inputs, before), 'init_from="auto"')
        found["init_from"] = earlier or cfg.init_from
    return dataclasses.replace(cfg, **found)


def runs_below(
    root: Path | None,
    stage: str | None = None,
    run_name: str | None = None,
    pattern: str = "**/config.json",
) -> list[Path]:
    """List the run folders with checkpoints below `root`, but those set aside."""
    found = []
    for file in sorted(root.glob(pattern)) if root else ():
        run = RunFolder(file.parent)
        if not run.checkpoint_folders() or run.is_aside():
            continue
        with contextlib.suppress(ValueError):
            fits = stage in (None, run.settings().get("stage"))
            if fits and run_name in (None, run.root.name):
                found.append(run.root)
    return found


def _only(found: list[Path], what: str) -> str | None:
    """Return the only one found, or None without one. Raises `ValueError` for several."""
    if len(found) > 1:
        listing = "\n  ".join(map(str, found))
        raise ValueError(
            f"{what} matches several of the inputs: name one of them\n  {listing}"
        )
    return str(found[0]) if found else None
