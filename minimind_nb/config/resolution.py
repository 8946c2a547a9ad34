"""How explicit settings, recipe, preset, machine and stage combine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .presets import MIXTURE_FIELDS, PRESETS, RECIPES, STAGES


def fill_defaults(
    settings: Mapping[str, Any], machine: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Every setting that has a default, by the order of who goes before whom.

    An explicit value goes before the recipe's, that before the preset's, that before
    what the machine offers, and last comes the stage's default.
    """
    stage = settings.get("stage", "pretrain")
    values = dict(STAGES[stage])
    values.update(machine or {})
    values.update(PRESETS.get(settings.get("preset") or "", {}))
    values.update(RECIPES.get(settings.get("recipe") or "", {}))
    values.update({k: v for k, v in settings.items() if v is not None})
    heads = values["num_attention_heads"]
    values.setdefault("intermediate_size", 3 * values["hidden_size"])
    values.setdefault("head_dim", values["hidden_size"] // heads if heads > 0 else 0)
    values.setdefault("min_learning_rate", 0.1 * values["learning_rate"])
    if not values["use_moe"]:
        for name in MIXTURE_FIELDS:
            # What was set explicitly stays, to be refused as a contradiction.
            values[name] = settings.get(name)
    moe = "_moe" if values["use_moe"] else ""
    values.setdefault("run_name", f"{stage}_{values['hidden_size']}{moe}")
    return values


def count_parameters(shape: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of a resolved shape: "total", and "active" for a token.

    Tied embeddings count once. The two differ for a mixture of experts only.
    """
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    head_dim = shape["head_dim"] or width // heads
    attention = 2 * width * head_dim * (heads + kv_heads)
    norms = 2 * width + (2 * head_dim if shape["qk_norm"] else 0)
    expert = 3 * width * inner
    total = active = expert
    if shape["use_moe"]:
        gate = width * shape["n_routed_experts"]
        shared = shape["n_shared_experts"]
        total = expert * (shape["n_routed_experts"] + shared) + gate
        active = expert * (shape["num_experts_per_tok"] + shared) + gate
    outside = shape["vocab_size"] * width + width
    layers = shape["num_hidden_layers"]
    return {
        "total": outside + layers * (attention + norms + total),
        "active": outside + layers * (attention + norms + active),
    }
