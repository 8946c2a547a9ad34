import base64
import gc
import json
import math
import re
import subprocess
import sys
import warnings

import pytest

from minimind_nb.monitor.charts import LARGEST_OUTPUT, Chart, inspect

PNG = b"\x89PNG\r\n\x1a\n"


def payload(html):
    """The data that the script of a chart reads."""
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', html)
    return json.loads(text)


def lines(chart):
    """The x and y values of the curves of its picture, in the order of drawing."""
    return [line.get_xydata().T.tolist() for line in chart.figure.axes[0].get_lines()]


@pytest.fixture(autouse=True)
def warnings_are_errors():
    gc.collect()  # what earlier tests left open is theirs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def history(make_history):
    return make_history([4.0, 3.0, 2.0], [(0, 4.5), (3, 2.5)])


def test_a_chart_is_a_page_a_picture_and_a_line(history):
    bundle = inspect(history)._repr_mimebundle_()
    assert set(bundle) == {"text/html", "image/png", "text/plain"}
    assert base64.b64decode(bundle["image/png"]).startswith(PNG)
    assert f"base64,{bundle['image/png']}" in bundle["text/html"]
    assert bundle["text/plain"].startswith("pretrain_64: step 3 of 100 · loss 2.000")
    assert bundle["text/plain"] in bundle["text/html"]


def test_the_page_holds_every_quantity_and_the_choices(history):
    page = inspect(history, x="tokens", y="perplexity", smoothing=0.5).html("a")
    assert "<img" not in page
    data = payload(page)
    assert (data["key"], data["title"]) == ("a", "pretrain_64")
    assert data["choices"] == {"x": "tokens", "y": "perplexity"}
    assert list(data["ys"]) == [
        *("loss", "perplexity", "bits_per_byte"),
        *("tokens_per_second", "peak_memory_gib"),
    ]
    assert data["runs"][0]["train"]["tokens"] == [4000, 8000, 12000]
    assert data["ys"]["loss"]["curves"][0]["mean"] == [4, 3, 2]


def test_a_running_training_needs_no_matplotlib():
    code = (
        "import sys; from minimind_nb.monitor import charts, metrics\n"
        "chart = charts.inspect(metrics.History('none'))\n"
        "chart.html(); print('matplotlib' in sys.modules)\n"
        "chart.png(); print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_the_picture_shows_training_and_validation(history, tmp_path):
    chart = inspect(history, x="tokens", smoothing=0.5)
    raw, smoothed, validation = [line for line in lines(chart) if line[0]]
    assert raw[1] == [4, 4, 3, 3, 2, 2]
    assert smoothed[0] == [4000, 8000, 12000]
    assert smoothed[1][1] == pytest.approx(10 / 3)
    assert validation == [[0, 12000], [4.5, 2.5]]
    axes = chart.figure.axes[0]
    assert axes.get_xlabel() == "text tokens"
    assert axes.get_ylabel() == "loss (nats per token)"
    axes.set_title("mine")  # is kept
    chart.savefig(tmp_path / "a.png", dpi=30)
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    assert chart.figure.axes[0].get_title() == "mine"


def test_preferences_have_a_loss_of_pairs_and_curves_of_their_own(preferences):
    data = payload(inspect(preferences).html())
    assert data["ys"]["loss"]["label"] == "loss (nats per pair)"
    assert "perplexity" not in data["ys"]
    assert {"reward_margin", "accuracy", "kl"} <= set(data["ys"])
    chart = inspect(preferences, y="kl")
    assert lines(chart)[-1] == [[3], [-0.0123]]
    assert chart.figure.axes[0].get_ylabel().startswith("KL divergence (estimate")


def test_the_picture_of_a_mixture_names_its_experts(mixture):
    (legend,) = inspect(mixture, y="expert_load").figure.legends
    names = [text.get_text().strip() for text in legend.get_texts()]
    assert names == [f"expert {n}" for n in range(4)]


def test_a_resume_and_values_that_are_not_finite_are_marked(make_history):
    history = make_history([4.0, math.nan, 2.0, 1.0], resume=2)
    drawn = lines(inspect(history))
    assert drawn[0][0] == [2, 2] and drawn[1][0] == [2]
    data = payload(inspect(history).html())
    assert data["runs"][0]["resume"]["step"] == [2]
    assert data["ys"]["loss"]["curves"][0]["mean"] == [4, "Infinity", 2, 1]
    assert data["subtitle"].endswith("dashed: resumed · ×: not finite")


@pytest.mark.parametrize(
    "losses", [[], [3.0], [math.nan], [0.0], [-1.0, 1e199], [800.0]]
)
def test_odd_histories_draw_without_a_warning(make_history, losses):
    history = make_history(losses, [(0, 8.8)] if losses else [])
    for y in ("loss", "perplexity"):
        chart = inspect(history, y=y)
        assert chart.png(30).startswith(PNG)
        assert payload(chart.html())["choices"]["y"] == y


@pytest.mark.parametrize("title", ["预训练 512", "a_$_b$", "_<b>1</b></script>"])
def test_odd_titles_are_shown_as_text(make_history, title):
    chart = inspect(make_history([3.0, 2.0]))
    chart.title = title
    chart.png(30)
    page = chart.html()
    assert "<b>1" not in page
    assert payload(page)["title"] == title


def test_choices_that_do_not_exist_are_refused(history, preferences):
    with pytest.raises(ValueError, match="x='epoch' is not a choice of this chart"):
        inspect(history, x="epoch")
    with pytest.raises(ValueError, match="y='kl' is not .*'loss' or 'perplexity'"):
        inspect(history, y="kl")
    with pytest.raises(ValueError, match="y='perplexity' is not .* or 'kl'"):
        inspect(preferences, y="perplexity")


def test_many_long_runs_stay_below_the_largest_output(make_history):
    history = make_history()
    history.rows = [
        {
            "kind": "train",
            "step": n,
            "tokens": 32_768 * n,
            "seconds": n / 3,
            "loss": loss,
        }
        | {"grad_norm": 1 / n, "learning_rate": loss / n, "tokens_per_second": n / 7}
        | {"peak_memory_gib": [n / 3, n / 7], "accuracy": loss, "kl": loss}
        for n in range(1, 3_001)
        for loss in [math.sin(n) ** 2]
    ]
    page = Chart([history] * 8).html(picture=b"0" * 30_000)
    assert 0.6 * LARGEST_OUTPUT < len(page.encode()) + 40_000 < LARGEST_OUTPUT
