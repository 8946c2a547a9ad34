"""What each process does: build the parts of a run, and train."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import TrainConfig
from ..data.corpus import Corpus
from ..data.tokenizer import TokenizerSpec, read_tokenizer
from ..launch.distributed import Group
from ..launch.stopping import StopRequest
from ..launch.verdict import RankRecord
from ..model.architecture import MiniMindForCausalLM
from ..model.interop import model_config
from ..monitor.metrics import MetricsLog
from ..storage.runs import RunFolder
from .checkpoint import Progress, load_checkpoint
from .clock import SessionClock
from .loop import Trainer, fit
from .optim import FlatGradients, build_optimizer
from .saving import Saver
from .stages import STAGES


def run(
    rank: int, payload: Mapping[str, Any], record: RankRecord, stop: StopRequest
) -> str:
    """Train as `payload` says, from wherever its checkpoint stands; how it ended.

    Rank 0 holds the run folder's lock as long as it lives.
    """
    cfg = TrainConfig(**payload["settings"])
    folder = RunFolder(payload["folder"])
    torch.set_num_threads(payload["threads"])
    device = torch.device(f"cuda:{rank}" if cfg.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with folder.lock() if rank == 0 else contextlib.nullcontext():
        record.update(phase="meeting")
        group = join(rank, cfg, payload)
        group.meet(device)
        record.update(phase="training")
        trainer = build(
            cfg, payload, group=group, device=device, record=record, stop=stop
        )
        with trainer.metrics:
            ending = explain_memory_errors(trainer)
        group.close()
    return ending


def join(rank: int, cfg: TrainConfig, payload: Mapping[str, Any]) -> Group:
    """Meet the other ranks of the run."""
    assert cfg.num_processes and cfg.device
    store = Path(payload["store"])
    return Group(rank, cfg.num_processes, store, cfg.device, cfg.hang_timeout_seconds)


def build(
    cfg: TrainConfig,
    payload: Mapping[str, Any],
    *,
    group: Group,
    device: torch.device,
    record: RankRecord,
    stop: StopRequest,
) -> Trainer:
    """Make all parts of a run, restored from the checkpoint where there is one."""
    folder = RunFolder(payload["folder"])
    tokenizer = read_tokenizer(folder.tokenizer)
    model = build_model(cfg, tokenizer)
    nn.Module.to(model, device)
    optimizer = build_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")
    progress = Progress()
    if payload["checkpoint"]:
        progress = load_checkpoint(
            Path(payload["checkpoint"]), model, optimizer, scaler
        )
    corpus = Corpus.reopen(payload["corpus"], cfg.val_fraction)
    stream = corpus.training_stream(
        cfg, tokenizer.pad_id, group.rank, group.size, progress.samples
    )
    total_steps = min(stream.total_steps, cfg.max_steps or stream.total_steps)
    record.update(step=progress.step, total_steps=total_steps)
    is_first = group.rank == 0
    metrics = MetricsLog(folder.metrics_file) if is_first else MetricsLog.silent()
    metrics.append(
        "event",
        event="resume" if payload["checkpoint"] else "start",
        step=progress.step,
        samples=progress.samples,
        tokens=progress.tokens,
        seconds=progress.seconds,
        total_steps=total_steps,
        total_samples=min(stream.total_samples, total_steps * stream.global_batch),
        num_processes=group.size,
        global_batch=stream.global_batch,
    )
    return Trainer(
        cfg=cfg,
        stage=STAGES[cfg.stage],
        group=group,
        device=device,
        model=model,
        gradients=FlatGradients(model, device),
        optimizer=optimizer,
        scaler=scaler,
        autocast=torch.autocast(
            device.type,
            dtype=getattr(torch, cfg.dtype or "float32"),
            enabled=cfg.dtype != "float32",
        ),
        stream=stream,
        validation=corpus.validation_rows(cfg, tokenizer.pad_id),
        total_steps=total_steps,
        progress=progress,
        metrics=metrics,
        saver=Saver(
            folder=folder,
            weights_file=Path(payload["weights_file"]),
            keep=cfg.keep_checkpoints,
            config=payload["config"],
            metrics=metrics,
            saves=is_first,
        ),
        clock=SessionClock(payload["deadline"] if is_first else None),
        record=record,
        stop=stop,
    )


def build_model(cfg: TrainConfig, tokenizer: TokenizerSpec) -> MiniMindForCausalLM:
    """A freshly initialised model: the same weights for the same seed, on any rank."""
    torch.manual_seed(cfg.seed)
    return MiniMindForCausalLM(model_config(dataclasses.asdict(cfg), tokenizer)).train()


def explain_memory_errors(trainer: Trainer) -> str:
    """Train, and say after an out-of-memory error what would fit.

    Raises `MemoryError` naming the batch and accumulation that keep the global batch.
    """
    try:
        return fit(trainer)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(smaller_batch(trainer.cfg)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not allocate; on a CPU it has no exception type for that."""
    texts = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in texts
    )


def smaller_batch(cfg: TrainConfig) -> str:
    """What to set so that less memory does for the same global batch."""
    assert cfg.batch_size and cfg.accumulation_steps
    divisors = [n for n in range(2, cfg.batch_size + 1) if cfg.batch_size % n == 0]
    found = f"out of memory with batch_size={cfg.batch_size}, "
    found += f"accumulation_steps={cfg.accumulation_steps}"
    if not divisors:
        return (
            f"{found}; a row cannot be halved: lower max_seq_len={cfg.max_seq_len} or "
            "the model's size"
        )
    batch_size = cfg.batch_size // divisors[0]
    return (
        f"{found}; the same global batch in less memory: batch_size={batch_size}, "
        f"accumulation_steps={cfg.accumulation_steps * divisors[0]}, with "
        'allow_change=["batch_size", "accumulation_steps"] to go on with this run'
    )
