"""The training loop, of every stage, on one process or several."""

import math
import time
from typing import Any

import torch
from safetensors import SafetensorError

from ..data.batches import StepBatch
from ..hardware import peak_memory_gib
from ..launch.cancellation import agreed_stop_reason
from ..model.state_dict import write_pth
from ..storage.verified import DamagedFolder
from .checkpoint import LogWindow, save_checkpoint
from .evaluation import answer_prompts, seed_of
from .optim import learning_rate
from .trainer import Trainer, describe_lines

_COMPILERS = ("torch._dynamo", "torch._functorch", "torch._inductor", "triton")
_MAX_FAILED_SAVES = 3


def fit(trainer: Trainer) -> str:
    """Train to the end, or until the ranks agree to stop; return the status."""
    cfg, progress, total = trainer.cfg, trainer.progress, trainer.plan.total_steps
    if progress.step % cfg.eval_interval == 0 and progress.val_loss is None:
        validate(trainer)  # at first, and what a stop left out
    if progress.step >= total:  # an earlier call may have failed after its checkpoint
        if progress.window.tokens:
            log_progress(trainer)
        save(trainer, final=True)
    while progress.step < total:
        stop_reason = train_step(trainer)
        last = progress.step == total
        stopping = last or stop_reason is not None
        if stopping or progress.step % cfg.log_interval == 0:
            log_progress(trainer)
        if last or (not stopping and progress.step % cfg.eval_interval == 0):
            validate(trainer)
        at_decay = progress.step == trainer.plan.decay_start
        if stopping or at_decay or progress.step % cfg.save_interval == 0:
            save(trainer, final=stopping)
        if stop_reason and not last:
            return stop_reason
    return "finished"


def train_step(trainer: Trainer) -> str | None:
    """Take one optimizer step; return the stop reason that the ranks agreed on, or None."""
    started = time.monotonic()
    batch = trainer.stream.next_step()
    try:
        compute_gradients(trainer, batch)
    except Exception as error:
        if not type(error).__module__.startswith(_COMPILERS):
            raise
        trainer.log("event", event="compile_failed", error=repr(error)[:300])
        trainer.compiled = None
        compute_gradients(trainer, batch)
    trainer.gradients.add_stop_flags(trainer.stop_flags())
    trainer.group.sum(trainer.gradients.flat)  # gradients, losses and stop flags
    trainer.scaler.unscale_(trainer.optimizer)
    norm, means, stop_flags = trainer.gradients.grad_norm_and_sums()  # the host waits
    update_weights(trainer, norm)
    record_step(trainer, batch, means, norm, time.monotonic() - started)
    return agreed_stop_reason(stop_flags)


def compute_gradients(trainer: Trainer, batch: StepBatch) -> None:
    """Sum the gradients and losses of this rank's micro-batches."""
    keys = trainer.cfg.seed, trainer.group.rank, trainer.progress.step
    torch.manual_seed(seed_of(*keys))  # of dropout
    trainer.gradients.flat.zero_()
    for micro_batch in batch.micro_batches:
        sums = trainer.losses(trainer.to_device(micro_batch), trainer.compiled)
        losses = sums.share_of(batch, micro_batch.samples)
        trainer.scaler.scale(losses.loss + losses.aux_loss).backward()
        trainer.gradients.add_losses(losses)
        trainer.counts[0] += micro_batch.inputs.numel()
        trainer.counts[1:] += torch.tensor(trainer.model.expert_load()).flatten()


def update_weights(trainer: Trainer, norm: float) -> None:
    """Clip and apply the gradients; leave weights and moments alone if not finite.

    All ranks hold the same sum, so all take the same branch.
    """
    cfg, progress = trainer.cfg, trainer.progress
    plan = trainer.plan
    rate = learning_rate(progress.step, plan.total_steps, cfg, plan.decay_start)
    for parameters in trainer.optimizer.param_groups:
        parameters["lr"] = rate
    if math.isfinite(norm):
        trainer.gradients.clip(norm, cfg.grad_clip)
        trainer.scaler.step(trainer.optimizer)
        progress.skipped_in_a_row = 0
    else:
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
    trainer.scaler.update()


def record_step(
    trainer: Trainer, batch: StepBatch, losses: list[float], norm: float, seconds: float
) -> None:
    """Advance the run by one step, which counts even if it was skipped."""
    progress, window = trainer.progress, trainer.progress.window
    lines = trainer.lines() if progress.skipped_in_a_row else []
    window.losses += torch.tensor(losses, dtype=torch.float64) * batch.num_targets
    window.num_targets += batch.num_targets
    window.tokens += batch.tokens
    window.learning_rate = trainer.optimizer.param_groups[0]["lr"]
    window.grad_norm = norm
    window.seconds += seconds
    progress.step += 1
    progress.samples = trainer.stream.samples
    progress.tokens += batch.tokens
    progress.seconds += seconds
    progress.val_loss = None
    if not trainer.compiled or progress.step > trainer.plan.done + 1:
        trainer.clock.add("step", seconds)  # without the time to compile
    trainer.record.update(step=progress.step)
    if progress.skipped_in_a_row:
        record_skipped_step(trainer, lines, losses[0])


