"""Charts of a history, drawn with matplotlib's object interface.

No pyplot: a figure made here belongs to its caller alone, so a cell shows it once
and nothing stays open behind it.
"""

import io
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import AutoLocator, EngFormatter, LogLocator, MaxNLocator

from .metrics import History
from .progress import LARGEST_LOSS, outcome

# For each choice of x: the field of a row, its factor, and what stands at the axis.
X_AXES = {
    "step": ("step", 1, "optimizer step"),
    "tokens": ("tokens", 1, "text tokens"),
    "minutes": ("seconds", 1 / 60, "training time (minutes)"),
}
Y_LABELS = {
    "loss": "loss (nats per token)",
    "perplexity": "perplexity (exp of the loss)",
}

# Two of Okabe and Ito's palette (Color Universal Design, 2008) that stay apart under
# every common colour blindness; markers and widths say the same again.
TRAINING, VALIDATION = "#0072B2", "#D55E00"
INK, FAINT_INK, GRID = "#222222", "#666666", "#E4E4E4"
CHINESE = {"Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Micro Hei", "PingFang SC"}

FEW_ROWS = 90  # below it smoothing hides more than it shows
LEAST_RATIO = 12  # of an axis' ends for ticks at equal ratios
MARKERS = 24  # on a validation curve; more would hide the line


