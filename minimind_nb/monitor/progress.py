"""How far a run is, in numbers and in words; standard library only."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .metrics import History

RECENT_ROWS = 12  # the speed behind "time left" is that of so many logged intervals

MINUTE, HOUR, DAY = 60, 3_600, 86_400
STATUS_WORDS = {
    "running": "running",
    "finished": "finished",
    "time_budget": "stopped: the session's time was used up",
    "interrupted": "stopped: interrupted",
    "terminated": "stopped: terminated",
    "failed": "failed",
    "killed": "ended from outside",
    "new": "not started",
}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands. None: not known yet."""

    step: int
    total_steps: int | None
    tokens: float | None
    trained_seconds: float
    """Training time over all sessions, without evaluation and saving."""
    seconds_left: float | None
    """Training time until the last step at the speed of the last logged rows."""
    tokens_per_second: float | None
    loss: float | None
    learning_rate: float | None
    skipped_steps: int
    validation_loss: float | None
    lowest_validation_loss: float | None

    @property
    def fraction(self) -> float:
        """Share of the steps done, 0 to 1; 0 while the total is unknown."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0


def measure(history: History, plan: Mapping[str, Any] | None = None) -> Progress:
    """The progress told by the rows; `plan` gives `total_steps` before they do."""
    horizon = history.horizon
    train, validation = history.last("train") or {}, history.last("eval") or {}
    total = horizon.get("total_steps") or (plan or {}).get("total_steps")
    step = max(int(train.get("step", 0)), int(horizon.get("step", 0)))
    losses = [loss for loss in history.column("eval", "loss") if math.isfinite(loss)]
    seconds_a_step = _recent_seconds_a_step(history)
    left = None
    if total and seconds_a_step is not None:
        left = max(0, total - step) * seconds_a_step
    return Progress(
        step=step,
        total_steps=int(total) if total else None,
        tokens=train.get("tokens"),
        trained_seconds=train.get("seconds") or 0.0,
        seconds_left=left,
        tokens_per_second=train.get("tokens_per_second"),
        loss=train.get("loss"),
        learning_rate=train.get("learning_rate"),
        skipped_steps=int(train.get("skipped_steps") or 0),
        validation_loss=validation.get("loss"),
        lowest_validation_loss=min(losses, default=None),
    )


def _recent_seconds_a_step(history: History) -> float | None:
    """Seconds a step over the last rows of this session, None before there are two.

    The start row counts as one of them where it says its `seconds`.
    """
    points: list[tuple[float, float]] = []
    for row in reversed(history.rows):
        begins = row is history.horizon
        if (begins or row["kind"] == "train") and "seconds" in row:
            points.append((row.get("step", 0), row["seconds"]))
        if begins or len(points) > RECENT_ROWS:
            break
    if len(points) < 2:  # noqa: PLR2004
        return None
    (last_step, last_seconds), (first_step, first_seconds) = points[0], points[-1]
    if last_step <= first_step:
        return None
    return max(0.0, last_seconds - first_seconds) / (last_step - first_step)


def describe(progress: Progress) -> str:
    """One plain line: step, loss, perplexity, learning rate, speed, time left."""
    parts = [step_text(progress)]
    if progress.loss is not None:
        parts.append(f"loss {loss_text(progress.loss)}")
        parts.append(f"ppl {perplexity_text(progress.loss)}")
    if progress.learning_rate is not None:
        parts.append(f"lr {progress.learning_rate:.1e}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tok/s")
    if progress.skipped_steps:
        parts.append(f"{progress.skipped_steps} skipped")
    if progress.seconds_left is not None:
        parts.append(f"{duration(progress.seconds_left)} left")
    return "  ".join(parts)


def describe_end(progress: Progress, status: str) -> str:
    """One plain line about a run that is over, or was looked at."""
    parts = [STATUS_WORDS.get(status, status), step_text(progress, of=" of ")]
    if progress.loss is not None:
        loss = progress.loss
        parts.append(f"loss {loss_text(loss)} (perplexity {perplexity_text(loss)})")
    if progress.validation_loss is not None:
        loss = progress.validation_loss
        parts.append(
            f"validation {loss_text(loss)} (perplexity {perplexity_text(loss)})"
        )
    if progress.tokens:
        parts.append(f"{count(progress.tokens)} text tokens")
    if progress.trained_seconds:
        parts.append(f"{duration(progress.trained_seconds)} of training")
    return " · ".join(part for part in parts if part)


def step_text(progress: Progress, of: str = "/") -> str:
    if not progress.total_steps:
        return f"step {progress.step:,}"
    share = f"{100 * progress.fraction:.0f} %"
    return f"step {progress.step:,}{of}{progress.total_steps:,} ({share})"


def perplexity(loss: float) -> float:
    """exp(loss); infinity where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def loss_text(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "not finite"


def perplexity_text(loss: float) -> str:
    """The perplexity of a loss to three digits or so."""
    value = perplexity(loss)
    if not math.isfinite(value):
        return "not finite"
    if value >= 1e6:  # noqa: PLR2004
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004


def duration(seconds: float) -> str:
    """12 s, 4 min 10 s, 3 h 05 min, 2 d 3 h."""
    if not math.isfinite(seconds):
        return "unknown time"
    whole = round(seconds)
    if whole < MINUTE:
        return f"{whole} s"
    if whole < HOUR:
        return f"{whole // MINUTE} min {whole % MINUTE:02d} s"
    if whole < DAY:
        return f"{whole // HOUR} h {whole % HOUR // MINUTE:02d} min"
    return f"{whole // DAY} d {whole % DAY // HOUR} h"


def count(number: float) -> str:
    """950, 12.3 k, 3.2 M, 1.5 B: at most three digits and the unit."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
