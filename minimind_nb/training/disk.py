"""Whether a run can write where it is to, and has room for all that it will write."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ..config import TrainConfig, count_parameters
from ..data.demo import DEMO
from ..data.shards import estimate_bytes
from ..storage.runs import RunFolder

_CHECKPOINT_BYTES = 12  # a parameter: fp32 weight and two fp32 moments
_EXPORT_BYTES = 2


def check_writable(out_dir: Path) -> None:
    """Raise `OSError` where nothing can be written in `out_dir`; it is made."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass
    except OSError as error:
        raise type(error)(
            error.errno,
            f"out_dir cannot be written ({error.strerror}); choose a folder of your own "
            "with out_dir=…",
            str(out_dir),
        ) from error


def check_room(cfg: TrainConfig, cache: Path | None = None) -> None:
    """Raise `OSError` where the checkpoints do not fit that the run has yet to write.

    Nor, with `cache`, the tokens that may have to be put there first: those count where
    nothing is there yet, for else they may be what is there.
    """
    assert cfg.run_name and cfg.data_path
    run = RunFolder(Path(cfg.out_dir) / cfg.run_name)
    if run.status() == "finished" and cfg.resume is not False:
        return  # perhaps nothing is left to do, and a save asks for itself
    parameters = count_parameters(cfg.shape())["total"]
    kept = cfg.keep_checkpoints + 2  # the best one, and the one being written
    there = 0 if cfg.resume is False else len(run.checkpoint_folders())
    missing = max(1, kept - there)
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
    _check_free(Path(cfg.out_dir), needed, words)


def _check_free(place: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(
            f"{place} has {free / 2**20:,.0f} MiB free; {what} need "
            f"{needed / 2**20:,.0f} MiB. Make room there."
        )
