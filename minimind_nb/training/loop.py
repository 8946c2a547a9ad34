"""The training loop, of every stage, on one process or several."""

from __future__ import annotations

import math
import time

import torch
from safetensors import SafetensorError

from ..data.batches import StepBatch
from ..data.tokenizer import write_tokenizer
from ..hardware import peak_memory_gib
from ..launch.cancellation import agreed_stop_reason
from ..model.state_dict import write_pth
from ..storage.verified import DamagedFolder
from .checkpoint import save_checkpoint
from .evaluation import evaluate_rows
from .optim import find_not_finite, learning_rate
from .samples import seed_of, write_samples
from .trainer import SinceLog, Trainer, lines_text

_MOST_FAILED_SAVES = 3


def fit(t: Trainer) -> str:
    """Train to the end, or until the ranks agree to stop; return how it ended."""
    cfg, progress = t.cfg, t.progress
    assert cfg.log_interval and cfg.eval_interval and cfg.save_interval
    if progress.step == 0:
        validate(t)
    if progress.step >= t.total_steps:
        save(t, final=True)  # an earlier call may have failed behind its checkpoint
    while progress.step < t.total_steps:
        ending = train_step(t)
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
    """One optimizer step; returns the stop reason that the ranks agreed on, if any.

    The loss is the sum over target tokens (or pairs) divided by their global number, so
    that accumulation, padding and the number of ranks cannot change it.
    """
    began = time.monotonic()
    batch = t.stream.next_step()
    torch.manual_seed(seed_of(t.cfg.seed, t.group.rank, t.progress.step))
    t.gradients.flat.zero_()
    for micro_batch in batch.micro_batches:
        with t.autocast:
            losses = t.stage.objective(t.model, micro_batch.to(t.device), t.cfg)
        loss = losses.loss / batch.terms
        aux_loss = losses.aux_loss * (micro_batch.samples / batch.samples)
        t.scaler.scale(loss + aux_loss).backward()
        measures = losses.measures / batch.samples
        t.gradients.add_losses(torch.cat([loss[None], aux_loss[None], measures]))
        t.since_log.add_choices(t.model)
    if t.clock.is_over():
        t.stop.reason = t.stop.reason or "time_budget"
    t.gradients.add_stop_flags(t.stop.stop_flags())
    t.group.sum(t.gradients.flat)
    t.scaler.unscale_(t.optimizer)
    norm, means, flags = t.gradients.norm_and_slots()
    update_weights(t, norm)
    t.clock.add_step(seconds := time.monotonic() - began)
    t.since_log.add(batch, means, norm, seconds)
    count_step(t, batch, means[0], seconds)
    return agreed_stop_reason(flags)


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


def count_step(t: Trainer, batch: StepBatch, loss: float, seconds: float) -> None:
    """Move the run on by one step; too many skipped ones end it.

    Skipped steps count, so that schedule and data never depend on them; the metrics
    name the lines of the data. Raises `FloatingPointError` naming them, also where a
    run ends in two or more of them, or in nothing else.
    """
    progress = t.progress
    progress.step += 1
    progress.samples = t.stream.samples
    progress.tokens += batch.tokens
    progress.seconds += seconds
    progress.val_loss = None
    t.record.update(step=progress.step)
    if not progress.skipped_in_a_row:
        return
    lines = t.stream.lines(range(progress.samples - batch.samples, progress.samples))
    found = {"loss": loss, "loss_scale": (scale := t.scaler.get_scale())}
    where = progress.position()
    t.metrics.append("event", **where, event="skipped_step", **found, lines=lines)
    scale_too_small = t.scaler.is_enabled() and scale < 1.0
    most = t.cfg.max_skipped_steps
    searching = t.scaler.is_enabled() and math.isfinite(loss)  # for its loss scale
    if progress.step == t.total_steps and not searching:
        most = min(most, 2, progress.step)
    if scale_too_small or progress.skipped_in_a_row >= most:
        spoiled = find_not_finite(dict(t.model.named_parameters()))
        state = (
            f"{spoiled} is not finite" if spoiled else "The weights are those before"
        )
        raise FloatingPointError(
            f"{progress.skipped_in_a_row} steps in a row had a gradient that is not "
            f"finite (loss {loss}, loss scale {scale}). The last one came from "
            f"{lines_text(lines)} of the data. {state}. Lower learning_rate="
            f"{t.cfg.learning_rate:g}, or look at those lines."
        )


