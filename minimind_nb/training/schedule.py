"""The learning rate as a function of the step."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, warmup: int, total: int, highest: float, lowest: float
) -> float:
    """Linear warm-up, then a cosine from `highest` to `lowest`, at 0-based `step`.

    `highest · (step + 1) / warmup` while `step < warmup`; the last step of `total`
    gets `lowest`.
    """
    if step < warmup:
        return highest * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return lowest + (highest - lowest) * cosine
