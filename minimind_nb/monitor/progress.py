"""The progress of a run in numbers and in words; standard library only."""

import contextlib
import datetime
import math

from ..config import ResolvedConfig, flops_per_token, shorten_home
from ..launch.outcome import RankRecord
from ..storage.run_folder import RunFolder, step_of
from .metrics import History, Row
from .tables import Facts

RECENT_ROWS = 12  # logged rows whose speed gives the time left
LARGEST_LOSS = 700  # exp of more does not fit a float
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


def machine_figures(history: History) -> dict[str, str]:
    """Return how much of the machine and of its rows the newest steps used, by name."""
    if not (train := history.last("train")):
        return {}
    memory = ", ".join(f"{gib:.2f}" for gib in train["peak_memory_gib"])
    shown = {"peak memory (GiB, each process)": memory}
    if "fill" in train:
        shown["fill of the rows"] = f"{train['fill']:.0%}"
    if rate := history.session[0].get("machine_flops"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            token = flops_per_token(RunFolder(history.path.parent).settings())
            share = train["tokens_per_second"] * token / rate
            shown["of the machine's rate"] = f"{share:.0%}"
    return shown


def progress_line(history: History) -> str:
    """Return the figures as one plain line."""
    return "  ".join(f"{name} {text}" for name, text in figures(history).items())


def activity(history: History) -> str:
    """Return what a running training does besides making steps, else ""."""
    folder = RunFolder(history.path.parent)
    record = RankRecord.read(folder.record_file(0))
    if record is None or (record.status, record.phase) != ("running", "training"):
        return "starting the processes"
    step, last = record.step, record.step == record.total_steps
    here = (row for row in history.rows[-99:] if row["step"] == step)
    seen, cfg = {row.get("event", row["kind"]) for row in here}, folder.settings()
    if "eval" not in seen and (last or step % cfg["eval_interval"] == 0):
        return "validating" if cfg["val_path"] or cfg["val_fraction"] else ""
    if step and not seen & {"save", "save_failed"}:
        return "saving" if last or step % cfg["save_interval"] == 0 else ""
    return ""


def samples_by_step(history: History) -> dict[int, dict[str, str]]:
    """Return the answer to each prompt at each step that has any, oldest first."""
    found: dict[int, dict[str, str]] = {}
    for row in history.select("sample"):
        found.setdefault(row["step"], {})[row["prompt"]] = row["answer"]
    return found


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
    return " · ".join(filter(None, parts))


def what_next(history: History, status: str, again: str = AGAIN) -> str:
    """Return what is saved of a run, and how it goes on; `again` says how to resume."""
    if status == "finished":
        use = "generate" if history.stage == "pretrain" else "chat"
        return f'Try it with run.{use}("…"); raise epochs or max_steps to train longer.'
    if status == "running":
        return "run.plot() draws what is logged so far."
    saved = RunFolder(history.path.parent).checkpoint_folders()
    if not saved:
        return f"Nothing is saved yet; {again} to start."
    at = position_text(history, step_of(saved[0]))
    return f"Saved at step {at}; {again} to resume."


def result(history: History, status: str, again: str = AGAIN) -> Facts:
    """Return the known figures of a run in words, in reading order, and what is next."""
    words = STATUS_WORDS[status]
    note = f"{words[0].upper()}{words[1:]}. {what_next(history, status, again)}"
    facts = {"optimizer steps": position_text(history)}
    if train := history.last("train"):
        seconds, tokens = train["seconds"], train["tokens"]
        facts |= {
            "training loss, last logged": loss_text(train),
            "text tokens": f"{tokens:,}",
            "training time": duration(seconds),
            "text tokens per second": f"{tokens / seconds:,.0f}",
            "skipped steps": f"{train['skipped_steps']:,}",
        }
    facts |= machine_figures(history)
    if last := history.last("eval"):
        best = min(history.select("eval"), key=lambda row: row["loss"])
        facts["validation loss"] = loss_text(last)
        facts["lowest validation loss"] = f"{best['loss']:.3f} at step {best['step']:,}"
        if "bits_per_byte" in last:
            facts["bits per byte (validation)"] = f"{last['bits_per_byte']:.3f}"
        if "kl" in last:
            name = "KL divergence, estimated (nats per answer token)"
            facts[name] = f"{last['kl']:.3f}"
    resumes = [row for row in history.select("event") if row["event"] == "resume"]
    if resumes:
        facts["resumed at step"] = ", ".join(f"{row['step']:,}" for row in resumes)
    if failed := failed_save(history):
        facts["save that failed"] = failed
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        facts |= _configured_facts(history)
    return Facts(history.path.parent.name, facts, note)


def _configured_facts(history: History) -> dict[str, str]:
    """Return what the settings of the run tell, too: a reference, and its weights."""
    from .references import expected_loss  # loads numpy

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
