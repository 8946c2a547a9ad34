import math
from typing import Any

import pytest

from minimind_nb.config import TrainConfig, describe_unknown


class Corpus:
    """What someone might define in a cell and hand over."""

    def __repr__(self) -> str:
        return "Corpus()"


def problems(**settings: Any) -> list[str]:
    """What is said of settings, line by line."""
    with pytest.raises(ValueError) as caught:
        TrainConfig(**settings)
    head, *lines = str(caught.value).split("\n  - ")
    many = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
    assert head == f"the configuration has {many}:"
    return lines


def test_an_unknown_name_gets_the_likely_one():
    assert problems(hiden_size=512) == [
        "unknown setting 'hiden_size'; did you mean hidden_size?"
    ]
    assert problems(zzz=1) == ["unknown setting 'zzz'"]
    assert describe_unknown("colour", ["color"], "option") == (
        "unknown option 'colour'; did you mean color?"
    )


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("num_train_epochs", "epochs"),
        ("logging_steps", "log_interval"),
        ("rope_scaling", "max_seq_len"),
        ("save_steps", "save_interval"),
        ("max_grad_norm", "grad_clip"),
        ("per_device_train_batch_size", "batch_size"),
        ("lr", "learning_rate"),
        ("fp16", "dtype"),
        ("BF16", "dtype"),
        ("block_size", "max_seq_len"),
        ("data-path", "data_path"),
        ("from_weight", "init_from"),
        ("save-dir", "out_dir"),
    ],
)
def test_a_name_from_elsewhere_is_translated(there, here):
    text = f"unknown setting {there!r}; did you mean {here}?"
    assert problems(**{there: 1}) == [text]
    options = ["--help", "--beta1", "--vocab_size", "--max_steps", f"--{here}"]
    assert describe_unknown(f"--{there}", options).endswith(f"did you mean --{here}?")


def test_all_problems_are_named_in_one_error_and_in_the_order_given():
    assert problems(
        epoch=1, learning_rat=1e-3, epochs=0, dtype="fp16", hidden_size=100
    ) == [
        "unknown setting 'epoch'; did you mean epochs?",
        "unknown setting 'learning_rat'; did you mean learning_rate?",
        "epochs=0 must be at least 1",
        "dtype='fp16' is not one of float16, bfloat16, float32; did you mean float16?",
        "hidden_size=100 does not make num_attention_heads=8 of one even width; use "
        "96 or 112, or set head_dim",
    ]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"stage": "pretrian"},
            "not one of pretrain, sft, dpo; did you mean pretrain?",
        ),
        ({"preset": "minimind2-smal"}, "did you mean minimind2-small?"),
        ({"stage": "SFT"}, "did you mean sft?"),
        ({"recipe": "sft-demo"}, "did you mean demo-sft?"),
        ({"recipe": "fast"}, "not one of demo, demo-sft, demo-dpo, minimind, mi"),
        ({"device": "gpu"}, "device='gpu' is not one of cuda, cpu"),
        ({"on_bad_line": "skipp"}, "not one of error, skip; did you mean skip?"),
    ],
)
def test_a_choice_that_is_none_lists_the_choices(settings, text):
    (line,) = problems(**settings)
    assert text in line


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"epochs": "2"}, "epochs='2' is str, expected int or None"),
        ({"epochs": 2.0}, "epochs=2.0 is float, expected int or None"),
        ({"epochs": True}, "epochs=True is bool, expected int or None"),
        ({"use_moe": 1}, "use_moe=1 is int, expected bool or None"),
        ({"use_moe": "false"}, "use_moe='false' is str, expected bool or None"),
        ({"resume": None}, "resume=None is NoneType, expected str or bool"),
        (
            {"data_path": Corpus()},
            "data_path=Corpus() is Corpus, expected str or tuple of strings or None",
        ),
        (
            {"sample_prompts": "a, b"},
            "sample_prompts='a, b' is str, expected tuple of strings or None",
        ),
        ({"preset": ["demo"]}, "preset=('demo',) is tuple, expected str or None"),
        (
            {"data_path": b"a"},
            "data_path=b'a' is bytes, expected str or tuple of strings or None",
        ),
        (
            {"allow_change": "seed"},
            "allow_change='seed' is str, expected tuple of strings",
        ),
        (
            {"allow_change": (1, [])},
            "allow_change=(1, ()) is tuple, expected tuple of strings",
        ),
    ],
)
def test_a_value_of_another_kind_names_field_and_kinds(settings, line):
    assert problems(**settings) == [line]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_must_be_finite(value):
    assert problems(learning_rate=value) == [
        f"learning_rate={value} is not a finite number"
    ]


