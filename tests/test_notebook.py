"""The parameters of a notebook as a configuration, the runs it opens, the notebooks."""

import ast
from pathlib import Path
from typing import Any

import nbformat
import pytest

import minimind_nb as mm
from minimind_nb import notebook
from minimind_nb.config import STAGES, TrainConfig, kinds, resolve

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

OWN = (
    '# Parameters: None means the default.\ndata_path = "demo"\nlearning_rate = None\n'
)


def config(stage: str = "pretrain", **names: Any) -> TrainConfig:
    return mm.notebook_config(stage, names)


def test_globals_that_are_named_like_settings_are_settings():
    names = {"data_path": "a.jsonl", "epochs": 2, "batch_size": None, "asked": 3}
    expected = TrainConfig(stage="sft", data_path="a.jsonl", epochs=2, beta1=0.8)
    assert config("sft", **names, settings={"beta1": 0.8}) == expected


def test_own_data_has_the_defaults_of_the_stage_whatever_trial_is():
    assert config(data_path="a.jsonl", trial=True) == TrainConfig(data_path="a.jsonl")


def test_the_demo_has_its_preset_and_recipe_and_a_short_trial():
    whole = TrainConfig(data_path="demo", preset="demo", recipe="demo")
    assert config(data_path="demo", preset=None, trial=False) == whole
    trial = resolve(config(data_path="demo", preset=None, trial=True))
    assert (trial.max_steps, trial.log_interval, trial.recipe) == (12, 2, "demo")
    for stage in ("sft", "dpo"):
        assert config(stage, data_path="demo").recipe == f"demo-{stage}"


def test_what_is_given_goes_before_the_demo_even_none():
    cfg = config(data_path="demo", trial=True, max_steps=30, preset="minimind2-small")
    assert (cfg.max_steps, cfg.log_interval, cfg.preset) == (30, 2, "minimind2-small")
    whole: dict[str, Any] = dict.fromkeys(["max_steps", "log_interval", "recipe"])
    cfg = config(data_path="demo", trial=True, **whole)
    assert cfg == TrainConfig(data_path="demo", preset="demo")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta3": 0.9}, "unknown setting 'beta3'; did you mean"),
        ({"epochs": 3}, "epochs: set as a parameter and in settings; leave one out"),
        ("{'beta1': 0.8}", 'expected a dict like {"max_steps": 3}'),
    ],
)
def test_settings_that_are_unknown_or_given_twice_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        config(data_path="a.jsonl", epochs=2, settings=settings)


def test_settings_may_be_text_as_papermill_gives_them():
    cfg = config(data_path="a.jsonl", settings='{"beta1": 0.8}')
    assert cfg == TrainConfig(data_path="a.jsonl", beta1=0.8)


@pytest.mark.parametrize(
    "cells",
    [
        [OWN, "# Parameters\nlearning_rat = 3\n", "learning_rat = 5"],
        [OWN.replace("learning_rate", "learning_rat")],
    ],
)
def test_a_misspelt_parameter_is_refused(cells):
    names = {"data_path": "demo", "In": ["", *cells]}
    with pytest.raises(ValueError, match="learning_rat.*did you mean learning_rate"):
        mm.notebook_config("pretrain", names)


def test_every_setting_and_own_name_is_taken_as_a_parameter():
    inserted = "# Parameters\nbeta1 = 0.8\nquestions = 3\n"
    names = {"beta1": 0.8, "questions": 3, "In": ["", OWN, inserted]}
    cfg = mm.notebook_config("dpo", names, own=["questions"])
    assert cfg == TrainConfig(stage="dpo", beta1=0.8)
    with pytest.raises(ValueError, match="unknown parameter 'questions'"):
        mm.notebook_config("dpo", names)


def test_a_corrected_cell_counts_not_the_one_before():
    wrong = OWN.replace("learning_rate", "learning_rat")
    mm.notebook_config("pretrain", {"In": ["", wrong, "x = 1", OWN]})


def test_a_notebook_without_training_takes_the_names_of_its_own_cell():
    own = "# Parameters: None means the default.\nsource = None\ntop_p = 0.9\n"
    mm.check_parameters({"In": ["", own, "# Parameters\ntop_p = 0.5\n", "x = 1"]})
    with pytest.raises(
        ValueError, match="unknown parameter 'topp'; did you mean top_p"
    ):
        mm.check_parameters({"In": ["", own, "# Parameters\ntopp = 0.5\n", "x = 1"]})


@pytest.fixture
def trained(monkeypatch) -> list[TrainConfig]:
    """The runs that were asked for; each leaves its stage in the listing."""
    asked: list[TrainConfig] = []

    class Stage:
        def __init__(self, stage: str) -> None:
            self.history = type("History", (), {"stage": stage})

    listing = [Stage(cfg.stage) for cfg in asked]
    monkeypatch.setattr(notebook, "_list_runs", lambda out_dir: listing)
    monkeypatch.setattr(
        notebook,
        "train",
        lambda cfg: (asked.append(cfg), listing.append(Stage(cfg.stage))),
    )
    return asked


def test_the_demo_runs_that_are_missing_are_trained_first(trained, tmp_path: Path):
    cfg = config("dpo", data_path="demo", out_dir=str(tmp_path), trial=True, seed=3)
    mm.train_demo_before(cfg)
    shared = {"data_path": "demo", "out_dir": str(tmp_path), "max_steps": 12}
    assert trained == [
        TrainConfig(stage="pretrain", preset="demo", recipe="demo", **shared),
        TrainConfig(stage="sft", recipe="demo-sft", **shared),
    ]
    mm.train_demo_before(cfg)
    assert len(trained) == 2


@pytest.mark.parametrize(
    "names", [{"data_path": "a.jsonl"}, {"init_from": "a.pth"}, {"resume": "out/sft_1"}]
)
def test_nothing_is_trained_before_runs_that_need_no_demo(trained, names):
    mm.train_demo_before(config("sft", **({"data_path": "demo"} | names)))
    assert not trained


def test_runs_are_found_or_a_trial_is_trained(trained, tmp_path: Path):
    (run,) = mm.find_runs(str(tmp_path))
    assert (run.history.stage, trained[0].max_steps) == ("pretrain", 12)
    assert mm.find_runs(str(tmp_path), demo="sft") == [run]


def code_of(notebook: Path) -> tuple[str, str]:
    """The parameters cell, and the code of all other cells."""
    cells = nbformat.read(notebook, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    (own,) = [c for c in code if "parameters" in c.metadata.get("tags", [])]
    return own.source, "\n".join(cell.source for cell in code if cell is not own)


def assigned(source: str) -> set[str]:
    names = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_committed_with_few_parameters_and_without_outputs(file):
    content = nbformat.read(file, as_version=4)
    assert not any(cell.get("outputs") for cell in content.cells)
    assert content.metadata.kernelspec.name == "python3"
    own, _ = code_of(file)
    assert own.startswith("# Parameters: ")
    lines = ast.parse(own).body
    assert len(lines) <= 15
    for line in lines:
        assert isinstance(line, ast.Assign)
        ast.literal_eval(line.value)


@pytest.mark.parametrize("stage", STAGES)
def test_the_later_cells_of_a_training_notebook_assign_no_setting(stage):
    (file,) = [file for file in NOTEBOOKS if file.stem == stage]
    own, later = code_of(file)
    assert assigned(own) - {"trial", "questions", "settings"} <= kinds().keys()
    assert not assigned(later) & kinds().keys()
