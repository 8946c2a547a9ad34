"""A run's curve with controls; a plain picture where widgets do not load."""

import base64
import os
from typing import Any

import ipywidgets as widgets

from .charts import (
    X_AXES,
    Chart,
    check_choices,
    offered,
    plot_history,
    suggest_smoothing,
)
from .metrics import History
from .progress import outcome


class Inspector:
    """The chart of a run with smoothing, log axes, and a choice of both axes.

    `source` is what `History.load` takes. The picture is drawn in the kernel at every
    change, with what a running training has added. A saved notebook also holds the
    picture as it was when the cell showed it.

    Attributes: `history`; `controls`, the widgets by name (`smoothing`, `log_x`,
    `log_y`, `x`, `y`); `image`, whose `value` is the PNG; `panel`, which holds all.
    """

    def __init__(
        self,
        source: "str | os.PathLike[str] | History",
        *,
        y: str = "loss",
        x: str = "step",
    ) -> None:
        self.history = History.load(source)
        choices = offered(self.history)
        check_choices(x, y, choices, None)
        narrow = {"button_width": "auto"}
        self.controls: dict[str, Any] = {
            "x": widgets.ToggleButtons(options=list(X_AXES), value=x, style=narrow),
            "y": widgets.ToggleButtons(options=choices, value=y, style=narrow),
            "smoothing": widgets.FloatSlider(
                value=suggest_smoothing(len(self.history.select("train"))),
                max=0.99,
                step=0.01,
                description="smoothing",
                continuous_update=False,  # a drawing takes 0.2 s; a drag would queue
            ),
            "log_x": widgets.Checkbox(description="log x", indent=False),
            "log_y": widgets.Checkbox(description="log y", indent=False),
        }
        self.image = widgets.Image(format="png", layout={"max_width": "100%"})
        axes, others = [*self.controls.values()][:2], [*self.controls.values()][2:]
        rows = [widgets.HBox(axes), widgets.HBox(others), self.image]
        self.panel = widgets.VBox(rows)
        for control in self.controls.values():
            control.observe(self._redraw, names="value")
        self._redraw()

    def _redraw(self, *_: object) -> None:
        self.history.refresh()
        self.image.value = self.figure().png()

    def figure(self) -> Chart:
        """The chart as the controls stand, to save or to change."""
        choices = {name: control.value for name, control in self.controls.items()}
        return plot_history(self.history, **choices)

    def _repr_mimebundle_(self, **_: object) -> dict[str, object]:
        """The widgets, and a PNG and a line of text for who cannot show them."""
        widget: Any = self.panel._repr_mimebundle_()
        picture = base64.b64encode(self.image.value).decode()
        return {**widget, "image/png": picture, "text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"Inspector of {self.history.path.parent.name}: {outcome(self.history)}"


def inspect(
    source: "str | os.PathLike[str] | History", *, y: str = "loss", x: str = "step"
) -> Inspector:
    """Look at a run's curve with controls: `mm.inspect("out/pretrain_512")`.

    `y` and `x` are what it shows at first, of what `plot_history` takes. Raises
    ValueError for a choice that does not exist, and what `History.load` raises.
    """
    return Inspector(source, y=y, x=x)
