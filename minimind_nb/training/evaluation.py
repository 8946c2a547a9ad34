"""Loss on held-out text, by all ranks together."""

from __future__ import annotations

import math

import torch

from ..data.batches import ValidationRows
from .trainer import Trainer


def evaluate_rows(t: Trainer, rows: ValidationRows) -> dict[str, float]:
    """Loss a token, perplexity and bits per byte of text over all rows.

    Weighted by tokens; consumes no randomness. Bits per byte count what it costs to
    predict each document with its end, per UTF-8 byte of its text, so they can be
    compared across tokenizers.
    """
    assert t.cfg.batch_size
    sums = torch.zeros(2, dtype=torch.float64, device=t.device)
    t.model.eval()
    with torch.no_grad():
        for batch in rows.micro_batches(t.cfg.batch_size, t.group.rank, t.group.size):
            moved = batch.to(t.device)
            with t.autocast:
                loss, _ = t.stage.objective(t.model, moved)
            sums[0] += loss
            sums[1] += (moved.targets >= 0).sum()
    t.model.train()
    t.group.sum(sums)
    total, tokens = sums.tolist()
    loss = total / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < math.log(1e300) else math.inf,
        "bits_per_byte": total / math.log(2) / max(1, rows.text_bytes),
    }
