"""Ticks at round numbers, also of a quantity that an axis only implies."""

import math
from collections.abc import Callable

from matplotlib.axis import Axis
from matplotlib.ticker import Locator, MaxNLocator

MOST_TICKS = 8
TICK_ROOM = 1 / 16  # of the axis: the height of two labels in a chart of 4.6 inches


class RoundTicks(Locator):
    """Ticks where another quantity is round, at least 1/16 of the axis apart.

    `forward` turns the axis' quantity into the other one, `back` undoes it; the
    axis may be logarithmic. Evenly spaced numbers or 1, 2, 5, 10: whichever leaves
    more ticks on this axis.
    """

    def __init__(
        self,
        forward: Callable[[float], float] = float,
        back: Callable[[float], float] = float,
    ) -> None:
        self._forward, self._back = forward, back

    def __call__(self) -> list[float]:
        assert self.axis is not None
        low, high = sorted(self.axis.get_view_interval())
        return self.tick_values(low, high)

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        low, high = self._forward(vmin), self._forward(vmax)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            return []
        even, bent = (
            self._thin_out([self._back(value) for value in values], vmin, vmax)
            for values in (even_values(low, high), bent_values(low, high))
        )
        return even if len(even) >= len(bent) else bent

    def _thin_out(self, ticks: list[float], vmin: float, vmax: float) -> list[float]:
        """The ticks from the top down, without those too close to the one before."""
        assert isinstance(self.axis, Axis)
        place = self.axis.get_transform().transform
        room = abs(place(vmax) - place(vmin)) * TICK_ROOM
        kept: list[float] = []
        for tick in reversed(ticks):
            if not kept or abs(place(kept[-1]) - place(tick)) >= room:
                kept.append(tick)
        return kept


def even_values(low: float, high: float) -> list[float]:
    """Round numbers from low to high at equal distances."""
    values = MaxNLocator(MOST_TICKS, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(value) for value in values if low <= value <= high]


def bent_values(low: float, high: float) -> list[float]:
    """Round numbers from low to high at roughly equal ratios; none below zero."""
    if low <= 0:
        return []
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 3, 4, 6, 8), (1, 2, 5), (1, 3), (1,)):
        values = [digit * 10.0**decade for decade in decades for digit in digits]
        values = [value for value in values if low <= value <= high]
        if len(values) <= MOST_TICKS:
            return values
    return values[:: math.ceil(len(values) / MOST_TICKS)]


def tick_text(value: float) -> str:
    """A tick label: 0.25, 8.5, 1,800, 2e+07."""
    if abs(value) >= 1e7:  # noqa: PLR2004
        return f"{value:.0e}"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.4g}"  # noqa: PLR2004
