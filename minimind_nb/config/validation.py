"""Validate a configuration, and report every problem at once."""

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

_CHOICES: dict[str, Iterable[Any]] = {
    "stage": STAGES,
    "preset": PRESETS,
    "recipe": RECIPES,
    "device": ("cuda", "cpu"),
    "dtype": ("float16", "bfloat16", "float32"),
    "on_bad_line": ("error", "skip"),
    "optimizer": ("muon", "adamw"),
    "schedule": ("linear", "cosine"),
    "compile": ("auto", True, False),
}
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
    "dpo_beta publish_minutes"
).split()
_FRACTIONS = "decay_fraction dropout beta1 beta2 val_fraction max_bad_fraction".split()
_AT_MOST = {
    "num_experts_per_tok": "n_routed_experts",
    "max_seq_len": "max_position_embeddings",
    "sample_tokens": "max_position_embeddings",
    "min_learning_rate": "learning_rate",
}
# Names that other trainers and MiniMind's scripts have for settings.
_PAIRS = (
    "mode=stage save_dir=out_dir output_dir=out_dir save_weight=run_name "
    "from_weight=init_from from_resume=resume resume_from_checkpoint=resume "
    "n_embd=hidden_size d_model=hidden_size n_layer=num_hidden_layers "
    "n_head=num_attention_heads block_size=max_seq_len max_length=max_seq_len "
    "num_train_epochs=epochs max_iters=max_steps lr=learning_rate "
    "per_device_train_batch_size=batch_size warmup_steps=warmup_iters "
    "max_grad_norm=grad_clip eval_steps=eval_interval logging_steps=log_interval "
    "save_steps=save_interval save_total_limit=keep_checkpoints "
    "report_to=use_wandb fp16=dtype bf16=dtype mixed_precision=dtype "
    "rope_scaling=max_seq_len"  # training takes longer rows instead
).split()
_NAMED_ELSEWHERE = {there: here for there, here in (p.split("=") for p in _PAIRS)}


def validate(
    settings: Mapping[str, Any],
    kinds: Mapping[str, tuple[type, ...]],
    resolved: bool = False,
) -> None:
    """Raise one `ValueError` with everything that is wrong with explicit settings.

    `kinds` are the types that each setting may have. In `resolved` settings defaults
    cannot be told from what was set, so none is refused for having no effect.
    """
    sound, problems = {}, []
    for name, value in settings.items():
        if value is None and type(None) in kinds.get(name, ()):
            continue
        if problem := _value_problem(name, value, kinds) or _out_of_range(name, value):
            problems.append(problem)
        else:
            sound[name] = value
    values = fill_defaults(sound)
    problems += _misshapen(values)
    problems += _contradictions(values, "num_processes" in sound)
    if not resolved:
        problems += _without_effect(sound, values)
    problems += _not_changeable(sound.get("allow_change", ()), kinds)
    if problems:
        many = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        head = f"the configuration has {many}:"
        raise ValueError("\n  - ".join([head, *problems]))


def describe_unknown(name: str, known: Iterable[str], what: str = "setting") -> str:
    """Say that `name` does not exist, and which name was probably meant."""
    plain = name.lower().strip("-").replace("-", "_")
    hint = _hint(_NAMED_ELSEWHERE.get(plain, name), known)
    return f"unknown {what} {name!r}{hint}"


def _hint(name: str, known: Iterable[str]) -> str:
    def words(text: str) -> list[str]:
        return sorted(re.findall("[^-_]+", text.lower()))

    names = list(known)
    close = [one for one in names if words(one) == words(name)]
    close = close or difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _value_problem(
    name: str, value: Any, kinds: Mapping[str, tuple[type, ...]]
) -> str | None:
    if name not in kinds:
        return describe_unknown(name, kinds)
    kind, allowed = type(value), kinds[name]
    if kind is float and not math.isfinite(value):
        return f"{name}={value} is not a finite number"
    member = int | float if name == "data_weights" else str
    uniform = kind is not tuple or all(isinstance(part, member) for part in value)
    if not (uniform and (kind in allowed or (kind is int and float in allowed))):
        special = {
            type(None): "None",
            tuple: f"tuple of {'numbers' if name == 'data_weights' else 'strings'}",
        }
        expected = " or ".join(special.get(one, one.__name__) for one in allowed)
        return f"{name}={value!r} is {kind.__name__}, expected {expected}"
    choices = _CHOICES.get(name)
    if choices and value not in choices:
        texts = [str(choice) for choice in choices]
        hint = _hint("cuda" if value == "gpu" else value, texts)
        return f"{name}={value!r} is not one of {', '.join(texts)}{hint}"
    return None


