"""The state of a run in one process, on which every step of the loop works."""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..launch.cancellation import StopRequest
from ..launch.outcome import RankRecord
from ..launch.process_group import Group
from ..monitor.metrics import MetricsLog
from .checkpoint import Progress, load_checkpoint
from .evaluation import Evaluator, choose_prompts
from .optim import FlatGradients, build_optimizer
from .run_plan import RunPlan
from .stages import compile_objective

_FIRST_SAVE = 10.0  # seconds, assumed until one was measured
_NAMED_LINES = 20


class SessionClock:
    """A deadline on the monotonic clock, if there is one.

    It leaves time for one more step, a validation and two saves as slow as any so far.
    """

    def __init__(self, deadline: float | None) -> None:
        self.deadline = math.inf if deadline is None else deadline
        self._slowest: dict[str, float] = {}

    def add(self, kind: str, seconds: float) -> None:
        """Record the duration of a "step", a "validation" or a "save"."""
        self._slowest[kind] = max(seconds, self._slowest.get(kind, 0.0))

    def is_over(self) -> bool:
        """Return whether another step could miss the deadline."""
        slowest = self._slowest.get
        step, save = slowest("step", 0.0), slowest("save", _FIRST_SAVE)
        margin = step + slowest("validation", 0.0) + 2 * save
        return time.monotonic() + margin > self.deadline


class Trainer(Evaluator):
    """The parts of a run, restored from its checkpoint if there is one.

    `validation` is None if nothing is held out; `prompts`, `metrics` and the session's
    deadline are rank 0's.
    """

    def __init__(
        self,
        plan: RunPlan,
        group: Group,
        device: torch.device,
        record: RankRecord,
        stop: StopRequest,
    ) -> None:
        super().__init__(plan, group, device, record)
        cfg, pad_id = plan.cfg, plan.tokenizer.pad_id
        self.stop = stop
        self.optimizer = build_optimizer(self.model, cfg)
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")
        self.progress = Progress()
        if plan.checkpoint:
            parts = self.model, self.optimizer, self.scaler
            self.progress = load_checkpoint(plan.checkpoint, *parts)
        self.compiled = compile_objective(self.model, cfg) if cfg.compile else None
        self.gradients = FlatGradients(self.model, device, 2 + len(self.stage.metrics))
        place = {"rank": group.rank, "samples": self.progress.samples}
        self.stream = plan.corpus.training_stream(cfg, pad_id, **place)
        self.validation = plan.corpus.validation_rows(cfg, pad_id)
        is_first = group.rank == 0
        self.prompts = choose_prompts(self, self.validation) if is_first else []
        self.metrics = MetricsLog(plan.folder.metrics_file if is_first else os.devnull)
        self.clock = SessionClock(plan.deadline if is_first else None)
        experts = torch.tensor(self.model.expert_load())
        self.counts = torch.zeros(1 + experts.numel(), dtype=torch.float64)
        self.failed_saves = 0

    def log(self, kind: str, **fields: Any) -> None:
        """Append a row to the metrics: the run's position, and some fields."""
        names = ("step", "samples", "tokens", "seconds")
        where = {name: getattr(self.progress, name) for name in names}
        self.metrics.append(kind, **where, **fields)

    def share_counts(self) -> None:
        """Move what the ranks counted to the window, which is the same on all."""
        self.group.sum(total := self.counts.to(self.device))
        self.progress.window.counts += total.cpu()
        self.counts.zero_()

    def stop_flags(self) -> list[float]:
        """Return this rank's stop flags, the session's deadline considered."""
        if self.clock.is_over():
            self.stop.reason = self.stop.reason or "time_budget"
        return self.stop.stop_flags()

    @contextlib.contextmanager
    def blaming_data(self) -> Iterator[None]:
        """Add the lines of the data in the step to an exception."""
        try:
            yield
        except Exception as error:
            if lines := self.lines():
                where = f"step {self.progress.step + 1}, rank {self.group.rank}"
                error.add_note(f"in {where}, with {describe_lines(lines)} of the data")
            raise

    def lines(self) -> list[int]:
        """Return the lines of the data in the step that is not yet recorded, if any."""
        return self.stream.lines(range(self.progress.samples, self.stream.samples))


def describe_lines(lines: list[int]) -> str:
    """Return "the lines [2, 5, 9]", shortened if there are many."""
    rest = len(lines) - _NAMED_LINES
    return f"the lines {lines[:_NAMED_LINES]}" + f" and {rest} more" * (rest > 0)
