"""The work of each process: build the parts of a run, and train or evaluate."""

import contextlib
import json
import re
import timeit
from collections.abc import Iterator

import torch

from ..hardware import choose_threads, count_cores
from ..launch.cancellation import StopRequest
from ..launch.outcome import LESS_MEMORY, RankRecord
from ..launch.process_group import Group
from ..launch.spawn import Job
from ..storage.verified import write_text
from .evaluation import Evaluator
from .loop import fit
from .run_plan import RunPlan
from .trainer import Trainer

_OUT_OF_MEMORY = "can't allocate memory|not enough memory|out of memory|ALLOC_FAILED"


def run(job: Job, store: str, record: RankRecord, stop: StopRequest) -> str:
    """Train as the plan in the folder says, from its checkpoint on; return the status."""
    with _joined(job, store, record) as (plan, group, device):
        trainer = Trainer(plan, group, device, record, stop)
        with trainer.metrics, trainer.blaming_data():
            log_start(trainer)
            status = fit(trainer)
            trainer.log("event", event="end", status=status)
    return status


def measure(job: Job, store: str, record: RankRecord, stop: StopRequest) -> str:
    """Evaluate the initial weights of a plan on all its documents, into `scores.json`."""
    with _joined(job, store, record) as (plan, group, device):
        evaluator = Evaluator(plan, group, device, record)
        rows = plan.corpus.validation_rows(plan.cfg, plan.tokenizer.pad_id)
        assert rows is not None
        scores = {**evaluator.evaluate(rows), "documents": len(rows.documents)}
        if record.rank == 0:
            write_text(job.folder.root / "scores.json", json.dumps(scores))
    return "finished"


def time_sums(job: Job, store: str, record: RankRecord, stop: StopRequest) -> str:
    """Write how long a sum of gradients over the ranks takes into `all_reduce`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record.update(phase="meeting")
    group = Group(record.rank, job.num_processes, store, device)
    seconds = min(timeit.repeat(lambda: group.meet(25_000_000), number=1, repeat=5))
    peers = device == "cuda" and torch.cuda.can_device_access_peer(0, 1)
    text = f"{seconds * 1e3:.0f} ms for 25 M gradients, {'' if peers else 'no '}P2P"
    write_text(job.folder.root / "all_reduce", text)
    group.close()
    return "finished"


@contextlib.contextmanager
def _joined(
    job: Job, store: str, record: RankRecord
) -> Iterator[tuple[RunPlan, Group, torch.device]]:
    """Read the plan, take this rank's threads and device, and meet the other ranks.

    Raises `MemoryError` that says what needs less if the block runs out of memory.
    """
    torch.set_num_threads(choose_threads(job.num_processes, count_cores()))
    plan = RunPlan.read(job.folder)
    record.update(phase="meeting")
    group = Group(record.rank, job.num_processes, store, plan.cfg.device)
    group.meet()
    record.update(phase="training")
    try:
        yield plan, group, group.device
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        record.update(phase="out_of_memory")
        rows = f"batch_size={plan.cfg.batch_size}"
        raise MemoryError(f"out of memory with {rows}: {LESS_MEMORY}") from error
    group.close()


def log_start(trainer: Trainer) -> None:
    """Log the position and the horizon of a run that starts or is resumed."""
    at, stream, total = trainer.progress, trainer.stream, trainer.plan.total_steps
    trainer.record.update(step=at.step, total_steps=total)
    known = {"machine_flops": flops} if (flops := trainer.plan.machine_flops) else {}
    samples_left = max(0, total - at.step) * trainer.cfg.global_batch
    trainer.log(
        "event",
        event="resume" if trainer.plan.checkpoint else "start",
        stage=trainer.cfg.stage,
        total_steps=total,
        total_samples=min(stream.total_samples, at.samples + samples_left),
        num_processes=trainer.group.size,
        global_batch=trainer.cfg.global_batch,
        cut=stream.truncated.cut,
        dropped=stream.truncated.dropped,
        **known,
    )
    rows, full = trainer.cfg.batch_size, trainer.plan.config.get("too_large_batch_size")
    if full and rows < full:
        trainer.log("event", event="smaller_batch", batch_size=rows, too_large=full)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out. Only CUDA's pool has an exception type for it."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or re.search(_OUT_OF_MEMORY, str(error)) is not None
