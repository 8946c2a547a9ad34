"""Saving at intervals: the checkpoint, the weights file beside it, and pruning."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..monitor.metrics import MetricsLog
from ..storage import verified
from ..storage.runs import RunFolder
from .checkpoint import Progress, save_checkpoint

_MOST_FAILED_SAVES = 3


class Saver:
    """Writes what must survive; on ranks other than 0 `saves` is False: it does nothing.

    A save that fails is tried again at the next interval; three in a row, or the one
    at the end, raise `OSError`.
    """

    def __init__(
        self,
        *,
        folder: RunFolder,
        weights_file: Path,
        keep: int,
        config: dict[str, Any],
        metrics: MetricsLog,
        saves: bool,
    ) -> None:
        self.folder = folder
        self.weights_file = weights_file
        self.keep = keep
        self.config = config
        self.metrics = metrics
        self.saves = saves
        self._failed = 0

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        progress: Progress,
        final: bool,
    ) -> float:
        """Save, and return the seconds it took."""
        began = time.monotonic()
        if not self.saves:
            return 0.0
        try:
            folder = save_checkpoint(
                self.folder,
                model=model,
                optimizer=optimizer,
                scaler=scaler,
                progress=progress,
                config=self.config,
            )
            self.folder.prune_checkpoints(self.keep)
            export_weights(model, self.weights_file)
        except (OSError, SafetensorError, verified.DamagedFolder) as error:
            self._failed += 1
            self._log(progress, "save_failed", error=str(error))
            print(f"Saving at step {progress.step} failed: {error}", flush=True)
            if final or self._failed == _MOST_FAILED_SAVES:
                raise OSError(
                    f"saving at step {progress.step} failed ({self._failed} in a row): "
                    f"{error}"
                ) from error
        else:
            self._failed = 0
            self._log(progress, "save", folder=folder.name)
        return time.monotonic() - began

    def _log(self, progress: Progress, event: str, **facts: str) -> None:
        self.metrics.append(
            "event",
            step=progress.step,
            samples=progress.samples,
            tokens=progress.tokens,
            seconds=progress.seconds,
            event=event,
            **facts,
        )


def export_weights(model: nn.Module, file: Path) -> None:
    """Write MiniMind's `.pth`: a bare fp16 state dict with both tied keys.

    For other programs; rounded to fp16, so no run is resumed from it.
    """
    tensors = {
        name: tensor.detach().to("cpu", torch.float16)
        for name, tensor in model.state_dict().items()
    }
    buffer = io.BytesIO()  # torch turns a full disk into a RuntimeError of no kind
    torch.save(tensors, buffer)
    verified.write_bytes(file, buffer.getvalue())
