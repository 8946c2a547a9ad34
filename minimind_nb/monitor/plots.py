"""Charts of a history, drawn with matplotlib's object interface.

No pyplot: a figure made here belongs to its caller alone, so a cell shows it once
and nothing stays open behind it.
"""

import io
import math
from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from .metrics import History
from .progress import (
    count,
    duration,
    loss_text,
    measure,
    perplexity,
    perplexity_text,
)
from .scales import RoundTicks, tick_text

X_LABELS = {
    "step": "optimizer step",
    "tokens": "text tokens",
    "minutes": "training time (minutes)",
}
Y_LABELS = {
    "loss": "loss (nats per token)",
    "perplexity": "perplexity (exp of the loss)",
}

# Okabe and Ito's palette (Color Universal Design, 2008), the pairs that stay apart
# under every common colour blindness first; markers and widths say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT_INK, GRID = "#222222", "#666666", "#E4E4E4"
LATIN_FONT = "DejaVu Sans"  # comes with matplotlib
CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "Droid Sans Fallback", "Microsoft YaHei", "PingFang SC",
    "SimHei", "Arial Unicode MS",
)  # fmt: skip

FEW_ROWS = 90  # below it smoothing hides more than it shows
MARKERS = 24  # on a validation curve; more would hide the line


class Chart(Figure):
    """A matplotlib Figure that shows itself as a PNG in a cell, without pyplot."""

    def _repr_png_(self) -> bytes:
        return figure_png(self)


def plot_history(
    history: History,
    title: str | None = None,
    *,
    log_x: bool = False,
    log_y: bool = False,
    smoothing: float | None = None,
    y: str = "loss",
    x: str = "step",
) -> Figure:
    """One chart of a run: training and validation, perplexity on the second scale.

    `x` is "step", "tokens" (text tokens) or "minutes" (training time, all sessions);
    `y` is "loss" or "perplexity", the other one is on the right. `smoothing` is the
    weight of the past in the moving average, 0 (none) up to 1, None for one that
    fits the number of rows; the raw rows stay visible behind it. Rows whose loss is
    not finite interrupt the curves and are marked at the top. A run that went on
    from a checkpoint has a faint vertical line there. `title` defaults to the run's
    name, with a line of figures under it; "" leaves both out. Raises ValueError for
    a choice that does not exist.
    """
    _check_choices(x, y, smoothing)
    figure = Chart(figsize=(8.4, 4.6), dpi=100, facecolor="white", layout="constrained")
    axes = figure.add_subplot(facecolor="white")
    draw_history(axes, history, x=x, y=y, smoothing=smoothing)
    _draw_restarts(axes, history, x)
    _dress(axes, x, y, log_x, log_y)
    _write_titles(axes, history, title)
    return figure


def figure_png(figure: Figure, dpi: float = 120) -> bytes:
    """The figure as a PNG file; 8.4 x 4.6 inches at 120 dpi are 1008 x 552 pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


def draw_history(
    axes: Axes,
    history: History,
    *,
    x: str = "step",
    y: str = "loss",
    smoothing: float | None = None,
    label: str = "",
    colours: tuple[str, str] = COLOURS[:2],
) -> None:
    """Draw a run's training and validation curves onto axes.

    `label` names the run in the legend where there are several; `colours` are those
    of the training and the validation curve.
    """
    prefix = f"{label}: " if label else ""
    positions, values = _curve(history, "train", x, y)
    if smoothing is None:
        smoothing = suggest_smoothing(len(values))
    smooth_values = smooth(values, smoothing)
    suffix = f", smoothed {smoothing:.2g}" if smoothing else ""
    if smoothing:
        axes.plot(positions, values, color=colours[0], linewidth=0.8, alpha=0.3)
    if len(values):
        axes.plot(
            positions,
            smooth_values,
            color=colours[0],
            linewidth=1.8,
            marker="o" if np.isfinite(values).sum() == 1 else "",
            label=f"{prefix}training{suffix}",
        )
    lost = positions[~np.isfinite(values)]
    if len(lost):
        axes.plot(
            lost,
            np.full(len(lost), 0.975),
            transform=axes.get_xaxis_transform(),
            linestyle="",
            marker="x",
            markersize=6,
            color=INK,
            label=f"{prefix}loss not finite ({len(lost)} rows)",
        )
    positions, values = _curve(history, "eval", x, y)
    if len(values):
        axes.plot(
            positions,
            values,
            color=colours[1],
            linewidth=1.2,
            marker="o",
            markevery=math.ceil(len(values) / MARKERS),
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=f"{prefix}validation",
        )


def smooth(values: Iterable[float], weight: float) -> np.ndarray:
    """Moving average in which the past has `weight`, corrected for its short start.

    Kingma and Ba's bias correction (2015): the first value is itself, not a share of
    it. A value that is not finite gives NaN in its place, and the average starts
    anew behind it.
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
    for name, value, choices in (("x", x, X_LABELS), ("y", y, Y_LABELS)):
        if value not in choices:
            expected = ", ".join(repr(choice) for choice in choices)
            raise ValueError(
                f"{name}={value!r} is not something a chart shows; expected one of "
                f"{expected}, for example run.plot({name}={next(iter(choices))!r})."
            )
    if smoothing is not None and not 0 <= smoothing < 1:
        raise ValueError(
            f"smoothing={smoothing!r} is out of range; expected 0 (no smoothing) up "
            "to but not including 1, for example run.plot(smoothing=0.9)."
        )


