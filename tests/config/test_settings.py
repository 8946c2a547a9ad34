import ast
import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimind_nb.config import SHAPE_FIELDS, ResolvedConfig, TrainConfig, kinds, resolve

MINIMIND_NAMES = (
    "data_path out_dir epochs batch_size learning_rate hidden_size num_hidden_layers "
    "max_seq_len use_moe accumulation_steps grad_clip warmup_iters save_interval "
    "log_interval use_wandb num_processes dtype"
).split()


def config(**settings: Any) -> TrainConfig:
    """A configuration from values no type checker would let through."""
    return TrainConfig(**settings)


def test_the_names_minimind_users_know_are_fields():
    assert set(MINIMIND_NAMES) <= kinds().keys()


def test_fields_are_keyword_only_and_frozen():
    with pytest.raises(TypeError, match="positional"):
        TrainConfig("pretrain")  # pyright: ignore[reportCallIssue]
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        TrainConfig().epochs = 2  # pyright: ignore[reportAttributeAccessIssue]


def test_kinds_tell_optional_fields_from_required_ones():
    assert kinds()["epochs"] == (int, type(None))
    assert kinds()["resume"] == (str, bool)
    assert kinds()["allow_change"] == (tuple,)
    assert kinds()["seed"] == (int, type(None))


def test_only_what_differs_from_the_defaults_is_explicit():
    assert TrainConfig().explicit() == {}
    cfg = config(stage="pretrain", epochs=2, seed=42, dropout=None)
    assert cfg.explicit() == {"epochs": 2, "seed": 42}


def test_a_configuration_shows_what_is_set_as_python():
    cfg = config(data_path=("a", "b"), epochs=2, learning_rate=1e-3)
    assert repr(cfg) == (
        "mm.TrainConfig(data_path=('a', 'b'), epochs=2, learning_rate=0.001)"
    )
    assert ast.unparse(ast.parse(repr(cfg))) == repr(cfg)
    assert repr(TrainConfig()) == "mm.TrainConfig()"


def test_a_cell_also_shows_the_defaults_that_are_known():
    rows = cells(config(data_path="<a>", recipe="founding", epochs=2))
    assert rows["data_path"] == ["&#x27;&lt;a&gt;&#x27;", "set"]
    assert rows["epochs"] == ["2", "set"]
    assert rows["hidden_size"] == ["512", "resolved"]
    assert rows["learning_rate"] == ["0.0005", "resolved"], "the recipe's"
    answers = cells(config(stage="sft", preset="demo"))
    assert "hidden_size" not in answers, "that of the initial weights"
    assert answers["learning_rate"][1] == "resolved"


def cells(cfg: TrainConfig) -> dict[str, list[str]]:
    """The rows of the table by name."""
    _, *rows = cfg._repr_html_().removesuffix("</table>").split("<tr>")
    parts = (re.split("<td.*?>", row)[1:] for row in rows)
    return {name: values for name, *values in parts}


def test_paths_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = config(data_path="~/a.jsonl", out_dir="~/out", run_name="~", init_from="~/r")
    found = (cfg.data_path, cfg.out_dir, cfg.run_name, cfg.init_from)
    assert found == ("/home/me/a.jsonl", "/home/me/out", "~", "/home/me/r")
    assert config(resume="~/r").resume == "/home/me/r"


def test_numpy_numbers_paths_and_lists_become_plain(tmp_path):
    cfg = config(
        data_path=tmp_path / "text.jsonl",
        out_dir=Path("runs"),
        epochs=np.int64(3),
        learning_rate=np.float32(0.5),
        dropout=np.float64(0.25),
        use_moe=np.True_,
        allow_change=["epochs", "dtype"],
    )
    plain = [str(tmp_path / "text.jsonl"), "runs", 3, 0.5, 0.25, True]
    plain.append(("epochs", "dtype"))
    names = ("data_path", "out_dir", "epochs", "learning_rate", "dropout", "use_moe")
    found = [getattr(cfg, name) for name in (*names, "allow_change")]
    assert found == plain
    assert [type(value) for value in found] == [type(value) for value in plain]


def test_plain_values_are_taken_beside_an_unknown_name(tmp_path):
    with pytest.raises(ValueError) as caught:
        config(epoch=np.int64(1), epochs=np.int64(2), data_path=tmp_path)
    assert str(caught.value) == (
        "the configuration has a problem:\n  - unknown setting 'epoch'; did you mean "
        "epochs?"
    )


def test_a_configuration_travels_and_copies():
    cfg = TrainConfig(preset="demo", epochs=2, allow_change=("seed",))
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    assert copy.deepcopy(cfg) == cfg
    assert hash(copy.copy(cfg)) == hash(cfg)
    assert dataclasses.replace(cfg, epochs=3).epochs == 3


