"""The parts of a run in one process, which every step of the loop works on."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import TrainConfig
from ..data.batches import StepBatch, TrainingStream, ValidationRows
from ..data.tokenizer import TokenizerSpec
from ..launch.cancellation import StopRequest
from ..launch.outcome import RankRecord
from ..launch.process_group import Group
from ..model.architecture import MiniMindForCausalLM
from ..monitor.metrics import MetricsLog
from ..storage.run_folder import RunFolder
from .optim import FlatGradients
from .stages import Stage

_REMEMBERED_STEPS = 200
_FIRST_SAVE_SECONDS = 10.0  # assumed until one was measured
_PERCENTILES = 20
_NAMED_LINES = 20


class SessionClock:
    """Knows a deadline on the monotonic clock (None: there is none).

    The margin is the 95th percentile of the step times plus the longest validation and
    two saves, so that the last save fits in even when it is slow.
    """

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        self._steps: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._longest_save = 0.0
        self._longest_validation = 0.0

    def add_step(self, seconds: float) -> None:
        """Remember how long a step took."""
        self._steps.append(seconds)

    def add_save(self, seconds: float) -> None:
        """Remember how long a save took."""
        self._longest_save = max(self._longest_save, seconds)

    def add_validation(self, seconds: float) -> None:
        """Remember how long a validation took, answers included."""
        self._longest_validation = max(self._longest_validation, seconds)

    def margin_seconds(self) -> float:
        """The time that one more step, a validation and the save after may take."""
        slow = max(self._steps, default=0.0)
        if len(self._steps) > _PERCENTILES:
            slow = statistics.quantiles(self._steps, n=_PERCENTILES)[-1]
        saves = 2 * (self._longest_save or _FIRST_SAVE_SECONDS)
        return slow + self._longest_validation + saves

    def is_over(self) -> bool:
        """Whether another step could miss the deadline."""
        if self.deadline is None:
            return False
        return time.monotonic() + self.margin_seconds() > self.deadline


@dataclass
class Progress:
    """Where a run stands: what changes from step to step beside the tensors.

    `samples` and `tokens` count rows and predicted text tokens of all ranks;
    `seconds` is training time over all sessions, without validation and saving;
    `val_loss` was measured with the weights of this very step, or is None.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    val_loss: float | None = None

    def position(self) -> dict[str, float]:
        """What every row of metrics begins with."""
        names = ("step", "samples", "tokens", "seconds")
        return {name: getattr(self, name) for name in names}


@dataclass
class SinceLog:
    """Sums since the last row of metrics.

    `losses` are the loss, the auxiliary loss and the stage's measures, each times the
    terms of its step. `positions` (of this rank's rows, padding too) and `choices` (how
    often each expert of each layer was chosen) are this rank's own.
    """

    losses: list[float] = field(default_factory=list)
    terms: int = 0
    tokens: int = 0
    positions: int = 0
    choices: torch.Tensor | float = 0.0
    grad_norm: float = 0.0
    seconds: float = 0.0

    def add(
        self, batch: StepBatch, losses: list[float], norm: float, seconds: float
    ) -> None:
        """Count one step, whose losses are means over its terms."""
        before = self.losses or [0.0] * len(losses)
        pairs = zip(before, losses, strict=True)
        self.losses = [total + loss * batch.terms for total, loss in pairs]
        self.terms += batch.terms
        self.tokens += batch.tokens
        self.positions += sum(one.inputs.numel() for one in batch.micro_batches)
        self.grad_norm = norm
        self.seconds += seconds

    def add_choices(self, model: MiniMindForCausalLM) -> None:
        """Count which experts the last forward pass chose; they are on the host."""
        if counts := model.expert_load():
            self.choices = self.choices + torch.tensor(counts, dtype=torch.float64)


class Prompt(NamedTuple):
    """What the model is asked at every validation, as people and as it read it."""

    text: str
    ids: list[int]


@dataclass
class Parts:
    """What a loss is computed with."""

    cfg: TrainConfig
    stage: Stage
    group: Group
    device: torch.device
    model: MiniMindForCausalLM
    autocast: torch.autocast
    record: RankRecord


@dataclass
class Trainer(Parts):
    """What `worker.build` makes and the loop changes.

    `config` is config.json's; `prompts` are what the model is asked at validations.
    """

    gradients: FlatGradients
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    tokenizer: TokenizerSpec
    stream: TrainingStream
    validation: ValidationRows | None
    prompts: list[Prompt]
    total_steps: int
    progress: Progress
    folder: RunFolder
    weights_file: Path
    config: dict[str, Any]
    metrics: MetricsLog
    clock: SessionClock
    stop: StopRequest
    since_log: SinceLog = field(default_factory=SinceLog)
    failed_saves: int = 0

    @contextlib.contextmanager
    def blaming_data(self) -> Iterator[None]:
        """Add to what is raised in a step the lines of the data this rank had in it."""
        try:
            yield
        except Exception as error:
            shares = self.stream.shares(self.progress.samples, self.stream.samples)
            if lines := self.stream.lines(itertools.chain(*shares)):
                where = f"step {self.progress.step + 1}, where rank {self.group.rank}"
                error.add_note(f"in {where} had {lines_text(lines)} of the data")
            raise


def lines_text(lines: list[int]) -> str:
    """ "the lines [2, 5, 9]", as many as one can look at."""
    rest = len(lines) - _NAMED_LINES
    return f"the lines {lines[:_NAMED_LINES]}" + f" and {rest} more" * (rest > 0)
