"""The progress of a run in numbers and in words; standard library only."""

import contextlib
import datetime
import math

from ..config import ResolvedConfig, flops_per_token, shorten_home
from ..launch.outcome import RankRecord
from ..storage.run_folder import RunFolder, step_of
from .metrics import History, Row, perplexity
from .references import expected_loss
from .tables import Facts, Table

RECENT_ROWS = 12  # logged rows whose speed gives the time left
_LINE = ("step", "loss", "validation loss", "time left", "text tokens/s", "not saved")
AGAIN = "train again with the same settings"

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


def position_text(history: History, done: int | None = None) -> str:
    """Return the steps `done` (by default all that are logged) and in all: "3 of 100"."""
    step, total = position(history)
    step = step if done is None else done
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
    """Return the newest figures of a run by name, in reading order."""
    shown = {"step": position_text(history)}
    if train := history.last("train"):
        shown["loss"] = loss_text(train)
    if validation := history.last("eval"):
        shown["validation loss"] = loss_text(validation)
        finite = [r for r in history.select("eval") if math.isfinite(r["loss"])]
        best = min(finite, key=lambda row: row["loss"], default=validation)
        if best is not validation:
            lowest = f"{best['loss']:.3f} at step {best['step']:,}"
            shown["lowest validation loss"] = lowest
        names = {"bits_per_byte": "bits per byte", "kl": "KL (nats per answer token)"}
        for name in filter(validation.get, names):
            shown[names[name]] = f"{validation[name]:.3f}"
    if left := seconds_left(history):
        shown["time left"] = duration(left)
    if train and "tokens_per_second" in train:
        shown |= _machine_figures(history, train)
    return shown | _events(history)


def _machine_figures(history: History, train: Row) -> dict[str, str]:
    """Return the figures of a row on speed and on the use of the machine."""
    tokens = f"{train['tokens']:,} in {duration(train['seconds'])}"
    shown = {
        "text tokens": tokens,
        "text tokens/s": f"{train['tokens_per_second']:,.0f}",
    }
    if rate := history.session[0].get("machine_flops"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            token = flops_per_token(RunFolder(history.path.parent).settings())
            share = train["tokens_per_second"] * token / rate
            shown["of the machine's rate"] = f"{share:.0%}"
    if "fill" in train:
        shown["fill of the rows"] = f"{train['fill']:.0%}"
    memory = ", ".join(f"{gib:.2f}" for gib in train["peak_memory_gib"])
    skipped = f"{train['skipped_steps']:,}"
    return shown | {"GiB of memory, each process": memory, "skipped steps": skipped}


def _events(history: History) -> dict[str, str]:
    """Return the newest resume, and what went wrong."""
    events = {row["event"]: row for row in history.select("event")}
    shown = {}
    if "resume" in events:
        shown["resumed at step"] = f"{events['resume']['step']:,}"
    failed, saved = (events.get(name, {}) for name in ("save_failed", "save"))
    if failed.get("step", 0) > saved.get("step", 0):
        shown["not saved"] = f"at step {failed['step']:,}: {failed['error']}"
    if "compile_failed" in events:
        shown["not compiled"] = f"{events['compile_failed']['error']:.80}"
    return shown


def outcome(history: History) -> str:
    """Return the most important figures of a run as one plain line."""
    shown = figures(history)
    return " · ".join(f"{name} {shown[name]}" for name in _LINE if name in shown)


def activity(history: History) -> str:
    """Return what a running training does other than steps, else ""."""
    record = RankRecord.read(RunFolder(history.path.parent).record_file(0))
    if record is None or (record.status, record.phase) != ("running", "training"):
        return "starting the processes"
    return record.doing


def samples(history: History) -> Table:
    """Return the answers to the fixed prompts, a row for each validation."""
    found: dict[int, dict[str, str]] = {}
    for row in history.select("sample"):
        found.setdefault(row["step"], {})[row["prompt"]] = row["answer"]
    prompts = dict.fromkeys(prompt for given in found.values() for prompt in given)
    rows = [
        [f"{step:,}", *(given.get(prompt, "") for prompt in prompts)]
        for step, given in found.items()
    ]
    none = "" if rows else ": none, since validations make them unless sample_tokens=0"
    return Table(f"Answers{none}", ["step", *prompts], rows)


def what_next(history: History, status: str, again: str = AGAIN) -> str:
    """Return what is saved of a run, and what to do next; `again` says how to resume."""
    if status == "finished":
        use = "generate" if history.stage == "pretrain" else "chat"
        return f'Try it with run.{use}("…"); raise epochs or max_steps to train longer, or start over with resume=False.'
    if status == "running":
        return "run.plot() draws what is logged so far."
    saved = RunFolder(history.path.parent).checkpoint_folders()
    if not saved:
        return f"Nothing is saved yet; {again} to start."
    at = position_text(history, step_of(saved[0]))
    return f"Saved at step {at}; {again} to resume."


def result(history: History, status: str, again: str = AGAIN) -> Facts:
    """Return the figures of a run, and a note of how it ended and what is next."""
    words = STATUS_WORDS[status]
    note = f"{words[0].upper()}{words[1:]}. {what_next(history, status, again)}"
    facts = figures(history)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        facts |= _configured_facts(history)
    return Facts(history.path.parent.name, facts, note)


def _configured_facts(history: History) -> dict[str, str]:
    """Return what the settings of the run tell, too: a reference, and its weights."""
    folder = RunFolder(history.path.parent)
    shape, facts = folder.settings(), {}
    tokens = (history.last("train") or {"tokens": 0})["tokens"]
    if expected := expected_loss(shape, tokens):
        facts["validation loss of a reference run"] = expected
    weights = folder.root.with_name(ResolvedConfig(**shape).weights_name)
    if weights.is_file():
        facts["weights"] = shorten_home(str(weights))
        width = (math.pi if shape["qk_norm"] else 8 / 3) * shape["hidden_size"]
        inner, theirs = shape["intermediate_size"], 64 * math.ceil(width / 64)
        if inner != theirs:
            words = f"set intermediate_size={inner:,}; theirs is {theirs:,}"
            facts["for MiniMind's scripts"] = words
    return facts


def loss_text(row: Row) -> str:
    """Return a row's loss with what it means: "2.000 (perplexity 7.389)"."""
    loss = row["loss"]
    if "reward_margin" in row:
        accuracy, margin = 100 * row["accuracy"], row["reward_margin"]
        return f"{loss:.3f} (accuracy {accuracy:.0f} %, margin {margin:.3g})"
    return f"{loss:.3f} (perplexity {perplexity(loss):,.4g})"


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds: 3:05:00; 1 day, 2:00:00."""
    return str(datetime.timedelta(seconds=round(seconds)))
