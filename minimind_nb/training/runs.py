"""Runs on disk: `Run` opens one, `runs` lists a folder of them; summary and chart."""

import contextlib
import csv
import io
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import shorten_home
from ..monitor.metrics import History, flatten
from ..monitor.progress import (
    STATUS_WORDS,
    duration,
    failed_save,
    loss_text,
    outcome,
    position_text,
)
from ..monitor.references import expected_loss
from ..monitor.tables import Table
from ..storage import verified
from ..storage.run_folder import RunFolder

if TYPE_CHECKING:
    from ..monitor.charts import Chart


class Run:
    """A training run on disk, usable as its path: `mm.Run("out/pretrain_512")`.

    Raises FileNotFoundError for a folder that is not a run, listing the runs nearby.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        files = RunFolder(Path(path).expanduser())
        begun = files.exists()  # there may be no row yet
        self._history = History(files.metrics_file) if begun else History.load(path)
        self.folder = self._history.path.parent

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def status(self) -> str:
        """The status: "finished", "time_budget", "interrupted", "failed", …"""
        return RunFolder(self.folder).status()

    @property
    def history(self) -> History:
        """The metrics logged so far."""
        self._history.refresh()
        return self._history

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json; `config["settings"]` are TrainConfig's values."""
        return RunFolder(self.folder).read_config()

    def plot(self, **choices: Any) -> "Chart":
        """Return the chart of `plot_history`, with its choices (x, y, smoothing, …)."""
        from ..monitor.charts import plot_history

        return plot_history(self.history, **choices)

    def export_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write the training and validation rows as one table, replacing a file.

        There is a column for each name, empty if a row has no such value. Each entry of
        a list has its own: `peak_memory_gib_1` is that of the second process,
        `expert_load_0_3` the share of the fourth expert in the first layer.
        """
        kept = [row for row in self.history.rows if row["kind"] in ("train", "eval")]
        rows = [dict(flatten(row)) for row in kept]
        names = dict.fromkeys(["kind", "step", *(name for row in rows for name in row)])
        text = io.StringIO()
        writer = csv.DictWriter(text, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        verified.write_text(file, text.getvalue())
        return file

    def samples(self, most: int = 8) -> Table:
        """Return the answers to the run's fixed prompts, one row per validation.

        There are at most `most` rows at even distances, the first and last included.
        """
        name, samples = self.folder.name, self.history.select("sample")
        if not samples:
            title = f"{name} has no sampled answers; every validation makes some unless"
            return Table(f"{title} sample_tokens=0", [], [])
        prompts = dict.fromkeys(row["prompt"] for row in samples)
        answers = {(row["step"], row["prompt"]): row["answer"] for row in samples}
        steps = sorted({row["step"] for row in samples})
        gaps = max(1, min(most, len(steps)) - 1)
        shown = [steps[round(n * (len(steps) - 1) / gaps)] for n in range(gaps + 1)]
        table = Table(f"How the answers of {name} change", ["step", *prompts], [])
        for step in dict.fromkeys(shown):
            given = (answers.get((step, prompt), "") for prompt in prompts)
            table.rows.append([f"{step:,}", *given])
        return table

    def __repr__(self) -> str:
        return f"Run({shorten_home(os.fspath(self))!r}): {outcome(self.history, self.status)}"


class Runs(Table):
    """A list of runs; `runs` are those with a checkpoint to load, in the same order."""

    runs: list[Run]


def runs(out_dir: str | os.PathLike[str] = "out") -> Runs:
    """List the runs in a folder, the last changed first: `mm.runs("out")`.

    Losses are the last logged ones; the size is that of the run folder with all its
    checkpoints. Raises FileNotFoundError if there is no such folder.
    """
    root = Path(out_dir).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is not a folder; expected the out_dir of training runs, for example "
            'mm.runs("out"). mm.train(cfg) makes it.'
        )
    folders = map(RunFolder, root.glob("[!.]*"))
    found = [f for f in folders if f.plan_file.is_file() or f.metrics_file.is_file()]
    measured = sorted(((*_measure(f.root), f.root) for f in found), reverse=True)
    columns = "name stage status step loss".split()
    columns += ["validation loss", "size", "last change"]
    none = "" if found else ": none yet; mm.train(cfg) makes one"
    table = Runs(f"Runs in {root}{none}", columns, [])
    table.runs = []
    for changed, size, folder in measured:
        run = Run(folder)
        history = run.history
        stage = history.stage if history.rows else ""
        last = (history.last(kind) for kind in ("train", "eval"))
        losses = [f"{row['loss']:.3f}" if row else "" for row in last]
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(changed))
        row = [folder.name, stage, STATUS_WORDS[run.status], position_text(history)]
        table.rows.append([*row, *losses, f"{size / 2**20:,.1f} MiB", when])
        if RunFolder(folder).checkpoint_folders():
            table.runs.append(run)
    return table


def _measure(folder: Path) -> tuple[float, int]:
    """Return when the last file in a folder was written, and the bytes of all."""
    states = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # a running training removes files
            states += [path.lstat()] if path.is_file() else []
    changed = max((state.st_mtime for state in states), default=0.0)
    return changed, sum(state.st_size for state in states)


def save_chart(run: Run) -> None:
    """Write the run's chart as loss.png."""
    verified.write_bytes(run.folder / "loss.png", run.plot().png())


