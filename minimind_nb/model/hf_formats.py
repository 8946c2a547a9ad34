"""The model families of transformers that hold MiniMind's networks.

One row a family: which networks it holds, and how its `config.json` is written and
read. The tensors on disk have MiniMind's names in all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .architecture import BASE_DEFAULTS, YARN_DEFAULTS, MiniMindConfig

OWN_CODE = "modeling_minimind"
"""The module, in a folder of our own kind, that holds the network."""

_SAME = (
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "vocab_size max_position_embeddings rms_norm_eps"
).split()
# transformers has more activations, biases and quantization: MiniMind does not.
_PLAIN: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "quantization_config": None,
}
_SHIPPED_THETA = 10_000.0
_MOST = 1 << 31  # and more of nothing
_MEASURES = ("rms_norm_eps", "rope_theta")
_COUNTS = (
    *(name for name in _SAME if name not in _MEASURES),
    *("intermediate_size", "n_routed_experts", "num_experts_per_tok"),
)


@dataclass(frozen=True)
class Family:
    """Networks of one kind, as transformers knows them.

    `ours` are the fields of `MiniMindConfig` that all of them share; `renamed` its
    fields with another name in `config.json`, each with the names ever in use, the one
    to write first; `fixed` are further fields of `config.json`; `defaults` apply to
    fields that it lacks.
    """

    model_type: str
    architecture: str
    ours: Mapping[str, Any]
    renamed: Mapping[str, tuple[str, ...]]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def unsupported(self, config: MiniMindConfig) -> list[str]:
        """Return what of a network it cannot hold, as `name=value`; [] if it holds it."""
        wrong = {
            name: getattr(config, name)
            for name, value in self.ours.items()
            if getattr(config, name) != value
        }
        if config.hidden_act != "silu":
            wrong["hidden_act"] = config.hidden_act
        width, heads = config.hidden_size, config.num_attention_heads
        if self.model_type == "llama" and width % heads:
            wrong |= {"hidden_size": width, "num_attention_heads": heads}
        return [f"{name}={value!r}" for name, value in wrong.items()]

    def config_json(self, config: MiniMindConfig) -> dict[str, Any]:
        """Return the `config.json` of a network that it holds."""
        names = {name: (name,) for name in _SAME} | dict(self.renamed)
        rope = config.rope_parameters or {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
        }
        ids = {name: getattr(config, name) for name in BASE_DEFAULTS}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **{theirs[0]: getattr(config, name) for name, theirs in names.items()},
            **{name: value for name, value in self.fixed.items() if value is not None},
            **ids,
            "initializer_range": config.initializer_range,
            "rope_parameters": rope,
            # Read before transformers 5, and by what has not followed it yet.
            "rope_theta": config.rope_theta,
            "use_cache": True,
        }

    def read(self, fields: Mapping[str, Any]) -> MiniMindConfig:
        """Return the configuration that a `config.json` describes.

        Only fields known here are read. Raises `ValueError` naming what MiniMind does
        not support, or what is missing.
        """
        foreign = [
            f"{name}={fields[name]!r}"
            for name, value in self.fixed.items()
            if fields.get(name) is not None and fields[name] != value
        ]
        if any(kind != "full_attention" for kind in fields.get("layer_types") or ()):
            foreign.append(f"layer_types={fields['layer_types']!r}")
        yarn, theta = _read_rope(fields)
        if yarn is None:
            rope = fields.get("rope_parameters") or fields.get("rope_scaling")
            foreign.append(f"rope scaling {rope!r}")
        if foreign:
            raise ValueError(
                f"MiniMind has no {', '.join(foreign)}; only a {self.architecture} "
                "without it can be read"
            )
        known: dict[str, Any] = {"rope_theta": theta, **self.ours, **(yarn or {})}
        for name, theirs in ({n: (n,) for n in _SAME} | dict(self.renamed)).items():
            said = [fields[one] for one in theirs if fields.get(one) is not None]
            if not said and name not in self.defaults:
                raise ValueError(f"config.json lacks {theirs[0]}")
            known[name] = said[0] if said else self.defaults[name]
        return MiniMindConfig(**known)


def _read_rope(fields: Mapping[str, Any]) -> tuple[dict[str, Any] | None, float]:
    """Return `MiniMindConfig`'s fields for YaRN (None for another scaling), and theta."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = rope.get("rope_theta", fields.get("rope_theta", _SHIPPED_THETA))
    kind = rope.get("rope_type", rope.get("type", "default"))
    values = {name: rope[name] for name in rope if name in YARN_DEFAULTS}
    others = rope.keys() - values.keys() - {"rope_type", "type", "rope_theta"}
    if kind == "default" and not values and not others:
        return {}, theta
    if kind != "yarn" or others or values.keys() != YARN_DEFAULTS.keys():
        return None, theta
    # MiniMind stretches only what is longer than the original, transformers always.
    longest = fields.get("max_position_embeddings", 0)
    if longest <= values["original_max_position_embeddings"]:
        return None, theta
    return {"inference_rope_scaling": True, "rope_scaling": values}, theta


