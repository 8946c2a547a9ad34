import base64

import pytest

from minimind_nb.monitor.inspector import inspect

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def inspector(make_history):
    return inspect(make_history([5.0, 4.0, 4.5, 3.0, 3.5], [(0, 6.0), (5, 3.2)]))


def test_every_control_changes_the_picture(inspector):
    pictures = {bytes(inspector.image.value)}
    choices = {
        "smoothing": 0.9, "x": "tokens", "y": "perplexity", "log_y": True, "log_x": True
    }  # fmt: skip
    for name, value in choices.items():
        inspector.controls[name].value = value
        pictures.add(bytes(inspector.image.value))
    assert len(pictures) == 1 + len(choices)
    assert all(picture.startswith(PNG) for picture in pictures)


def test_a_change_also_shows_what_the_run_has_added(inspector, add_rows):
    add_rows(type(inspector.history)(inspector.history.path), 6)
    inspector.controls["x"].value = "minutes"
    assert inspector.history.last("train")["step"] == 6


def test_readers_without_widgets_find_the_picture_as_it_is(inspector):
    inspector.controls["smoothing"].value = 0.8
    bundle = inspector._repr_mimebundle_(include=None, exclude=None)
    view = bundle["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == inspector.panel.model_id
    assert base64.b64decode(bundle["image/png"]) == inspector.image.value
    assert bundle["text/plain"] == repr(inspector)
    assert repr(inspector).startswith("Inspector of pretrain_64: step 5 of 100 · loss")


def test_what_can_be_looked_at_is_what_the_run_has(inspector, preferences, mixture):
    def options(history):
        return inspect(history).controls["y"].options

    assert inspector.controls["y"].options == ("loss", "perplexity")
    assert options(preferences) == ("loss", "reward_margin", "accuracy", "kl")
    assert options(mixture) == ("loss", "perplexity", "expert_load")
