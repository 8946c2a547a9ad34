"""What stays of a run: its summary and its chart; and `Run`, which opens one later."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage import verified
from ..storage.runs import RunFolder
from .metrics import History, find_metrics
from .progress import (
    HOUR,
    STATUS_WORDS,
    count,
    describe_end,
    duration,
    loss_text,
    measure,
    perplexity_text,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHART_NAME, SUMMARY_NAME = "loss.png", "summary.md"
TOLD_SETTINGS = (
    "stage", "preset", "data_path", "hidden_size", "num_hidden_layers", "use_moe",
    "max_seq_len", "epochs", "batch_size", "accumulation_steps", "learning_rate",
    "dtype", "seed",
)  # fmt: skip
KIB = 1024


class Run:
    """A training run on disk: `mm.Run("out/pretrain_512")`; `mm.train` returns one.

    Goes wherever a path goes. Raises FileNotFoundError where the folder is no run,
    saying what is there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        root = Path(path)
        if not RunFolder(root).exists():
            root = find_metrics(root).parent
        self._files = RunFolder(root)
        self._history = History(self._files.metrics_file)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._files.root

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def status(self) -> str:
        """ "finished", "time_budget", "interrupted", "terminated", "failed", …"""
        return self._files.status()

    @property
    def history(self) -> History:
        """The metrics, read up to now."""
        self._history.refresh()
        return self._history

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds; `config["settings"]` are TrainConfig's values."""
        return self._files.read_config()

    def plot(self, **choices: Any) -> "Figure":
        """The chart of `plot_history`, which names the choices (x, y, smoothing, …)."""
        from .plots import plot_history

        return plot_history(self.history, **choices)

    def __repr__(self) -> str:
        words = describe_end(measure(self.history), self.status)
        return f"Run({os.fspath(self)!r}): {words}"


def save_chart(folder: str | os.PathLike[str], history: History) -> Path:
    """Write the run's chart as loss.png, at once; returns the file."""
    from .plots import figure_png, plot_history

    path = Path(folder) / CHART_NAME
    verified.write_bytes(path, figure_png(plot_history(history)))
    return path


def write_summary(
    folder: str | os.PathLike[str],
    history: History,
    config: Mapping[str, Any],
    status: str,
) -> Path:
    """Write summary.md, at once; returns the file.

    It says what was trained, what came of it, which files there are and how to go
    on. `config` is what config.json holds, or the settings alone.
    """
    folder = Path(folder)
    settings = config.get("settings", config)
    parts = [
        f"# {folder.name}",
        f"{STATUS_WORDS.get(status, status).capitalize()}, "
        f"{time.strftime('%Y-%m-%d %H:%M')}.",
        "## Result",
        _table(result_facts(history)),
        "![loss](loss.png)" if (folder / CHART_NAME).is_file() else "",
        "## Settings",
        _table({name: _setting(settings, name) for name in TOLD_SETTINGS}),
        "Everything else is in `config.json`.",
        "## Files",
        _table(_files(folder)),
        "## How to go on",
        _how_to_go_on(folder, status),
    ]
    path = folder / SUMMARY_NAME
    verified.write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def result_facts(history: History) -> dict[str, str]:
    """The figures of a run in words, in reading order; "" for what is not known."""
    progress = measure(history)
    train, validation = history.last("train") or {}, history.last("eval") or {}
    seconds, tokens = progress.trained_seconds, progress.tokens or 0
    memory = train.get("peak_memory_gib") or []
    bits = validation.get("bits_per_byte")
    resumes = [row for row in history.select("event") if row.get("event") == "resume"]
    total = f" of {progress.total_steps:,}" if progress.total_steps else ""
    return {
        "optimizer steps": f"{progress.step:,}{total}",
        "training loss, last logged": _loss(progress.loss),
        "validation loss": _loss(progress.validation_loss),
        "lowest validation loss": _loss(progress.lowest_validation_loss),
        "bits per byte (validation)": f"{bits:.3f}" if bits else "",
        "text tokens": f"{tokens:,.0f} ({count(tokens)})" if tokens else "",
        "training time": f"{duration(seconds)} ({seconds / HOUR:.2f} hours)",
        "text tokens per second": f"{tokens / seconds:,.0f}" if seconds else "",
        "peak memory (GiB, each process)": ", ".join(
            f"{gib:.2f}" for gib in memory if gib is not None
        ),
        "skipped steps": str(progress.skipped_steps or ""),
        "resumed at step": ", ".join(f"{row.get('step', 0):,}" for row in resumes),
        "damaged lines in metrics.jsonl": str(history.damaged_lines or ""),
    }


def _loss(loss: float | None) -> str:
    if loss is None:
        return ""
    return f"{loss_text(loss)} (perplexity {perplexity_text(loss)})"


def _setting(settings: Mapping[str, Any], name: str) -> str:
    value = settings.get(name)
    return "" if value is None else f"`{value}`"


def _table(facts: Mapping[str, str]) -> str:
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _files(folder: Path) -> dict[str, str]:
    """The run's own files and folders, and the weights beside it, with their sizes."""
    entries = [path for path in sorted(folder.iterdir()) if path.name[0] != "."]
    weights = sorted(folder.parent.glob("*.pth"))
    files = {f"`{path.name}{'/' * path.is_dir()}`": _size(path) for path in entries}
    return files | {f"`../{path.name}`": _size(path) for path in weights}


def _size(path: Path) -> str:
    inside = path.rglob("*") if path.is_dir() else [path]
    size = sum(part.stat().st_size for part in inside if part.is_file())
    return f"{size / KIB**2:,.1f} MiB" if size >= KIB**2 else f"{size / KIB:,.1f} KiB"


def _how_to_go_on(folder: Path, status: str) -> str:
    load = f'model, tokenizer = mm.load("{folder}")\nmm.Run("{folder}").plot()'
    if status == "finished":
        hint = "Load the weights; or raise `epochs` and call `mm.train` again."
    else:
        hint = (
            "`mm.train(cfg)` with the same configuration goes on from the newest "
            "checkpoint that is whole."
        )
    return f"{hint}\n\n```python\nimport minimind_nb as mm\n\n{load}\n```"
