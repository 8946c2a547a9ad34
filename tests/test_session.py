from pathlib import Path

import pytest

from minimind_nb import session
from minimind_nb.session import Session, current_session

KAGGLE = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}


def test_kaggle_is_known_by_its_run_type():
    interactive = current_session(KAGGLE)
    assert (interactive.kind, interactive.batch) == ("kaggle", False)
    batch = current_session({"KAGGLE_KERNEL_RUN_TYPE": "Batch"})
    assert (batch.kind, batch.batch) == ("kaggle", True)
    assert batch.scratch == Path("/kaggle/temp")
    assert batch.inputs == Path("/kaggle/input")


def test_an_api_key_on_a_laptop_is_no_kaggle():
    assert current_session({"KAGGLE_USERNAME": "x", "KAGGLE_KEY": "y"}).kind == "plain"


def test_colab_is_known_by_its_release_tag():
    assert current_session({"COLAB_RELEASE_TAG": "r1"}) == Session("colab")


def test_the_environment_of_this_process_is_the_default(monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "r1")
    assert current_session().kind == "colab"


def test_what_can_be_made_again_is_kept_out_of_kaggles_saved_folder():
    cache = current_session(KAGGLE).cache_folder("/kaggle/working/out")
    assert cache == Path("/kaggle/temp/minimind_nb")
    assert Session("plain").cache_folder("runs") == Path("runs/cache")


def test_a_session_on_kaggle_ends_with_a_margin_unless_set():
    kaggle = current_session(KAGGLE)
    assert kaggle.hours(None) == 11.5
    assert kaggle.hours(9.0) == 9.0
    assert Session("colab").hours(None) is None


def test_a_plain_session_starts_with_the_call():
    assert Session("plain").seconds_left(None) is None
    assert Session("plain").seconds_left(0.5) == 1800.0


@pytest.mark.parametrize("kind", ["kaggle", "colab"])
def test_a_hosted_sessions_clock_started_with_the_session(kind, monkeypatch):
    monkeypatch.setattr(session, "oldest_age_seconds", lambda: 600.0)
    assert Session(kind).seconds_left(1.0) == 3000.0