def write_summary(run: Run, status: str, weights_file: Path) -> None:
    """Write summary.md; `weights_file` is the run's `.pth` beside the folder."""
    folder, config = run.folder, run.config
    path = shorten_home(str(folder))
    settings = {name: f"`{config['settings'][name]}`" for name in config["explicit"]}
    facts = result_facts(run.history)
    tokens = (run.history.last("train") or {"tokens": 0})["tokens"]
    if expected := expected_loss(config["settings"], tokens):
        facts["validation loss of a reference run"] = expected
    if weights_file.is_file():
        facts["weights"] = f"`../{weights_file.name}`"
        shape = config["settings"]
        width = (math.pi if shape["qk_norm"] else 8 / 3) * shape["hidden_size"]
        inner, theirs = shape["intermediate_size"], 64 * math.ceil(width / 64)
        if inner != theirs:
            words = f"set intermediate_size={inner:,}; theirs is {theirs:,}"
            facts["for MiniMind's scripts"] = words
    following = "`mm.train(cfg)` resumes from the newest good checkpoint."
    if status == "finished":
        following = "To train longer, raise `epochs` or `max_steps` and train again."
    text = f"""# {folder.name}

{STATUS_WORDS[status].capitalize()}, {time.strftime("%Y-%m-%d %H:%M")}.
{following}

## Result

{_markdown(facts)}

![loss](loss.png)

## Settings

{_markdown(settings)}

All other settings have their defaults; `config.json` lists them.

```python
import minimind_nb as mm

model, tokenizer = mm.load("{path}")
mm.Run("{path}").plot()
```
"""
    verified.write_text(folder / "summary.md", text)


def result_facts(history: History) -> dict[str, str]:
    """Return the known figures of a run in words, in reading order."""
    facts = {"optimizer steps": position_text(history)}
    if train := history.last("train"):
        seconds, tokens = train["seconds"], train["tokens"]
        memory = ", ".join(f"{gib:.2f}" for gib in train["peak_memory_gib"])
        facts |= {
            "training loss, last logged": loss_text(train),
            "text tokens": f"{tokens:,}",
            "training time": duration(seconds),
            "text tokens per second": f"{tokens / seconds:,.0f}",
            "peak memory (GiB, each process)": memory,
            "skipped steps": f"{train['skipped_steps']:,}",
        }
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
    return facts


def _markdown(facts: Mapping[str, str]) -> str:
    """Return a table; in Markdown a bar ends a cell, and a new line the row."""
    cells = {n: " ".join(t.split()).replace("|", "\\|") for n, t in facts.items()}
    rows = [f"| {name} | {cell} |" for name, cell in cells.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows])
