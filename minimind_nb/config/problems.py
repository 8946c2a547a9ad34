"""What can be wrong with settings, found all at once and said in plain words."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from .presets import MIXTURE_FIELDS, PRESETS, RECIPES, STAGES
from .resolution import fill_defaults

Kinds = Mapping[str, tuple[type, ...]]
"""The types that each setting may have."""

_AT_LEAST: dict[str, float] = {
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "intermediate_size": 1,
    "vocab_size": 1,
    "max_position_embeddings": 2,
    "n_routed_experts": 1,
    "num_experts_per_tok": 1,
    "n_shared_experts": 0,
    "aux_loss_alpha": 0,
    "max_seq_len": 2,
    "epochs": 1,
    "batch_size": 1,
    "accumulation_steps": 1,
    "min_learning_rate": 0,
    "warmup_iters": 0,
    "weight_decay": 0,
    "grad_clip": 0,
    "max_steps": 1,
    "seed": 0,
    "eval_tokens": 1,
    "eval_interval": 1,
    "log_interval": 1,
    "save_interval": 1,
    "keep_checkpoints": 2,
    "num_processes": 1,
    "max_skipped_steps": 1,
}
_ABOVE_ZERO = (
    "learning_rate rope_theta rms_norm_eps max_session_hours hang_timeout_seconds"
).split()
_FRACTIONS = "dropout beta1 beta2 val_fraction max_bad_fraction".split()
_ONE_OF: dict[str, Iterable[str]] = {
    "stage": STAGES,
    "preset": PRESETS,
    "recipe": RECIPES,
    "device": ("cuda", "cpu"),
    "dtype": ("float16", "bfloat16", "float32"),
    "on_bad_line": ("error", "skip"),
}


def find_problems(settings: Mapping[str, Any], kinds: Kinds) -> list[str]:
    """Everything wrong with explicit settings, one sentence each."""
    sound, problems = {}, []
    for name, value in settings.items():
        problem = _kind_problem(name, value, kinds[name]) or _choice_problem(
            name, value
        )
        if problem:
            problems.append(problem)
        else:
            sound[name] = value
    values = fill_defaults(sound)
    problems += _range_problems(values) + _shape_problems(values)
    return problems + _contradictions(sound, values, kinds)


def describe_unknown(name: str, known: Iterable[str], what: str = "setting") -> str:
    """Say that `name` does not exist, and what was probably meant."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{name!r} is no {what}{hint}"


def list_problems(problems: list[str]) -> str:
    """The text of the one error that carries all problems."""
    head = "the configuration has a problem" if len(problems) == 1 else ""
    head = head or f"the configuration has {len(problems)} problems"
    return "\n  - ".join([f"{head}:", *problems])


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(value, tuple):
        return tuple in kinds and all(isinstance(part, str) for part in value)
    return isinstance(value, kinds)


def _kind_problem(name: str, value: Any, kinds: tuple[type, ...]) -> str | None:
    if _fits(value, kinds):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name}={value} is not a finite number"
    special = {type(None): "None", tuple: "tuple of names"}
    names = [special.get(kind, kind.__name__) for kind in kinds]
    found = type(value).__name__
    return f"{name}={value!r} is {found}, expected {' or '.join(names)}"


def _choice_problem(name: str, value: Any) -> str | None:
    choices = _ONE_OF.get(name)
    if choices is None or value is None or value in choices:
        return None
    close = difflib.get_close_matches(value, list(choices), n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{name}={value!r} is not one of {', '.join(choices)}{hint}"


def _range_problems(values: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, least in _AT_LEAST.items():
        value = values.get(name)
        if value is not None and value < least:
            problems.append(f"{name}={value} is too small, at least {least} is needed")
    for name in _ABOVE_ZERO:
        value = values.get(name)
        if value is not None and value <= 0:
            problems.append(f"{name}={value} must be above 0")
    for name in _FRACTIONS:
        value = values.get(name)
        if value is not None and not 0 <= value < 1:
            problems.append(f"{name}={value} must be from 0 up to, but not, 1")
    return problems


def _shape_problems(values: Mapping[str, Any]) -> list[str]:
    width, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads, head_dim = values["num_key_value_heads"], values["head_dim"]
    problems = []
    if heads > 0 and head_dim == width // heads and width % heads:
        problems.append(
            f"hidden_size={width} cannot be shared out among "
            f"num_attention_heads={heads}; take a multiple, or set head_dim"
        )
    if kv_heads > 0 and heads % kv_heads:
        problems.append(
            f"num_attention_heads={heads} is no multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    if head_dim % 2:
        problems.append(f"head_dim={head_dim} is odd; rotary embeddings need pairs")
    if values["use_moe"] and values["num_experts_per_tok"] > values["n_routed_experts"]:
        problems.append(
            f"num_experts_per_tok={values['num_experts_per_tok']} is more than "
            f"n_routed_experts={values['n_routed_experts']}"
        )
    if values["max_seq_len"] > values["max_position_embeddings"]:
        problems.append(
            f"max_seq_len={values['max_seq_len']} is more than "
            f"max_position_embeddings={values['max_position_embeddings']}"
        )
    return problems


def _contradictions(
    settings: Mapping[str, Any], values: Mapping[str, Any], kinds: Kinds
) -> list[str]:
    problems = []
    if values["min_learning_rate"] > values["learning_rate"]:
        problems.append(
            f"min_learning_rate={values['min_learning_rate']} is above "
            f"learning_rate={values['learning_rate']}"
        )
    if "val_path" in settings and "val_fraction" in settings:
        problems.append(
            "val_path and val_fraction exclude each other: a validation file replaces "
            "the held-out part; leave one of them out"
        )
    if "max_bad_fraction" in settings and values.get("on_bad_line") != "skip":
        problems.append('max_bad_fraction needs on_bad_line="skip"')
    if not values["use_moe"]:
        problems += [
            f"{name} is a setting of mixtures of experts; set use_moe=True or leave "
            "it out"
            for name in MIXTURE_FIELDS
            if name in settings
        ]
    if values.get("device") == "cpu" and values.get("dtype") == "float16":
        problems.append(
            'dtype="float16" is for GPUs; a CPU takes "float32" or "bfloat16"'
        )
    name = values["run_name"]
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        problems.append(f"run_name={name!r} is not the name of a folder in out_dir")
    problems += [
        f"allow_change: {describe_unknown(change, kinds)}"
        for change in settings.get("allow_change", ())
        if change not in kinds
    ]
    return problems
