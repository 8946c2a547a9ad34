"""What is mounted is found by its name, in both of Kaggle's layouts."""

import json
from pathlib import Path

import pytest

from minimind_nb.config import TrainConfig
from minimind_nb.storage.inputs import find_input, find_inputs, input_runs

LAYOUTS = ("notebooks/ann/minimind-{}/out", "minimind-{}/out")


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
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"settings": {"stage": stage}}))
    return run


def test_a_file_is_found_below_the_inputs_by_its_name(mount):
    file = mount / "datasets" / "ann" / "texts" / "a [1].jsonl"
    file.parent.mkdir(parents=True)
    file.touch()
    assert find_input("a [1].jsonl") == str(file)
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
    with pytest.raises(ValueError, match="c.jsonl may mean several of the inputs"):
        find_input("c.jsonl")
    assert find_input("two/c.jsonl") == str(mount / "two" / "c.jsonl")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_from_the_version_before(mount, layout):
    cfg = TrainConfig(data_path="demo")
    assert find_inputs(cfg) == cfg
    run = leave_run(mount / layout.format("pretrain"), "pretrain", "pretrain_512")
    assert input_runs() == input_runs("pretrain", "pretrain_512") == [run]
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
    with pytest.raises(ValueError, match='resume="auto" may mean several'):
        find_inputs(TrainConfig(data_path="demo"))
    with pytest.raises(ValueError, match='init_from="auto" may mean several'):
        find_inputs(TrainConfig(stage="sft", data_path="demo"))


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
    assert input_runs() == []
