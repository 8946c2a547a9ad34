"""How far a run is, in numbers and in words; standard library only."""

import datetime
import math
from collections.abc import Mapping
from typing import Any

from .metrics import History, Row

RECENT_ROWS = 12  # "time left" goes by the speed of so many logged rows
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

Plan = Mapping[str, Any]


def position(history: History, plan: Plan | None = None) -> tuple[int, int | None]:
    """Steps done and steps in all; `plan` gives `total_steps` before the rows do."""
    step = history.rows[-1]["step"] if history.rows else 0
    begin = history.session[0] if history.rows else {}
    return step, begin.get("total_steps") or (plan or {}).get("total_steps")


def seconds_left(history: History) -> float | None:
    """Training time to the last step at this session's speed, None until it is known."""
    _, total = position(history)
    rows = [row for row in history.session if row["kind"] == "train"]
    rows = [*history.session[:1], *rows][-RECENT_ROWS:]
    if not total or not rows or rows[-1]["step"] <= rows[0]["step"]:
        return None
    seconds, steps = (rows[-1][name] - rows[0][name] for name in ("seconds", "step"))
    return (total - rows[-1]["step"]) * seconds / steps


def figures(history: History, plan: Plan | None = None) -> dict[str, str]:
    """What a watcher wants to know of a running training, by name."""
    step, total = position(history, plan)
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
        shown["validation loss"] = f"{validation['loss']:.3f}"
        if "reward_margin" in validation:
            shown["validation loss"] = loss_text(validation)
    if train:
        shown["text tokens/s"] = f"{train['tokens_per_second']:,.0f}"
        if train["skipped_steps"]:
            shown["skipped steps"] = f"{train['skipped_steps']:,}"
    return shown


def describe(history: History, plan: Plan | None = None) -> str:
    """The figures as one plain line."""
    shown = figures(history, plan).items()
    return "  ".join(f"{name} {text}" for name, text in shown)


def outcome(history: History, status: str = "") -> str:
    """One plain line about a run that is over, or is looked at."""
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
    """A line for each save that failed and was left to the next one."""
    events = history.select("event")
    failed = (row for row in events if row.get("event") == "save_failed")
    return [
        f"saving at step {row['step']:,} failed: {row.get('error')}" for row in failed
    ]


def perplexity_text(loss: float) -> str:
    """exp(loss) to four digits."""
    return f"{math.inf if loss > LARGEST_LOSS else math.exp(loss):,.4g}"


def scores(row: Row) -> dict[str, str]:
    """What explains a row's loss: of preferences accuracy and margin, else perplexity."""
    if "reward_margin" in row:
        margin = f"{row['reward_margin']:.3g}"
        return {"accuracy": f"{100 * row['accuracy']:.0f} %", "margin": margin}
    return {"perplexity": perplexity_text(row["loss"])}


def loss_text(row: Row) -> str:
    """A row's loss and what goes with it: "2.000 (perplexity 7.389)"."""
    told = ", ".join(f"{name} {text}" for name, text in scores(row).items())
    return f"{row['loss']:.3f} ({told})"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 3:05:00; 1 day, 2:00:00."""
    return str(datetime.timedelta(seconds=round(seconds)))
