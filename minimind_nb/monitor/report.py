"""What stays of a run: its summary and its chart; and `Run`, which opens one later."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage import verified
from ..storage.runs import RunFolder
from .metrics import History, find_metrics
from .progress import STATUS_WORDS, duration, loss_text, outcome, position

if TYPE_CHECKING:
    from .plots import Chart


class Run:
    """A training run on disk: `mm.Run("out/pretrain_512")`; `mm.train` returns one.

    Goes wherever a path goes. Raises FileNotFoundError where the folder is no run.
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

    def plot(self, **choices: Any) -> "Chart":
        """The chart of `plot_history`, which names the choices (x, y, smoothing, …)."""
        from .plots import plot_history

        return plot_history(self.history, **choices)

    def __repr__(self) -> str:
        return f"Run({os.fspath(self)!r}): {outcome(self.history, self.status)}"


def save_chart(run: Run) -> None:
    """Write the run's chart as loss.png, at once."""
    verified.write_bytes(run.folder / "loss.png", run.plot().png())


def write_summary(run: Run, status: str, weights_file: Path) -> None:
    """Write summary.md, at once; `weights_file` is the run's `.pth` beside the folder."""
    folder, config = run.folder, run.config
    told = {name: f"`{config['settings'][name]}`" for name in config["explicit"]}
    files = [path.name for path in sorted(folder.iterdir())]
    files += [f"../{weights_file.name}"] if weights_file.is_file() else []
    chart = "![loss](loss.png)\n\n" if (folder / "loss.png").is_file() else ""
    goes_on = "`mm.train(cfg)` goes on from the newest good checkpoint."
    if status == "finished":
        goes_on = "To train longer, raise `epochs` and call `mm.train(cfg)` again."
    text = f"""# {folder.name}

{STATUS_WORDS[status].capitalize()}, {time.strftime("%Y-%m-%d %H:%M")}.
{goes_on}

## Result

{_table(result_facts(run.history))}

{chart}## Settings

{_table(told)}

Everything else has its default, which `config.json` tells.

## Files

{", ".join(f"`{name}`" for name in files)}

```python
import minimind_nb as mm

model, tokenizer = mm.load("{folder}")
mm.Run("{folder}").plot()
```
"""
    verified.write_text(folder / "summary.md", text)


def result_facts(history: History) -> dict[str, str]:
    """The figures of a run in words, in reading order; what is not known is left out."""
    step, total = position(history)
    facts = {"optimizer steps": f"{step:,} of {total:,}" if total else f"{step:,}"}
    if train := history.last("train"):
        seconds, tokens = train["seconds"], train["tokens"]
        memory = ", ".join(f"{gib:.2f}" for gib in train["peak_memory_gib"])
        facts |= {
            "training loss, last logged": loss_text(train["loss"]),
            "text tokens": f"{tokens:,}",
            "training time": f"{duration(seconds)} ({seconds / 3600:.2f} hours)",
            "text tokens per second": f"{tokens / seconds:,.0f}",
            "peak memory (GiB, each process)": memory,
            "skipped steps": f"{train['skipped_steps']:,}",
        }
    if validation := history.last("eval"):
        lowest = min(history.select("eval"), key=lambda row: row["loss"])
        facts |= {
            "validation loss": loss_text(validation["loss"]),
            "lowest validation loss": f"{lowest['loss']:.3f} at step {lowest['step']:,}",
            "bits per byte (validation)": f"{validation['bits_per_byte']:.3f}",
        }
    events = history.select("event")
    if resumes := [f"{e['step']:,}" for e in events if e["event"] == "resume"]:
        facts["resumed at step"] = ", ".join(resumes)
    if history.damaged_lines:
        facts["damaged lines in metrics.jsonl"] = f"{history.damaged_lines:,}"
    return facts


def _table(facts: Mapping[str, str]) -> str:
    rows = [f"| {name} | {text} |" for name, text in facts.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows])