def _curve(
    history: History, kind: str, x: str, y: str
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and values of one kind of rows; rows without a position left out."""
    positions = np.array(history.column(kind, "seconds" if x == "minutes" else x))
    values = np.array(history.column(kind, "loss"))
    if x == "minutes":
        positions = positions / 60
    if y == "perplexity":
        values = np.array([perplexity(value) for value in values])
    known = np.isfinite(positions)
    return positions[known], values[known]


def _draw_restarts(axes: Axes, history: History, x: str) -> None:
    """A faint vertical line wherever the run went on from a checkpoint."""
    steps, _ = _curve(history, "train", "step", "loss")
    positions, _ = _curve(history, "train", x, "loss")
    if len(steps) != len(positions) or not len(steps):
        return
    label = "resumed"
    for row in history.select("event"):
        if row.get("event") == "resume" and "step" in row:
            place = float(np.interp(row["step"], steps, positions))
            axes.axvline(
                place,
                color=FAINT_INK,
                alpha=0.5,
                linewidth=1,
                dashes=(2, 3),
                label=label,
            )
            label = "_nolegend_"


def _dress(axes: Axes, x: str, y: str, log_x: bool, log_y: bool) -> None:
    """Scales, ticks, labels, grid and legend."""
    axes.set_xlabel(X_LABELS[x], color=INK, fontsize=11)
    axes.set_ylabel(Y_LABELS[y], color=INK, fontsize=11)
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT_INK)
    axes.tick_params(colors=INK, labelsize=10)
    axes.margins(x=0.015)
    drawn = [line for line in axes.get_lines() if line.get_label() != "resumed"]
    if not drawn:
        axes.set(xticks=[], yticks=[])
        axes.text(
            0.5, 0.5, "no rows yet", transform=axes.transAxes,
            ha="center", color=FAINT_INK, fontsize=13,
        )  # fmt: skip
        return
    if log_x and axes.dataLim.x1 > 0:
        axes.set_xscale("log", nonpositive="mask")
    elif x != "minutes":
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    write_x = count if x == "tokens" else tick_text
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write_x(value)))
    if log_y and axes.dataLim.y1 > 0:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(RoundTicks())
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
    _add_second_scale(axes, y)
    axes.legend(
        loc="upper right", fontsize=10, labelcolor=INK, framealpha=0.9, edgecolor="none"
    )


def _add_second_scale(axes: Axes, y: str) -> None:
    """Perplexity to the right of a loss, and the other way round."""
    if y == "loss":
        name, forward, back = "perplexity", perplexity, _loss_of
    else:
        name, forward, back = "loss", _loss_of, perplexity
    second = axes.secondary_yaxis("right")
    second.yaxis.set_major_locator(RoundTicks(forward, back))
    second.yaxis.set_minor_locator(NullLocator())
    second.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: tick_text(forward(value)))
    )
    second.set_ylabel(Y_LABELS[name], color=FAINT_INK, fontsize=11)
    second.tick_params(colors=FAINT_INK, labelsize=10)
    second.spines["right"].set_visible(False)


def _loss_of(value: float) -> float:
    return math.log(max(value, 1.0))


def _write_titles(axes: Axes, history: History, title: str | None) -> None:
    if title == "":
        return
    title = history.path.parent.name if title is None else title
    title, families = printable(title)
    axes.set_title(
        title,
        loc="left",
        parse_math=False,
        pad=24,
        fontsize=13,
        color=INK,
        family=families,
        # Asking a Chinese font without a bold face for one logs a warning each time.
        fontweight="bold" if families == [LATIN_FONT] else "normal",
    )
    progress = measure(history)
    parts = []
    if (lowest := progress.lowest_validation_loss) is not None:
        parts.append(
            f"lowest validation loss {loss_text(lowest)} "
            f"(perplexity {perplexity_text(lowest)})"
        )
    if progress.loss is not None:
        total = progress.total_steps
        of_total = f" of {total:,}" if total else ""
        parts.append(f"step {progress.step:,}{of_total}")
    if progress.tokens:
        parts.append(f"{count(progress.tokens)} text tokens")
    if progress.trained_seconds:
        parts.append(duration(progress.trained_seconds))
    axes.text(
        0, 1.035, " · ".join(parts), transform=axes.transAxes, fontsize=10,
        color=FAINT_INK,
    )  # fmt: skip


def printable(text: str) -> tuple[str, list[str]]:
    """The text and the fonts to write it in, Chinese ones where they are needed.

    A character that no installed font has becomes a box; asking matplotlib for it
    would warn at every drawing.
    """
    families = [LATIN_FONT]
    if text.isascii():
        return text, families
    installed = {font.name for font in fontManager.ttflist}
    families += [name for name in CJK_FONTS if name in installed][:1]
    fonts = [get_font(fontManager.findfont(name)) for name in families]
    shown = "".join(
        char if any(font.get_char_index(ord(char)) for font in fonts) else "\u25a1"
        for char in text
    )
    return shown, families
