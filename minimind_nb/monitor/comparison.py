"""Several runs on one figure, with a legend of the settings that differ."""

from __future__ import annotations

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
    legible,
    read_curve,
    say_empty,
    scale,
    smooth,
    suggest_smoothing,
    write_titles,
    y_choices,
    y_label,
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
LEGEND_COLUMNS = 110  # of text; a longer line of the legend leaves the figure
# Settings that say where a run is and what it is called, not how it learns.
PLACES = {"out_dir", "run_name", "resume", "allow_change"}


def compare(
    *sources: str | os.PathLike[str] | History,
    y: str = "loss",
    x: str = "step",
    smoothing: float | None = None,
    log_x: bool = False,
    log_y: bool = False,
) -> Chart:
    """Draw up to eight runs: `mm.compare("out/pretrain_512", "b/pretrain_512")`.

    Each source is what `History.load` takes; `x`, `y` and the rest are those of
    `plot_history`, with a `y` that every run has. Markers are validation, thin lines
    training. The legend names a run by its path, as far as the paths differ, and by the
    settings that differ. Raises ValueError for no run, more than eight, or an invalid
    choice, and what `History.load` raises.
    """
    if not 0 < len(sources) <= len(STYLES):
        raise ValueError(
            f"{len(sources)} runs to compare; expected 1 to {len(STYLES)}, for example "
            'mm.compare("out/pretrain_512", "other/pretrain_512").'
        )
    histories = [History.load(source) for source in sources]
    offered = [y_choices(history) for history in histories]
    common = [n for n in offered[0] if all(n in one for one in offered)]
    check_choices(x, y, [n for n in common if n != "expert_load"], smoothing)
    names = _name_runs([history.path.parent for history in histories])
    stages = dict.fromkeys(history.stage for history in histories)
    label = y_label(y, stages)
    figure, axes = blank_chart(x, label, height=4.8 + 0.21 * len(names))
    handles, smoothed = [], ""
    for history, (color, marker) in zip(histories, STYLES, strict=False):
        train, validation = (read_curve(history, k, x, y) for k in ("train", "eval"))
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
    subtitle = f"with markers: validation · thin: training{smoothed}"
    if len(stages) > 1:
        subtitle += f" · stages {', '.join(stages)}: their values do not compare"
    title = f"{label.partition(' (')[0]} of {len(names)} run{'s' * (len(names) > 1)}"
    write_titles(axes, title, subtitle)
    return figure


def _add_legend(figure: Chart, handles: list[Any], names: list[str]) -> None:
    """Add one line a run below the axes, where it hides no curve."""
    place: Any = {"loc": "outside lower left", "edgecolor": "none", "labelcolor": INK}
    legend = figure.legend(handles, ["run"] * len(names), fontsize=9, **place)
    lines = [shorten(name, LEGEND_COLUMNS) for name in names]
    shown, font = legible("\n".join(lines))
    for text, line in zip(legend.get_texts(), shown.split("\n"), strict=True):
        # Set afterwards, since a label that begins with "_" would be left out.
        text.set(text=line, parse_math=False, **font)


def _name_runs(folders: Sequence[Path]) -> list[str]:
    """Return for each run its path below their common folder, and its settings.

    If explicit settings differ, the defaults that follow from them are left out.
    """
    paths = [folder.resolve() for folder in folders]
    common = os.path.commonpath([path.parent for path in paths])
    configs = [_read_config(path) for path in paths]
    settings = [config["settings"] for config in configs]
    names = dict.fromkeys(name for one in settings for name in one)
    differing = [
        name
        for name in names
        if name not in PLACES and len({repr(one.get(name)) for one in settings}) > 1
    ]
    explicit = {name for config in configs for name in config["explicit"]}
    listed = [name for name in differing if name in explicit] or differing
    labels = []
    for path, one in zip(paths, settings, strict=True):
        parts = [f"{n} {_value(one[n])}" for n in listed if one.get(n) is not None]
        end = f": {', '.join(parts)}" if parts else ""
        labels.append(f"{os.path.relpath(path, common)}{end}")
    return labels


def _read_config(folder: Path) -> dict[str, Any]:
    """Return settings and explicit names; a curve needs the metrics only."""
    try:
        config = RunFolder(folder).read_config()
        return {"settings": dict(config["settings"]), "explicit": [*config["explicit"]]}
    except (OSError, ValueError, KeyError, TypeError):
        return {"settings": {}, "explicit": []}


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value}"
