"""Validate a configuration, and report every problem at once."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .presets import (
    MIXTURE_FIELDS,
    PRESETS,
    RECIPES,
    SHAPE_FIELDS,
    STAGES,
    TRAINING_SHAPE_FIELDS,
    WEIGHTS_NAMES,
    fill_defaults,
)

Kinds = Mapping[str, tuple[type, ...]]
"""The types that each setting may have."""

_MAX_NAME_BYTES = 200  # a file system takes 255, and endings are added to names
_AT_LEAST = {
    0: "n_shared_experts aux_loss_alpha min_learning_rate warmup_iters weight_decay "
    "grad_clip seed sample_tokens",
    1: "hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
    "intermediate_size vocab_size n_routed_experts num_experts_per_tok epochs "
    "global_batch batch_size accumulation_steps max_steps eval_tokens eval_interval "
    "log_interval save_interval num_processes max_skipped_steps",
    2: "head_dim max_position_embeddings max_seq_len keep_checkpoints",
}
_MINIMUM = {name: least for least, names in _AT_LEAST.items() for name in names.split()}
_POSITIVE = (
    "learning_rate rope_theta rms_norm_eps max_session_hours hang_timeout_seconds "
    "dpo_beta"
).split()
_FRACTIONS = "dropout beta1 beta2 val_fraction max_bad_fraction".split()
_SURROGATE = re.compile("[\ud800-\udfff]")
_CHOICES: dict[str, Iterable[str]] = {
    "stage": STAGES,
    "preset": PRESETS,
    "recipe": RECIPES,
    "device": ("cuda", "cpu"),
    "dtype": ("float16", "bfloat16", "float32"),
    "on_bad_line": ("error", "skip"),
}


def find_problems(
    settings: Mapping[str, Any], kinds: Kinds, asked: bool = True
) -> list[str]:
    """Return everything that is wrong with explicit settings, one sentence each.

    `asked` is False for resolved settings, in which defaults cannot be told from what
    was set.
    """
    sound, problems = {}, []
    for name, value in settings.items():
        if problem := _value_problem(name, value, kinds[name]):
            problems.append(problem)
        else:
            sound[name] = value
    values = fill_defaults(sound)
    problems += filter(None, map(_range_problem, values, values.values()))
    problems += _contradictions(values, "num_processes" in sound)
    if asked:
        problems += _misplaced(sound, values)
    return [*problems, *_not_changeable(sound.get("allow_change", ()), kinds)]


def describe_unknown(name: str, known: Iterable[str], what: str = "setting") -> str:
    """Say that `name` does not exist, and which name was probably meant."""
    return f"unknown {what} {name!r}{_hint(name, known)}"


def list_problems(problems: list[str]) -> str:
    """Return the text of the one error that carries all problems."""
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
            return f"{name} contains half of a surrogate pair: {part!a:.60}"
    names_only = kind is not tuple or all(isinstance(part, str) for part in value)
    if not (names_only and (kind in kinds or (kind is int and float in kinds))):
        special = {type(None): "None", tuple: "tuple of strings"}
        expected = " or ".join(special.get(kind, kind.__name__) for kind in kinds)
        return f"{name}={value!r} is {kind.__name__}, expected {expected}"
    choices = _CHOICES.get(name)
    if choices and value is not None and value not in choices:
        meant = "cuda" if value == "gpu" else value
        hint = _hint(meant, choices, quote="'")
        return f"{name}={value!r} is not one of {', '.join(choices)}{hint}"
    return None


def _range_problem(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if name in _MINIMUM and value < _MINIMUM[name]:
        return f"{name}={value} is too small, at least {_MINIMUM[name]} is needed"
    if name in _POSITIVE and value <= 0:
        return f"{name}={value} must be above 0"
    if name in _FRACTIONS and not 0 <= value < 1:
        return f"{name}={value} must be at least 0 and below 1"
    return None


def _contradictions(v: Mapping[str, Any], processes_known: bool) -> list[str]:
    """Return what does not fit together, defaults included."""
    width, heads, head_dim = v["hidden_size"], v["num_attention_heads"], v["head_dim"]
    kv_heads, top_k = v["num_key_value_heads"], v["num_experts_per_tok"]
    context = v["max_position_embeddings"]
    rows, steps, count = v["batch_size"], v["accumulation_steps"], v["num_processes"]
    rules = {
        f"hidden_size={width} is not divisible by num_attention_heads={heads}; choose a "
        "multiple, or set head_dim": (
            heads > 0 and head_dim == width // heads and width % heads
        ),
        f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}": (
            kv_heads > 0 and heads % kv_heads
        ),
        f"head_dim={head_dim} is odd; rotary embeddings need pairs": head_dim % 2,
        f"num_experts_per_tok={top_k} is more than "
        f"n_routed_experts={v['n_routed_experts']}": (
            v["use_moe"] and top_k > v["n_routed_experts"]
        ),
        f"max_seq_len={v['max_seq_len']} is more than "
        f"max_position_embeddings={context}": v["max_seq_len"] > context,
        f"sample_tokens={v['sample_tokens']} is not below "
        f"max_position_embeddings={context}": v["sample_tokens"] >= context,
        f"min_learning_rate={v['min_learning_rate']} is above "
        f"learning_rate={v['learning_rate']}": (
            v["min_learning_rate"] > v["learning_rate"]
        ),
        f"global_batch={v['global_batch']} is not batch_size={rows} × "
        f"accumulation_steps={steps} × num_processes={count}; leave some of them out": (
            processes_known and v["global_batch"] != rows * steps * count
        ),
        'dtype="float16" needs a GPU; on a CPU use "float32" or "bfloat16"': (
            v["device"] == "cpu" and v["dtype"] == "float16"
        ),
        "seed is too large, at most 2**63 - 1 is possible": (
            v["seed"] >= 1 << 63  # torch takes 64 bits with a sign
        ),
        f"run_name={v['run_name']!r} cannot be the name of a run folder in out_dir": (
            not _is_folder_name(v["run_name"])
        ),
        'init_from="auto" needs a previous stage, and pretrain is the first; name the '
        "weights, or leave it out for a random initialisation": (
            v["stage"] == "pretrain" and v["init_from"] == "auto"
        ),
        "document_mask=False would let conversations see each other; leave it out": (
            v["stage"] != "pretrain" and v["document_mask"] is False
        ),
    }
    return [problem for problem, wrong in rules.items() if wrong]


def _is_folder_name(name: str) -> bool:
    return (
        name not in ("", "cache")  # token caches are in that folder
        and not name.startswith((".", f"{WEIGHTS_NAMES['sft']}_"))  # others' weights
        and name.isprintable()
        and len(name.encode()) <= _MAX_NAME_BYTES
        and {"/", "\\"}.isdisjoint(name)
    )


def _misplaced(settings: Mapping[str, Any], v: Mapping[str, Any]) -> Iterator[str]:
    """Yield explicit settings that have no effect beside the others."""
    rules = {
        "val_fraction": ("val_path" in settings, "cannot be used with val_path"),
        "dpo_beta": (v["stage"] != "dpo", 'needs stage="dpo"'),
        "max_bad_fraction": (v["on_bad_line"] != "skip", 'needs on_bad_line="skip"'),
        "wandb_project": (not v["use_wandb"], "needs use_wandb=True"),
        **{name: (not v["use_moe"], "needs use_moe=True") for name in MIXTURE_FIELDS},
    }
    for name, (misplaced, reason) in rules.items():
        if misplaced and name in settings:
            yield f"{name} {reason}; leave it out"


def _not_changeable(names: Iterable[str], kinds: Kinds) -> Iterator[str]:
    for name in names:
        if name not in kinds:
            yield f"allow_change: {describe_unknown(name, kinds)}"
        elif name in SHAPE_FIELDS and name not in TRAINING_SHAPE_FIELDS:
            yield (
                f"allow_change: {name} is part of the weights' shape, which cannot "
                "change; choose another run_name"
            )
