"""The curves of runs: what their rows hold, thinned to what a chart can show."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..storage.run_folder import RunFolder
from .metrics import History, Row

X_LABELS = {
    "step": "optimizer step",
    "tokens": "text tokens",
    "minutes": "training time (minutes)",
}
Y_LABELS = {
    "loss": "loss (nats per token)",
    "perplexity": "perplexity (exp of the loss)",
    "bits_per_byte": "bits per byte of text",
    "loss_by_file": "loss by data file (nats per token)",
    "reward_margin": "reward margin (nats)",
    "accuracy": "accuracy (share of pairs with a margin above 0)",
    "kl": "KL divergence (estimate, nats per answer token)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "text tokens per second",
    "peak_memory_gib": "peak memory (GiB, each process)",
    "expert_load": "expert load (share of choices, mean over layers)",
}
PARTS = {"loss_by_file": "file", "peak_memory_gib": "process", "expert_load": "expert"}
KINDS = {"train": "training", "eval": "validation"}
LARGEST = 1e200  # greater values count as infinite, since axes end soon after
FEW_ROWS = 90  # below it smoothing hides more than it shows

Table = dict[str, np.ndarray]  # a column [rows, parts] for each field
Curve = dict[str, Any]


def read_run(history: History) -> dict[str, Table]:
    """Return the numbers of training, validation and resumes.

    They are NaN where a row has none, and inf where it has one that is not finite.
    """
    rows = {kind: history.select(kind) for kind in (*KINDS, "event")}
    rows["event"] = [row for row in rows["event"] if row.get("event") == "resume"]
    tables = {}
    for kind, some in rows.items():
        fields = "step", "tokens", "seconds", *Y_LABELS
        tables[kind] = table = {field: _column(some, field) for field in fields}
        if history.stage != "dpo":  # whose loss is a mean over pairs
            limited = np.minimum(table["loss"], math.log(LARGEST))
            infinite = np.isinf(table["loss"])
            table["perplexity"] = np.where(infinite, math.inf, np.exp(limited))
        loads = [row.get("expert_load") or [[math.nan]] for row in some]
        if not np.isnan(table["expert_load"]).all():
            ends = [[min(map(min, one)), max(map(max, one))] for one in loads]
            table["range"] = np.array(ends)
    return tables


def places(table: Table, chosen: np.ndarray | slice) -> dict[str, np.ndarray]:
    """Return steps, tokens and minutes of chosen rows."""
    fields = "step", "tokens", "seconds"
    numbers = (table[field].sum(1)[chosen] for field in fields)
    step, tokens, seconds = (np.nan_to_num(one, posinf=0) for one in numbers)
    return {"step": step, "tokens": tokens, "minutes": seconds / 60}


def make_grid(table: Table, most: int) -> dict[str, np.ndarray]:
    """Return the places of a curve's points, and how many `rows` each stands for.

    A point is the row in the middle of a bucket of rows. Of more than `most` rows, a
    bucket has three numbers, and a quarter of the buckets lies at equal ratios, so that
    the beginning of a long run is not one point of a logarithmic axis.
    """
    count = len(table["step"])
    starts = np.arange(count)
    if count > most:
        even = np.linspace(0, count, most // 4, endpoint=False)
        ratios = np.geomspace(1, count - 1, most // 12)
        starts = np.unique(np.concatenate([even, ratios]).astype(int))
    rows = np.diff(starts, append=count)
    return places(table, starts + rows // 2) | {"rows": rows}


def read_curves(
    y: str, history: History, tables: dict[str, Table], grids: Any, label: str
) -> Iterator[Curve]:
    """Yield the curves of a quantity: `mean`, `low`, `high` and `lost` (see `_thin`).

    Their `role` is that of the rows, or "range" for the expert load of one run, which
    has no mean. A `label` names all of them, else each is named for what it shows.
    """
    for kind, name in KINDS.items():
        column, rows = tables[kind][y], grids[kind]["rows"]
        if np.isnan(column).all():
            continue
        names = _part_names(history, y, column.shape[1]) if y in PARTS else [name]
        for part, values in zip(names, column.T, strict=True):
            yield {"role": kind, "name": label or part, **_thin(values, rows)}
        if y == "expert_load" and not label:
            least, greatest = (_thin(ends, rows) for ends in tables[kind]["range"].T)
            low = least.get("low", least["mean"])
            high = greatest.get("high", greatest["mean"])
            ends = {"mean": rows * math.nan, "low": low, "high": high, "lost": rows[:0]}
            yield {"role": "range", "name": "range over layers", **ends}


def _thin(values: np.ndarray, rows: np.ndarray) -> Curve:
    """Return mean, least and greatest value of buckets of `rows` rows each.

    There is the mean alone if all have one row. It is NaN where a value is missing or
    not finite; `lost` lists the buckets with one that is not finite.
    """
    starts = np.cumsum(rows) - rows
    finite = np.isfinite(values)
    sums = np.add.reduceat(np.where(finite, values, 0), starts)
    whole = np.logical_and.reduceat(finite, starts)
    lost = np.flatnonzero(np.logical_or.reduceat(np.isinf(values), starts))
    curve = {"mean": np.where(whole, sums / rows, np.nan), "lost": lost}
    if len(rows) < len(values):
        kept = np.where(finite, values, np.nan)
        curve["low"] = np.fmin.reduceat(kept, starts)
        curve["high"] = np.fmax.reduceat(kept, starts)
    return curve


def _part_names(history: History, y: str, parts: int) -> list[str]:
    folder, paths = RunFolder(history.path.parent), None
    if y == "loss_by_file" and folder.exists():
        paths = folder.settings().get("data_path")
    files = [Path(path).name for path in paths] if isinstance(paths, list) else []
    numbered = [f"{PARTS[y]} {number}" for number in range(parts)]
    return files if len(set(files)) == parts else numbered


def smooth(mean: np.ndarray, rows: np.ndarray, weight: float) -> np.ndarray:
    """Return the moving average in which the past has `weight` at each row.

    Its short start is corrected as in Adam (Kingma and Ba, 2015). It has the gaps of
    the mean, and restarts after each.
    """
    averages, total, mass = [], 0.0, 0.0
    for value, count in zip(mean.tolist(), rows.tolist(), strict=True):
        if math.isnan(total):
            total = mass = 0.0
        past = weight**count
        total = past * total + (1 - past) * value
        mass = past * mass + 1 - past
        averages.append(total / mass)
    return np.array(averages)


def choose_smoothing(rows: int, asked: float | None = None) -> float:
    """Return what is asked for, or a weight that averages a sixtieth of the rows."""
    if asked is None:
        return 0.0 if rows < FEW_ROWS else min(0.99, round(1 - 60 / rows, 2))
    if 0 <= asked < 1:
        return asked
    raise ValueError(
        f"smoothing={asked!r} is out of range; expected 0 (none) or more, below 1."
    )


def _column(rows: list[Row], field: str) -> np.ndarray:
    """Return numbers [rows, parts]; a list of lists becomes the means over the first."""
    if not rows or field not in {**rows[0], **rows[-1]}:
        return np.full((len(rows), 1), np.nan)
    values = [row.get(field) for row in rows]
    known = np.array([value is not None for value in values], bool)[:, None]
    try:
        column = np.array(values, float)
    except (TypeError, ValueError):  # lists of unequal length: processes came or went
        lists = (value if isinstance(value, list) else [] for value in values)
        column = np.array([*itertools.zip_longest(*lists)], float).T
        known = ~np.isnan(column)
    layered = len(column.shape[2:]) > 0
    column = column.mean(1) if layered else column.reshape(len(rows), -1)
    return np.where(known & ~(np.abs(column) < LARGEST), math.inf, column)
