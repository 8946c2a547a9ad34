"""Several runs in one chart, with the settings that differ and a table of the ends."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..storage.run_folder import RunFolder
from .charts import Chart
from .curves import KINDS
from .metrics import History
from .tables import Table

# Settings that say where a run is and what it is called, not how it learns.
PLACES = {"out_dir", "run_name", "resume", "allow_change"}
SCORES = "loss", "perplexity", "bits_per_byte"


def compare(*sources: str | os.PathLike[str] | History, **choices: Any) -> Chart:
    """Chart several runs: `mm.compare("out/pretrain_512", "b/pretrain_512")`.

    Each source is what `History.load` takes; `choices` are those of `inspect`. The
    legend names a run by its path and settings, as far as they differ. A table has the
    last validation of each run, and its loss at the tokens and the time that all have
    reached. Raises ValueError for no run or an invalid choice, and what `History.load`
    raises.
    """
    if not sources:
        raise ValueError(
            'No run to compare; pass folders: mm.compare("out/pretrain_512", "other/sft").'
        )
    histories = [History.load(source) for source in sources]
    runs = [RunFolder(history.path.parent) for history in histories]
    configs = [run.read_config() if run.exists() else {} for run in runs]
    # A tokenizer's hash in config.json counts its chat template, its file does not.
    files = [run.tokenizer / "tokenizer.json" for run in runs]
    validation = {one.get("hashes", {}).get("validation") for one in configs}
    parts = {
        "stages": {history.stage for history in histories},
        "tokenizers": {file.read_bytes() for file in files if file.is_file()},
        "validation data": validation - {None},
    }
    found = " and ".join(name for name, values in parts.items() if len(values) > 1)
    note = f"different {found}: compare bits per byte of the same text, not loss"
    names = _name_runs([run.root for run in runs], configs)
    table, notes = _finals(histories, names), [note] if found else []
    return Chart(histories, names=names, notes=notes, table=table, **choices)


def _finals(histories: Sequence[History], names: list[str]) -> Table:
    """Return the last values of each run, and the losses at what all have reached."""
    newest = [[one.last(kind) or {"step": 0} for kind in KINDS] for one in histories]
    ends = [max(rows, key=lambda row: row["step"]) for rows in newest]
    tokens, seconds = (
        min(validation.get(n, 0) for _, validation in newest)
        for n in ("tokens", "seconds")
    )
    heads = ["run", "steps", "tokens", "minutes", "validation loss", "perplexity"]
    heads += ["bits per byte", f"≈ loss at {tokens:,} tokens"]
    heads += [f"≈ loss at {seconds / 60:,.1f} minutes"]
    rows = []
    for name, history, end in zip(names, histories, ends, strict=True):
        last = history.last("eval") or {}
        scores = [last.get(field, math.nan) for field in SCORES]
        scores += [_loss_at(history, "tokens", tokens)]
        scores += [_loss_at(history, "seconds", seconds)]
        reached = [f"{end.get(field, 0):,}" for field in ("step", "tokens")]
        reached += [f"{end.get('seconds', 0) / 60:,.1f}"]
        texts = ["–" if math.isnan(value) else f"{value:,.4g}" for value in scores]
        rows.append([name.partition(": ")[0], *reached, *texts])
    return Table("Where the runs ended", heads, rows)


def _loss_at(history: History, field: str, at: float) -> float:
    """Return the validation loss at a place, interpolated; NaN before the first."""
    columns = [history.column("eval", name) for name in (field, "loss")]
    points = np.array(columns)
    places, losses = points[:, np.isfinite(points).all(0)]
    return np.interp(at, places, losses, left=math.nan) if len(places) else math.nan


def _name_runs(folders: list[Path], configs: list[dict[str, Any]]) -> list[str]:
    """Return each run's path below their common folder, and the settings that differ,
    of those that were set explicitly in one of the runs."""
    paths = [folder.resolve() for folder in folders]
    common = os.path.commonpath([path.parent for path in paths])
    settings: list[dict[str, Any]] = [one.get("settings", {}) for one in configs]
    explicit = dict.fromkeys(n for one in configs for n in one.get("explicit", []))
    texts = {n: [repr(one.get(n)) for one in settings] for n in explicit}
    differ = [n for n, some in texts.items() if n not in PLACES and len({*some}) > 1]
    names = []
    for path, one in zip(paths, settings, strict=True):
        parts = [f"{n} {one[n]}" for n in differ if one.get(n) is not None]
        about = [os.path.relpath(path, common), ", ".join(parts)]
        names.append(": ".join(filter(None, about)))
    return names
