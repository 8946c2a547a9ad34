import math

from matplotlib.figure import Figure

from minimind_nb.monitor.scales import RoundTicks, bent_values, even_values, tick_text


def ticks_of(locator, low, high, scale="linear"):
    axes = Figure().add_subplot()
    axes.set_yscale(scale)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(locator)
    return sorted(locator())


def test_bent_values_are_round_and_few():
    assert bent_values(0.7, 9) == [0.8, 1, 2, 3, 4, 6, 8]
    assert bent_values(2, 9000) == [3, 10, 30, 100, 300, 1000, 3000]
    assert bent_values(-1, 5) == []
    assert len(bent_values(1, 1e30)) <= 8


def test_even_values_stay_inside():
    assert even_values(0.3, 8.8) == [2, 4, 6, 8]


def test_perplexity_ticks_beside_a_loss_axis():
    ticks = ticks_of(RoundTicks(math.exp, math.log), 1.0, 9.0)
    assert [round(math.exp(tick)) for tick in ticks] == [
        3, 10, 30, 100, 300, 1000, 3000
    ]  # fmt: skip


def test_ticks_too_close_together_are_left_out():
    forward = lambda value: math.log(max(value, 1.0))  # noqa: E731
    ticks = ticks_of(RoundTicks(forward, math.exp), 0.0, 7000.0)
    assert [round(forward(tick)) for tick in ticks] == [6, 8]


def test_a_logarithmic_axis_has_plain_ticks():
    assert ticks_of(RoundTicks(), 0.7, 9.0, "log") == [0.8, 1, 2, 3, 4, 6, 8]


def test_no_ticks_where_the_quantity_has_no_range():
    assert ticks_of(RoundTicks(lambda _: math.inf), 1, 2) == []


def test_tick_texts():
    texts = [tick_text(value) for value in (0.25, 8.5, 999.9999, 1800, 2e7, -3000)]
    assert texts == ["0.25", "8.5", "1,000", "1,800", "2e+07", "-3,000"]
