import base64

import pytest
from matplotlib.figure import Figure

from minimind_nb.monitor.inspector import Inspector, inspect
from minimind_nb.monitor.metrics import MetricsLog

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def inspector(make_history):
    history = make_history([5.0, 4.0, 4.5, 3.0, 3.5], [(0, 6.0), (5, 3.2)])
    return inspect(history.path.parent)


def test_every_control_changes_the_picture(inspector):
    pictures = [bytes(inspector.image.value)]
    for name, value in (
        ("smoothing", 0.9), ("x", "tokens"), ("x", "minutes"), ("y", "perplexity"),
        ("log_y", True), ("log_x", True),
    ):  # fmt: skip
        inspector.controls[name].value = value
        pictures.append(bytes(inspector.image.value))
    assert all(picture.startswith(PNG) for picture in pictures)
    assert len(set(pictures)) == len(pictures)


def test_reload_reads_what_the_run_has_added(inspector):
    before = bytes(inspector.image.value)
    with MetricsLog(inspector.history.path) as log:
        log.append("train", step=6, loss=1.0)
    inspector.reload.click()
    assert inspector.image.value != before
    assert inspector.history.last("train")["step"] == 6


def test_readers_without_widgets_find_the_picture_as_it_is(inspector):
    inspector.smoothing.value = 0.8
    bundle = inspector._repr_mimebundle_(include=None, exclude=None)
    view = bundle["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == inspector.panel.model_id
    assert base64.b64decode(bundle["image/png"]) == inspector.image.value
    assert bundle["text/plain"] == repr(inspector)
    assert repr(inspector).startswith("Inspector of pretrain_64: step 5 of 100 (5 %)")


def test_the_figure_can_be_taken_away(inspector):
    inspector.y.value = "perplexity"
    figure = inspector.figure()
    assert isinstance(figure, Figure)
    assert figure.axes[0].get_ylabel().startswith("perplexity")


def test_a_history_is_taken_as_it_is(make_history):
    history = make_history([3.0])
    assert Inspector(history).history is history


def test_curves_of_a_folder_that_is_no_run_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="but no metrics.jsonl; expected a run"):
        inspect(tmp_path)
