"""The curve of a run with controls; a plain picture where widgets do not load."""

import base64
import os
from typing import Any

import ipywidgets as widgets

from . import charts
from .metrics import History
from .progress import outcome


class Inspector:
    """The chart of a run with controls; `inspect` makes one.

    Every change draws the picture again in the kernel, with new rows of a running
    training. A saved notebook also holds the picture as the cell showed it. `controls`
    are the widgets by name, `image` is the PNG, and `panel` holds all.
    """

    def __init__(self, history: History, y: str, x: str) -> None:
        self.history = history
        choices = charts.y_choices(history)
        charts.check_choices(x, y, choices)
        narrow = {"button_width": "auto"}
        self.controls: dict[str, Any] = {
            "x": widgets.ToggleButtons(
                options=list(charts.X_AXES), value=x, style=narrow
            ),
            "y": widgets.ToggleButtons(options=choices, value=y, style=narrow),
            "smoothing": widgets.FloatSlider(
                value=charts.choose_smoothing(history),
                max=0.99,
                step=0.01,
                description="smoothing",
                continuous_update=False,  # a drawing takes 0.2 s; a drag would queue
            ),
            "log_x": widgets.Checkbox(description="log x", indent=False),
            "log_y": widgets.Checkbox(description="log y", indent=False),
        }
        self.image = widgets.Image(format="png", layout={"max_width": "100%"})
        controls = [*self.controls.values()]
        rows = [widgets.HBox(controls[:2]), widgets.HBox(controls[2:]), self.image]
        self.panel = widgets.VBox(rows)
        for control in controls:
            control.observe(self._redraw, names="value")
        self._redraw()

    def _redraw(self, *_: object) -> None:
        self.history.refresh()
        self.image.value = self.figure().png()

    def figure(self) -> charts.Chart:
        """Return the chart with the current choices, to save or to change."""
        choices = {name: control.value for name, control in self.controls.items()}
        return charts.plot_history(self.history, **choices)

    def _repr_mimebundle_(self, **_: object) -> dict[str, object]:
        """Return the widgets, and a PNG and a line of text for other viewers."""
        widget: Any = self.panel._repr_mimebundle_()
        picture = base64.b64encode(self.image.value).decode()
        return {**widget, "image/png": picture, "text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"Inspector of {self.history.path.parent.name}: {outcome(self.history)}"


def inspect(
    source: str | os.PathLike[str] | History, *, y: str = "loss", x: str = "step"
) -> Inspector:
    """Show a run's curve with smoothing, log axes and a choice of both axes.

    `source` is what `History.load` takes: `mm.inspect("out/pretrain_512")`; `y` and `x`
    are those of `plot_history`. Raises what these raise.
    """
    return Inspector(History.load(source), y, x)
