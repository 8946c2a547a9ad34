"""Runs on disk: `Run` opens one, `runs` lists a folder of them; summary and chart."""

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import shorten_home
from ..monitor.metrics import History
from ..monitor.progress import STATUS_WORDS, position_text, result, samples
from ..monitor.tables import Facts, Table
from ..session import running_kernel
from ..storage import verified
from ..storage.run_folder import RunFolder

if TYPE_CHECKING:
    from ..monitor.charts import Chart
    from ..monitor.chat import Chat


class Run:
    """A training run on disk, usable as its path: `mm.Run("out/pretrain_512")`.

    Raises FileNotFoundError for a folder that is not a run, listing the runs nearby.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        files = RunFolder(Path(path).expanduser())
        begun = files.exists()  # there may be no row yet
        self._history = History(files.metrics_file) if begun else History.load(path)
        self.folder = self._history.path.parent
        self.shown_in: int | None = None

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
        """Return the chart of `inspect`, with its choices (x, y, smoothing, …)."""
        from ..monitor.charts import inspect

        return inspect(self.history, **choices)

    def summary(self) -> Facts:
        """Return the figures of the run, as in its summary.md, and what to do next."""
        return result(self.history, self.status)

    def chat(self, text: str | None = None, **settings: Any) -> "Chat":
        """Chat with the model of the run: `mm.chat(run, text, …)`."""
        from ..monitor.chat import chat

        return chat(self, text, **settings)

    def generate(self, prompts: Any, **settings: Any) -> Any:
        """Continue one prompt or a list of them: `mm.generate(*mm.load(run), prompts, …)`."""
        from ..model.generation import generate
        from ..model.loading import load

        return generate(*load(self), prompts, **settings)

    def evaluate(self, data_path: str | os.PathLike[str], **settings: Any) -> Facts:
        """Measure the loss on a file: `mm.evaluate(run, data_path, …)`."""
        from .measurement import evaluate

        return evaluate(self, data_path, **settings)

    def export(
        self, path: str | os.PathLike[str], format: str | None = None, **settings: Any
    ) -> Path:
        """Write the model for other programs: `mm.export(run, path, format, …)`."""
        from ..model.export import export

        return export(self, path, format, **settings)

    def samples(self, most: int = 8) -> Table:
        """Return the answers to the run's fixed prompts, one row per validation.

        There are at most `most` rows at even distances, the last included.
        """
        table = samples(self.history)
        gap = max(1, -(-len(table.rows) // most))
        table.rows = table.rows[::-gap][::-1]
        return table

    def __repr__(self) -> str:
        facts = self.summary()
        facts.title = f"Run({shorten_home(os.fspath(self))!r})"
        facts.note = STATUS_WORDS[self.status]  # the view says the rest
        return repr(facts)

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def _ipython_display_(self) -> None:
        """Show nothing in the cell whose live view ends as this run's card."""
        cell = getattr(running_kernel(), "execution_count", None)
        if cell is None or cell != self.shown_in:
            raise NotImplementedError  # then IPython takes the methods above


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


def _listed(facts: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in facts.items())


def write_summary(run: Run, status: str) -> None:
    """Write summary.md."""
    facts, config = result(run.history, status), run.config
    settings = {name: f"`{config['settings'][name]}`" for name in config["explicit"]}
    text = f"""# {facts.title}

{facts.note} ({time.strftime("%Y-%m-%d %H:%M")})

## Result

{_listed(facts)}

![loss](loss.png)

## Settings

{_listed(settings)}

All other settings have their defaults; `config.json` lists them. Open the run with
`mm.Run("{shorten_home(str(run.folder))}")`.
"""
    verified.write_text(run.folder / "summary.md", text)
