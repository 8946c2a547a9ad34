"""Several runs in one chart, with the settings that differ and a table of the ends."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..storage.run_folder import RunFolder
from .charts import Chart
from .metrics import History
from .tables import Table

MOST_RUNS = 8  # as many as there are colours
# Settings that say where a run is and what it is called, not how it learns.
PLACES = {"out_dir", "run_name", "resume", "allow_change"}


def compare(*sources: str | os.PathLike[str] | History, **choices: Any) -> Chart:
    """Chart up to eight runs: `mm.compare("out/pretrain_512", "b/pretrain_512")`.

    Each source is what `History.load` takes; `choices` are those of `plot_history`. The
    legend names a run by its path and settings, as far as they differ. A table has the
    last validation of each run, and its loss at the tokens and the time that all have
    reached. Raises ValueError for no run, more than eight, or an invalid choice, and
    what `History.load` raises.
    """
    if not 0 < len(sources) <= MOST_RUNS:
        raise ValueError(
            f"{len(sources)} runs to compare; expected 1 to {MOST_RUNS}, for example "
            'mm.compare("out/pretrain_512", "other/pretrain_512").'
        )
    histories = [History.load(source) for source in sources]
    runs = [RunFolder(history.path.parent) for history in histories]
    configs = [run.read_config() if run.exists() else {} for run in runs]
    names = _name_runs([run.root for run in runs], configs)
    table = _finals(histories, names)
    notes = _differences(histories, runs, configs)
    return Chart(histories, names=names, notes=[*notes], table=table, **choices)


def _differences(
    histories: list[History], runs: list[RunFolder], configs: list[dict[str, Any]]
) -> Iterator[str]:
    """Yield why values of the runs do not compare."""
    stages = dict.fromkeys(history.stage for history in histories)
    found = [f"stages {', '.join(stages)}"] if len(stages) > 1 else []
    hashes = [one.get("hashes", {}) for one in configs]
    # A tokenizer's hash counts its chat template, its file does not.
    files = [run.tokenizer / "tokenizer.json" for run in runs]
    texts = {file.read_bytes() for file in files if file.is_file()}
    if len({one.get("tokenizer") for one in hashes}) > 1 and len(texts) > 1:
        found.append("different tokenizers")
    if found:
        why = " and ".join(found)
        yield f"{why}: compare bits per byte of the same text, not loss or perplexity"
    if len({one["validation"] for one in hashes if one.get("validation")}) > 1:
        yield "different validation data"


def _finals(histories: Sequence[History], names: list[str]) -> Table:
    """Return the last values of each run, and the losses at what all have reached."""
    ends = [one.last("eval") or one.last("train") or {} for one in histories]
    shared = {n: min(end.get(n, 0) for end in ends) for n in ("tokens", "seconds")}
    heads = ["run", "steps", "tokens", "minutes"]
    heads += ["validation loss", "perplexity", "bits per byte"]
    heads.append(f"loss at {shared['tokens']:,} tokens")
    heads.append(f"loss at {shared['seconds'] / 60:,.1f} minutes")
    table = Table("Where the runs ended", heads, [])
    for name, history, end in zip(names, histories, ends, strict=True):
        step, tokens, seconds = (end.get(n, 0) for n in ("step", "tokens", "seconds"))
        row = [
            name.partition(": ")[0],
            f"{step:,}",
            f"{tokens:,}",
            f"{seconds / 60:,.1f}",
        ]
        last = history.last("eval") or {}
        values = [
            last.get(n, math.nan) for n in ("loss", "perplexity", "bits_per_byte")
        ]
        losses = np.array(history.column("eval", "loss"))
        for field, at in shared.items():
            places = np.array(history.column("eval", field))
            known = np.isfinite(losses) & np.isfinite(places)
            reached = known.any() and at >= places[known][0]
            interpolated = np.interp(at, places[known], losses[known]) if reached else 0
            values.append(interpolated if reached else math.nan)
        row += ["–" if math.isnan(value) else f"{value:,.4g}" for value in values]
        table.rows.append(row)
    return table


def _name_runs(folders: list[Path], configs: list[dict[str, Any]]) -> list[str]:
    """Return each run's path below their common folder, and the settings that differ,
    of those that were set explicitly in one of the runs."""
    paths = [folder.resolve() for folder in folders]
    common = os.path.commonpath([path.parent for path in paths])
    settings: list[dict[str, Any]] = [one.get("settings", {}) for one in configs]
    explicit = dict.fromkeys(n for one in configs for n in one.get("explicit", []))
    listed = [
        name
        for name in explicit
        if name not in PLACES and len({repr(one.get(name)) for one in settings}) > 1
    ]
    labels = []
    for path, one in zip(paths, settings, strict=True):
        known = [(n, one[n]) for n in listed if one.get(n) is not None]
        parts = [f"{n} {v:g}" if isinstance(v, float) else f"{n} {v}" for n, v in known]
        names = [os.path.relpath(path, common), ", ".join(parts)]
        labels.append(": ".join(filter(None, names)))
    return labels
