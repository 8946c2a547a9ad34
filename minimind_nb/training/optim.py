"""The optimizer, its learning rate, and the gradients as one flat tensor."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..config import ResolvedConfig
from ..launch.cancellation import STOP_REASONS
from .stages import Losses


class FlatGradients:
    """All gradients in one float32 tensor, then `losses` numbers, then the stop flags.

    Each parameter's `.grad` is a view into it, so one all-reduce a step sums all over
    the ranks. The layout never changes, and so the order of additions does not either:
    DistributedDataParallel rebuilds its buckets after the first backward pass, which
    makes a resumed run differ (1e-7 from three ranks on).
    """

    def __init__(self, model: nn.Module, device: torch.device, losses: int) -> None:
        parameters = [*model.parameters()]
        count = sum(p.numel() for p in parameters)
        size = count + losses + len(STOP_REASONS)
        self._losses = losses
        self.flat = torch.zeros(size, dtype=torch.float32, device=device)
        self.gradients, self._sums = self.flat[:count], self.flat[count:]
        pieces = self.gradients.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)

    def add_losses(self, losses: Losses) -> None:
        """Add a micro-batch's share of the step's losses, without waiting for it."""
        parts = losses.loss[None], losses.aux_loss[None], losses.metrics
        self._sums[: self._losses] += torch.cat(parts).detach()

    def add_stop_flags(self, flags: list[float]) -> None:
        """Add this rank's stop flags, one for each of `STOP_REASONS`."""
        if any(flags):
            self._sums[self._losses :] += torch.tensor(flags, device=self.flat.device)

    def grad_norm_and_sums(self) -> tuple[float, list[float], list[float]]:
        """Return the gradient norm, the losses and the stop flags; waits for the device."""
        norm = torch.linalg.vector_norm(self.gradients)
        first, *values = torch.cat([norm[None], self._sums]).tolist()
        return first, values[: self._losses], values[self._losses :]

    def clip(self, norm: float, most: float) -> None:
        """Scale the gradients down to the norm `most`; 0 never clips."""
        if most > 0 and norm > most:
            self.gradients.mul_(most / norm)


def build_optimizer(model: nn.Module, cfg: ResolvedConfig) -> torch.optim.AdamW:
    """Return AdamW, with weight decay on matrices (embeddings included) only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (cfg.beta1, cfg.beta2)
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=True)


def learning_rate(step: int, total: int, cfg: ResolvedConfig) -> float:
    """Return the learning rate at 0-based `step`: linear warm-up, then a cosine.

    `learning_rate · (step + 1) / warmup_iters` at first; the last step of `total` gets
    `min_learning_rate`. The warm-up takes a tenth of the steps at most.
    """
    highest, lowest = cfg.learning_rate, cfg.min_learning_rate
    warmup = min(cfg.warmup_iters, total // 10)
    if step < warmup:
        return highest * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return lowest + (highest - lowest) * cosine
