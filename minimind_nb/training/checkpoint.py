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
from ..model.state_dict import put_weights
from ..storage import verified
from ..storage.run_folder import OPTIMIZER, STATE, WEIGHTS
from .optim import find_not_finite, moments, restore_moments
from .trainer import Progress, Trainer


def save_checkpoint(t: Trainer) -> Path:
    """Write a checkpoint of the state after `t.progress.step` steps, and verify it.

    fp32 weights (tied ones once), AdamW's moments by parameter name, and the rest as
    JSON. An intact checkpoint of this step is left as it is, a damaged one set aside.
    Raises `OSError`, `DamagedFolder` where it is not what was written, and
    `FloatingPointError` where a weight or a moment is not finite: no run could go on
    from that, and the checkpoint before is good.
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
        if spoiled := find_not_finite(weights) or find_not_finite(kept):
            raise FloatingPointError(
                f"{spoiled} is not finite after step {t.progress.step}, so nothing is "
                "saved; the checkpoint before is good. Lower learning_rate, or look at "
                "the rows before"
            )
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

    Raises `ValueError` naming the tensors if it is of another shape, before the
    optimizer is changed.
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


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of the run as it was when a checkpoint was written."""
    return _read_state(folder)["config"]


def _read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE).read_text(encoding="utf-8"))
