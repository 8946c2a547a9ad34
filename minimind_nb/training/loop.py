"""The training loop, of every stage, on one process or several."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, field

import torch
from torch import nn

from ..config import TrainConfig
from ..data.batches import StepBatch, TrainingStream, ValidationRows
from ..hardware import peak_memory_gib
from ..launch.distributed import Group
from ..launch.stopping import StopRequest, count_ballots
from ..launch.verdict import RankRecord
from ..monitor.metrics import MetricsLog
from .checkpoint import Progress
from .clock import SessionClock
from .evaluation import evaluate_rows
from .optim import FlatGradients
from .saving import Saver
from .schedule import learning_rate
from .stages import Stage


@dataclass
class SinceLog:
    """Sums since the last row of metrics; losses are means over a step's targets."""

    loss: float = 0.0
    aux_loss: float = 0.0
    targets: int = 0
    samples: int = 0
    grad_norm: float = 0.0
    seconds: float = 0.0

    def add(self, batch: StepBatch, loss: float, aux: float, norm: float) -> None:
        """Count one step."""
        self.loss += loss * batch.targets
        self.aux_loss += aux * batch.targets
        self.targets += batch.targets
        self.samples += batch.samples
        self.grad_norm = norm


@dataclass
class Trainer:
    """The parts of a run in one process."""

    cfg: TrainConfig
    stage: Stage
    group: Group
    device: torch.device
    model: nn.Module
    gradients: FlatGradients
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: torch.autocast
    stream: TrainingStream
    validation: ValidationRows | None
    total_steps: int
    progress: Progress
    metrics: MetricsLog
    saver: Saver
    clock: SessionClock
    record: RankRecord
    stop: StopRequest
    since_log: SinceLog = field(default_factory=SinceLog)


def fit(t: Trainer) -> str:
    """Train to the end, or until the ranks agree to stop; return how it ended."""
    cfg, progress = t.cfg, t.progress
    assert cfg.log_interval and cfg.eval_interval and cfg.save_interval
    if progress.step == 0:
        validate(t)
    while progress.step < t.total_steps:
        began = time.monotonic()
        ending = train_step(t)
        count_seconds(t, time.monotonic() - began)
        last = progress.step == t.total_steps
        stopping = last or ending is not None
        if stopping or progress.step % cfg.log_interval == 0:
            log_progress(t)
        if last or (not stopping and progress.step % cfg.eval_interval == 0):
            validate(t)
        if stopping or progress.step % cfg.save_interval == 0:
            save(t, final=stopping)
        if ending and not last:
            return ending
    return "finished"


def train_step(t: Trainer) -> str | None:
    """One optimizer step; returns why to stop after it, if any rank wishes to.

    The loss is the sum over target tokens divided by their global number, so that
    accumulation, padding and the number of ranks cannot change it.
    """
    batch = t.stream.next_step()
    seed_dropout(t.cfg.seed, t.group.rank, t.progress.step)
    t.gradients.zero()
    for micro_batch in batch.micro_batches:
        rows = micro_batch.to(t.device)
        with t.autocast:
            loss_sum, aux_loss = t.stage.objective(t.model, rows)
        loss = loss_sum / batch.targets
        aux_loss = aux_loss * (len(rows.inputs) / batch.samples)
        t.scaler.scale(loss + aux_loss).backward()
        t.gradients.add_losses(loss, aux_loss)
    if t.clock.is_over():
        t.stop.reason = t.stop.reason or "time_budget"
    t.gradients.vote(t.stop.ballot())
    t.group.sum(t.gradients.flat)
    t.scaler.unscale_(t.optimizer)
    norm, loss, aux_loss, ballots = t.gradients.norm_and_slots()
    update_weights(t, norm)
    count_step(t, batch, loss, aux_loss, norm)
    return count_ballots(ballots)


