"""What can be wrong with settings, found all at once and said in plain words."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .presets import (
    MIXTURE_FIELDS,
    PRESETS,
    RECIPES,
    SHAPE_FIELDS,
    STAGES,
    TRAINING_SHAPE_FIELDS,
    WEIGHTS_NAMES,
)
from .resolution import fill_defaults

Kinds = Mapping[str, tuple[type, ...]]
"""The types that each setting may have."""

_LONGEST_NAME = 200  # bytes; a file system takes 255, and names get endings
_AT_LEAST = {
    0: "n_shared_experts aux_loss_alpha min_learning_rate warmup_iters weight_decay "
    "grad_clip seed sample_tokens",
    1: "hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
    "intermediate_size vocab_size n_routed_experts num_experts_per_tok epochs "
    "batch_size accumulation_steps max_steps eval_tokens eval_interval log_interval "
    "save_interval num_processes max_skipped_steps",
    2: "head_dim max_position_embeddings max_seq_len keep_checkpoints",
}
_LEAST = {name: least for least, names in _AT_LEAST.items() for name in names.split()}
_ABOVE_ZERO = (
    "learning_rate rope_theta rms_norm_eps max_session_hours hang_timeout_seconds "
    "dpo_beta"
).split()
_FRACTIONS = "dropout beta1 beta2 val_fraction max_bad_fraction".split()
_SURROGATE = re.compile("[\ud800-\udfff]")
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
        if problem := _value_problem(name, value, kinds[name]):
            problems.append(problem)
        else:
            sound[name] = value
    values = fill_defaults(sound)
    allowed = sound.get("allow_change", ())
    unknown = [n for n in allowed if n not in kinds]
    fixed = [n for n in SHAPE_FIELDS if n in allowed and n not in TRAINING_SHAPE_FIELDS]
    return [
        *problems,
        *filter(None, map(_range_problem, values, values.values())),
        *_contradictions(sound, values),
        *(f"allow_change: {describe_unknown(name, kinds)}" for name in unknown),
        *(
            f"allow_change: {name} is the shape of the weights, which no run can change; "
            "take another run_name"
            for name in fixed
        ),
    ]


def describe_unknown(name: str, known: Iterable[str], what: str = "setting") -> str:
    """Say that `name` does not exist, and what was probably meant."""
    return f"{name!r} is no {what}{_hint(name, known)}"


def list_problems(problems: list[str]) -> str:
    """The text of the one error that carries all problems."""
    many = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n  - ".join([f"the configuration has {many}:", *problems])


def _hint(name: str, known: Iterable[str], quote: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {quote}{close[0]}{quote}?" if close else ""


def _value_problem(name: str, value: Any, kinds: tuple[type, ...]) -> str | None:
    kind = type(value)
    if kind is float and not math.isfinite(value):
        return f"{name}={value} is not a finite number"
    for part in value if kind is tuple else (value,):
        if isinstance(part, str) and _SURROGATE.search(part):
            return f"{name} holds half of a surrogate pair: {part!a:.60}"
    names_only = kind is not tuple or all(isinstance(part, str) for part in value)
    if not (names_only and (kind in kinds or (kind is int and float in kinds))):
        special = {type(None): "None", tuple: "tuple of strings"}
        expected = " or ".join(special.get(kind, kind.__name__) for kind in kinds)
        return f"{name}={value!r} is {kind.__name__}, expected {expected}"
    choices = _ONE_OF.get(name)
    if choices and value is not None and value not in choices:
        meant = "cuda" if value == "gpu" else value
        hint = _hint(meant, choices, quote="'")
        return f"{name}={value!r} is not one of {', '.join(choices)}{hint}"
    return None


def _range_problem(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if name in _LEAST and value < _LEAST[name]:
        return f"{name}={value} is too small, at least {_LEAST[name]} is needed"
    if name in _ABOVE_ZERO and value <= 0:
        return f"{name}={value} must be above 0"
    if name in _FRACTIONS and not 0 <= value < 1:
        return f"{name}={value} must be from 0 up to, but not, 1"
    return None


def _contradictions(
    settings: Mapping[str, Any], values: Mapping[str, Any]
) -> list[str]:
    """What does not go together, in the explicit settings or with the defaults."""
    v = values
    width, heads, head_dim = v["hidden_size"], v["num_attention_heads"], v["head_dim"]
    kv_heads, top_k = v["num_key_value_heads"], v["num_experts_per_tok"]
    undivided = heads > 0 and head_dim == width // heads and width % heads
    name = v["run_name"]
    checks: dict[str, Any] = {
        f"hidden_size={width} cannot be shared out among num_attention_heads={heads}; "
        "take a multiple, or set head_dim": undivided,
        f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}": (
            kv_heads > 0 and heads % kv_heads
        ),
        f"head_dim={head_dim} is odd; rotary embeddings need pairs": head_dim % 2,
        f"num_experts_per_tok={top_k} is more than "
        f"n_routed_experts={v['n_routed_experts']}": (
            v["use_moe"] and top_k > v["n_routed_experts"]
        ),
        f"max_seq_len={v['max_seq_len']} is more than "
        f"max_position_embeddings={v['max_position_embeddings']}": (
            v["max_seq_len"] > v["max_position_embeddings"]
        ),
        f"sample_tokens={v['sample_tokens']} is not below "
        f"max_position_embeddings={v['max_position_embeddings']}": (
            v["sample_tokens"] >= v["max_position_embeddings"]
        ),
        f"min_learning_rate={v['min_learning_rate']} is above "
        f"learning_rate={v['learning_rate']}": (
            v["min_learning_rate"] > v["learning_rate"]
        ),
        "val_path and val_fraction exclude each other: a validation file replaces the "
        "held-out part; leave one of them out": (
            {"val_path", "val_fraction"} <= settings.keys()
        ),
        'dtype="float16" is for GPUs; a CPU takes "float32" or "bfloat16"': (
            v["device"] == "cpu" and v["dtype"] == "float16"
        ),
        f"run_name={name!r} cannot be the name of a run folder in out_dir": (
            name in ("", "cache")  # token caches lie there
            or name.startswith(f"{WEIGHTS_NAMES['sft']}_")  # weights of another run
            or not name.isprintable()
            or len(name.encode()) > _LONGEST_NAME
            or name.startswith(".")
            or not {"/", "\\"}.isdisjoint(name)
        ),
        "seed is too large, at most 2**63 - 1 is possible": (
            v.get("seed", 0) >= 1 << 63  # torch takes 64 bits with a sign
        ),
    }
    checks |= _between_stages(settings, values) | _alone(settings, values)
    for field in MIXTURE_FIELDS:
        text = (
            f"{field} is a setting of mixtures of experts; set use_moe=True or leave "
        )
        checks[f"{text}it out"] = field in settings and not v["use_moe"]
    return [problem for problem, wrong in checks.items() if wrong]


def _between_stages(
    settings: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, bool]:
    """What is a setting of another stage, or none of this one."""
    v = values
    return {
        'init_from="auto" looks for the stage before, and pretrain is the first; name '
        "the weights, or leave it out to begin with new ones": (
            v["stage"] == "pretrain" and v["init_from"] == "auto"
        ),
        "document_mask=False would let conversations see each other; leave it out": (
            v["stage"] != "pretrain" and v["document_mask"] is False
        ),
        'dpo_beta is a setting of stage="dpo"; leave it out': (
            v["stage"] != "dpo" and "dpo_beta" in settings
        ),
    }


def _alone(settings: Mapping[str, Any], v: Mapping[str, Any]) -> dict[str, bool]:
    """What means something beside another setting only."""
    return {
        'max_bad_fraction needs on_bad_line="skip"': (
            "max_bad_fraction" in settings and v.get("on_bad_line") != "skip"
        ),
        "wandb_project needs use_wandb=True": (
            "wandb_project" in settings and not v.get("use_wandb")
        ),
    }
