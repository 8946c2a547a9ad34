"""What stays of a run: its summary and chart; `Run` opens one later, `runs` lists all."""

import html
import itertools
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import shorten_home
from ..storage import verified
from ..storage.run_folder import RunFolder
from .metrics import History, Row, find_metrics
from .progress import (
    STATUS_WORDS,
    duration,
    failed_saves,
    loss_text,
    outcome,
    position,
)
from .tables import Table, shorten

if TYPE_CHECKING:
    from .charts import Chart

COLUMNS = [
    *("name", "stage", "status", "step", "loss", "validation loss"),
    *("size", "last change"),
]
EVALUATED = {
    "bits_per_byte": "bits per byte (validation)",
    "kl": "KL divergence, estimated (nats per answer token)",
}
PROMPT_WIDTH = 40  # columns of a prompt that heads a column


class Run:
    """A training run on disk: `mm.Run("out/pretrain_512")`; `mm.train` returns one.

    Goes wherever a path goes. Raises FileNotFoundError where the folder is no run.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        root = Path(path).expanduser()
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
        from .charts import plot_history

        return plot_history(self.history, **choices)

    def export_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write the metrics as a table, as `History.to_csv` says."""
        return self.history.to_csv(path)

    def samples(self, most: int = 8) -> Table:
        """How the answers to the run's fixed prompts changed, validation by validation.

        `most` steps at even distances, the first and the last among them.
        """
        return sample_table(self.history, most)

    def __repr__(self) -> str:
        return f"Run({os.fspath(self)!r}): {outcome(self.history, self.status)}"


class Runs(Table):
    """A listing of runs; `runs` are those with a checkpoint to load, in its order."""

    def __init__(self, title: str, rows: list[list[str]], runs: list[Run]) -> None:
        super().__init__(title, COLUMNS, rows)
        self.runs = runs


def runs(out_dir: str | os.PathLike[str] = "out") -> Runs:
    """The runs in a folder, the last changed first: `mm.runs("out")`.

    Losses are the last logged ones; the size is that of the run folder, with all
    checkpoints. What cannot be read is listed with the reason. Raises
    FileNotFoundError where there is no such folder.
    """
    root = Path(out_dir).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is no folder; expected the out_dir of training runs, for example "
            'mm.runs("out"). mm.train(cfg) makes it.'
        )
    found = []
    for folder in filter(Path.is_dir, root.glob("[!.]*")):
        try:
            cells = _list_run(folder)
        except Exception as error:  # a listing shows every run, whatever ails one
            reason = f"{error}".replace(f"{folder}{os.sep}", "")
            cells = ["", f"cannot be read: {reason}", "", "", ""]
        if cells:
            size, changed = _measure(folder)
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(changed))
            row = [folder.name, *cells, f"{size:,.1f} MiB", when]
            found.append((changed, folder, row))
    found.sort(reverse=True)
    trained = [f for _, f, _ in found if RunFolder(f).checkpoint_folders()]
    none = "" if found else ": none yet; mm.train(cfg) makes one"
    title, rows = f"Runs in {root}{none}", [row for _, _, row in found]
    return Runs(title, rows, [Run(folder) for folder in trained])


def _list_run(folder: Path) -> list[str]:
    """Stage, status, step and losses, or nothing of a folder that is no run."""
    files = RunFolder(folder)
    config = files.read_config() if files.exists() else {}
    if "settings" not in config and not files.metrics_file.exists():
        return []
    run = Run(folder)
    step, total = position(run.history)
    losses = [(run.history.last(kind) or {}).get("loss") for kind in ("train", "eval")]
    return [
        str(config.get("settings", {}).get("stage", run.history.stage)),
        STATUS_WORDS[run.status],
        f"{step:,} of {total:,}" if total else f"{step:,}",
        *("" if loss is None else f"{loss:.3f}" for loss in losses),
    ]


def _measure(folder: Path) -> tuple[float, float]:
    """MiB of all files below a folder, and when the last of them was written."""
    size, changed = 0, 0.0
    for path in folder.rglob("*"):
        try:
            state = path.lstat()
        except OSError:  # a running training removes files
            continue
        if not path.is_dir():
            size, changed = size + state.st_size, max(changed, state.st_mtime)
    return size / 2**20, changed