def _out_of_range(name: str, value: Any) -> str | None:
    if name in _MINIMUM and value < _MINIMUM[name]:
        return f"{name}={value} must be at least {_MINIMUM[name]}"
    if name == "data_weights" and not all(0 < one < math.inf for one in value):
        return f"data_weights={value} must be above 0; leave a file out of data_path"
    hub = name == "publish" or name == "resume" and str(value).startswith("hf:")
    if hub and not re.fullmatch(r"hf:\w[\w.-]*/\w[\w.-]*", value):
        return f'{name}={value!r} is not of the form "hf:USER/NAME"'
    if name in _POSITIVE and value <= 0:
        return f"{name}={value} must be above 0"
    if name in _FRACTIONS and not 0 <= value < 1:
        return f"{name}={value} must be at least 0 and below 1"
    return None


def _misshapen(v: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sizes that do not fit together, defaults included."""
    for name, limit in _AT_MOST.items():
        if v[name] is not None and v[limit] is not None and v[name] > v[limit]:
            yield f"{name}={v[name]} is more than {limit}={v[limit]}"
    width, heads, head_dim = v["hidden_size"], v["num_attention_heads"], v["head_dim"]
    step = 2 * heads  # rotary embeddings need pairs
    if head_dim == width // heads and width % step:
        near = [str(size) for size in (width // step * step, -(-width // step) * step)]
        yield (
            f"hidden_size={width} does not make num_attention_heads={heads} of one even "
            f"width; use {' or '.join(near).removeprefix('0 or ')}, or set head_dim"
        )
    elif head_dim % 2:
        yield f"head_dim={head_dim} is odd; rotary embeddings need pairs"
    kv_heads = v["num_key_value_heads"]
    if heads % kv_heads:
        yield (
            f"num_attention_heads={heads} is no multiple of "
            f"num_key_value_heads={kv_heads}"
        )


def _contradictions(v: Mapping[str, Any], processes_known: bool) -> Iterator[str]:
    """Yield what else does not fit together, defaults included."""
    rows, steps, count = v["batch_size"], v["accumulation_steps"], v["num_processes"]
    total = v["global_batch"]
    if processes_known and total % count:
        yield f"global_batch={total} is not divisible by num_processes={count}"
    elif processes_known and total != rows * steps * count:
        yield (
            f"global_batch={total} is not batch_size={rows} × accumulation_steps={steps} "
            f"× num_processes={count}; leave some of them out"
        )
    if v["device"] == "cpu" and v["dtype"] == "float16":
        yield 'dtype="float16" needs a GPU; on a CPU use "float32" or "bfloat16"'
    if not _is_folder_name(v["run_name"]):
        yield f"run_name={v['run_name']!r} cannot be the name of a run folder in out_dir"
    if v["stage"] == "pretrain" and v["init_from"] == "auto":
        yield (
            'init_from="auto" needs a previous stage, and pretrain is the first; name '
            "the weights, or leave it out for a random initialisation"
        )
    if v["stage"] == "dpo" and v.get("compile") is True:
        yield "compile=True is not for dpo, whose rows differ in length; leave it out"
    if v["stage"] != "pretrain" and v["document_mask"] is False:
        yield "document_mask=False would let conversations see each other; leave it out"


def _is_folder_name(name: str) -> bool:
    # "cache" holds the token caches, and "full_sft_…" is the weights' name of other runs.
    taken = name in ("", "cache") or name.startswith((".", f"{WEIGHTS_NAMES['sft']}_"))
    return not taken and name.isprintable() and "/" not in name


def _without_effect(settings: Mapping[str, Any], v: Mapping[str, Any]) -> Iterator[str]:
    rules = {
        "val_fraction": ("val_path" in settings, "cannot be used with val_path"),
        "dpo_beta": (v["stage"] != "dpo", 'needs stage="dpo"'),
        "max_bad_fraction": (v["on_bad_line"] != "skip", 'needs on_bad_line="skip"'),
        "wandb_project": (not v["use_wandb"], "needs use_wandb=True"),
        "publish_minutes": ("publish" not in settings, "needs publish"),
        **{name: (not v["use_moe"], "needs use_moe=True") for name in MIXTURE_FIELDS},
    }
    for name, (misplaced, reason) in rules.items():
        if misplaced and name in settings:
            yield f"{name} {reason}; leave it out"


def _not_changeable(
    names: Iterable[str], known: Mapping[str, tuple[type, ...]]
) -> Iterator[str]:
    for name in names:
        if name not in known:
            yield f"allow_change: {describe_unknown(name, known)}"
        elif name in SHAPE_FIELDS and name not in TRAINING_SHAPE_FIELDS:
            yield (
                f"allow_change: {name} is part of the weights' shape, which cannot "
                "change; choose another run_name"
            )
