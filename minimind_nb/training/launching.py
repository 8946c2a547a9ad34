"""Start the ranks of a plan, again with less memory or another transport if needed."""

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..hardware import choose_threads, count_cores
from ..launch.outcome import TrainingFailed
from ..launch.spawn import Job, run_processes
from .run_plan import RunPlan

logger = logging.getLogger(__name__)
_COMPILERS = "TORCHINDUCTOR_COMPILE_THREADS"
# Changes for ranks that do not connect: two T4 over PCIe can hang until peer-to-peer, or
# shared memory, is off. A file store fails once in some 2,000 starts; a fresh one helps.
_RETRIES: dict[str, list[dict[str, str]]] = {
    "cpu": [{}],
    "cuda": [{"NCCL_P2P_DISABLE": "1"}, {"NCCL_SHM_DISABLE": "1"}],
}


def compile_cache() -> str:
    """Return the folder of compiled graphs: the user's own, not torch's default in a
    shared /tmp, since they are read with pickle."""
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")  # torch's import sets it, too
    if given and not given.startswith(f"{tempfile.gettempdir()}/torchinductor_"):
        return given
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return str(caches / "minimind_nb" / "inductor")


def launch(
    target: str, plan: RunPlan, on_poll: Callable[[], None], lock: int | None = None
) -> str:
    """Start the workers, again with smaller micro-batches if memory runs out."""
    asked = plan
    while True:
        try:
            return _start(target, plan, on_poll, lock)
        except TrainingFailed as failure:
            rows = plan.cfg.batch_size
            if failure.phase != "out_of_memory" or not plan.cfg.allow_smaller_batch:
                raise
            if rows == 1:
                asked.write()  # the number of rows was not the cause
                raise
        plan = plan.halve_batch()
        logger.warning(
            f"out of memory with batch_size={rows}: restarting at step {plan.done:,} with "
            f"batch_size={plan.cfg.batch_size} and the same global batch"
        )


def _start(
    target: str, plan: RunPlan, on_poll: Callable[[], None], lock: int | None
) -> str:
    cfg = plan.cfg
    threads = str(choose_threads(cfg.num_processes, count_cores()))
    job = Job(
        target=f"minimind_nb.training.worker:{target}",
        folder=plan.folder,
        num_processes=cfg.num_processes,
        environment={
            **dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS"], threads),
            _COMPILERS: os.environ.get(_COMPILERS, threads),
            "TORCHINDUCTOR_CACHE_DIR": compile_cache(),
        },
        hang_timeout=cfg.hang_timeout_seconds,
        lock=lock,
    )
    return connect(job, cfg.device, on_poll)


def connect(job: Job, device: str, on_poll: Callable[[], None]) -> str:
    """Start the workers, again in another environment if they do not connect."""
    for changes in _RETRIES[device]:
        try:
            return run_processes(job, on_poll)
        except TrainingFailed as failure:
            if failure.phase != "meeting":
                raise
            logger.warning(f"the processes did not connect; retrying {changes or ''}")
        job = replace(job, environment={**job.environment, **changes})
    return run_processes(job, on_poll)