def test_a_copy_with_an_unknown_name_is_refused_like_a_new_one():
    with pytest.raises(
        ValueError, match="unknown setting 'epoch'; did you mean epochs"
    ):
        dataclasses.replace(TrainConfig(), epoch=3)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preset": "minimind-3-moe", "recipe": "minimind", "dropout": 0.1},
        {"preset": "demo", "recipe": "demo", "data_path": "demo", "max_steps": 7},
        {"use_moe": True, "aux_loss_alpha": 0.0, "allow_change": ("seed",)},
        {"data_path": "a", "val_path": "b", "on_bad_line": "skip"},
        {"stage": "sft", "sample_prompts": ("a, b", "c"), "use_moe": True},
        {"use_wandb": True, "wandb_project": "mine"},
        {"stage": "dpo", "dpo_beta": 0.3, "recipe": "demo-dpo", "sample_tokens": 0},
    ],
)
def test_resolved_configuration_is_a_fixed_point_and_survives_travel(settings):
    machine = {"device": "cuda", "num_processes": 2, "dtype": "float16"}
    cfg = resolve(TrainConfig(**settings), **machine, vocab_size=6400)
    other_machine = {"device": "cpu", "num_processes": 1, "dtype": "float32"}
    assert resolve(cfg, **other_machine, vocab_size=9) == cfg
    through_json = json.loads(json.dumps(dataclasses.asdict(cfg)))
    assert ResolvedConfig(**through_json) == cfg
    assert pickle.loads(pickle.dumps(cfg)) == cfg


def test_resolution_leaves_nothing_open_in_shape_and_optimisation():
    cfg = resolve(TrainConfig(use_moe=True))
    open_fields = {n for n, v in dataclasses.asdict(cfg).items() if v is None}
    assert open_fields == {
        "data_weights",
        "val_path",
        "tokenizer",
        "preset",
        "recipe",
        "dpo_beta",
        "max_steps",
        "sample_prompts",
        "max_session_hours",
        "publish",
    }


@pytest.mark.parametrize(
    ("settings", "processes", "batch"),
    [
        ({"batch_size": 8, "accumulation_steps": 4}, 2, (64, 8, 4)),
        ({}, 1, (32, 32, 1)),
        ({}, 2, (32, 16, 1)),
        ({}, 3, (33, 11, 1)),
        ({"recipe": "demo"}, 2, (4, 2, 1)),
        ({"recipe": "demo"}, 1, (4, 4, 1)),
        ({"global_batch": 48}, 2, (48, 24, 1)),
        ({"global_batch": 48, "batch_size": 4}, 2, (48, 4, 6)),
        ({"global_batch": 48, "accumulation_steps": 4}, 2, (48, 6, 4)),
        ({"batch_size": 8}, 2, (16, 8, 1)),
        ({"accumulation_steps": 2}, 2, (128, 32, 2)),
    ],
)
def test_the_global_batch_is_split_among_processes(settings, processes, batch):
    cfg = resolve(TrainConfig(**settings), num_processes=processes)
    assert (cfg.global_batch, cfg.batch_size, cfg.accumulation_steps) == batch


def test_a_global_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="global_batch=7 is not divisible by num_"):
        resolve(TrainConfig(global_batch=7), num_processes=2)
    with pytest.raises(ValueError, match="global_batch=8 is not batch_size=3 ×"):
        TrainConfig(global_batch=8, batch_size=3, num_processes=1)


def test_shape_speaks_by_the_models_names():
    shape = resolve(TrainConfig(preset="minimind2-moe")).shape()
    assert list(shape) == SHAPE_FIELDS
    assert (shape["hidden_size"], shape["n_routed_experts"]) == (640, 4)


def test_weights_and_run_are_named_as_minimind_names_them():
    dense, mixture = (resolve(TrainConfig(use_moe=moe)) for moe in (False, True))
    assert dense.weights_name == "pretrain_512.pth"
    assert mixture.weights_name == "pretrain_512_moe.pth"
    assert resolve(TrainConfig(stage="sft")).weights_name == "full_sft_512.pth"
    assert dense.run_name == "pretrain_512"
    assert mixture.run_name == "pretrain_512_moe"


def test_a_run_with_a_name_of_its_own_has_weights_of_that_name():
    named = resolve(TrainConfig(run_name="trial", stage="sft"))
    assert named.weights_name == "trial.pth"


def test_resolution_refuses_what_the_machine_contradicts():
    with pytest.raises(ValueError, match='dtype="float16" needs a GPU'):
        resolve(TrainConfig(dtype="float16"), device="cpu")
