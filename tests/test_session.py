"""The session: where it is, when it ends, and what is found by its name in the inputs."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import minimind_nb as mm
from minimind_nb import session
from minimind_nb.config import TrainConfig
from minimind_nb.session import (
    Session,
    current_session,
    find_input,
    find_inputs,
    runs_below,
)

KAGGLE = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}
LAYOUTS = ("notebooks/ann/minimind-{}/out", "minimind-{}/out")


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


def test_what_can_be_made_again_is_kept_out_of_kaggles_saved_folder():
    cache = current_session(KAGGLE).cache_folder("/kaggle/working/out")
    assert cache == Path("/kaggle/temp/minimind_nb")
    assert Session("plain").cache_folder("runs") == Path.cwd() / "runs/cache"


def test_a_session_on_kaggle_ends_with_a_margin_unless_set(monkeypatch):
    monkeypatch.setattr(session, "oldest_age_seconds", lambda: 0.0)
    kaggle = current_session(KAGGLE)
    assert kaggle.seconds_left(None) == 11.5 * 3600
    assert kaggle.seconds_left(9.0) == 9.0 * 3600
    assert Session("colab").seconds_left(None) is None


def test_a_plain_session_starts_with_the_call():
    assert Session("plain").seconds_left(None) is None
    assert Session("plain").seconds_left(0.5) == 1800.0


@pytest.mark.parametrize("kind", ["kaggle", "colab"])
def test_a_hosted_sessions_clock_started_with_the_session(kind, monkeypatch):
    monkeypatch.setattr(session, "oldest_age_seconds", lambda: 600.0)
    assert Session(kind).seconds_left(1.0) == 3000.0


def test_a_program_that_executes_notebooks_makes_a_batch_run(monkeypatch):
    for answered in (True, False):
        parent = {"content": {"allow_stdin": answered}}
        kernel = SimpleNamespace(get_parent=lambda parent=parent: parent)
        monkeypatch.setattr(session, "running_kernel", lambda kernel=kernel: kernel)
        assert current_session({}) == Session("plain", batch=not answered)
        assert not current_session({"COLAB_RELEASE_TAG": "r1"}).batch


@pytest.fixture
def mount(tmp_path, monkeypatch):
    working, inputs = tmp_path / "working", tmp_path / "input"
    working.mkdir()
    inputs.mkdir()
    monkeypatch.chdir(working)
    monkeypatch.setenv("MINIMIND_NB_INPUTS", str(inputs))
    return inputs


def leave_run(out_dir, stage, name):
    run = out_dir / name
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"settings": {"stage": stage}}))
    return run


def test_a_file_is_found_below_the_inputs_by_its_name(mount):
    file = mount / "datasets" / "ann" / "texts" / "a [1].jsonl"
    file.parent.mkdir(parents=True)
    file.touch()
    assert find_input("a [1].jsonl") == str(file)
    assert find_input("texts/*.jsonl") == find_input("*[[]1].jsonl") == (str(file),)
    several = find_inputs(TrainConfig(data_path="a [1].jsonl, texts/a [1].jsonl"))
    assert several.data_path == (str(file), str(file))
    for path in (None, "demo", "auto", "b.jsonl", "/a [1].jsonl"):
        assert find_input(path) == path
    Path("a [1].jsonl").touch()
    assert find_input("a [1].jsonl") == "a [1].jsonl"


def test_a_path_that_leads_out_of_the_inputs_is_not_looked_for(mount):
    (mount.parent / "x.jsonl").touch()
    (mount / "data").mkdir()
    for path in ("../x.jsonl", "data/../../x.jsonl"):
        assert find_input(path) == path


def test_of_several_files_one_must_be_named(mount):
    for folder in ("one", "two"):
        (mount / folder).mkdir()
        (mount / folder / "c.jsonl").touch()
    with pytest.raises(ValueError, match="c.jsonl matches several of the inputs"):
        find_input("c.jsonl")
    assert find_input("two/c.jsonl") == str(mount / "two" / "c.jsonl")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_from_the_version_before(mount, layout):
    cfg = TrainConfig(data_path="demo")
    assert find_inputs(cfg) == cfg
    run = leave_run(mount / layout.format("pretrain"), "pretrain", "pretrain_512")
    assert runs_below(mount) == runs_below(mount, "pretrain", "pretrain_512") == [run]
    assert find_inputs(cfg).resume == str(run)
    assert find_inputs(TrainConfig(data_path="demo", resume=False)).resume is False
    assert find_inputs(TrainConfig(data_path="demo", run_name="b")).resume == "auto"
    leave_run(Path("out"), "pretrain", "pretrain_512")
    assert find_inputs(cfg) == cfg


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stage_begins_from_the_stage_before(mount, layout):
    cfg = TrainConfig(stage="sft", data_path="demo")
    before = leave_run(mount / layout.format("pretrain"), "pretrain", "pretrain_512")
    assert find_inputs(cfg).init_from == str(before)
    own = leave_run(mount / layout.format("sft"), "sft", "sft_512")
    goes_on = find_inputs(cfg)
    assert (goes_on.resume, goes_on.init_from) == (str(own), None)
    leave_run(Path("out"), "pretrain", "pretrain_512")
    anew = TrainConfig(stage="sft", data_path="demo", resume=False)
    assert find_inputs(anew).init_from is None


def test_of_several_runs_one_must_be_named(mount):
    for name in ("a", "b"):
        leave_run(mount / name, "pretrain", "pretrain_512")
    with pytest.raises(ValueError, match='resume="auto" matches several'):
        find_inputs(TrainConfig(data_path="demo"))
    with pytest.raises(ValueError, match='init_from="auto" matches several'):
        find_inputs(TrainConfig(stage="sft", data_path="demo"))


def test_data_that_is_not_attached_or_still_processed_says_what_to_do(mount):
    (mount / "datasets" / "ann" / "texts").mkdir(parents=True)
    words = "attach its data set with Add Input, or restart once it is processed"
    for path in ("corpus.jsonl", "texts"):
        cfg = mm.notebook_config("pretrain", {"data_path": path, "out_dir": "out"})
        with pytest.raises(FileNotFoundError, match=words) as error:
            mm.train(cfg, view=False)
        assert path in str(error.value) and "\n" not in str(error.value)
    assert not Path("out").exists()


def test_an_empty_output_of_a_version_does_not_start_the_run_over(mount):
    (mount / "notebooks" / "ann" / "minimind-pretrain").mkdir(parents=True)
    with pytest.raises(
        ValueError, match="minimind-pretrain is empty, .* last complete"
    ):
        find_inputs(TrainConfig(data_path="demo"))
    run = leave_run(mount / "a", "pretrain", "pretrain_512")
    assert find_inputs(TrainConfig(data_path="demo")).resume == str(run)


def test_a_run_that_was_set_aside_is_no_choice(mount):
    run = leave_run(mount / "a", "pretrain", "pretrain_512")
    leave_run(mount / "a", "pretrain", "pretrain_512.old1")
    assert find_inputs(TrainConfig(data_path="demo")).resume == str(run)


def test_where_nothing_is_mounted_nothing_changes(monkeypatch):
    monkeypatch.delenv("MINIMIND_NB_INPUTS", raising=False)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    cfg = TrainConfig(data_path="nowhere.jsonl")
    assert find_inputs(cfg) is cfg
    assert find_input("nowhere.jsonl") == "nowhere.jsonl"
    assert runs_below(None) == []
