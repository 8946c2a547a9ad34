"""Loss and measures on held-out samples, by all ranks together."""

from __future__ import annotations

import math

import torch

from ..data.batches import IGNORED, ValidationRows
from .trainer import Parts


def evaluate_rows(parts: Parts, rows: ValidationRows) -> dict[str, float]:
    """The mean loss a term, and what goes with it; consumes no randomness.

    A term is a target, and then perplexity and bits per byte come along: what it costs
    to predict each document, or answer, with its end, per UTF-8 byte of its text, which
    can be compared across tokenizers. Or it is a pair, and the stage's measures come.
    """
    cfg, stage, group = parts.cfg, parts.stage, parts.group
    assert cfg.batch_size
    sums = torch.zeros(3 + len(stage.measures), dtype=torch.float64)
    sums = sums.to(parts.device)
    training = parts.model.training
    parts.model.eval()
    with torch.no_grad():
        for batch in rows.micro_batches(cfg.batch_size, group.rank, group.size):
            moved = batch.to(parts.device)
            with parts.autocast:
                losses = stage.objective(parts.model, moved, cfg)
            sums[0] += losses.loss
            sums[1] += (moved.targets != IGNORED).sum()
            sums[2] += batch.samples
            sums[3:] += losses.measures
            parts.record.beat()
    parts.model.train(training)
    group.sum(sums)
    total, targets, samples, *measures = sums.tolist()
    if stage.measures:
        means = [value / samples for value in measures]
        return {
            "loss": total / samples,
            **dict(zip(stage.measures, means, strict=True)),
        }
    loss = total / targets
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < math.log(1e300) else math.inf,
        "bits_per_byte": total / math.log(2) / max(1, rows.text_bytes),
    }