class Chart(Figure):
    """A matplotlib Figure that shows itself as a PNG in a cell, without pyplot."""

    def png(self, dpi: float = 120) -> bytes:
        """The picture as a file; 8.4 x 4.6 inches at 120 dpi are 1008 x 552 pixels."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=dpi)
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def plot_history(
    history: History,
    title: str | None = None,
    *,
    log_x: bool = False,
    log_y: bool = False,
    smoothing: float | None = None,
    y: str = "loss",
    x: str = "step",
) -> Chart:
    """One chart of a run: training and validation, a loss with its perplexity.

    `x` is "step", "tokens" (text tokens) or "minutes" (training time, all sessions);
    `y` is "loss", with perplexity as a second scale, or "perplexity". `smoothing` is
    the weight of the past in the moving average, 0 (none) up to 1, None for one that
    fits the number of rows. Rows whose loss is not finite interrupt the curves and are
    marked at the top. Raises ValueError for a choice that does not exist.
    """
    _check_choices(x, y, smoothing)
    figure = Chart(figsize=(8.4, 4.6), dpi=100, facecolor="white", layout="constrained")
    axes = figure.add_subplot(facecolor="white")
    _draw_curves(axes, history, x, y, smoothing)
    axes.set_xlabel(X_AXES[x][2], color=INK, fontsize=11)
    axes.set_ylabel(Y_LABELS[y], color=INK, fontsize=11)
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT_INK)
    axes.tick_params(colors=INK, labelsize=10)
    axes.margins(x=0.015)
    if axes.get_legend_handles_labels()[1]:
        _scale(axes, x, log_x, log_y)
        if y == "loss":
            _add_perplexity(axes)
        axes.legend(loc="upper right", labelcolor=INK, edgecolor="none")
    else:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no rows yet", transform=axes.transAxes, ha="center")
    _write_titles(axes, title or history.path.parent.name, outcome(history))
    return figure


def smooth(values: Iterable[float], weight: float) -> np.ndarray:
    """Moving average in which the past has `weight`, corrected for its short start.

    Kingma and Ba's bias correction (2015). A value that is not finite gives NaN in its
    place, and the average starts anew behind it.
    """
    averages, total, mass = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total = weight * total + (1 - weight) * value
            mass = weight * mass + (1 - weight)
            averages.append(total / mass)
        else:
            total = mass = 0.0
            averages.append(math.nan)
    return np.array(averages)


def suggest_smoothing(rows: int) -> float:
    """A weight that averages over a sixtieth of the rows; none below 90 rows."""
    return 0.0 if rows < FEW_ROWS else min(0.99, round(1 - 60 / rows, 2))


def _check_choices(x: str, y: str, smoothing: float | None) -> None:
    for name, value, choices in (("x", x, X_AXES), ("y", y, Y_LABELS)):
        if value not in choices:
            raise ValueError(
                f"{name}={value!r} is not something a chart shows; expected "
                f"{name}={' or '.join(map(repr, choices))}."
            )
    if smoothing is not None and not 0 <= smoothing < 1:
        raise ValueError(
            f"smoothing={smoothing!r} is out of range; expected 0 (none) up to but not "
            "including 1, for example run.plot(smoothing=0.9)."
        )


def _draw_curves(
    axes: Axes, history: History, x: str, y: str, smoothing: float | None
) -> None:
    """Training behind validation, marks for lost losses, and where a run resumed."""
    field, factor, _ = X_AXES[x]

    def curve(kind: str) -> tuple[np.ndarray, np.ndarray]:
        losses = np.array(history.column(kind, "loss"))
        values = _perplexity(losses) if y == "perplexity" else losses
        return np.array(history.column(kind, field)) * factor, values

    at, values = curve("train")
    weight = suggest_smoothing(len(values)) if smoothing is None else smoothing
    if weight:
        axes.plot(at, values, color=TRAINING, lw=0.8, alpha=0.3)
    if len(values):
        label = f"training, smoothed {weight:.2g}" if weight else "training"
        marker = "o" if len(values) == 1 else ""
        style = {"color": TRAINING, "lw": 1.8, "marker": marker, "label": label}
        axes.plot(at, smooth(values, weight), **style)
    lost = at[~np.isfinite(values)]
    if len(lost):
        top = axes.get_xaxis_transform()
        label = f"loss not finite ({len(lost)} rows)"
        axes.plot(lost, 0 * lost + 0.975, "x", color=INK, transform=top, label=label)
    at, values = curve("eval")
    if len(values):
        every = math.ceil(len(values) / MARKERS)
        style = {"color": VALIDATION, "lw": 1.2, "label": "validation"}
        axes.plot(at, values, marker="o", ms=4, markevery=every, **style)
    resumes = [row for row in history.select("event") if row["event"] == "resume"]
    for number, row in enumerate(resumes):
        label = "" if number else "resumed"
        style = {"color": FAINT_INK, "alpha": 0.5, "lw": 1, "dashes": (2, 3)}
        axes.axvline(row[field] * factor, label=label, **style)


def _scale(axes: Axes, x: str, log_x: bool, log_y: bool) -> None:
    """Linear or logarithmic axes with plain numbers; step 0 has no logarithm."""
    if x == "step":
        whole = MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
        axes.xaxis.set_major_locator(whole)
    if log_x and axes.dataLim.x1 > 0:
        axes.set_xscale("log", nonpositive="mask")
        _tick_ratios(axes.xaxis, *axes.get_xlim())
    if log_y and axes.dataLim.y1 > 0:
        axes.set_yscale("log", nonpositive="mask")
        _tick_ratios(axes.yaxis, *axes.get_ylim())
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_major_formatter(EngFormatter() if x == "tokens" else "{x:,g}")


def _tick_ratios(axis: Any, low: float, high: float) -> None:
    """Ticks at 1, 2, 5, 10; at even distances where these would be less than four."""
    ratios = high > LEAST_RATIO * low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if ratios else AutoLocator())
    axis.minorticks_off()


def _add_perplexity(axes: Axes) -> None:
    """Perplexity to the right of a loss."""
    second = axes.secondary_yaxis("right", functions=(_perplexity, _loss))
    _tick_ratios(second.yaxis, *_perplexity(axes.get_ylim()))
    second.yaxis.set_major_formatter("{x:,g}")
    second.set_ylabel(Y_LABELS["perplexity"], color=FAINT_INK, fontsize=11)
    second.tick_params(colors=FAINT_INK, labelsize=9)
    second.spines["right"].set_visible(False)


def _perplexity(loss: Any) -> np.ndarray:
    return np.exp(np.minimum(loss, LARGEST_LOSS))


def _loss(perplexity: Any) -> np.ndarray:
    return np.log(np.maximum(perplexity, np.finfo(float).tiny))


def _write_titles(axes: Axes, title: str, subtitle: str) -> None:
    """A run's name may be Chinese; a character without a font warns at every drawing."""
    fonts = sorted(CHINESE & {font.name for font in fontManager.ttflist})
    if not fonts:
        title = title.encode("ascii", "replace").decode()
    # Such fonts often have no bold face, which is a warning too.
    face: Any = {"weight": "bold"} if title.isascii() else {"family": fonts}
    axes.set_title(
        title, loc="left", parse_math=False, pad=24, fontsize=13, color=INK, **face
    )
    axes.annotate(
        subtitle, (0, 1), (0, 8), "axes fraction", "offset points",
        fontsize=9, color=FAINT_INK, in_layout=False,
    )  # fmt: skip
