"""The state of a run in one process, on which every step of the loop works."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.batches import StepBatch, TrainingStream, ValidationRows
from ..data.tokenizer import TokenizerSpec
from ..launch.cancellation import StopRequest
from ..model.architecture import MiniMindForCausalLM
from ..monitor.metrics import MetricsLog
from ..storage.run_folder import RunFolder
from .evaluation import Evaluator, Prompt, seed_of
from .optim import FlatGradients

_REMEMBERED_STEPS = 200
_FIRST_SAVE_SECONDS = 10.0  # assumed until one was measured
_NAMED_LINES = 20


class SessionClock:
    """A deadline on the monotonic clock (None: no deadline).

    The run stops early enough for one more step, a validation and two saves, each as
    slow as the slowest so far.
    """

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        self._steps: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._longest_save = self._longest_validation = 0.0

    def add_step(self, seconds: float) -> None:
        """Record the duration of a step."""
        self._steps.append(seconds)

    def add_save(self, seconds: float) -> None:
        """Record the duration of a save."""
        self._longest_save = max(self._longest_save, seconds)

    def add_validation(self, seconds: float) -> None:
        """Record the duration of a validation, answers included."""
        self._longest_validation = max(self._longest_validation, seconds)

    def margin_seconds(self) -> float:
        """Return the time that one more step, a validation and two saves may take."""
        saves = 2 * (self._longest_save or _FIRST_SAVE_SECONDS)
        return max(self._steps, default=0.0) + self._longest_validation + saves

    def is_over(self) -> bool:
        """Return whether another step could miss the deadline."""
        if self.deadline is None:
            return False
        return time.monotonic() + self.margin_seconds() > self.deadline


@dataclass
class Progress:
    """The position of a run: what changes from step to step, apart from tensors.

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
        """Return the fields that every row of metrics begins with."""
        names = ("step", "samples", "tokens", "seconds")
        return {name: getattr(self, name) for name in names}


@dataclass
class LogWindow:
    """Sums since the last row of metrics.

    `losses` are the loss, the auxiliary loss and the stage's metrics, each times the
    targets of its step. `positions` (of this rank's rows, padding included) and
    `expert_choices` (how often each expert of each layer was chosen) are this rank's.
    """

    losses: list[float] = field(default_factory=list)
    num_targets: int = 0
    tokens: int = 0
    positions: int = 0
    expert_choices: torch.Tensor | float = 0.0
    grad_norm: float = 0.0
    seconds: float = 0.0

    def add(
        self, batch: StepBatch, losses: list[float], norm: float, seconds: float
    ) -> None:
        """Add one step, whose losses are means over its targets."""
        before = self.losses or [0.0] * len(losses)
        pairs = zip(before, losses, strict=True)
        self.losses = [total + loss * batch.num_targets for total, loss in pairs]
        self.num_targets += batch.num_targets
        self.tokens += batch.tokens
        self.positions += sum(one.inputs.numel() for one in batch.micro_batches)
        self.grad_norm = norm
        self.seconds += seconds

    def add_expert_choices(self, model: MiniMindForCausalLM) -> None:
        """Add the experts chosen in the last forward pass; they are on the host."""
        if counts := model.expert_load():
            counts = torch.tensor(counts, dtype=torch.float64)
            self.expert_choices = self.expert_choices + counts


@dataclass(kw_only=True)
class Trainer(Evaluator):
    """The parts of a run, built by `worker.build` and changed by the loop.

    `config` is the content of config.json; `prompts` are answered at validations, on
    rank 0.
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
    window: LogWindow = field(default_factory=LogWindow)
    failed_saves: int = 0

    def seed_dropout(self) -> None:
        """Seed this step's dropout from (seed, rank, step)."""
        torch.manual_seed(seed_of(self.cfg.seed, self.group.rank, self.progress.step))

    def stop_flags(self) -> list[float]:
        """Return this rank's stop flags, the session's deadline considered."""
        if self.clock.is_over():
            self.stop.reason = self.stop.reason or "time_budget"
        return self.stop.stop_flags()

    @contextlib.contextmanager
    def blaming_data(self) -> Iterator[None]:
        """Add the lines of the data in this rank's step to an exception."""
        try:
            yield
        except Exception as error:
            shares = self.stream.shares(self.progress.samples, self.stream.samples)
            if lines := self.stream.lines(itertools.chain(*shares)):
                where = f"step {self.progress.step + 1}, rank {self.group.rank}"
                error.add_note(f"in {where}, with {describe_lines(lines)} of the data")
            raise


def describe_lines(lines: list[int]) -> str:
    """Return "the lines [2, 5, 9]", shortened if there are many."""
    rest = len(lines) - _NAMED_LINES
    return f"the lines {lines[:_NAMED_LINES]}" + f" and {rest} more" * (rest > 0)
