"""Whether a run can write where it is to, and has room for all that it will write."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

from ..config import TrainConfig, count_parameters
from ..data.demo import DEMO
from ..data.token_cache import estimate_bytes
from ..storage.run_folder import RunFolder

_CHECKPOINT_BYTES = 12  # a parameter: fp32 weight and two fp32 moments
_EXPORT_BYTES = 2
_PROBE_BYTES = 1 << 16


def check_writable(folder: Path) -> None:
    """Raise `OSError` where nothing can be written in a folder; it is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise type(error)(
            error.errno,
            f"{folder} cannot be written ({error.strerror}); choose a folder of your "
            "own with out_dir=…, or make room there",
            str(folder),
        ) from error


def check_room(
    cfg: TrainConfig, steps: int | None = None, cache: Path | None = None
) -> None:
    """Raise `OSError` where the checkpoints of so many steps more do not fit.

    Nor, with `cache`, the tokens that may have to be put there first: those count where
    nothing is there yet, for else they may be what is there. Before the number of steps
    is known a finished run needs nothing, for perhaps there is nothing left to do.
    """
    assert cfg.run_name and cfg.data_path and cfg.save_interval
    run = RunFolder(Path(cfg.out_dir) / cfg.run_name)
    goes_on = cfg.resume is not False
    if steps is None and goes_on and run.status() == "finished":
        return
    parameters = count_parameters(cfg.shape())["total"]
    kept = cfg.keep_checkpoints + 2  # the best one, and the one being written
    there = len(run.checkpoint_folders()) if goes_on else 0
    to_come = math.inf if steps is None else math.ceil(steps / cfg.save_interval)
    missing = int(max(1, min(kept - there, to_come)))
    needed = parameters * (_CHECKPOINT_BYTES * missing + 2 * _EXPORT_BYTES)
    words = (
        f"{missing} checkpoint{'s' * (missing > 1)} of {parameters / 1e6:.1f} M "
        "parameters and the weights"
    )
    tokens = 0
    if cache:
        cache.mkdir(parents=True, exist_ok=True)
        if not any(cache.iterdir()):
            files = {cfg.data_path, cfg.val_path} - {DEMO, None}
            tokens = sum(estimate_bytes(Path(str(file))) for file in files)
        if cache.stat().st_dev == Path(cfg.out_dir).stat().st_dev:
            needed, tokens = needed + tokens, 0
        _check_free(cache, tokens, "the tokens of the data")
    place = run.checkpoints if run.checkpoints.is_dir() else Path(cfg.out_dir)
    _check_free(place, needed, words)


def _check_free(place: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(
            f"{place} has {free / 2**20:,.0f} MiB free; {what} need "
            f"{needed / 2**20:,.0f} MiB. Make room there."
        )
