"""What a checkpoint holds, and how it becomes a running state again.

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
from ..model.weights import put_weights
from ..storage import verified
from ..storage.runs import OPTIMIZER, STATE, WEIGHTS
from .optim import moments, restore_moments
from .trainer import Progress, Trainer


def save_checkpoint(t: Trainer) -> Path:
    """Write a checkpoint of the state after `t.progress.step` steps, and verify it.

    fp32 weights (tied ones once), AdamW's moments by parameter name, and the rest as
    JSON. An intact checkpoint of this step is left as it is, a damaged one set aside.
    Raises `OSError`, or `DamagedFolder` where it is not what was written.
    """
    target = t.folder.checkpoint_folder(t.progress.step)
    if not target.exists():
        state = {
            "progress": asdict(t.progress),
            "scaler": t.scaler.state_dict(),
            "config": t.config,
        }
        text = json.dumps(state, indent=2, ensure_ascii=False)
        facts = {"step": t.progress.step, "val_loss": t.progress.val_loss}
        facts |= {"run": t.config["run"]}
        weights = {name: p.detach() for name, p in t.model.named_parameters()}
        kept = moments(t.optimizer, t.model)
        needed = sum(tensor.nbytes for tensor in (*weights.values(), *kept.values()))
        with verified.writing(target, facts, needed) as aside:
            save_file(weights, aside / WEIGHTS)
            save_file(kept, aside / OPTIMIZER)
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

    Raises `ValueError` naming the tensors where it is of another shape; nothing is
    changed then.
    """
    put_weights(model, load_file(folder / WEIGHTS), str(folder))
    restore_moments(optimizer, model, load_file(folder / OPTIMIZER))
    state = _read_state(folder)
    if state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])


def read_progress(folder: Path) -> Progress:
    """Where the run stood when a checkpoint was written."""
    return Progress(**_read_state(folder)["progress"])


def _read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE).read_text(encoding="utf-8"))