_DENSE = {"intermediate_size": ("intermediate_size",)}
_SEES_ALL = {"use_sliding_window": False, "sliding_window": None}
_THIRD = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32_768}

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            ours={"qk_norm": False, "use_moe": False},
            renamed=_DENSE,
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
            ours={"qk_norm": True, "use_moe": False},
            renamed=_DENSE,
            fixed={**_PLAIN, **_SEES_ALL},
            defaults={**_THIRD, "num_key_value_heads": 32, "head_dim": 128},
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            ours={"qk_norm": True, "use_moe": True, "n_shared_experts": 0},
            renamed={
                "intermediate_size": ("moe_intermediate_size",),
                "n_routed_experts": ("num_experts", "num_local_experts"),
                "num_experts_per_tok": ("num_experts_per_tok",),
                "norm_topk_prob": ("norm_topk_prob",),
                "aux_loss_alpha": ("router_aux_loss_coef",),
            },
            fixed={
                **_PLAIN,
                **_SEES_ALL,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            },
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


def read_own(fields: Mapping[str, Any]) -> MiniMindConfig:
    """Return the configuration that a `config.json` of MiniMind's, ours or theirs, describes.

    Only fields known here are read.
    """
    known = {
        *inspect.signature(MiniMindConfig).parameters,
        *BASE_DEFAULTS,
        *("rope_parameters", "flash_attn"),
        *("num_experts", "moe_intermediate_size", "router_aux_loss_coef"),
    }
    kept = {name: value for name, value in fields.items() if name in known}
    if kept.get("tie_word_embeddings") is False:
        raise ValueError("tie_word_embeddings is false, and MiniMind ties them")
    return MiniMindConfig.from_dict(kept)


def own_config_json(config: MiniMindConfig) -> dict[str, Any]:
    """Return a `config.json` that points transformers to the code in the same folder."""
    classes = {
        "AutoConfig": "MiniMindConfig",
        "AutoModel": "MiniMindModel",
        "AutoModelForCausalLM": "MiniMindForCausalLM",
    }
    return config.to_diff_dict() | {
        "architectures": ["MiniMindForCausalLM"],
        "auto_map": {auto: f"{OWN_CODE}.{name}" for auto, name in classes.items()},
    }


def read_config(fields: Mapping[str, Any]) -> MiniMindConfig:
    """Return the configuration that a `config.json` of any known kind describes.

    Raises `ValueError` for another kind, and for what MiniMind cannot express.
    """
    kind = str(fields.get("model_type"))
    known = {MiniMindConfig.model_type: read_own} | {
        name: family.read for name, family in FAMILIES.items()
    }
    if kind not in known:
        raise ValueError(f"it holds a {kind!r} model; {', '.join(known)} can be read")
    try:
        config = known[kind](fields)
    except (TypeError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"config.json describes no model: {error}") from None
    check_numbers(config)
    return config


def check_numbers(config: MiniMindConfig) -> None:
    """Raise `ValueError` for a size, an epsilon or a YaRN value that is not positive."""
    yarn = config.rope_parameters or {}
    numbers = {name: getattr(config, name) for name in (*_COUNTS, *_MEASURES)}
    numbers |= {name: yarn[name] for name in YARN_DEFAULTS if yarn}
    for name, value in numbers.items():
        kinds = int if name in _COUNTS else int | float
        valid = isinstance(value, kinds) and not isinstance(value, bool)
        if not (valid and 0 < value < _MOST):
            raise ValueError(
                f"the configuration is invalid: {name} is {value!r}, and a number above "
                "0 is expected"
            )
