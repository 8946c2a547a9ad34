"""Several runs on one figure, with a legend of what differs between their settings."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..storage.run_folder import RunFolder
from .charts import (
    INK,
    MARKERS,
    Chart,
    blank_chart,
    check_choices,
    describe_y,
    legible,
    offered,
    read_curve,
    say_empty,
    scale,
    smooth,
    suggest_smoothing,
    write_titles,
)
from .metrics import History
from .tables import shorten

# Okabe and Ito's palette (Color Universal Design, 2008), its yellow being too faint on
# white; each colour has a marker of its own, which says the same again.
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#222222", "v"),
    ("#E69F00", "P"),
    ("#56B4E9", "X"),
    ("#888888", "*"),
)
KINDS = ("train", "eval")
MOST_SETTINGS = 4  # told of a run
LEGEND_COLUMNS = 110  # of text a line; beyond it a line of the legend leaves the figure
# They say where a run lies and what it is called, not how it learns.
PLACES = {"out_dir", "run_name", "resume", "allow_change"}


def compare(
    *sources: "str | os.PathLike[str] | History",
    y: str = "loss",
    x: str = "step",
    smoothing: float | None = None,
    log_x: bool = False,
    log_y: bool = False,
) -> Chart:
    """Up to eight runs on one figure: `mm.compare("out/pretrain_512", "b/pretrain_512")`.

    Each source is what `History.load` takes; `x`, `y` and the rest are those of
    `plot_history`, `y` being something that every run has. Markers are validation, thin
    lines training. The legend tells a run by its path, as far as the paths differ, and
    by the settings that differ. Raises ValueError for no run, more than eight, or a
    choice that does not exist, and what `History.load` raises.
    """
    if not 0 < len(sources) <= len(STYLES):
        raise ValueError(
            f"{len(sources)} runs to compare; expected 1 to {len(STYLES)}, for example "
            'mm.compare("out/pretrain_512", "other/pretrain_512").'
        )
    histories = [History.load(source) for source in sources]
    choices = [n for n in offered(histories[0]) if n != "expert_load"]
    for history in histories:
        choices = [name for name in choices if name in offered(history)]
    check_choices(x, y, choices, smoothing)
    names = _tell_apart([history.path.parent for history in histories])
    stages = dict.fromkeys(history.stage for history in histories)
    label = describe_y(y, stages)
    figure, axes = blank_chart(x, label, height=4.8 + 0.21 * len(names))
    handles, smoothed = [], ""
    for history, (color, marker) in zip(histories, STYLES, strict=False):
        train, validation = (read_curve(history, kind, x, y) for kind in KINDS)
        weight = suggest_smoothing(len(train[0])) if smoothing is None else smoothing
        smoothed = " (smoothed)" if weight else smoothed
        style: dict[str, Any] = {"color": color, "lw": 1.8}
        thin = {"lw": 1, "alpha": 0.6} if len(validation[0]) else {}
        form = "." if len(train[0]) == 1 else "-"
        axes.plot(train[0], smooth(train[1], weight), form, **(style | thin))
        every = max(1, math.ceil(len(validation[0]) / MARKERS))
        style |= {"marker": marker, "ms": 6, "markevery": every}
        handles += axes.plot(*validation, **style)
    if any(history.select("train") + history.select("eval") for history in histories):
        scale(axes, x, log_x, log_y)
    else:
        say_empty(axes)
    _add_legend(figure, handles, names)
    told = f"with markers: validation · thin: training{smoothed}"
    if len(stages) > 1:
        told += f" · stages {', '.join(stages)}: their figures do not compare"
    title = f"{label.partition(' (')[0]} of {len(names)} run{'s' * (len(names) > 1)}"
    write_titles(axes, title, told)
    return figure


def _add_legend(figure: Chart, handles: list[Any], names: list[str]) -> None:
    """One line a run below the axes, where it hides no curve."""
    place: Any = {"loc": "outside lower left", "edgecolor": "none", "labelcolor": INK}
    legend = figure.legend(handles, ["run"] * len(names), fontsize=9, **place)
    lines = [shorten(name, LEGEND_COLUMNS) for name in names]
    shown, font = legible("\n".join(lines))
    for text, line in zip(legend.get_texts(), shown.split("\n"), strict=True):
        # Set afterwards, for a label that begins with "_" would be left out.
        text.set(text=line, parse_math=False, **font)


def _tell_apart(folders: Sequence[Path]) -> list[str]:
    """For each run its path below what all have in common, and its own settings."""
    paths = [folder.resolve() for folder in folders]
    common = os.path.commonpath([path.parent for path in paths])
    configs = [_read_config(path) for path in paths]
    settings = [config["settings"] for config in configs]
    names = dict.fromkeys(
        name for one in settings for name in one if name not in PLACES
    )
    differing = [n for n in names if len({repr(one.get(n)) for one in settings}) > 1]
    explicit = {name for config in configs for name in config["explicit"]}
    # What was set explains the defaults that follow from it.
    told = [name for name in differing if name in explicit] or differing
    labels = []
    for path, one in zip(paths, settings, strict=True):
        parts = [
            f"{name} {_value(one[name])}"
            for name in told[:MOST_SETTINGS]
            if one.get(name) is not None
        ]
        parts += ["…"] if len(told) > MOST_SETTINGS else []
        place = os.path.relpath(path, common)
        labels.append(f"{place}: {', '.join(parts)}" if parts else place)
    return labels


def _read_config(folder: Path) -> dict[str, Any]:
    """The settings and the names of the explicit ones; metrics are enough for a curve."""
    try:
        config = RunFolder(folder).read_config()
        return {"settings": dict(config["settings"]), "explicit": [*config["explicit"]]}
    except (OSError, ValueError, KeyError, TypeError):
        return {"settings": {}, "explicit": []}


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value}"
