"""What a checkpoint holds, and how it becomes a running state again.

No random state is kept: every draw of a run is seeded from (seed, rank, step), so the
step says it all, for any number of processes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..model.architecture import MiniMindForCausalLM
from ..model.interop import put_weights
from ..storage import verified
from ..storage.runs import OPTIMIZER, STATE, WEIGHTS, RunFolder
from .optim import moments, restore_moments


@dataclass
class Progress:
    """Where a run stands: what changes from step to step beside the tensors.

    `samples` and `tokens` count rows and predicted text tokens of all ranks;
    `seconds` is training time over all sessions, without validation and saving.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    val_loss: float | None = None


def save_checkpoint(
    folder: RunFolder,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
    config: dict[str, Any],
) -> Path:
    """Write a checkpoint of the state after `progress.step` steps, and verify it.

    fp32 weights (tied ones once), AdamW's moments by parameter name, and the rest as
    JSON. An intact checkpoint of this step is left as it is. Raises `OSError`.
    """
    target = folder.checkpoint_folder(progress.step)
    facts = {"step": progress.step, "val_loss": progress.val_loss}
    if target.exists():
        verified.verify(target)
        return target
    with verified.writing(target, facts) as aside:
        weights = {name: p.detach() for name, p in model.named_parameters()}
        save_file(weights, aside / WEIGHTS)
        save_file(moments(optimizer, model), aside / OPTIMIZER)
        state = {
            "progress": asdict(progress),
            "scaler": scaler.state_dict(),
            "config": config,
        }
        text = json.dumps(state, indent=2, ensure_ascii=False)
        (aside / STATE).write_text(text, encoding="utf-8")
    verified.verify(target)
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
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])
