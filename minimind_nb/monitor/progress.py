"""The progress of a run in numbers and in words; standard library only."""

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
    "killed": "killed",
    "new": "not started",
}


def position(history: History) -> tuple[int, int | None]:
    """Return the steps done and in all, None until a row has the total."""
    if not history.rows:
        return 0, None
    return history.rows[-1]["step"], history.session[0].get("total_steps")


def position_text(history: History) -> str:
    """Return the steps done and in all: "3 of 100"."""
    step, total = position(history)
    return f"{step:,} of {total:,}" if total else f"{step:,}"


def seconds_left(history: History) -> float | None:
    """Return the training time left at this session's speed, None until it is known."""
    _, total = position(history)
    rows = [row for row in history.session if row["kind"] == "train"]
    rows = [*history.session[:1], *rows][-RECENT_ROWS:]
    if not total or not rows or rows[-1]["step"] <= rows[0]["step"]:
        return None
    seconds, steps = (rows[-1][name] - rows[0][name] for name in ("seconds", "step"))
    return (total - rows[-1]["step"]) * seconds / steps


def figures(history: History) -> dict[str, str]:
    """Return the figures of a running training, by name."""
    step, total = position(history)
    share = f"/{total:,} ({step / total:.0%})" if total else ""
    shown = {"step": f"{step:,}{share}"}
    if (left := seconds_left(history)) is not None:
        shown["time left"] = duration(left)
    if train := history.last("train"):
        shown["loss"] = loss_text(train)
    if validation := history.last("eval"):
        shown["validation"] = loss_text(validation)
    if train:
        shown["text tokens/s"] = f"{train['tokens_per_second']:,.0f}"
        if train["skipped_steps"]:
            shown["skipped steps"] = f"{train['skipped_steps']:,}"
    if failed := failed_save(history):
        shown["not saved"] = failed
    for row in history.select("event"):
        if row["event"] == "compile_failed":
            shown["not compiled"] = f"{row['error']:.80}"
    return shown


def progress_line(history: History) -> str:
    """Return the figures as one plain line."""
    return "  ".join(f"{name} {text}" for name, text in figures(history).items())


def outcome(history: History, status: str = "") -> str:
    """Return one plain line about a run that has ended."""
    train, validation = history.last("train"), history.last("eval")
    parts = [
        STATUS_WORDS.get(status),
        f"step {position_text(history)}",
        train and f"loss {train['loss']:.3f}",
        validation and f"validation {loss_text(validation)}",
        train and f"{train['tokens']:,} text tokens",
        train and duration(train["seconds"]),
    ]
    if status == "killed":
        saves = [row for row in history.rows if row.get("event") == "save"]
        parts.append(
            f"last save at step {saves[-1]['step']:,}" if saves else "not saved"
        )
    return " · ".join(filter(None, parts))


def failed_save(history: History) -> str:
    """Return the step and the error of the newest save if it failed, else ""."""
    for row in reversed(history.rows):
        if row.get("event") in ("save", "save_failed"):
            return f"at step {row['step']:,}: {row['error']}" if "error" in row else ""
    return ""


def loss_text(row: Row) -> str:
    """Return a row's loss with what it means: "2.000 (perplexity 7.389)"."""
    loss = row["loss"]
    if "reward_margin" in row:
        accuracy, margin = 100 * row["accuracy"], row["reward_margin"]
        return f"{loss:.3f} (accuracy {accuracy:.0f} %, margin {margin:.3g})"
    perplexity = math.inf if loss > LARGEST_LOSS else math.exp(loss)
    return f"{loss:.3f} (perplexity {perplexity:,.4g})"


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds: 3:05:00; 1 day, 2:00:00."""
    return str(datetime.timedelta(seconds=round(seconds)))
