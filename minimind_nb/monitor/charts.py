"""The chart of a run, drawn with matplotlib's object interface.

No pyplot: a figure made here belongs to its caller alone, so a cell shows it once
and nothing stays open behind it.
"""

import io
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import AutoLocator, EngFormatter, LogLocator, MaxNLocator

from .metrics import History, Row
from .progress import LARGEST_LOSS, outcome

# For each choice of x: the field of a row, its factor, and the label of the axis.
X_AXES = {
    "step": ("step", 1, "optimizer step"),
    "tokens": ("tokens", 1, "text tokens"),
    "minutes": ("seconds", 1 / 60, "training time (minutes)"),
}
Y_LABELS = {
    "loss": "loss (nats per token)",
    "perplexity": "perplexity (exp of the loss)",
    "reward_margin": "reward margin (nats)",
    "accuracy": "accuracy (share of pairs with a margin above 0)",
    "kl": "KL divergence, estimated, may be below 0 (nats per answer token)",
    "expert_load": "share of the routed choices, mean over layers",
}

# Two of Okabe and Ito's palette (Color Universal Design, 2008) that stay apart under
# every common colour blindness; markers and widths say the same again.
TRAINING, VALIDATION = "#0072B2", "#D55E00"
INK, FAINT_INK, GRID = "#222222", "#666666", "#E4E4E4"
CHINESE = {"Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Micro Hei", "PingFang SC"}

# Below the axes, where it hides no curve.
LEGEND: Any = {"loc": "outside lower left", "labelcolor": INK, "edgecolor": "none"}
FEW_ROWS = 90  # below it smoothing hides more than it shows
LEAST_RATIO = 12  # of an axis' ends for ticks at equal ratios
MARKERS = 24  # on a validation curve; more would hide the line


class Chart(Figure):
    """A matplotlib Figure that shows itself as a PNG in a cell, without pyplot."""

    def png(self, dpi: float = 120) -> bytes:
        """Return the picture; 8.4 x 4.6 inches at 120 dpi are 1008 x 552 pixels."""
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
    """Return the chart of a run: training and validation, a loss with its perplexity.

    `x` is "step", "tokens" (text tokens) or "minutes" (training time, all sessions);
    `y` is "loss", with perplexity as a second scale, or "perplexity"; for preferences
    "loss", "reward_margin", "accuracy" or "kl"; for mixtures also "expert_load".
    `smoothing` is the weight of the past in the moving average, 0 (none) up to 1, None
    for one that suits the number of rows. Rows with a non-finite value interrupt the
    curves and are marked at the top. Raises ValueError for an invalid choice.
    """
    choices = y_choices(history)
    check_choices(x, y, choices)
    weight = choose_smoothing(history, smoothing)
    title = title or history.path.parent.name
    figure, axes = blank_chart(x, y, history.stage, title, outcome(history))
    if y == "expert_load":
        _draw_experts(axes, history, x, weight)
    else:
        _draw_run(axes, history, x, y, weight)
    resumes = [row for row in history.select("event") if row["event"] == "resume"]
    for number, at in enumerate(read_x(resumes, x)):
        style: Any = {"color": FAINT_INK, "alpha": 0.5, "lw": 1, "dashes": (2, 3)}
        axes.axvline(at, label="" if number else "resumed", **style)
    if scale(axes, [history], x, log_x, log_y):
        if y == "loss" and "perplexity" in choices:
            _add_perplexity(axes)
        figure.legend(ncols=4, **LEGEND)
    return figure


def y_choices(history: History) -> list[str]:
    """Return the values of a run that can be drawn."""
    rows = [history.last(kind) or {} for kind in ("train", "eval")]
    usual = ["loss"] if history.stage == "dpo" else ["loss", "perplexity"]
    return usual + [n for n in list(Y_LABELS)[2:] if any(n in row for row in rows)]


def check_choices(x: str, y: str, choices: Iterable[str]) -> None:
    """Raise ValueError for an unknown axis."""
    for name, value, known in (("x", x, X_AXES), ("y", y, choices)):
        if value not in known:
            raise ValueError(
                f"{name}={value!r} is not a choice of this chart; expected "
                f"{name}={' or '.join(map(repr, known))}."
            )


def smooth(values: Iterable[float], weight: float) -> np.ndarray:
    """Return the moving average in which the past has `weight`.

    Its short start is corrected as in Adam (Kingma and Ba, 2015). A non-finite value
    gives NaN in its place, and the average restarts after it.
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


def choose_smoothing(history: History, asked: float | None = None) -> float:
    """Return what is asked for, or a weight that averages a sixtieth of the rows."""
    if asked is None:
        rows = len(history.select("train"))
        return 0.0 if rows < FEW_ROWS else min(0.99, round(1 - 60 / rows, 2))
    if 0 <= asked < 1:
        return asked
    raise ValueError(
        f"smoothing={asked!r} is out of range; expected 0 (none) or more, below 1."
    )


def read_x(rows: list[Row], x: str) -> np.ndarray:
    field, factor, _ = X_AXES[x]
    return np.array([row[field] for row in rows]) * factor


def read_curve(
    history: History, kind: str, x: str, y: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the points of one kind of row, NaN if a row has no such value."""
    values = np.array(history.column(kind, "loss" if y == "perplexity" else y))
    if y == "perplexity":
        values = np.where(np.isfinite(values), _perplexity(values), values)
    return read_x(history.select(kind), x), values


