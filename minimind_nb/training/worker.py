"""What each process does: build the parts of a run, and train or evaluate."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import TrainConfig
from ..data.corpus import Corpus
from ..data.tokenizer import read_tokenizer
from ..launch.cancellation import StopRequest
from ..launch.outcome import RankRecord
from ..launch.process_group import Group
from ..model.architecture import MiniMindForCausalLM
from ..model.loading import model_config
from ..model.state_dict import put_weights, read_tensors
from ..monitor.metrics import MetricsLog
from ..storage.run_folder import RunFolder
from ..storage.verified import write_text
from .checkpoint import load_checkpoint
from .evaluation import evaluate_rows
from .loop import fit
from .optim import FlatGradients, build_optimizer
from .reference import prepare_reference
from .samples import choose_prompts
from .stages import STAGES
from .trainer import Parts, Progress, SessionClock, Trainer

_LONG_SECONDS = 7 * 24 * 3600.0


def run(
    rank: int, payload: Mapping[str, Any], record: RankRecord, stop: StopRequest
) -> str:
    """Train as `payload` says, from wherever its checkpoint stands; how it ended.

    Raises `MemoryError` naming the batch and accumulation that keep the global batch in
    less memory.
    """
    cfg = TrainConfig(**payload["settings"])
    group, device = _meet(rank, payload, cfg, record)
    record.update(phase="training")
    with _advising(smaller_batch(cfg)):
        trainer = build(payload, group, device, record, stop)
        with trainer.metrics, trainer.blaming_data():
            log_start(trainer, "resume" if payload["checkpoint"] else "start")
            ending = prepare_reference(trainer, lambda: initial_model(payload))
            ending = ending or fit(trainer)
    group.close()
    return ending


def measure(
    rank: int, payload: Mapping[str, Any], record: RankRecord, stop: StopRequest
) -> str:
    """Evaluate the weights of `payload` on all its documents, into `scores.json`.

    Raises `MemoryError` naming what to lower.
    """
    cfg = TrainConfig(**payload["settings"])
    group, device = _meet(rank, payload, cfg, record)
    lower = f"lower batch_size={cfg.batch_size} or max_seq_len={cfg.max_seq_len}"
    with _advising(lower):
        scores = _score(payload, cfg, group, device, record)
    if rank == 0:
        folder = RunFolder(payload["folder"])
        write_text(folder.root / "scores.json", json.dumps(scores))
    group.close()
    return "finished"


def _score(
    payload: Mapping[str, Any],
    cfg: TrainConfig,
    group: Group,
    device: torch.device,
    record: RankRecord,
) -> dict[str, float]:
    folder = RunFolder(payload["folder"])
    model = initial_model(payload).eval()
    nn.Module.to(model, device)
    pad_id = read_tokenizer(folder.tokenizer).pad_id
    corpus = Corpus.reopen(payload["corpus"], cfg)
    rows = corpus.validation_rows(cfg, pad_id)
    assert rows is not None
    stage, autocast = STAGES[cfg.stage], _autocast(cfg, device)
    record.update(phase="training")
    parts = Parts(cfg, stage, group, device, model, autocast, record)
    return {**evaluate_rows(parts, rows), "documents": len(rows.documents)}


@contextlib.contextmanager
def _advising(advice: str) -> Iterator[None]:
    """Where memory runs out, raise `MemoryError` that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"out of memory: {advice}") from error