def sample_table(history: History, most: int = 8) -> Table:
    """A row for each of at most `most` steps, a column for each prompt."""
    name = history.path.parent.name
    answers: dict[int, dict[tuple[int, str], str]] = {}
    for row in history.select("sample"):
        answers.setdefault(row["step"], {})[row["number"], row["prompt"]] = row[
            "answer"
        ]
    prompts = dict.fromkeys(itertools.chain(*answers.values()))
    if not answers:
        how = "every validation makes some unless sample_tokens=0"
        return Table(f"{name} has no sampled answers; {how}", [], [])
    steps = sorted(answers)
    gaps = max(1, min(most, len(steps)) - 1)
    shown = dict.fromkeys(round(n * (len(steps) - 1) / gaps) for n in range(gaps + 1))
    return Table(
        f"How the answers of {name} change",
        ["step", *(shorten(prompt, PROMPT_WIDTH) for _, prompt in prompts)],
        [
            [
                f"{steps[n]:,}",
                *(answers[steps[n]].get(prompt, "") for prompt in prompts),
            ]
            for n in shown
        ],
    )


def save_chart(run: Run) -> None:
    """Write the run's chart as loss.png, at once."""
    verified.write_bytes(run.folder / "loss.png", run.plot().png())


def write_summary(run: Run, status: str, weights_file: Path) -> None:
    """Write summary.md, at once; `weights_file` is the run's `.pth` beside the folder."""
    folder, config = run.folder, run.config
    place = shorten_home(str(folder))
    told = {name: f"`{config['settings'][name]}`" for name in config["explicit"]}
    files = [path.name for path in sorted(folder.iterdir())]
    files += [f"../{weights_file.name}"] if weights_file.is_file() else []
    chart = "![loss](loss.png)\n\n" if (folder / "loss.png").is_file() else ""
    goes_on = "`mm.train(cfg)` goes on from the newest good checkpoint."
    if status == "finished":
        limit = config["settings"].get("max_steps") or math.inf
        further = "max_steps" if limit <= position(run.history)[0] else "epochs"
        goes_on = f"To train longer, raise `{further}` and call `mm.train(cfg)` again."
    text = f"""# {folder.name}

{STATUS_WORDS[status].capitalize()}, {time.strftime("%Y-%m-%d %H:%M")}.
{goes_on}

## Result

{_markdown(result_facts(run.history).items())}

{chart}{_answers(run.history)}## Settings

{_markdown(told.items())}

Everything else has its default, which `config.json` tells.

## Files

{", ".join(f"`{name}`" for name in files)}

```python
import minimind_nb as mm

model, tokenizer = mm.load("{place}")
mm.Run("{place}").plot()
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
            "training loss, last logged": loss_text(train),
            "text tokens": f"{tokens:,}",
            "training time": duration(seconds),
            "text tokens per second": f"{tokens / seconds:,.0f}",
            "peak memory (GiB, each process)": memory,
            "skipped steps": f"{train['skipped_steps']:,}",
        } | _routing(train)
    if validation := history.last("eval"):
        lowest = min(history.select("eval"), key=lambda row: row["loss"])
        facts |= {
            "validation loss": loss_text(validation),
            "lowest validation loss": f"{lowest['loss']:.3f} at step {lowest['step']:,}",
        }
        for name, words in EVALUATED.items():
            if name in validation:
                facts[words] = f"{validation[name]:.3f}"
    begin = next(iter(history.session), {})
    if begin.get("cut") or begin.get("dropped"):
        documents = "pairs" if history.stage == "dpo" else "conversations"
        lost = f"{begin['cut']:,} cut at a turn, {begin['dropped']:,} dropped"
        facts[f"over-long {documents}"] = lost
    events = history.select("event")
    if resumes := [f"{e['step']:,}" for e in events if e["event"] == "resume"]:
        facts["resumed at step"] = ", ".join(resumes)
    if failed := failed_saves(history):
        facts["last of the saves that failed"] = failed[-1]
    if history.damaged_lines:
        facts["damaged lines in metrics.jsonl"] = f"{history.damaged_lines:,}"
    return facts


def _routing(train: Row) -> dict[str, str]:
    """How evenly a mixture's experts are used, and the loss that evens them out."""
    if not (layers := train.get("expert_load")):
        return {}
    shares = [100 * share for layer in layers for share in layer]
    even = f"even would be {100 / len(layers[0]):.1f} %"
    return {
        "load of an expert": f"{min(shares):.1f} % to {max(shares):.1f} %, {even}",
        "auxiliary loss": f"{train['aux_loss']:.4f}",
    }


def _answers(history: History) -> str:
    """The first and the last sampled answer to each prompt, as Markdown."""
    table = sample_table(history, most=2)
    if not table.rows:
        return ""
    (_, *steps), *lines = zip(table.columns, *table.rows, strict=True)
    columns = ["prompt", *(f"step {step}" for step in steps)]
    safe = ([html.escape(text, quote=False) for text in line] for line in lines)
    return f"## Answers\n\n{_markdown(safe, columns)}\n\n"


def _markdown(rows: Iterable[Iterable[str]], columns: Sequence[str] = ("", "")) -> str:
    """A table; a bar would end its cell, and a new line the row."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[" ".join(t.split()).replace("|", "\\|") for t in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
