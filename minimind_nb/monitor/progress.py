"""The progress of a run in numbers and in words; standard library only."""

from __future__ import annotations

import datetime
import math

from .metrics import History, Row

RECENT_ROWS = 12  # logged rows whose speed gives the time left
LARGEST_LOSS = 700  # exp of more does not fit a float

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


def position(history: History, planned: int | None = None) -> tuple[int, int | None]:
    """Return the steps done and in all; `planned` is the total before a row has it."""
    if not history.rows:
        return 0, planned
    return history.rows[-1]["step"], history.session[0].get("total_steps") or planned


def seconds_left(history: History) -> float | None:
    """Return the training time left at this session's speed, None until it is known."""
    _, total = position(history)
    rows = [row for row in history.session if row["kind"] == "train"]
    rows = [*history.session[:1], *rows][-RECENT_ROWS:]
    if not total or not rows or rows[-1]["step"] <= rows[0]["step"]:
        return None
    seconds, steps = (rows[-1][name] - rows[0][name] for name in ("seconds", "step"))
    return (total - rows[-1]["step"]) * seconds / steps


def figures(history: History, planned: int | None = None) -> dict[str, str]:
    """Return the figures of a running training, by name."""
    step, total = position(history, planned)
    train, validation = history.last("train"), history.last("eval")
    left = seconds_left(history)
    share = f"/{total:,} ({step / total:.0%})" if total else ""
    shown = {"step": f"{step:,}{share}"}
    if history.rows and (now := history.rows[-1]).get("event") == "reference":
        shown["reference"] = f"{now['pairs']:,} of {now['total_pairs']:,} pairs"
    if left is not None:
        shown["time left"] = duration(left)
    if train:
        shown |= {"loss": f"{train['loss']:.3f}"} | scores(train)
    if validation:
        text = loss_text(validation)
        preferences = "reward_margin" in validation
        shown["validation loss"] = text if preferences else f"{validation['loss']:.3f}"
    if train:
        shown["text tokens/s"] = f"{train['tokens_per_second']:,.0f}"
        if train["skipped_steps"]:
            shown["skipped steps"] = f"{train['skipped_steps']:,}"
    return shown


def progress_line(history: History, planned: int | None = None) -> str:
    """Return the figures as one plain line."""
    shown = figures(history, planned).items()
    return "  ".join(f"{name} {text}" for name, text in shown)


def outcome(history: History, status: str = "") -> str:
    """Return one plain line about a run that has ended."""
    step, total = position(history)
    train, validation = history.last("train"), history.last("eval")
    parts = [STATUS_WORDS[status]] if status else []
    parts.append(f"step {step:,} of {total:,}" if total else f"step {step:,}")
    if train:
        parts.append(f"loss {train['loss']:.3f}")
    if validation:
        parts.append(f"validation {loss_text(validation)}")
    if train:
        parts.append(f"{train['tokens']:,} text tokens")
        parts.append(duration(train["seconds"]))
    return " · ".join(parts)


def failed_saves(history: History) -> list[str]:
    """Return a line for each save that failed and was left to the next one."""
    return [
        f"saving at step {row['step']:,} failed: {row.get('error')}"
        for row in history.select("event")
        if row.get("event") == "save_failed"
    ]


def perplexity_text(loss: float) -> str:
    """Return exp(loss) to four digits."""
    return f"{math.inf if loss > LARGEST_LOSS else math.exp(loss):,.4g}"


def scores(row: Row) -> dict[str, str]:
    """Return accuracy and margin of a row of preferences, else the perplexity."""
    if "reward_margin" in row:
        margin = f"{row['reward_margin']:.3g}"
        return {"accuracy": f"{100 * row['accuracy']:.0f} %", "margin": margin}
    return {"perplexity": perplexity_text(row["loss"])}


def loss_text(row: Row) -> str:
    """Return a row's loss with its scores: "2.000 (perplexity 7.389)"."""
    listed = ", ".join(f"{name} {text}" for name, text in scores(row).items())
    return f"{row['loss']:.3f} ({listed})"


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds: 3:05:00; 1 day, 2:00:00."""
    return str(datetime.timedelta(seconds=round(seconds)))
