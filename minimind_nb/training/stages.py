"""What differs between stages, as one row each; the loop is the same for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import IGNORED, MicroBatch


@dataclass(frozen=True)
class Stage:
    """`record_format` names how rows are read; `weights` begins the weights' name."""

    record_format: str
    objective: Callable[[nn.Module, MicroBatch], tuple[Tensor, Tensor]]
    weights: str


def next_token_loss(model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the targets, and the auxiliary loss.

    In float32 whatever the precision of the products; the sum, because only the
    caller knows the number of targets over all micro-batches and ranks. The auxiliary
    loss is a mean over the rows (per sequence) or a product of means (over the batch).
    """
    mask = None if batch.documents is None else document_mask(batch.documents)
    output = model(input_ids=batch.inputs, attention_mask=mask)
    loss = F.cross_entropy(
        output.logits.flatten(0, 1).float(),
        batch.targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return loss, output.aux_loss


def document_mask(documents_BT: Tensor) -> Tensor:
    """Boolean [B, 1, T, T]: causal, and only within the same document.

    One mask for all heads and layers. Padding (-1) sees padding only, so that no row
    of the softmax is empty.
    """
    length = documents_BT.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents_BT.device)
    same = documents_BT[:, :, None] == documents_BT[:, None, :]
    return (same & causal.tril())[:, None]


STAGES: dict[str, Stage] = {
    "pretrain": Stage("pretrain", next_token_loss, "pretrain"),
}
"""Stages by name; their default settings are in `minimind_nb.config.presets`."""
