"""The model families of transformers that hold MiniMind's networks.

The tensors on disk have MiniMind's names in all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import BASE_DEFAULTS, DEFAULTS, YARN_DEFAULTS, MiniMindConfig

_SHIPPED_THETA = 10_000.0
# In a MiniMind config.json, of either generation.
_OWN_FIELDS = {
    *DEFAULTS,
    *"pad_token_id bos_token_id eos_token_id rope_scaling rope_parameters".split(),
    *"num_experts moe_intermediate_size router_aux_loss_coef".split(),
}


@dataclass(frozen=True)
class Family:
    """Networks of one kind, as transformers knows them."""

    model_type: str
    architecture: str
    ours: Mapping[str, Any]  # fields of MiniMindConfig that all of them share
    names: Mapping[str, str]  # other fields of MiniMindConfig, and those of config.json
    fixed: Mapping[str, Any]  # fields of config.json that MiniMind does not have

    def unsupported(self, config: MiniMindConfig) -> list[str]:
        """List what of a network it cannot hold, as `name=value`."""
        own = {name: getattr(config, name) for name in self.ours}
        return [f"{n}={v!r}" for n, v in own.items() if v != self.ours[n]]

    def config_json(self, config: MiniMindConfig) -> dict[str, Any]:
        """Return the `config.json` of a network that it holds."""
        # rope_theta is read before transformers 5, and by what has not followed it yet.
        copied = (*BASE_DEFAULTS, "initializer_range", "rope_theta")
        default = {"rope_type": "default", "rope_theta": config.rope_theta}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **{theirs: getattr(config, name) for name, theirs in self.names.items()},
            **{name: value for name, value in self.fixed.items() if value is not None},
            **{name: getattr(config, name) for name in copied},
            "rope_parameters": config.rope_parameters or default,
        }

    def read(self, fields: Mapping[str, Any]) -> MiniMindConfig:
        """Return the configuration that a `config.json` describes, or raise `ValueError`."""
        given = {n: value for n, value in fields.items() if value is not None}
        given.setdefault("num_experts", given.get("num_local_experts"))
        shared = given.keys() & self.fixed.keys()
        foreign = {n: given[n] for n in shared if given[n] != self.fixed[n]}
        if any(kind != "full_attention" for kind in given.get("layer_types", ())):
            foreign["layer_types"] = given["layer_types"]
        scaling = dict(given.get("rope_parameters") or given.get("rope_scaling") or {})
        kind = scaling.pop("rope_type", scaling.pop("type", "default"))
        theta = scaling.pop("rope_theta", given.get("rope_theta", _SHIPPED_THETA))
        rope: dict[str, Any] = {"rope_theta": theta}
        # MiniMind stretches only what is longer than the original, transformers always.
        original = scaling.get("original_max_position_embeddings", 0)
        longer = given.get("max_position_embeddings", 0) > original
        if kind == "yarn" and scaling.keys() == YARN_DEFAULTS.keys() and longer:
            rope |= {"inference_rope_scaling": True, "rope_scaling": scaling}
        elif kind != "default" or scaling:
            foreign["rope_scaling"] = {"rope_type": kind, **scaling}
        if foreign:
            listed = ", ".join(f"{name}={value!r}" for name, value in foreign.items())
            raise ValueError(f"MiniMind has no {listed}")
        known = {name: given.get(theirs) for name, theirs in self.names.items()}
        for name, theirs in self.names.items():
            # Heads that are not recorded here are compared with the weights.
            if known[name] is None and name not in ("num_key_value_heads", "head_dim"):
                raise ValueError(f"config.json lacks {theirs}")
        return MiniMindConfig(**self.ours, **known, **rope)


_SAME = (
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "vocab_size max_position_embeddings rms_norm_eps intermediate_size"
)
_DENSE = {name: name for name in _SAME.split()}
_MIXTURE = {
    **_DENSE,
    "intermediate_size": "moe_intermediate_size",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "norm_topk_prob": "norm_topk_prob",
    "aux_loss_alpha": "router_aux_loss_coef",
}
_SECOND = {"hidden_act": "silu", "qk_norm": False, "use_moe": False}
_THIRD = {**_SECOND, "qk_norm": True}
# transformers has more activations, biases, quantization and sliding windows.
_PLAIN = {"hidden_act": "silu", "attention_bias": False, "quantization_config": None}
_QWEN = {**_PLAIN, "use_sliding_window": False, "sliding_window": None}

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            ours=_SECOND,
            names=_DENSE,
            fixed={**_PLAIN, "mlp_bias": False, "pretraining_tp": 1},
        ),
        Family("qwen3", "Qwen3ForCausalLM", ours=_THIRD, names=_DENSE, fixed=_QWEN),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            ours={**_THIRD, "use_moe": True, "n_shared_experts": 0},
            names=_MIXTURE,
            fixed={**_QWEN, "decoder_sparse_step": 1, "mlp_only_layers": []},
        ),
    )
}
"""By `model_type`, the most widely read first."""


def read_config(fields: Mapping[str, Any]) -> MiniMindConfig:
    """Return the configuration that a `config.json` describes; reads only known fields.

    Raises `ValueError` for another kind, and for what MiniMind cannot express.
    """
    kind, known = str(fields.get("model_type")), ("minimind", *FAMILIES)
    if kind not in known:
        raise ValueError(f"it holds a {kind!r} model; {', '.join(known)} can be read")
    try:
        if kind == "minimind":
            own = {n: value for n, value in fields.items() if n in _OWN_FIELDS}
            return MiniMindConfig.from_dict(own)
        return FAMILIES[kind].read(fields)
    except (TypeError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"it describes no model: {error}") from None
