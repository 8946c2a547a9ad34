"""The model families of transformers that hold MiniMind's networks.

One row a family: which networks it holds, and how its `config.json` is written and
read. The tensors on disk have MiniMind's names in all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import BASE_DEFAULTS, YARN_DEFAULTS, MiniMindConfig

OWN_CODE = "modeling_minimind"
"""The module, in a folder of our own kind, that holds the network."""

_SAME = {
    name: (name,)
    for name in (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "vocab_size max_position_embeddings rms_norm_eps"
    ).split()
}
_SHIPPED_THETA = 10_000.0
_MOST = 1 << 31  # and more of nothing


@dataclass(frozen=True)
class Family:
    """Networks of one kind, as transformers knows them.

    `ours` are the fields of `MiniMindConfig` that all of them share; `names` the fields
    of `config.json` for the others, each with the names ever in use, the one to write
    first; `fixed` are its fields for what MiniMind does not have; `defaults` apply to
    fields that it lacks.
    """

    model_type: str
    architecture: str
    ours: Mapping[str, Any]
    names: Mapping[str, tuple[str, ...]]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def unsupported(self, config: MiniMindConfig) -> list[str]:
        """Return what of a network it cannot hold, as `name=value`; [] if it holds it."""
        wrong = [n for n, value in self.ours.items() if getattr(config, n) != value]
        uneven = config.hidden_size % config.num_attention_heads
        if self.model_type == "llama" and uneven:
            wrong += ["hidden_size", "num_attention_heads"]
        return [f"{name}={getattr(config, name)!r}" for name in wrong]

    def config_json(self, config: MiniMindConfig) -> dict[str, Any]:
        """Return the `config.json` of a network that it holds."""
        # rope_theta is read before transformers 5, and by what has not followed it yet.
        copied = (*BASE_DEFAULTS, "initializer_range", "rope_theta")
        default = {"rope_type": "default", "rope_theta": config.rope_theta}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **{theirs[0]: getattr(config, n) for n, theirs in self.names.items()},
            **{name: value for name, value in self.fixed.items() if value is not None},
            **{name: getattr(config, name) for name in copied},
            "rope_parameters": config.rope_parameters or default,
        }

    def read(self, fields: Mapping[str, Any]) -> MiniMindConfig:
        """Return the configuration that a `config.json` describes.

        Only fields known here are read. Raises `ValueError` naming what MiniMind does
        not have, or what is missing.
        """
        foreign = {
            name: fields[name]
            for name, value in self.fixed.items()
            if fields.get(name) is not None and fields[name] != value
        }
        if any(kind != "full_attention" for kind in fields.get("layer_types") or ()):
            foreign["layer_types"] = fields["layer_types"]
        scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        rope = _read_rope(fields, scaling)
        if rope is None:
            foreign["rope_scaling"] = scaling
        if foreign:
            listed = ", ".join(f"{name}={value!r}" for name, value in foreign.items())
            raise ValueError(f"MiniMind has no {listed}")
        known: dict[str, Any] = {**self.ours, **(rope or {})}
        for name, theirs in self.names.items():
            said = [fields[one] for one in theirs if fields.get(one) is not None]
            if not said and name not in self.defaults:
                raise ValueError(f"config.json lacks {theirs[0]}")
            known[name] = said[0] if said else self.defaults[name]
        return MiniMindConfig(**known)


def _read_rope(
    fields: Mapping[str, Any], rope: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return `MiniMindConfig`'s fields for RoPE, or None for another scaling."""
    theta = rope.get("rope_theta", fields.get("rope_theta", _SHIPPED_THETA))
    kind = rope.get("rope_type", rope.get("type", "default"))
    own = ("rope_type", "type", "rope_theta")
    values = {name: value for name, value in rope.items() if name not in own}
    if kind == "default" and not values:
        return {"rope_theta": theta}
    # MiniMind stretches only what is longer than the original, transformers always.
    longest = fields.get("max_position_embeddings", 0)
    original = values.get("original_max_position_embeddings", longest)
    if kind != "yarn" or values.keys() != YARN_DEFAULTS.keys() or longest <= original:
        return None
    return {"rope_theta": theta, "inference_rope_scaling": True, "rope_scaling": values}