def record_skipped_step(trainer: Trainer, lines: list[int], loss: float) -> None:
    """Log a skipped step with the lines of its data.

    Raises `FloatingPointError` after max_skipped_steps in a row, at the last step after
    two, and if no step of the run was any good.
    """
    cfg, progress = trainer.cfg, trainer.progress
    fp16, scale = trainer.scaler.is_enabled(), trainer.scaler.get_scale()
    row = {"event": "skipped_step", "loss": loss, "loss_scale": scale, "lines": lines}
    trainer.log("event", **row)
    in_a_row, most = progress.skipped_in_a_row, cfg.max_skipped_steps
    searching_scale = fp16 and math.isfinite(loss)
    if progress.step == trainer.plan.total_steps and not searching_scale:
        most = min(most, 2, progress.step)
    if in_a_row >= most or (fp16 and scale < 1.0):
        raise FloatingPointError(
            f"the gradient was not finite in {in_a_row} steps in a row (loss {loss}, loss "
            f"scale {scale}), in the last one with {describe_lines(lines)} of the data. "
            f"Lower learning_rate={cfg.learning_rate:g}, or look at those lines."
        )


def validate(trainer: Trainer) -> None:
    """Measure the loss on held-out samples, if any, and answer the prompts.

    Raises `FloatingPointError` if the loss at the end of the run is not finite.
    """
    started, progress = time.monotonic(), trainer.progress
    if trainer.validation is not None:
        trainer.record.update(doing="validating")
        scores = trainer.evaluate(trainer.validation)
        progress.val_loss = loss = scores["loss"]
        trainer.log("eval", **scores)
        if progress.step == trainer.plan.total_steps and not math.isfinite(loss):
            raise FloatingPointError(
                f"the final validation loss is {loss}: lower learning_rate"
            )
    try:
        seed = seed_of(trainer.cfg.seed, progress.step)
        prompts = trainer.prompts
        for number, answer in enumerate(answer_prompts(trainer, prompts, seed)):
            trainer.log("sample", number=number, prompt=prompts[number], answer=answer)
    except Exception as error:  # an answer is only looked at, and must not end a run
        trainer.log("event", event="answers_failed", error=str(error))
    trainer.record.update(doing="")
    trainer.clock.add("validation", time.monotonic() - started)


def save(trainer: Trainer, final: bool) -> None:
    """On rank 0, write a checkpoint and the weights file, and prune.

    A save that fails is tried again at the next interval; three in a row, or the one
    at the end, raise `OSError`.
    """
    trainer.share_counts()
    if trainer.group.rank != 0:
        return
    started, plan = time.monotonic(), trainer.plan
    trainer.record.update(doing="saving")
    try:
        parts = trainer.model, trainer.optimizer, trainer.scaler
        folder = save_checkpoint(plan, trainer.progress, *parts)
        total, keep = plan.total_steps, trainer.cfg.keep_checkpoints
        complete = total if trainer.progress.step == total else 0
        plan.folder.prune_checkpoints(keep, plan.decay_start, complete)
        write_pth(trainer.model.state_dict(), plan.weights_file)
    except (OSError, SafetensorError, DamagedFolder) as error:
        trainer.failed_saves += 1
        trainer.log("event", event="save_failed", error=str(error))
        if final or trainer.failed_saves == _MAX_FAILED_SAVES:
            raise OSError(
                f"saving at step {trainer.progress.step} failed "
                f"({trainer.failed_saves} in a row): {error}"
            ) from error
    else:
        trainer.failed_saves = 0
        trainer.log("event", event="save", folder=folder.name)
    trainer.record.update(doing="")
    trainer.clock.add("save", time.monotonic() - started)


def log_progress(trainer: Trainer) -> None:
    """Append a row of metrics with the means since the last one.

    A row off the log interval, at a stop, is partial: the next one covers its steps, too.
    Raises `RuntimeError` if the weights of the ranks, which all make the same updates, are
    not the same.
    """
    progress, group = trainer.progress, trainer.group
    window, partial = progress.window, progress.step % trainer.cfg.log_interval > 0
    ranks = torch.zeros(2, group.size, dtype=torch.float64)
    ranks[0, group.rank] = peak_memory_gib(trainer.device.type)
    sums = [p.detach().sum(dtype=torch.float64) for p in trainer.model.parameters()]
    ranks[1, group.rank] = torch.stack(sums).sum()
    group.sum(ranks := ranks.to(trainer.device))
    memory, checksums = ranks.cpu()
    if not checksums.allclose(checksums[:1], rtol=0, atol=0, equal_nan=True):
        raise RuntimeError(
            f"the weights of the ranks have drifted apart by step {progress.step}: "
            f"they sum up to {checksums.tolist()}. A device computes wrongly"
        )
    names = ("loss", "aux_loss", *trainer.stage.metrics)
    means = torch.as_tensor(window.losses) / window.num_targets
    trainer.share_counts()
    positions, *choices = torch.as_tensor(window.counts)
    more: dict[str, Any] = {"partial": True} if partial else {}
    if choices:  # each expert's share of the choices in its layer
        load = torch.stack(choices).view(len(trainer.model.expert_load()), -1)
        more["expert_load"] = (load / load.sum(1, keepdim=True)).tolist()
    trainer.log(
        "train",
        **dict(zip(names, means.tolist(), strict=True)),
        learning_rate=window.learning_rate,
        grad_norm=window.grad_norm,
        tokens_per_second=window.tokens / window.seconds,
        fill=window.tokens / float(positions),
        peak_memory_gib=memory.tolist(),
        loss_scale=trainer.scaler.get_scale(),
        skipped_steps=progress.skipped_steps,
        **more,
    )
    if not partial:
        progress.window = LogWindow()