def test_whole_numbers_are_numbers_where_fractions_are_expected():
    assert TrainConfig(learning_rate=1, grad_clip=0).learning_rate == 1


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("hidden_size", 0, "must be at least 1"),
        ("num_attention_heads", -8, "must be at least 1"),
        ("num_key_value_heads", 0, "must be at least 1"),
        ("max_seq_len", 1, "must be at least 2"),
        ("keep_checkpoints", 1, "must be at least 2"),
        ("seed", -1, "must be at least 0"),
        ("max_steps", 0, "must be at least 1"),
        ("weight_decay", -0.1, "must be at least 0"),
        ("learning_rate", 0.0, "learning_rate=0.0 must be above 0"),
        ("max_session_hours", -1.0, "max_session_hours=-1.0 must be above 0"),
        ("sample_tokens", -1, "must be at least 0"),
        ("dpo_beta", 0.0, "dpo_beta=0.0 must be above 0"),
        ("dropout", 1.0, "dropout=1.0 must be at least 0 and below 1"),
        ("val_fraction", -0.5, "val_fraction=-0.5 must be at least 0 and below 1"),
    ],
)
def test_a_number_out_of_range_says_the_range(name, value, text):
    assert any(text in line for line in problems(**{name: value}))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_key_value_heads": 3}, "=8 is no multiple of num_key_value_heads=3"),
        ({"hidden_size": 104}, "use 96 or 112, or set head_dim"),
        ({"hidden_size": 10, "num_attention_heads": 8}, "use 16, or set head_dim"),
        ({"num_attention_heads": 6}, "use 504 or 516, or set head_dim"),
        ({"head_dim": 63}, "head_dim=63 is odd; rotary embeddings need pairs"),
        (
            {"use_moe": True, "num_experts_per_tok": 5},
            "num_experts_per_tok=5 is more than n_routed_experts=4",
        ),
        (
            {"max_seq_len": 40_000},
            "max_seq_len=40000 is more than max_position_embeddings=32768",
        ),
        (
            {"sample_tokens": 513, "max_position_embeddings": 512},
            "sample_tokens=513 is more than max_position_embeddings=512",
        ),
        (
            {"min_learning_rate": 0.1, "learning_rate": 0.01},
            "min_learning_rate=0.1 is more than learning_rate=0.01",
        ),
        (
            {"val_path": "v.jsonl", "val_fraction": 0.1},
            "val_fraction cannot be used with val_path; leave it out",
        ),
        ({"wandb_project": "mine"}, "wandb_project needs use_wandb=True"),
        ({"publish_minutes": 5}, "publish_minutes needs publish; leave it out"),
        ({"resume": "hf:me"}, "resume='hf:me' is not of the form \"hf:USER/NAME\""),
        ({"max_bad_fraction": 0.1}, 'max_bad_fraction needs on_bad_line="skip"'),
        (
            {"n_routed_experts": 8},
            "n_routed_experts needs use_moe=True; leave it out",
        ),
        (
            {"aux_loss_alpha": 0.0, "preset": "minimind2"},
            "aux_loss_alpha needs use_moe=True; leave it out",
        ),
        (
            {"device": "cpu", "dtype": "float16"},
            'dtype="float16" needs a GPU; on a CPU use "float32" or "bfloat16"',
        ),
        (
            {"init_from": "auto"},
            'init_from="auto" needs a previous stage, and pretrain is the first',
        ),
        (
            {"stage": "sft", "document_mask": False},
            "document_mask=False would let conversations see each other; leave it out",
        ),
        ({"dpo_beta": 0.2}, 'dpo_beta needs stage="dpo"; leave it out'),
        (
            {"stage": "sft", "dpo_beta": 0.2},
            'dpo_beta needs stage="dpo"; leave it out',
        ),
        (
            {"allow_change": ("epoch",)},
            "allow_change: unknown setting 'epoch'; did you",
        ),
        (
            {"allow_change": ("head_dim",)},
            "allow_change: head_dim is part of the weights' shape",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, text):
    (line,) = problems(**settings)
    assert text in line


@pytest.mark.parametrize(
    "name", ["", "..", ".hidden", "a/b", "a\0b", "cache", "full_sft_512"]
)
def test_a_run_name_must_name_a_folder_in_out_dir(name):
    assert problems(run_name=name) == [
        f"run_name={name!r} cannot be the name of a run folder in out_dir"
    ]


def test_a_width_that_heads_do_not_divide_is_fine_with_a_head_dim():
    assert TrainConfig(hidden_size=100, head_dim=16).head_dim == 16


def test_mixture_settings_are_fine_where_a_preset_is_a_mixture():
    cfg = TrainConfig(preset="minimind2-moe", aux_loss_alpha=0.0)
    assert cfg.aux_loss_alpha == 0.0
