"""The curves of runs: what their rows hold, thinned to what a chart can show."""

import itertools
import math
from typing import Any

import numpy as np

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
LARGEST = 1e200  # greater values count as infinite: no axis can show them
FEW_ROWS = 90  # below it smoothing hides more than it shows

Table = dict[str, np.ndarray]  # a column [rows, parts] for each field


def read_run(history: History) -> dict[str, Table]:
    """Return the numbers of the rows "train" and "eval", and of each "resume".

    They are NaN where a row has none, and inf where it has one that is not finite. A
    quantity that no row has is left out.
    """
    rows = {kind: history.select(kind) for kind in KINDS}
    rows["resume"] = [row for row in history.rows if row.get("event") == "resume"]
    tables = {}
    for kind, some in rows.items():
        tables[kind] = table = {x: _column(some, x) for x in ("step", "tokens")}
        table["minutes"] = _column(some, "seconds") / 60
        columns = {y: _column(some, y) for y in Y_LABELS}
        table |= {y: one for y, one in columns.items() if not np.isnan(one).all()}
        # The loss of dpo is a mean over pairs.
        if "loss" in table and history.stage != "dpo":
            loss = table["loss"]
            limited = np.where(loss < math.log(LARGEST), loss, loss + math.inf)
            table["perplexity"] = np.exp(limited)
    return tables


def places(table: Table, most: int) -> Table:
    """Return steps, tokens and minutes of a curve's points, and how many `rows` each
    stands for: it is the row in the middle of its bucket, whose ends are two points."""
    count = len(table["step"])
    buckets = count if count <= most else most // 2
    starts = np.linspace(0, count, buckets, endpoint=False).astype(int)
    rows = np.diff(starts, append=count)
    return {x: table[x][starts + rows // 2, 0] for x in X_LABELS} | {"rows": rows}


def thin(values: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the mean of each bucket of rows, with `low` and `high` if it has several.

    A value that is not finite makes its bucket inf, a missing one makes it NaN.
    """
    starts = np.cumsum(rows) - rows
    curve = {"mean": np.add.reduceat(values, starts) / rows}
    if len(rows) < len(values):
        curve["low"] = np.minimum.reduceat(values, starts)
        curve["high"] = np.maximum.reduceat(values, starts)
    return curve


def smooth(mean: np.ndarray, rows: np.ndarray, weight: float) -> np.ndarray:
    """Return the moving average in which the past has `weight` at each row.

    Its short start is corrected as in Adam (Kingma and Ba, 2015). It restarts after
    each number that is not finite.
    """
    averages, total, mass = [], 0.0, 0.0
    for value, count in zip(mean.tolist(), rows.tolist(), strict=True):
        past = weight**count
        total = past * total + (1 - past) * value
        mass = past * mass + 1 - past
        averages.append(total / mass)
        if not math.isfinite(total):
            total = mass = 0.0
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
    """Return numbers [rows, parts], of which a row may have fewer than others."""
    values = [row.get(field) for row in rows]
    lists = any(isinstance(value, list) for value in values)
    parts = itertools.zip_longest(*map(_parts, values)) if lists else [values]
    column = np.array([*parts], object).T
    numbers = column.astype(float)
    lost = np.not_equal(column, np.array(None)) & ~(np.abs(numbers) < LARGEST)
    return np.where(lost, math.inf, numbers)


def _parts(value: Any) -> list[Any]:
    """Return a list as it is, of a list of lists the means over the first."""
    if not isinstance(value, list):
        return [value]
    if value and isinstance(value[0], list):
        return [sum(part) / len(part) for part in zip(*value, strict=True)]
    return value