def _meet(
    rank: int, payload: Mapping[str, Any], cfg: TrainConfig, record: RankRecord
) -> tuple[Group, torch.device]:
    """Take this rank's threads and device, and prove that the others are there."""
    assert cfg.num_processes and cfg.device
    torch.set_num_threads(payload["threads"])
    index = payload.get("local_rank", rank)
    device = torch.device(f"cuda:{index}" if cfg.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    record.update(phase="meeting")
    # Where a parent watches, it notices a hang, and can tell it from a machine that
    # slept, which a collective cannot.
    watched = "local_rank" not in payload
    timeout = _LONG_SECONDS if watched else cfg.hang_timeout_seconds
    group = Group(rank, cfg.num_processes, payload["store"], cfg.device, timeout)
    group.meet(device)
    return group, device


def _autocast(cfg: TrainConfig, device: torch.device) -> torch.autocast:
    dtype = getattr(torch, cfg.dtype or "float32")
    return torch.autocast(device.type, dtype=dtype, enabled=cfg.dtype != "float32")


def build(
    payload: Mapping[str, Any],
    group: Group,
    device: torch.device,
    record: RankRecord,
    stop: StopRequest,
) -> Trainer:
    """Make all parts of a run, restored from the checkpoint where there is one."""
    cfg = TrainConfig(**payload["settings"])
    folder, checkpoint = RunFolder(payload["folder"]), payload["checkpoint"]
    tokenizer = read_tokenizer(folder.tokenizer)
    model = new_model(payload) if checkpoint else initial_model(payload)
    nn.Module.to(model, device)
    optimizer = build_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")
    progress = Progress()
    if checkpoint:
        progress = load_checkpoint(Path(checkpoint), model, optimizer, scaler)
    corpus = Corpus.reopen(payload["corpus"], cfg)
    stream = corpus.training_stream(
        cfg, tokenizer.pad_id, group.rank, group.size, progress.samples
    )
    validation = corpus.validation_rows(cfg, tokenizer.pad_id)
    is_first = group.rank == 0
    stage = STAGES[cfg.stage]
    return Trainer(
        cfg=cfg,
        stage=stage,
        group=group,
        device=device,
        model=model,
        gradients=FlatGradients(model, device, 2 + len(stage.measures)),
        optimizer=optimizer,
        scaler=scaler,
        autocast=_autocast(cfg, device),
        tokenizer=tokenizer,
        stream=stream,
        validation=validation,
        prompts=choose_prompts(cfg, tokenizer, stream, validation) if is_first else [],
        total_steps=payload["total_steps"],
        progress=progress,
        folder=folder,
        weights_file=Path(payload["weights_file"]),
        config=payload["config"],
        metrics=MetricsLog(folder.metrics_file) if is_first else MetricsLog.silent(),
        clock=SessionClock(payload["deadline"] if is_first else None),
        record=record,
        stop=stop,
    )


def log_start(t: Trainer, event: str) -> None:
    """Say where the run stands and how far it is to go."""
    at, stream = t.progress, t.stream
    t.record.update(step=at.step, total_steps=t.total_steps)
    samples_left = max(0, t.total_steps - at.step) * stream.global_batch
    t.metrics.append(
        "event",
        event=event,
        stage=t.cfg.stage,
        **at.position(),
        total_steps=t.total_steps,
        total_samples=min(stream.total_samples, at.samples + samples_left),
        num_processes=t.group.size,
        global_batch=stream.global_batch,
        cut=stream.truncated.cut,
        dropped=stream.truncated.dropped,
    )


def initial_model(payload: Mapping[str, Any]) -> MiniMindForCausalLM:
    """The model a run begins from: new weights, or those that were found.

    Raises `RuntimeError` where the weights that a run began from are not there.
    """
    config = payload.get("config", {})
    file = payload["initial"]
    if file is None and config.get("hashes", {}).get("initial"):
        raise RuntimeError(
            f"the weights that this run began from ({config['began_from']}) are not there "
            "as they were, and its reference model, which they are, has to be computed "
            "again; put them back, or begin anew with resume=False"
        )
    model = new_model(payload)
    if file:
        put_weights(model, read_tensors(Path(file)), file)
    return model


def new_model(payload: Mapping[str, Any]) -> MiniMindForCausalLM:
    """A freshly initialised model: the same weights for the same seed, on any rank."""
    cfg = TrainConfig(**payload["settings"])
    tokenizer = read_tokenizer(RunFolder(payload["folder"]).tokenizer)
    torch.manual_seed(cfg.seed)
    config = model_config(dataclasses.asdict(cfg), tokenizer)
    return MiniMindForCausalLM(config).train()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether no memory was to be had; torch has an exception type for its own pool on
    CUDA only, not for a CPU, the driver or cuBLAS."""
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        text in str(error) for text in (*texts, "ALLOC_FAILED")
    )


def smaller_batch(cfg: TrainConfig) -> str:
    """What to set so that less memory does for the same global batch."""
    assert cfg.batch_size and cfg.accumulation_steps
    rows, steps = cfg.batch_size, cfg.accumulation_steps
    found = f"of batch_size={rows}, accumulation_steps={steps}"
    if rows == 1:
        return (
            f"a row {found} cannot be halved: lower max_seq_len={cfg.max_seq_len} or "
            "the model's size, or take fewer processes"
        )
    divisor = next(n for n in range(2, rows + 1) if rows % n == 0)
    return (
        f"the global batch {found} needs less memory as batch_size={rows // divisor}, "
        f"accumulation_steps={steps * divisor}, with "
        'allow_change=["batch_size", "accumulation_steps"] to go on with this run'
    )
