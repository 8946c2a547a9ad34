"""The optimizer, its learning rate, and the gradients as one flat tensor."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ResolvedConfig
from ..launch.cancellation import STOP_REASONS
from .stages import Losses

_MOMENTUM = 0.95
_ITERATIONS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


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


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for `matrices`, and AdamW for the rest.

    The momentum of a matrix [r, c] is orthogonalised, and scaled by 0.2 · √max(r, c) to
    the size of AdamW's updates (Liu et al. 2025), so that one rate serves both. Matrices
    of one shape are updated together, in products of `dtype`. Every rank makes the whole
    update.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        weight_decay: float,
        adamw: torch.optim.AdamW,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": adamw.defaults["lr"], "weight_decay": weight_decay}
        super().__init__([{"params": matrices}], defaults)
        self.adamw, self.dtype = adamw, dtype
        self.param_groups += adamw.param_groups
        self.state = adamw.state
        self._stacks: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            self._stacks.setdefault(matrix.shape, []).append(matrix)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all weights from their gradients."""
        rate, decay = (self.param_groups[0][name] for name in ("lr", "weight_decay"))
        for shape, matrices in self._stacks.items():
            gradients = torch.stack([p.grad for p in matrices if p.grad is not None])
            for matrix in matrices:
                self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
            momenta = torch.stack([self.state[p]["momentum"] for p in matrices])
            momenta.lerp_(gradients, 1 - _MOMENTUM)
            updates = orthogonalise(gradients.lerp(momenta, _MOMENTUM), self.dtype)
            # Else an expert without tokens keeps moving at full size along its last gradient.
            updates *= gradients.flatten(1).any(1)[:, None, None]
            size = rate * 0.2 * max(shape) ** 0.5
            parts = zip(matrices, momenta, updates, strict=True)
            for matrix, momentum, update in parts:
                self.state[matrix]["momentum"].copy_(momentum)
                matrix.mul_(1 - rate * decay).add_(update, alpha=-size)
        self.adamw.step()


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return matrices [n, r, c] with all singular values near 1, by Newton–Schulz.

    Five steps of the quintic iteration with Jordan's coefficients, which leave the
    values between 0.7 and 1.2. They are normalised in float32, multiplied in `dtype`.
    """
    norms = matrices.norm(dim=(1, 2), keepdim=True)
    wide = matrices.shape[1] <= matrices.shape[2]
    x = ((matrices if wide else matrices.mT) / (norms + 1e-7)).to(dtype)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x if wide else x.mT


def build_optimizer(model: nn.Module, cfg: ResolvedConfig) -> torch.optim.Optimizer:
    """Return Muon or AdamW, with weight decay on matrices (embeddings included) only.

    Muon is for the matrices of the layers; embeddings, norms and routers have AdamW.
    """
    muon = cfg.optimizer == "muon"
    hidden = {
        name: p
        for name, p in model.named_parameters()
        if muon and ".layers." in name and p.ndim > 1 and "mlp.gate.weight" not in name
    }
    rest = [p for name, p in model.named_parameters() if name not in hidden]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (cfg.beta1, cfg.beta2)
    adamw = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=True)
    if not muon:
        return adamw
    dtype = getattr(torch, cfg.dtype)
    return Muon([*hidden.values()], cfg.weight_decay, adamw, dtype)


def learning_rate(
    step: int, total: int, cfg: ResolvedConfig, decay_start: int
) -> float:
    """Return the learning rate at 0-based `step` of `total`: linear warm-up to
    `learning_rate` in `warmup_iters` steps, then the schedule.

    "linear" is constant up to `decay_start`, and falls to `min_learning_rate` behind the
    last step. "cosine" reaches it at the last step; there the warm-up takes a tenth of
    the steps at most.
    """
    highest, lowest = cfg.learning_rate, cfg.min_learning_rate
    warmup = cfg.warmup_iters
    if cfg.schedule == "cosine":
        warmup = min(warmup, total // 10)
    if step < warmup:
        return highest * (step + 1) / warmup
    if cfg.schedule == "linear":
        left = (total - step) / max(1, total - decay_start)
        return lowest + (highest - lowest) * min(1.0, max(0.0, left))
    progress = (step - warmup) / max(1, total - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return lowest + (highest - lowest) * cosine
