"""What differs between stages, as one row each; the loop is the same for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ..data.batches import MicroBatch
from .objectives import next_token_loss


@dataclass(frozen=True)
class Stage:
    """`record_format` names how rows are read; `weights` begins the weights' name."""

    record_format: str
    objective: Callable[[nn.Module, MicroBatch], tuple[Tensor, Tensor]]
    weights: str


STAGES: dict[str, Stage] = {
    "pretrain": Stage("pretrain", next_token_loss, "pretrain"),
}
"""Stages by name; their default settings are in `minimind_nb.config.presets`."""
