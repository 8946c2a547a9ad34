"""The content of a checkpoint, saved and restored.

No random state is kept: every draw of a run is seeded from (seed, rank, step).
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..model.architecture import MiniMindForCausalLM
from ..model.state_dict import put_weights
from ..storage import verified
from ..storage.run_folder import OPTIMIZER, STATE, WEIGHTS
from .run_plan import RunPlan


@dataclass
class LogWindow:
    """Sums since the last row of metrics, and the newest learning rate and norm.

    `losses` (the auxiliary one and the stage's metrics among them) are weighted by the
    targets of their step; `counts` are the positions and each expert's choices.
    """

    losses: torch.Tensor | float = 0.0
    num_targets: int = 0
    tokens: int = 0
    counts: torch.Tensor | float = 0.0
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    seconds: float = 0.0


@dataclass
class Progress:
    """The position of a run; `val_loss` is that of this very step, or None."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    val_loss: float | None = None
    window: LogWindow = field(default_factory=LogWindow)


def save_checkpoint(
    plan: RunPlan,
    progress: Progress,
    model: MiniMindForCausalLM,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Path:
    """Write a checkpoint of the state after `progress.step` steps, and verify it.

    One of this step is kept if it verifies and set aside if not. Raises `OSError`,
    `DamagedFolder` if reading it back fails, and `FloatingPointError` if a weight or a
    moment is not finite.
    """
    step, target = progress.step, plan.folder.checkpoint_folder(progress.step)
    if not target.exists():
        weights = {name: p.detach() for name, p in model.named_parameters()}
        moments = {
            f"{name}.{key}": value
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        tensors = weights | moments
        if bad := [name for name, t in tensors.items() if not t.isfinite().all()]:
            raise FloatingPointError(
                f"{bad[0]} is not finite after step {step}, so nothing was saved; the "
                "checkpoint before is good. Lower learning_rate"
            )
        facts = {"step": step, "val_loss": progress.val_loss, "run": plan.config["run"]}
        position, scale = asdict(progress), scaler.state_dict()
        state = {"progress": position, "scaler": scale, "config": plan.config}
        needed = sum(tensor.nbytes for tensor in tensors.values())
        with verified.writing(target, facts, needed) as aside:
            save_file(weights, aside / WEIGHTS)
            save_file(moments, aside / OPTIMIZER)
            style: Any = {"indent": 2, "ensure_ascii": False}
            text = json.dumps(state, default=torch.Tensor.tolist, **style)
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
    parameters = dict(model.named_parameters())
    for place, value in load_file(folder / OPTIMIZER).items():
        name, _, key = place.rpartition(".")
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)
    state = read_state(folder)
    if state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    position = state["progress"]
    window: dict[str, Any] = {
        name: torch.tensor(value, dtype=torch.float64) if type(value) is list else value
        for name, value in position.pop("window", {}).items()
    }
    return Progress(**position, window=LogWindow(**window))


def read_state(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside tensors: "progress", "scaler", "config"."""
    return json.loads((folder / STATE).read_bytes())
