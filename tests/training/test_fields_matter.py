"""Each setting, set off its default once, changes something that can be seen."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from support.runs import Settings, train_here, tree

from minimind_nb.config import TrainConfig

# What a single step or two of a tiny run shows.
CHANGES: dict[str, Any] = {
    "out_dir": "elsewhere",
    "run_name": "another",
    "preset": "demo",
    "recipe": "minimind",
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 64,
    "vocab_size": 6500,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-2,
    "dropout": 0.5,
    "qk_norm": True,
    "use_moe": True,
    "inference_rope_scaling": True,
    "max_seq_len": 24,
    "document_mask": True,
    "batch_size": 2,
    "accumulation_steps": 1,
    "learning_rate": 1e-2,
    "min_learning_rate": 2e-3,
    "optimizer": "adamw",
    "schedule": "cosine",
    "decay_fraction": 0.5,
    "warmup_iters": 3,
    "weight_decay": 0.9,
    "beta1": 0.5,
    "beta2": 0.5,
    "grad_clip": 0.01,
    "max_steps": 3,
    "seed": 8,
    "val_fraction": 0.3,
    "eval_tokens": 40,
    "eval_interval": 1,
    "sample_prompts": ("another", "third"),
    "sample_tokens": 0,
    "log_interval": 1,
    "save_interval": 1,
    "dtype": "bfloat16",
    "max_session_hours": 1e-6,
}
# What two steps do not show.
LONGER = {"min_learning_rate", "warmup_iters", "decay_fraction", "save_interval"}
# Of mixtures: set beside use_moe=True, and compared with that.
MIXTURE_CHANGES: dict[str, Any] = {
    "n_routed_experts": 3,
    "num_experts_per_tok": 1,
    "n_shared_experts": 0,
    "aux_loss_alpha": 0.5,
    "seq_aux": False,
    "norm_topk_prob": False,
}
# Shown by tests of their own.
ELSEWHERE = {
    "stage": "tests/config",
    "data_path": "test_resuming",
    "val_path": "test_a_validation_file_replaces_the_held_out_part",
    "tokenizer": "test_another_tokenizer_gives_other_tokens",
    "init_from": "test_initial_weights",
    "data_weights": "test_mixture",
    "dpo_beta": "test_stages",
    "global_batch": "test_settings",
    "allow_smaller_batch": "test_out_of_memory",
    "resume": "test_resuming",
    "compile": "test_compilation",
    "allow_change": "test_resuming",
    "max_position_embeddings": "tests/config",
    "epochs": "test_fewer_epochs_are_fewer_steps",
    "keep_checkpoints": "test_keep_checkpoints_keeps_more",
    "device": "test_preparation",
    "num_processes": "test_api",
    "max_skipped_steps": "test_loop",
    "hang_timeout_seconds": "test_rank_faults",
    "on_bad_line": "test_preparation",
    "max_bad_fraction": "test_preparation",
    "use_wandb": "test_wandb_follower",
    "wandb_project": "test_wandb_follower",
    "publish": "test_publishing",
    "publish_minutes": "test_publishing",
}
TIMED = {"seconds", "tokens_per_second", "peak_memory_gib"}


def seen(settings: Settings) -> dict[str, Any]:
    """All that a run leaves, but for its settings, times and paths."""
    _, folder = train_here(settings)
    out_dir = Path(settings["out_dir"])
    files = tree(out_dir)
    names = [name for name in files if not name.startswith("cache")]
    rows = [
        {k: v for k, v in json.loads(line).items() if k not in TIMED}
        for line in folder.metrics_file.read_text(encoding="utf-8").splitlines()
    ]
    weights = {
        name: hash(data)
        for name, data in files.items()
        if name.endswith(("model.safetensors", ".pth"))
    }
    return {"out_dir": out_dir.name, "files": names, "rows": rows, "weights": weights}


@pytest.fixture
def base(settings: Settings) -> Settings:
    settings |= {"max_steps": 2, "val_fraction": 0.1, "log_interval": 2}
    settings |= {"eval_interval": 2, "save_interval": 2, "warmup_iters": 0}
    return settings


def test_every_field_is_in_one_of_the_lists() -> None:
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    lists = [set(CHANGES), set(MIXTURE_CHANGES), set(ELSEWHERE)]
    assert set.union(*lists) == fields
    assert sum(map(len, lists)) == len(fields)


@pytest.mark.parametrize("name", CHANGES)
def test_the_field_changes_something(name: str, base: Settings, tmp_path: Path) -> None:
    changed = {**base, "out_dir": str(tmp_path / "out"), name: CHANGES[name]}
    if name == "out_dir":
        changed[name] = str(tmp_path / CHANGES[name])
    if name in LONGER:
        base, changed = ({**each, "max_steps": 10} for each in (base, changed))
    if name in ("preset", "recipe"):  # an explicit value goes before either
        kept = "data_path out_dir max_steps device dtype num_processes sample_tokens"
        base = {key: base[key] for key in kept.split()}
        changed = {**base, name: CHANGES[name]}
        base = {**base, "hidden_size": 64, "num_hidden_layers": 1, "batch_size": 1}
        changed |= {} if name == "preset" else {"hidden_size": 64, "batch_size": 1}
        changed |= {"num_hidden_layers": 1, "max_seq_len": 16, "accumulation_steps": 1}
        base |= {"max_seq_len": 16, "accumulation_steps": 1}
    before = {**base, "out_dir": str(tmp_path / "before" / "out")}
    assert seen(changed) != seen(before)


@pytest.mark.parametrize("name", MIXTURE_CHANGES)
def test_the_mixtures_field_changes_something(
    name: str, base: Settings, tmp_path: Path
) -> None:
    base = {**base, "use_moe": True}
    changed = {**base, name: MIXTURE_CHANGES[name]}
    before = {**base, "out_dir": str(tmp_path / "before" / "out")}
    assert seen(changed) != seen(before)


def test_a_validation_file_replaces_the_held_out_part(
    base: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "validation.jsonl"
    file.write_text('{"text": "quite another text, held out"}\n')
    before = {**base, "out_dir": str(tmp_path / "before" / "out")}
    del base["val_fraction"]
    assert seen({**base, "val_path": str(file)}) != seen(before)


def test_another_tokenizer_gives_other_tokens(base: Settings, tmp_path: Path) -> None:
    from minimind_nb.data.tokenizer_training import train_tokenizer

    folder = train_tokenizer([base["data_path"]], tmp_path / "own", vocab_size=300)
    before = {**base, "out_dir": str(tmp_path / "before" / "out")}
    assert seen({**base, "tokenizer": str(folder)}) != seen(before)


def test_keep_checkpoints_keeps_more(base: Settings) -> None:
    every = {"save_interval": 1, "max_steps": 6, "keep_checkpoints": 4}
    _, folder = train_here({**base, **every})
    assert len(list(folder.checkpoints.iterdir())) >= 4


def test_fewer_epochs_are_fewer_steps(base: Settings) -> None:
    del base["max_steps"]
    _, folder = train_here({**base, "epochs": 1})
    rows = folder.metrics_file.read_text(encoding="utf-8").splitlines()
    assert json.loads(rows[0])["total_steps"] < 12
