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
    what the machine offers and the weights that training begins from have, and last
    comes the stage's default.
    """
    stage = settings.get("stage", "pretrain")
    preset = PRESETS.get(settings.get("preset") or "", {})
    recipe = RECIPES.get(settings.get("recipe") or "", {})
    explicit = {k: v for k, v in settings.items() if v is not None}
    values = {
        "stage": stage,
        **STAGES[stage],
        **(machine or {}),
        **preset,
        **recipe,
        **explicit,
    }
    heads = values["num_attention_heads"]
    values.setdefault("intermediate_size", 3 * values["hidden_size"])
    values.setdefault("head_dim", values["hidden_size"] // heads if heads > 0 else 0)
    values.setdefault("min_learning_rate", 0.1 * values["learning_rate"])
    if not values["use_moe"]:
        # What was set explicitly stays, to be refused as a contradiction.
        values |= {name: settings.get(name) for name in MIXTURE_FIELDS}
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
    experts = chosen = 1
    gate = 0
    if shape["use_moe"]:
        experts = shape["n_routed_experts"] + shape["n_shared_experts"]
        chosen = shape["num_experts_per_tok"] + shape["n_shared_experts"]
        gate = width * shape["n_routed_experts"]
    attention = 2 * width * head_dim * (heads + kv_heads)
    norms = 2 * width + (2 * head_dim if shape["qk_norm"] else 0)
    layer, expert = attention + norms + gate, 3 * width * inner
    outside = shape["vocab_size"] * width + width
    return {
        name: outside + shape["num_hidden_layers"] * (layer + count * expert)
        for name, count in (("total", experts), ("active", chosen))
    }
