"""Defaults and limits of this machine: device, processes, precision, disk space."""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..config import ResolvedConfig, TrainConfig, count_parameters
from ..hardware import Hardware, choose_dtype, detect_hardware
from ..launch.spawn import RankInfo
from ..storage.run_folder import RunFolder

_CHECKPOINT_BYTES = 12  # per parameter: an fp32 weight and two fp32 moments
_WEIGHT_BYTES = 4
_EXPORT_BYTES = 2
_PROBE_BYTES = 1 << 16


def machine_defaults(
    cfg: TrainConfig, hardware: Hardware | None = None
) -> tuple[dict[str, Any], int]:
    """Return device, num_processes and dtype for this machine, and its CPU cores.

    Explicit settings are kept. Raises `ValueError` for those that cannot work here.
    """
    hardware = hardware or detect_hardware()
    device = cfg.device or ("cuda" if hardware.gpus else "cpu")
    if device == "cuda" and not hardware.gpus:
        raise ValueError('device="cuda", but no GPU was found; use device="cpu"')
    torchrun = RankInfo.from_environment()
    if torchrun and cfg.num_processes not in (None, torchrun.world_size):
        raise ValueError(
            f"num_processes={cfg.num_processes}, but torchrun started "
            f"{torchrun.world_size} (WORLD_SIZE); leave num_processes out"
        )
    gpus = len(hardware.gpus) if device == "cuda" else 1
    here = torchrun.local_world_size if torchrun else cfg.num_processes or gpus
    most = gpus if device == "cuda" else 4 * hardware.cpu_cores
    if not sys.platform.startswith("linux"):
        most = 1
        here = here if cfg.num_processes or torchrun else 1
    if here > most:
        reason = (
            f"{gpus} GPUs" if device == "cuda" else f"{hardware.cpu_cores} CPU cores"
        )
        raise ValueError(
            f"num_processes={here} is too many for {reason} on {sys.platform}; use at "
            f"most {most}"
        )
    capability = min((gpu.capability for gpu in hardware.gpus), default=None)
    dtype = choose_dtype(device, capability, hardware.cpu_native_bf16)
    return {
        "device": device,
        "num_processes": torchrun.world_size if torchrun else here,
        "dtype": cfg.dtype or dtype,
    }, hardware.cpu_cores


def check_writable(folder: Path) -> None:
    """Make a folder. Raises `OSError` if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise type(error)(
            error.errno,
            f"{folder} cannot be written ({error.strerror}); choose another folder with "
            "out_dir=…, or free some space",
            str(folder),
        ) from error


def check_room(cfg: ResolvedConfig, steps: int | None = None) -> None:
    """Raise `OSError` if the checkpoints of `steps` more steps do not fit on the disk.

    Before the number of steps is known, a finished run needs nothing.
    """
    run = RunFolder(Path(cfg.out_dir) / cfg.run_name)
    resumed = cfg.resume is not False
    if steps is None and resumed and run.status() == "finished":
        return
    parameters = count_parameters(cfg.shape())["total"]
    kept = cfg.keep_checkpoints + 2  # the best one, and the one being written
    existing = len(run.checkpoint_folders()) if resumed else 0
    to_come = math.inf if steps is None else math.ceil(steps / cfg.save_interval)
    missing = int(max(1, min(kept - existing, to_come)))
    needed = parameters * (_CHECKPOINT_BYTES * missing + 2 * _EXPORT_BYTES)
    if cfg.stage == "dpo":
        needed += _WEIGHT_BYTES * parameters  # the reference
    place = run.checkpoints if run.checkpoints.is_dir() else Path(cfg.out_dir)
    if needed > (free := shutil.disk_usage(place).free):
        raise OSError(
            f"{place} has {free / 2**20:,.0f} MiB free, but {missing} "
            f"checkpoint{'s' * (missing > 1)} of {parameters / 1e6:.1f} M parameters and "
            f"the weights need {needed / 2**20:,.0f} MiB. Free some space there."
        )