# transformers has more activations, biases, quantization and sliding windows.
_PLAIN = {"hidden_act": "silu", "attention_bias": False, "quantization_config": None}
_QWEN = {**_PLAIN, "use_sliding_window": False, "sliding_window": None}
_DENSE = {**_SAME, "intermediate_size": ("intermediate_size",)}
_THIRD = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32_768}

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            ours={"hidden_act": "silu", "qk_norm": False, "use_moe": False},
            names=_DENSE,
            fixed={**_PLAIN, "mlp_bias": False, "pretraining_tp": 1},
            defaults={
                "num_key_value_heads": None,
                "head_dim": None,
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 2048,
            },
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            ours={"hidden_act": "silu", "qk_norm": True, "use_moe": False},
            names=_DENSE,
            fixed=_QWEN,
            defaults={**_THIRD, "num_key_value_heads": 32, "head_dim": 128},
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            ours={
                "hidden_act": "silu",
                "qk_norm": True,
                "use_moe": True,
                "n_shared_experts": 0,
            },
            names={
                **_SAME,
                "intermediate_size": ("moe_intermediate_size",),
                "n_routed_experts": ("num_experts", "num_local_experts"),
                "num_experts_per_tok": ("num_experts_per_tok",),
                "norm_topk_prob": ("norm_topk_prob",),
                "aux_loss_alpha": ("router_aux_loss_coef",),
            },
            fixed={**_QWEN, "decoder_sparse_step": 1, "mlp_only_layers": []},
            defaults={
                **_THIRD,
                "num_key_value_heads": 4,
                "head_dim": None,
                "norm_topk_prob": False,
                "aux_loss_alpha": 0.001,
            },
        ),
    )
}
"""By `model_type`, the most widely read first."""


def _read_own(fields: Mapping[str, Any]) -> MiniMindConfig:
    """Return the configuration of a MiniMind `config.json`, of either generation.

    Only fields known here are read.
    """
    known = {
        *inspect.signature(MiniMindConfig).parameters,
        *("pad_token_id", "bos_token_id", "eos_token_id"),
        *("rope_parameters", "flash_attn"),
        *("num_experts", "moe_intermediate_size", "router_aux_loss_coef"),
    }
    return MiniMindConfig.from_dict({n: fields[n] for n in fields if n in known})


def own_config_json(config: MiniMindConfig) -> dict[str, Any]:
    """Return a `config.json` that points transformers to the code in the same folder."""
    code = {
        "AutoConfig": f"{OWN_CODE}.MiniMindConfig",
        "AutoModel": f"{OWN_CODE}.MiniMindModel",
        "AutoModelForCausalLM": f"{OWN_CODE}.MiniMindForCausalLM",
    }
    named = {"architectures": ["MiniMindForCausalLM"], "auto_map": code}
    return config.to_diff_dict() | named


def read_config(fields: Mapping[str, Any]) -> MiniMindConfig:
    """Return the configuration that a `config.json` of any known kind describes.

    Raises `ValueError` for another kind, for what MiniMind cannot express, and for a
    size, an epsilon or a YaRN value that is not positive.
    """
    readers = {MiniMindConfig.model_type: _read_own}
    readers |= {name: family.read for name, family in FAMILIES.items()}
    if (kind := str(fields.get("model_type"))) not in readers:
        raise ValueError(f"it holds a {kind!r} model; {', '.join(readers)} can be read")
    try:
        config = readers[kind](fields)
    except (TypeError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"it describes no model: {error}") from None
    names = (*_DENSE, "rope_theta", "n_routed_experts", "num_experts_per_tok")
    numbers = {name: getattr(config, name) for name in names}
    yarn = config.rope_parameters or {}
    for name, value in (
        numbers | {n: yarn[n] for n in yarn if n in YARN_DEFAULTS}
    ).items():
        if type(value) not in (int, float) or not 0 < value < _MOST:
            raise ValueError(f"{name} is {value!r}, and a number above 0 is expected")
    return config
