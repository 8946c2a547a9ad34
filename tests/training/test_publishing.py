"""Runs go to the Hub beside a training, and come back elsewhere."""

import functools
import io
import os
import re
import sys
import types
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import http_backoff
from support.hub import TOKEN, Hub, standing_in
from support.runs import Settings, logged, state_hashes, train_here, tree

import minimind_nb as mm
from minimind_nb.hub import download_run, find_token
from minimind_nb.monitor import publishing
from minimind_nb.monitor.metrics import History
from minimind_nb.storage.run_folder import NoGoodCheckpoint, RunFolder
from minimind_nb.training.run_plan import RunPlan

PLACE = "hf:me/cat"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with standing_in() as hub:
        yield hub


@pytest.fixture
def saved(settings: Settings) -> RunFolder:
    """A finished run of two steps."""
    return train_here({**settings, "max_steps": 2})[1]


class Finish:
    """An event that is set after one wait, which it records."""

    waited = 0.0

    def is_set(self) -> bool:
        return self.waited > 0

    def wait(self, seconds: float) -> None:
        self.waited = seconds


def follow(folder: RunFolder) -> list[str]:
    """Publish a run twice as the process beside it does, and return what it said."""
    plan, said, finish = RunPlan.read(folder), [], Finish()
    plan.config["settings"] |= {"publish": PLACE, "publish_minutes": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing, "Follower", lambda *given: given)
        given: Any = publishing.publisher(History(folder.metrics_file), plan.cfg)
    *_, work, history, cfg, token = given
    work(finish, said.append, history, cfg, token)
    assert finish.waited == 30
    return said


@pytest.mark.usefixtures("forked")
def test_a_published_run_resumed_elsewhere_equals_an_unbroken_one(
    hub: Hub, settings: Settings, tmp_path: Path
) -> None:
    _, unbroken = train_here({**settings, "out_dir": str(tmp_path / "unbroken")})
    first = {**settings, "max_session_hours": 1e-6, "publish": PLACE}
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        run = mm.train(mm.TrainConfig(**first))
        print(run, run.config, mm.TrainConfig(**first))
    assert run.status == "time_budget"
    step = re.findall(r"step_\d{8}", " ".join(hub.files["me/cat"]))[0]
    files = hub.files["me/cat"]
    assert hub.private == {"me/cat": True}
    assert f"step {int(step[5:])} of its pretrain run" in files["README.md"].decode()
    assert {"run/summary.md", "run/config.json"} <= files.keys()
    assert not [name for name in files if name.endswith((".log", ".pth"))]
    assert said.getvalue().count(f"published at {hub.address}/me/cat") == 1

    elsewhere = {**settings, "out_dir": str(tmp_path / "b"), "resume": PLACE}
    status, resumed = train_here(elsewhere)
    assert (status, resumed.root.name) == ("finished", "pretrain_32")
    assert state_hashes(resumed) == state_hashes(unbroken)
    mm.publish(resumed.root, PLACE)
    # A reader never sees half of a state: the old one goes in the commit of the new.
    parts = {part["value"].get("path"): part["key"] for part in hub.commits[-1]}
    new = "step_00000012/model.safetensors"
    assert parts[f"run/checkpoints/{step}/model.safetensors"] == "deletedFile"
    assert parts[f"run/checkpoints/{new}"] == "lfsFile"
    written = tree(tmp_path) | files
    assert len(written) > 50
    assert not [name for name, data in written.items() if TOKEN.encode() in data]
    assert TOKEN not in said.getvalue()


def test_a_published_model_has_a_card_and_keeps_it(
    hub: Hub, saved: RunFolder, tmp_path: Path
) -> None:
    address = mm.publish(saved.root, PLACE, private=False, license="mit")
    files = hub.files["me/cat"]
    assert address == f"{hub.address}/me/cat" and not hub.private["me/cat"]
    card = files["README.md"].decode()
    assert card.startswith('---\nlicense: "mit"\n')
    loss = History(saved.metrics_file).select("eval")[-1]["loss"]
    assert f"validation loss: {loss:.3f}" in card and "step 2 of" in card
    assert 'from_pretrained("me/cat")' in card
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(files[name])
    model, _ = mm.load(tmp_path)
    ours, _ = mm.load(saved.root)
    weights = zip(*map(list_weights, (model, ours)), strict=True)
    assert all((a == b).all() for a, b in weights)
    assert follow(saved) == [f"published at {address}"]
    assert hub.files["me/cat"]["README.md"].decode() == card


def list_weights(model: mm.MiniMindForCausalLM) -> list:
    return [parameter for _, parameter in sorted(model.named_parameters())]


