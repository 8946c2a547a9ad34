"""A run's curve with controls; a plain picture where widgets do not load."""

import base64
import os
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from .metrics import History
from .plots import figure_png, plot_history, suggest_smoothing
from .progress import describe_end, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

X_CHOICES = (("step", "step"), ("text tokens", "tokens"), ("minutes", "minutes"))
Y_CHOICES = (("loss", "loss"), ("perplexity", "perplexity"))


class Inspector:
    """The chart of a run with smoothing, log axes, and a choice of both axes.

    `source` is a run folder, a metrics file, a `Run` or a `History`. The picture is
    drawn in the kernel at every change. A notebook saved with it holds the widgets
    and, beside them, the picture as it is when the cell shows it, for readers that
    know no widgets. Raises what `History.load` raises.

    Attributes: `history`; the controls `smoothing`, `log_x`, `log_y`, `x`, `y` and
    `reload` (reads what a running training has added); `image`, whose `value` is the
    PNG; and `panel`, which holds them all.
    """

    def __init__(self, source: "str | os.PathLike[str] | History") -> None:
        self.history = History.load(source)
        rows = len(self.history.select("train"))
        self.smoothing = widgets.FloatSlider(
            value=suggest_smoothing(rows),
            min=0.0,
            max=0.99,
            step=0.01,
            description="smoothing",
            continuous_update=False,  # a drawing takes 0.2 s; a drag would queue them
            layout=widgets.Layout(width="330px"),
        )
        self.x = _choice(X_CHOICES)
        self.y = _choice(Y_CHOICES)
        self.log_x = _check("log x")
        self.log_y = _check("log y")
        self.reload = widgets.Button(
            description="reload", tooltip="read what the run has added since"
        )
        self.image = widgets.Image(
            format="png", layout=widgets.Layout(max_width="100%", width="840px")
        )
        self.controls: dict[str, Any] = {
            "smoothing": self.smoothing,
            "log_x": self.log_x,
            "log_y": self.log_y,
            "x": self.x,
            "y": self.y,
        }
        self.panel = widgets.VBox(
            [
                widgets.HBox([widgets.Label("x"), self.x, widgets.Label("y"), self.y]),
                widgets.HBox([self.smoothing, self.log_x, self.log_y, self.reload]),
                self.image,
            ]
        )
        for control in self.controls.values():
            control.observe(self._redraw, names="value")
        self.reload.on_click(self._redraw)
        self._redraw()

    def _redraw(self, *_: object) -> None:
        self.history.refresh()
        self.image.value = figure_png(self.figure())

    def figure(self) -> "Figure":
        """The chart as the controls stand, to save or to change."""
        choices = {name: control.value for name, control in self.controls.items()}
        return plot_history(self.history, **choices)

    def _repr_mimebundle_(self, **_: object) -> dict[str, object]:
        """The widgets, and a PNG and a line of text for who cannot show them."""
        shown: Any = self.panel._repr_mimebundle_()
        bundle: dict[str, object] = dict(shown)
        bundle["image/png"] = base64.b64encode(self.image.value).decode("ascii")
        bundle["text/plain"] = repr(self)
        return bundle

    def __repr__(self) -> str:
        words = describe_end(measure(self.history), "")
        return f"Inspector of {self.history.path.parent.name}: {words}"


def inspect(source: "str | os.PathLike[str] | History") -> Inspector:
    """Look at a run's curve with controls: `mm.inspect("out/pretrain_512")`."""
    return Inspector(source)


def _choice(options: tuple[tuple[str, str], ...]) -> widgets.ToggleButtons:
    return widgets.ToggleButtons(options=options, style={"button_width": "auto"})


def _check(description: str) -> widgets.Checkbox:
    return widgets.Checkbox(
        description=description, indent=False, layout=widgets.Layout(width="80px")
    )
