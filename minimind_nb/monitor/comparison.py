"""Several runs on one figure, with a legend of the settings that differ."""

import os
from pathlib import Path
from typing import Any

from ..storage.run_folder import RunFolder
from . import charts
from .charts import Chart
from .metrics import History
from .tables import shorten

# Okabe and Ito's palette (Color Universal Design, 2008), its yellow being too faint on
# white. Each colour has a marker of its own, which says the same again.
STYLES = [
    *(("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D")),
    *(("#222222", "v"), ("#E69F00", "P"), ("#56B4E9", "X"), ("#888888", "*")),
]
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
    `plot_history`, with a `y` that every run has. The legend names a run by its path
    and settings, as far as they differ. Raises ValueError for no run, more than eight,
    or an invalid choice, and what `History.load` raises.
    """
    if not 0 < len(sources) <= len(STYLES):
        raise ValueError(
            f"{len(sources)} runs to compare; expected 1 to {len(STYLES)}, for example "
            'mm.compare("out/pretrain_512", "other/pretrain_512").'
        )
    histories = [History.load(source) for source in sources]
    offered = [charts.y_choices(history) for history in histories]
    common = [n for n in offered[0] if all(n in one for one in offered)]
    charts.check_choices(x, y, [n for n in common if n != "expert_load"])
    stages = list(dict.fromkeys(history.stage for history in histories))
    name = charts.Y_LABELS[y].partition(" (")[0]
    title = f"{name} of {len(histories)} run{'s' * (len(histories) > 1)}"
    subtitle = "with markers: validation · thin: training"
    if len(stages) > 1:
        subtitle += f" · stages {', '.join(stages)}: their values do not compare"
    height = 4.8 + 0.21 * len(histories)
    figure, axes = charts.blank_chart(x, y, stages[0], title, subtitle, height=height)
    handles = []
    for history, (color, marker) in zip(histories, STYLES, strict=False):
        weight = charts.choose_smoothing(history, smoothing)
        points = charts.read_curve(history, "train", x, y)
        charts.draw_curve(axes, *points, weight, color=color, lw=1, alpha=0.6)
        points = charts.read_curve(history, "eval", x, y)
        style = {"color": color, "marker": marker, "ms": 6, "lw": 1.8}
        handles += charts.draw_curve(axes, *points, **style)
    charts.scale(axes, histories, x, log_x, log_y)
    _add_legend(figure, handles, _name_runs([one.path.parent for one in histories]))
    return figure


def _add_legend(figure: Chart, handles: list[Any], names: list[str]) -> None:
    """Add one line a run below the axes."""
    # Named afterwards, since a name that begins with "_" would be left out.
    legend = figure.legend(handles, "-" * len(names), fontsize=9, **charts.LEGEND)
    for label, name in zip(legend.get_texts(), names, strict=True):
        text, font = charts.legible(shorten(name, LEGEND_COLUMNS))
        label.set(text=text, parse_math=False, **font)


def _name_runs(folders: list[Path]) -> list[str]:
    """Return each run's path below their common folder, and the settings that differ,
    of those that were set explicitly in one of the runs."""
    paths = [folder.resolve() for folder in folders]
    common = os.path.commonpath([path.parent for path in paths])
    files = [RunFolder(path) for path in paths]
    configs = [file.read_config() if file.exists() else {} for file in files]
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
