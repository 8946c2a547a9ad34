"""Defaults and limits of this machine: device, processes, precision, disk space."""

import math
import sys
from typing import Any

from ..config import TrainConfig, count_parameters
from ..hardware import Hardware, choose_dtype, detect_hardware, has_compiler
from ..launch.spawn import enter_torchrun
from ..session import GPU_REMEDIES, current_session
from ..storage.file_system import free_bytes
from ..storage.run_folder import step_of
from .run_plan import RunPlan

# Per parameter: an fp32 weight and two fp32 moments; the fp16 weights, old and new.
_CHECKPOINT_BYTES, _EXPORT_BYTES, _REFERENCE_BYTES = 12, 4, 4


def machine_defaults(
    cfg: TrainConfig, hardware: Hardware | None = None
) -> dict[str, Any]:
    """Return device, num_processes and dtype, explicit or this machine's; can it compile.

    Raises `ValueError` for those that cannot work here.
    """
    hardware = hardware or detect_hardware()
    gpus, cores = len(hardware.gpus), hardware.cpu_cores
    device = cfg.device or ("cuda" if gpus else "cpu")
    if device == "cuda" and (problem := hardware.gpu_problem()):
        remedy = GPU_REMEDIES.get(current_session().kind, "")
        raise ValueError(f'{problem}; use device="cpu" or another accelerator{remedy}')
    most, default, limit = 4 * cores, 1, f"{cores} CPU cores"
    if device == "cuda":
        most, default, limit = gpus, gpus, f"{gpus} GPUs"
    if not sys.platform.startswith("linux"):
        most = default = 1
    processes = cfg.num_processes or enter_torchrun() or default
    if processes > most:
        raise ValueError(
            f"num_processes={processes} is too many for {limit} on {sys.platform}; use at "
            f"most {most}"
        )
    used = hardware.gpus if device == "cuda" else ()
    capability = min((gpu.capability for gpu in used), default=None)
    dtype = choose_dtype(capability, hardware.cpu_native_bf16)
    return {
        "device": device,
        "num_processes": processes,
        "dtype": cfg.dtype or dtype,
        "compile": cfg.stage != "dpo" and has_compiler(capability),
    }


def check_room(plan: RunPlan) -> None:
    """Raise `OSError` if the checkpoints of the steps left do not fit on the disk."""
    cfg, run = plan.cfg, plan.folder
    parameters = count_parameters(cfg.shape())["total"]
    steps = plan.total_steps - plan.done
    # The best one, the one at which the decay begins, and the one being written.
    kept = cfg.keep_checkpoints + 3
    existing = sum(step_of(f) <= plan.done for f in run.checkpoint_folders())
    existing *= plan.checkpoint is not None
    saves = math.ceil(steps / cfg.save_interval)
    if plan.done < plan.decay_start < plan.total_steps:
        saves += plan.decay_start % cfg.save_interval > 0
    missing = max(1, min(kept - existing, saves))
    reference = _REFERENCE_BYTES if cfg.stage == "dpo" else 0
    needed = parameters * (_CHECKPOINT_BYTES * missing + _EXPORT_BYTES + reference)
    places = (run.checkpoints, *run.checkpoints.parents)  # out_dir may be missing
    place = next(place for place in places if place.is_dir())
    if needed > (free := free_bytes(place)):
        raise OSError(
            f"{place} has {free / 2**20:,.0f} MiB free, but {missing} "
            f"checkpoint{'s' * (missing > 1)} of {parameters / 1e6:.1f} M parameters and "
            f"the weights need {needed / 2**20:,.0f} MiB. Free some space there."
        )