def test_another_model_and_a_later_state_are_left_alone(
    hub: Hub, saved: RunFolder
) -> None:
    refused = "hf:me/cat holds another model, and was left as it is: choose a new name"
    theirs = {"README.md": b"", "model.safetensors": b"someone's"}
    hub.files["me/cat"] = dict(theirs)
    (said,) = follow(saved)
    assert said.startswith(f"not published ({refused}); the training is not affected")
    assert 'pretrain_32", "hf:me/cat") does it later' in said
    config = saved.config_file.read_bytes()
    theirs["run/config.json"] = config.replace(b'"run": "', b'"run": "0')
    hub.files["me/cat"] = dict(theirs)
    with pytest.raises(RuntimeError, match=refused):
        mm.publish(saved.root, PLACE)
    assert hub.files["me/cat"] == theirs and not hub.commits
    later = {"run/checkpoints/step_00000009/manifest.json": b""}
    hub.files["me/cat"] = {"run/config.json": config, **later}
    refused = 'at step_00000009, this run at step_00000002: resume="hf:me/cat"'
    with pytest.raises(RuntimeError, match=refused):
        mm.publish(saved.root, PLACE)


def test_a_hub_that_refuses_is_reported_once_without_the_token(
    hub: Hub, saved: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.mood = 403
    (said,) = follow(saved)
    assert re.match(r"not published \(hf:me/cat cannot be opened: .*403 .*right", said)
    assert (
        "Traceback" in (shown := capfd.readouterr().out) and TOKEN not in said + shown
    )


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_hub_that_never_answers_holds_nothing_up(
    hub: Hub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.mood = "deaf"
    monkeypatch.setattr(publishing, "FINISH_SECONDS", 1.0)
    with logged() as texts:
        run = mm.train(mm.TrainConfig(**settings, publish=PLACE), view=False)
    assert run.status == "finished"
    assert texts[-1].startswith(
        "publishing failed or did not finish in time; the train"
    )


def test_a_hub_that_dies_during_an_upload_gets_nothing(
    hub: Hub, saved: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(saved.root)
    once = functools.partial(http_backoff, max_retries=0)
    monkeypatch.setattr("huggingface_hub.lfs.http_backoff", once)
    hub.mood = "dying"
    with pytest.raises(RuntimeError, match="Error while uploading"):
        mm.publish(saved.root, PLACE)
    assert hub.files["me/cat"].keys() == {".gitattributes"}
    assert tree(saved.root) == before


def test_only_known_files_of_a_strangers_repository_are_taken(
    hub: Hub, saved: RunFolder, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="cannot be opened: .*404.* Check its name"):
        download_run(PLACE, tmp_path)
    hub.files["me/cat"] = {"README.md": b""}
    with pytest.raises(FileNotFoundError, match="has no run that could be resumed"):
        download_run(PLACE, tmp_path)
    assert follow(saved) == [f"published at {hub.address}/me/cat"]
    files = hub.files["me/cat"]
    evil = "run/x.pth run/../../x.json run/tokenizer/../../../x.json run/code.py x.pkl"
    files |= dict.fromkeys(evil.split(), b"x")
    downloaded = tree(download_run(PLACE, tmp_path / "cache"))
    own = tree(saved.root)
    assert {"config.json", "rank0.json", "tokenizer/tokenizer.json"} < downloaded.keys()
    assert all(own[name] == data for name, data in downloaded.items())
    weights = next(name for name in files if name.endswith("optimizer.safetensors"))
    files[weights] = files[weights][:-1] + b"!"
    with pytest.raises(NoGoodCheckpoint, match="wrong sha256"):
        download_run(PLACE, tmp_path / "cache")


def test_a_token_is_asked_for_before_anything_starts(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", os.devnull)
    needed = (
        "publishing to hf:me/cat needs a token with the right to write: set HF_TOKEN"
    )
    with pytest.raises(ValueError, match=needed):
        mm.train(mm.TrainConfig(**settings, publish=PLACE), view=False)
    assert not Path(settings["out_dir"]).exists()
    assert find_token() is None

    class UserSecretsClient:
        def get_secret(self, name: str) -> str:
            return f"{name} of Kaggle\n"

    secrets = types.ModuleType("kaggle_secrets")
    vars(secrets)["UserSecretsClient"] = UserSecretsClient
    monkeypatch.setitem(sys.modules, "kaggle_secrets", secrets)
    assert find_token(PLACE) == "HF_TOKEN of Kaggle"


@pytest.mark.parametrize("place", ["me/cat", "hf:cat", "hf:../cat", "hf:me/a/b"])
def test_a_place_has_one_form(place: str, tmp_path: Path) -> None:
    expected = re.escape(f'publish={place!r} is not of the form "hf:USER/NAME"')
    with pytest.raises(ValueError, match=expected):
        mm.publish(tmp_path, place)
