"""The content of a checkpoint, saved and restored.

No random state is kept: every draw of a run is seeded from (seed, rank, step), so the
step says it all, for any number of processes.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..model.architecture import MiniMindForCausalLM
from ..model.state_dict import put_weights
from ..storage import verified
from ..storage.run_folder import OPTIMIZER, STATE, WEIGHTS
from .optim import find_non_finite, moments, restore_moments
from .trainer import Progress, Trainer


def save_checkpoint(trainer: Trainer) -> Path:
    """Write a checkpoint of the state after `trainer.progress.step` steps; verify it.

    Holds the fp32 weights (tied ones once), AdamW's moments by parameter name, and the
    rest as JSON. An intact checkpoint of this step is left as it is, a damaged one set
    aside. Raises `OSError`, `DamagedFolder` if reading it back fails, and
    `FloatingPointError` if a weight or a moment is not finite, since no run could
    resume from that.
    """
    progress = trainer.progress
    target = trainer.folder.checkpoint_folder(progress.step)
    if not target.exists():
        state = {
            "progress": asdict(progress),
            "scaler": trainer.scaler.state_dict(),
            "config": trainer.config,
        }
        facts = {"step": progress.step, "val_loss": progress.val_loss}
        facts |= {"run": trainer.config["run"]}
        weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
        kept = moments(trainer.optimizer, trainer.model)
        if name := find_non_finite(weights) or find_non_finite(kept):
            raise FloatingPointError(
                f"{name} is not finite after step {progress.step}, so nothing was saved; "
                "the previous checkpoint is good. Lower learning_rate, or look at the "
                "rows before this step"
            )
        needed = sum(tensor.nbytes for tensor in (*weights.values(), *kept.values()))
        with verified.writing(target, facts, needed) as aside:
            save_file(weights, aside / WEIGHTS)
            save_file(kept, aside / OPTIMIZER)
            text = json.dumps(state, indent=2, ensure_ascii=False)
            (aside / STATE).write_text(text, encoding="utf-8")
    try:
        verified.verify(target)
    except verified.DamagedFolder as damage:
        verified.set_aside(target, str(damage))
        raise
    return target


def load_checkpoint(
    folder: Path,
    model: MiniMindForCausalLM,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Restore a verified checkpoint into a model and its optimizer.

    Raises `ValueError` naming the tensors if it has another shape.
    """
    put_weights(model, load_file(folder / WEIGHTS), str(folder))
    restore_moments(optimizer, model, load_file(folder / OPTIMIZER))
    state = _read_state(folder)
    if state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])


def read_progress(folder: Path) -> Progress:
    """Return the progress of the run when a checkpoint was written."""
    return Progress(**_read_state(folder)["progress"])


def read_config(folder: Path) -> dict[str, Any]:
    """Return the run's `config.json` as it was when a checkpoint was written."""
    return _read_state(folder)["config"]


def _read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE).read_text(encoding="utf-8"))
