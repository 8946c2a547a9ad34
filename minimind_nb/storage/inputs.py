"""What is mounted read-only on Kaggle: files by their names, runs of other notebooks."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
from pathlib import Path
from typing import TypeVar

from ..config import PATH_FIELDS, STAGE_BEFORE, TrainConfig
from ..session import current_session
from .run_folder import RunFolder

_WORDS = ("demo", "auto", "none")  # settings of paths that are none
_Path = TypeVar("_Path")


def find_input(path: _Path) -> _Path | str:
    """The file or folder of this name below the mounted inputs.

    `path` is returned as it is where it exists, is absolute or no path ("demo", "auto",
    "none") or leads out of them, where nothing is mounted or of that name. Several
    parts, `"minimind-sft/out"`, choose among several places. Raises `ValueError` where
    several remain.
    """
    inputs = current_session().inputs
    if inputs is None or not isinstance(path, str | os.PathLike) or path in _WORDS:
        return path
    if Path(path).is_absolute() or Path(path).exists() or ".." in Path(path).parts:
        return path
    found = sorted(inputs.rglob(glob.escape(os.fspath(Path(path)))))
    return _only(found, os.fspath(path)) if found else path


def input_runs(stage: str | None = None, run_name: str | None = None) -> list[Path]:
    """The run folders below the mounted inputs, of a stage and a name if given.

    Those that `resume=False` has set aside are none of them.
    """
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
    read = [name for name in PATH_FIELDS if name != "out_dir"]
    found = {name: find_input(getattr(cfg, name)) for name in read}
    own = _runs_below(Path(cfg.out_dir), cfg.stage, cfg.run_name)
    runs = input_runs(cfg.stage, cfg.run_name)
    if cfg.resume == "auto" and runs and not own:
        found["resume"] = _only(runs, 'resume="auto"')
    before = STAGE_BEFORE.get(cfg.stage)
    goes_on = found["resume"] != cfg.resume or (own and cfg.resume is not False)
    if before and cfg.init_from in (None, "auto") and not goes_on:
        earlier = input_runs(before)
        if earlier and not _runs_below(Path(cfg.out_dir), before, None):
            found["init_from"] = _only(earlier, 'init_from="auto"')
    return dataclasses.replace(cfg, **found)


def _runs_below(root: Path, stage: str | None, run_name: str | None) -> list[Path]:
    found = []
    for file in sorted(root.rglob("config.json")):
        run = RunFolder(file.parent)
        if not run.checkpoints.is_dir() or run.is_aside():
            continue
        with contextlib.suppress(ValueError):
            settings = run.read_config().get("settings", {})
            fits = stage in (None, settings.get("stage"))
            if fits and run_name in (None, run.root.name):
                found.append(run.root)
    return found


def _only(found: list[Path], what: str) -> str:
    if len(found) > 1:
        listing = "\n  ".join(map(str, found))
        raise ValueError(
            f"{what} may mean several of the inputs; name one of them:\n  {listing}"
        )
    return str(found[0])
