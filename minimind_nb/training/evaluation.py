"""Loss on held-out text, by all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..data.batches import MicroBatch, ValidationRows
from ..launch.distributed import Group

Objective = Callable[[nn.Module, MicroBatch], tuple[Tensor, Tensor]]


def evaluate_rows(
    model: nn.Module,
    objective: Objective,
    rows: ValidationRows,
    *,
    batch_size: int,
    group: Group,
    device: torch.device,
    autocast: torch.autocast,
) -> dict[str, float]:
    """Loss a token, perplexity and bits per byte of text over all rows.

    Weighted by tokens; consumes no randomness. Bits per byte count what it costs to
    predict each document with its end, per UTF-8 byte of its text, so they can be
    compared across tokenizers.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    with torch.no_grad():
        for batch in rows.micro_batches(batch_size, group.rank, group.size):
            moved = batch.to(device)
            with autocast:
                loss, _ = objective(model, moved)
            sums[0] += loss
            sums[1] += (moved.targets >= 0).sum()
    model.train()
    group.sum(sums)
    total, tokens = sums.tolist()
    loss = total / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < math.log(1e300) else math.inf,
        "bits_per_byte": total / math.log(2) / max(1, rows.text_bytes),
    }
