"""A chart as a picture, by matplotlib without pyplot, which would keep figures open."""

import math
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogFormatter

from .curves import smooth
from .tables import shorten

COLORS = "#2b8cc4", "#dd6b1f", "#0f9d75", "#c4679c"  # as in page.css
DASHES = "-", (0, (6, 4)), (0, (2, 4)), (0, (9, 4, 2, 4))  # of each four curves
CHINESE = {"Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Micro Hei", "PingFang SC"}
LONGEST = 120  # columns of a line of text; a longer one leaves the figure
STYLE: Any = {
    **dict.fromkeys(["axes.spines.top", "axes.spines.right", "text.parse_math"], False),
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor"], "#444444"),
    **dict.fromkeys(["figure.facecolor", "axes.facecolor"], "white"),
    **{"axes.xmargin": 0.015, "legend.frameon": False, "legend.fontsize": 9},
}


def draw(data: dict[str, Any]) -> Figure:
    """Return the figure of a chart's data, with the quantity and axes chosen there."""
    fonts = sorted(CHINESE & {font.name for font in fontManager.ttflist})
    x, quantity = data["choices"]["x"], data["ys"][data["choices"]["y"]]
    # A character that no font has would warn at every drawing.
    charset = "utf-8" if fonts else "cp1252"
    with rc_context(STYLE | {"font.family": ["DejaVu Sans", *fonts]}):
        figure = Figure((8.4, 4.6 + 0.21 * len(data["runs"])), layout="constrained")
        axes = figure.add_subplot(xlabel=data["x"][x], ylabel=quantity["label"])
        title = (
            f"{_legible(data['title'], charset)}\n{_legible(data['subtitle'], charset)}"
        )
        axes.set_title(title, loc="left", fontsize=9)
        axes.grid(axis="y", color="#E4E4E4")
        for run in data["runs"]:
            for at in run["resume"][x]:
                axes.axvline(at, color="#AAAAAA", lw=1, dashes=(2, 3))
        drawn = quantity["curves"]
        handles = {curve["name"]: _draw_curve(axes, data, curve) for curve in drawn}
        if not handles:
            axes.text(0.5, 0.5, "no rows yet", transform=axes.transAxes, ha="center")
        # A name that begins with "_" would be left out.
        names = [f" {_legible(name, charset)}" for name in handles]
        columns = 4 if len(data["runs"]) == 1 else 1
        figure.legend(handles.values(), names, ncols=columns, loc="outside lower left")
        if x == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter())
        if quantity["log"] and axes.dataLim.y1 > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(3, 0.4)))
        return figure


def _draw_curve(axes: Axes, data: dict[str, Any], curve: dict[str, Any]) -> Line2D:
    """Draw a curve, and return what stands for it in the legend."""
    grid, mean = data["runs"][curve["run"]][curve["role"]], curve["mean"]
    at, number = grid[data["choices"]["x"]], curve["number"]
    color, dashes = COLORS[number % 4], DASHES[number // 4 % 4]
    lost = at[np.isinf(mean)]
    top: Any = {"transform": axes.get_xaxis_transform(), "color": color}
    axes.plot(lost, [0.975] * len(lost), "x", **top)
    style: Any = {"color": color, "ls": dashes, "lw": 1.4}
    if curve["role"] == "train":
        ends = np.stack([curve.get("low", mean), curve.get("high", mean)], 1)
        ends[np.isinf(ends)] = math.nan
        axes.plot(np.repeat(at, 2), ends.ravel(), lw=0.8, alpha=0.3, color=color)
        mean = smooth(mean, grid["rows"], data["smoothing"])
    if curve["role"] == "eval" or len(at) == 1:
        style |= {"marker": "o", "ms": 4, "markevery": math.ceil(len(at) / 24)}
    return axes.plot(at, np.where(np.isinf(mean), math.nan, mean), **style)[0]


def _legible(text: str, charset: str) -> str:
    return shorten(text, LONGEST).encode(charset, "replace").decode(charset)