def draw_curve(
    axes: Axes, at: np.ndarray, values: np.ndarray, weight: float = 0.0, **style: Any
) -> list[Any]:
    """Draw a smoothed curve; a single value is a point."""
    every = math.ceil(len(at) / MARKERS) or 1
    style = ({"marker": "o"} if len(at) == 1 else {}) | style
    return axes.plot(at, smooth(values, weight), markevery=every, **style)


def _draw_run(axes: Axes, history: History, x: str, y: str, weight: float) -> None:
    """Draw training behind validation, and marks for non-finite values."""
    at, values = read_curve(history, "train", x, y)
    if weight:
        draw_curve(axes, at, values, color=TRAINING, lw=0.8, alpha=0.3)
    if len(at):
        label = f"training, smoothed {weight:.2g}" if weight else "training"
        draw_curve(axes, at, values, weight, color=TRAINING, lw=1.8, label=label)
    lost = at[~np.isfinite(values)]
    if len(lost):
        top = axes.get_xaxis_transform()
        name = "loss" if y == "perplexity" else y.replace("_", " ")
        label = f"{name} not finite ({len(lost)} rows)"
        axes.plot(lost, 0 * lost + 0.975, "x", color=INK, transform=top, label=label)
    at, values = read_curve(history, "eval", x, y)
    if len(at):
        style = {"color": VALIDATION, "marker": "o", "ms": 4, "lw": 1.2}
        draw_curve(axes, at, values, label="validation", **style)


def _draw_experts(axes: Axes, history: History, x: str, weight: float) -> None:
    """Draw a line for each expert in front of the range over layers."""
    rows = [row for row in history.select("train") if "expert_load" in row]
    at = read_x(rows, x)
    loads = np.array([row["expert_load"] for row in rows])  # [rows, layers, experts]
    least, greatest = loads.min((1, 2)), loads.max((1, 2))
    axes.fill_between(at, least, greatest, color=GRID, label="range over layers")
    experts = loads.shape[2]
    colors = colormaps["viridis"](np.linspace(0, 0.9, experts))
    for number, shares in enumerate(loads.mean(1).T):
        style = {"color": colors[number], "label": f"expert {number}", "lw": 1.5}
        draw_curve(axes, at, shares, weight, **style)
    axes.axhline(1 / experts, color=INK, lw=1, dashes=(4, 3), label="even share")


def blank_chart(
    x: str, y: str, stage: str, title: str, subtitle: str, *, height: float = 4.6
) -> tuple[Chart, Axes]:
    """Return a chart with titles and labelled axes, and nothing drawn yet."""
    size = (8.4, height)
    figure = Chart(figsize=size, dpi=100, facecolor="white", layout="constrained")
    axes = figure.add_subplot(facecolor="white")
    pairs = (y, stage) == ("loss", "dpo")
    label = "loss (nats per pair)" if pairs else Y_LABELS[y]
    axes.set_xlabel(X_AXES[x][2], color=INK, fontsize=11)
    axes.set_ylabel(label, color=INK, fontsize=11)
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT_INK)
    axes.tick_params(colors=INK, labelsize=10)
    axes.margins(x=0.015)
    text, font = legible(title)
    # Chinese fonts often have no bold face, which is a warning too.
    face: Any = {"parse_math": False, "color": INK} | (font or {"weight": "bold"})
    axes.set_title(text, loc="left", pad=24, fontsize=13, **face)
    style: Any = {"fontsize": 9, "color": FAINT_INK, "in_layout": False}
    axes.annotate(subtitle, (0, 1), (0, 8), "axes fraction", "offset points", **style)
    return figure, axes


def scale(
    axes: Axes, histories: Iterable[History], x: str, log_x: bool, log_y: bool
) -> bool:
    """Set the axes' scales with plain numbers; return whether anything is drawn."""
    if not any(one.last("train") or one.last("eval") for one in histories):
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no rows yet", transform=axes.transAxes, ha="center")
        return False
    if x == "step":
        whole = MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
        axes.xaxis.set_major_locator(whole)
    if log_x and axes.dataLim.x1 > 0:  # step 0 has no logarithm
        axes.set_xscale("log", nonpositive="mask")
        _tick_ratios(axes.xaxis, *axes.get_xlim())
    if log_y and axes.dataLim.y1 > 0:
        axes.set_yscale("log", nonpositive="mask")
        _tick_ratios(axes.yaxis, *axes.get_ylim())
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_major_formatter(EngFormatter() if x == "tokens" else "{x:,g}")
    return True


def _tick_ratios(axis: Any, low: float, high: float) -> None:
    """Set ticks at 1, 2, 5, 10, or at even distances if these would be too few."""
    few = high < LEAST_RATIO * low
    axis.set_major_locator(AutoLocator() if few else LogLocator(subs=(1, 2, 5)))
    axis.minorticks_off()


def _add_perplexity(axes: Axes) -> None:
    """Add an axis of perplexity to the right of a loss."""
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


def legible(text: str) -> tuple[str, dict[str, Any]]:
    """Return a text that may be Chinese, with the font it needs.

    A character without a font warns at every drawing, so it becomes a "?".
    """
    western = text.encode("cp1252", "replace").decode("cp1252")
    fonts = sorted(CHINESE & {font.name for font in fontManager.ttflist})
    if western == text or not fonts:
        return western, {}
    return text, {"family": fonts}