def update_weights(t: Trainer, norm: float) -> None:
    """Clip and apply the gradients, or leave weights and moments alone.

    A non-finite gradient must be met by a branch: one NaN makes `clip_grad_norm_`
    spread it, and an update times 0 is still NaN. All ranks hold the same sum, so all
    take the same branch.
    """
    cfg, progress = t.cfg, t.progress
    assert cfg.warmup_iters is not None and cfg.grad_clip is not None
    assert cfg.learning_rate is not None and cfg.min_learning_rate is not None
    for parameters in t.optimizer.param_groups:
        parameters["lr"] = learning_rate(
            progress.step,
            warmup=cfg.warmup_iters,
            total=t.total_steps,
            highest=cfg.learning_rate,
            lowest=cfg.min_learning_rate,
        )
    if math.isfinite(norm):
        t.gradients.clip(norm, cfg.grad_clip)
        t.scaler.step(t.optimizer)
        progress.skipped_in_a_row = 0
    else:
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
    t.scaler.update()


def count_step(
    t: Trainer, batch: StepBatch, loss: float, aux_loss: float, norm: float
) -> None:
    """Move the run on by one step; too many skipped ones end it.

    Skipped steps count, so that schedule and data never depend on them. Raises
    `FloatingPointError` naming the lines of the data.
    """
    progress = t.progress
    progress.step += 1
    progress.samples = t.stream.samples
    progress.tokens += batch.targets
    t.since_log.add(batch, loss, aux_loss, norm)
    t.record.update(step=progress.step)
    scale_too_small = t.scaler.is_enabled() and t.scaler.get_scale() < 1.0
    if scale_too_small or progress.skipped_in_a_row >= t.cfg.max_skipped_steps:
        lines = t.stream.lines(progress.samples - batch.samples, progress.samples)
        raise FloatingPointError(
            f"{progress.skipped_in_a_row} steps in a row had a gradient that is not "
            f"finite (loss {loss}, loss scale {t.scaler.get_scale()}). The last one "
            f"came from the lines {lines[:20]} of the data. Weights and moments are "
            "those before. Lower learning_rate, or look at those lines."
        )


def seed_dropout(seed: int, rank: int, step: int) -> None:
    """Seed torch for one step of one rank."""
    digest = hashlib.blake2b(f"{seed} {rank} {step}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))


def count_seconds(t: Trainer, seconds: float) -> None:
    """Add to the training time, which leaves out validation and saving."""
    t.progress.seconds += seconds
    t.since_log.seconds += seconds
    t.clock.add_step(seconds)


def validate(t: Trainer) -> None:
    """Measure the loss on the held-out rows, where there are any, and log it."""
    if t.validation is None:
        return
    assert t.cfg.batch_size
    scores = evaluate_rows(
        t.model,
        t.stage.objective,
        t.validation,
        batch_size=t.cfg.batch_size,
        group=t.group,
        device=t.device,
        autocast=t.autocast,
    )
    t.progress.val_loss = scores["loss"]
    t.metrics.append("eval", **position(t), **scores)


def save(t: Trainer, final: bool) -> None:
    """Write a checkpoint and the weights file, on rank 0."""
    seconds = t.saver.save(t.model, t.optimizer, t.scaler, t.progress, final)
    t.clock.add_save(seconds)


def log_progress(t: Trainer) -> None:
    """Append a row of metrics with the means since the last one."""
    sums = t.since_log
    memory = torch.zeros(t.group.size, device=t.device)
    memory[t.group.rank] = peak_memory_gib(t.device.type)
    t.group.sum(memory)
    t.metrics.append(
        "train",
        **position(t),
        loss=sums.loss / sums.targets,
        aux_loss=sums.aux_loss / sums.targets,
        learning_rate=t.optimizer.param_groups[0]["lr"],
        grad_norm=sums.grad_norm,
        tokens_per_second=sums.targets / sums.seconds,
        fill=sums.targets / (sums.samples * t.stream.width),
        peak_memory_gib=memory.tolist(),
        loss_scale=t.scaler.get_scale(),
        skipped_steps=t.progress.skipped_steps,
    )
    t.since_log = SinceLog()


def position(t: Trainer) -> dict[str, float]:
    """Where the run stands, for every row of metrics."""
    at = t.progress
    return {
        "step": at.step,
        "samples": at.samples,
        "tokens": at.tokens,
        "seconds": at.seconds,
    }
