"""A chart as a picture, by matplotlib without pyplot, which would keep figures open."""

import math
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import AutoLocator, EngFormatter, LogLocator

from .curves import KINDS, smooth
from .tables import shorten

# Okabe and Ito's palette (Color Universal Design, 2008), its yellow being too faint on
# white; page.css has it for dark pages, too. Each colour has a marker of its own.
COLORS = "#0072B2 #D55E00 #009E73 #C0649A #444444 #B87F00 #3FA3DB #8C8C8C".split()
MARKERS = "so^DvphX"
INK, FAINT_INK, GRID = "#222222", "#666666", "#E4E4E4"
CHINESE = {"Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Micro Hei", "PingFang SC"}
LONGEST = 110  # columns of a line of text; a longer one leaves the figure
LEAST_RATIO = 12  # of an axis' ends for ticks at equal ratios
STYLE: Any = {
    **dict.fromkeys(["axes.spines.top", "axes.spines.right", "text.parse_math"], False),
    **dict.fromkeys(["text.color", "axes.labelcolor"], INK),
    "axes.edgecolor": FAINT_INK,
    "axes.xmargin": 0.015,
    "lines.linewidth": 1.6,
    "legend.edgecolor": "none",
    "legend.fontsize": 9,
}


def draw(data: dict[str, Any]) -> Figure:
    """Return the figure of a chart's data, with the quantity and axes chosen there."""
    fonts = sorted(CHINESE & {font.name for font in fontManager.ttflist})
    with rc_context(STYLE | {"font.family": ["DejaVu Sans", *fonts]}):
        size = 8.4, 4.6 + 0.21 * len(data["runs"])
        figure = Figure(size, dpi=100, facecolor="white", layout="constrained")
        axes = figure.add_subplot(facecolor="white")
        x, quantity = data["choices"]["x"], data["ys"][data["choices"]["y"]]
        axes.set(xlabel=data["x"][x], ylabel=quantity["label"])
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.tick_params(colors=INK)
        axes.set_title(_legible(data["title"]), loc="left", pad=24, fontsize=13)
        under: Any = {"textcoords": "offset points", "fontsize": 9, "in_layout": False}
        text = _legible(data["subtitle"])
        axes.annotate(text, (0, 1), (0, 8), "axes fraction", color=FAINT_INK, **under)
        handles = _draw_curves(axes, data, x, quantity["curves"])
        columns = {"ncols": 4 if data["alone"] else 1, "loc": "outside lower left"}
        # Named afterwards, since a name that begins with "_" would be left out.
        legend = figure.legend([*handles.values()], "-" * len(handles), **columns)
        for shown, (_, name) in zip(legend.get_texts(), handles, strict=True):
            shown.set_text(_legible(name))
        if not handles:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "no rows yet", transform=axes.transAxes, ha="center")
            return figure
        log_y = data["choices"]["log_y"]
        _scale(axes, "x", data["choices"]["log_x"], x == "tokens")
        _scale(axes, "y", quantity["log"] if log_y is None else log_y, False)
        return figure


def _draw_curves(axes: Axes, data: dict[str, Any], x: str, curves: Any) -> Any:
    """Draw all curves and return what stands for each in the legend."""
    for run in data["runs"]:
        for at in run["resumes"][x]:
            axes.axvline(at, color=FAINT_INK, alpha=0.5, lw=1, dashes=(2, 3))
    names = [*dict.fromkeys(one["name"] for one in curves if one["role"] in KINDS)]
    handles = {}
    for curve in curves:
        run, name, role = data["runs"][curve["run"]], curve["name"], curve["role"]
        grid, mean = run["grids"]["eval" if role == "eval" else "train"], curve["mean"]
        at, low, high = grid[x], curve.get("low", mean), curve.get("high", mean)
        if role == "range":
            handles[curve["run"], name] = axes.fill_between(at, low, high, color=GRID)
            continue
        number = names.index(name) if data["alone"] else curve["run"]
        number = 1 if data["alone"] and name == KINDS["eval"] else number
        style: Any = {"color": COLORS[number % len(COLORS)]}
        top: Any = {"transform": axes.get_xaxis_transform(), **style}
        axes.plot(at[curve["lost"]], [0.975] * len(curve["lost"]), "x", **top)
        if number >= len(COLORS):
            style["dashes"] = (5, 2)
        if role == "train":
            ends = np.stack([low, high], 1).ravel()
            axes.plot(np.repeat(at, 2), ends, lw=0.8, alpha=0.3, color=style["color"])
            mean = smooth(mean, grid["rows"], run["smoothing"])
            style["lw"] = 1.6 if data["alone"] else 1.1
        if role == "eval" or len(at) == 1:
            style |= {"marker": MARKERS[number % len(MARKERS)], "ms": 5}
            style["markevery"] = math.ceil(len(at) / 24)
        (handles[curve["run"], name],) = axes.plot(at, mean, **style)
    return handles


def _scale(axes: Axes, name: str, log: bool, units: bool) -> None:
    """Write plain numbers at ticks; make an axis logarithmic if it has any above 0."""
    axis = axes.xaxis if name == "x" else axes.yaxis
    if log and (axes.dataLim.x1 if name == "x" else axes.dataLim.y1) > 0:
        axes.set(**{f"{name}scale": "log"})
        low, high = axis.get_view_interval()
        few = high < LEAST_RATIO * low
        axis.set_major_locator(AutoLocator() if few else LogLocator(subs=(1, 2, 5)))
        axis.minorticks_off()
    axis.set_major_formatter(EngFormatter() if units else "{x:,g}")


def _legible(text: str) -> str:
    """Return a line of text, with "?" for what would warn at every drawing: a character
    that no font has."""
    found = any(font.name in CHINESE for font in fontManager.ttflist)
    line = shorten(text, LONGEST)
    return line if found else line.encode("cp1252", "replace").decode("cp1252")