def validate(t: Trainer) -> None:
    """Measure the loss on held-out samples, where there are any; ask the prompts.

    Raises `FloatingPointError` where the loss at the end of the run is not finite.
    """
    began = time.monotonic()
    if t.validation is not None:
        scores = evaluate_rows(t, t.validation)
        t.progress.val_loss = scores["loss"]
        t.metrics.append("eval", **t.progress.position(), **scores)
        if t.progress.step == t.total_steps and not math.isfinite(scores["loss"]):
            raise FloatingPointError(
                f"the validation loss at the end is {scores['loss']}: lower "
                f"learning_rate={t.cfg.learning_rate:g}"
            )
    try:
        write_samples(t)
    except Exception as error:  # what is only looked at must not end a run
        where = t.progress.position()
        t.metrics.append("event", **where, event="answers_failed", error=str(error))
    t.clock.add_validation(time.monotonic() - began)


def save(t: Trainer, final: bool) -> None:
    """On rank 0, write a checkpoint and the weights file, and prune.

    A save that fails is tried again at the next interval; three in a row, or the one
    at the end, raise `OSError`.
    """
    if t.group.rank != 0:
        return
    began, where = time.monotonic(), t.progress.position()
    try:
        if not t.folder.exists():  # deleted meanwhile; it must be found again
            write_tokenizer(t.tokenizer, t.folder.tokenizer)
            t.folder.write_config(t.config)
        folder = save_checkpoint(t)
        t.folder.prune_checkpoints(t.cfg.keep_checkpoints)
        write_pth(t.model.state_dict(), t.weights_file)
    except (OSError, SafetensorError, DamagedFolder) as error:
        t.failed_saves += 1
        t.metrics.append("event", **where, event="save_failed", error=str(error))
        if final or t.failed_saves == _MOST_FAILED_SAVES:
            raise OSError(
                f"saving at step {t.progress.step} failed ({t.failed_saves} in a row): "
                f"{error}"
            ) from error
    else:
        t.failed_saves = 0
        t.metrics.append("event", **where, event="save", folder=folder.name)
    t.clock.add_save(time.monotonic() - began)


def log_progress(t: Trainer) -> None:
    """Append a row of metrics with the means since the last one."""
    sums, load = t.since_log, t.model.expert_load()
    memory = torch.zeros(t.group.size, dtype=torch.float64)
    memory[t.group.rank] = peak_memory_gib(t.device.type)
    positions = torch.tensor([sums.positions], dtype=torch.float64)
    choices = torch.zeros_like(torch.tensor(load, dtype=torch.float64)) + sums.choices
    own = [memory, positions, choices.flatten()]
    total = torch.cat(own).to(t.device)
    t.group.sum(total)
    memory, positions, choices = total.cpu().split([len(part) for part in own])
    names = ("loss", "aux_loss", *t.stage.measures)
    t.metrics.append(
        "train",
        **t.progress.position(),
        **{n: total / sums.terms for n, total in zip(names, sums.losses, strict=True)},
        learning_rate=t.optimizer.param_groups[0]["lr"],
        grad_norm=sums.grad_norm,
        tokens_per_second=sums.tokens / sums.seconds,
        fill=sums.tokens / positions.item(),
        peak_memory_gib=memory.tolist(),
        loss_scale=t.scaler.get_scale(),
        skipped_steps=t.progress.skipped_steps,
        **expert_load(choices, len(load)),
    )
    t.since_log = SinceLog()


def expert_load(choices: torch.Tensor, layers: int) -> dict[str, list[list[float]]]:
    """For each layer the shares of its experts among all choices; nothing if dense."""
    if not layers:
        return {}
    counts = choices.view(layers, -1)
    return {"expert_load": (counts / counts.sum(1, keepdim=True)).tolist()}
