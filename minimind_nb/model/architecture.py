"""The MiniMind network in one file, which needs only torch and transformers.

Dense or mixture-of-experts, second generation (MiniMind 2) or third (`qk_norm`).
State-dict names are MiniMind's, so a `.pth` of either loads with `strict=True`.

Shape legend, used as a suffix of tensor names:

    B  batch                 H  query heads             E  routed experts
    T  tokens of the input   G  key and value heads     K  experts a token goes to
    S  tokens attended to    C  width of one head       F  rotary frequencies, C/2
    D  width (hidden size)   V  vocabulary

Under `torch.autocast` the residual stream, the norms, the router and the loss stay
float32; only matrix products and attention run in the lower precision.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

YARN_DEFAULTS: dict[str, float] = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 16,
    "original_max_position_embeddings": 2048,
    "attention_factor": 1.0,
}

# Fields that every configuration of transformers has, with other defaults there.
BASE_DEFAULTS: dict[str, Any] = dict(
    pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True
)

DEFAULTS: dict[str, Any] = dict(
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=None,
    intermediate_size=None,
    vocab_size=6400,
    max_position_embeddings=32768,
    rope_theta=1e6,
    rms_norm_eps=1e-5,
    dropout=0.0,
    hidden_act="silu",
    qk_norm=False,
    use_moe=False,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    scoring_func="softmax",
    aux_loss_alpha=0.01,
    seq_aux=True,
    norm_topk_prob=True,
    inference_rope_scaling=False,
    initializer_range=0.02,
)

# Defaults of a third-generation config.json.
THIRD_GENERATION: dict[str, Any] = dict(
    hidden_size=768, num_key_value_heads=4, rms_norm_eps=1e-6, num_experts_per_tok=1
)

# transformers 5.0 has input_embeds and cache_position, 5.23 inputs_embeds instead.
MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters

# Below this compute capability SDPA with `enable_gqa=True`, which transformers sets if
# there is no mask, silently takes a slow kernel (up to torch 2.13).
FAST_GQA_CAPABILITY = 8


class MiniMindConfig(PreTrainedConfig):
    """Shape of a MiniMind model, by the second generation's field names in `DEFAULTS`.

    `intermediate_size=None` is 3 · `hidden_size`, `head_dim=None` is
    `hidden_size // num_attention_heads`, `num_key_value_heads=None` is one per
    query head. `qk_norm=True` with `rms_norm_eps=1e-6` is the third generation.

    `inference_rope_scaling=True` stretches RoPE by YaRN (arXiv 2309.00071); the dict
    `rope_scaling` overrides single values of `YARN_DEFAULTS`. As everywhere in
    transformers 5 it is kept, and written to `config.json`, as `rope_parameters`.

    Raises `ValueError` for a shape that cannot be built.
    """

    model_type = "minimind"
    keys_to_ignore_at_inference = ["past_key_values", "aux_loss"]

    def __init__(self, **fields: Any) -> None:
        rope_scaling = fields.pop("rope_scaling", None)
        rope_scaling = fields.pop("rope_parameters", None) or rope_scaling
        shape = {name: fields.pop(name, DEFAULTS[name]) for name in DEFAULTS}
        super().__init__(**BASE_DEFAULTS | fields)
        # Later: transformers would refuse heads that are wider than their share.
        vars(self).update(shape)
        width, heads = self.hidden_size, self.num_attention_heads
        uneven = self.head_dim is None and width % heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.head_dim = self.head_dim or width // heads
        self.intermediate_size = self.intermediate_size or 3 * width
        self.rope_parameters = self._yarn(rope_scaling or {})
        self._check(uneven)

    def _yarn(self, given: dict[str, Any]) -> dict[str, Any] | None:
        kind = given.get("rope_type", given.get("type", "yarn"))
        own = ("type", "rope_type", "rope_theta")
        values = {key: value for key, value in given.items() if key not in own}
        unknown, enabled = values.keys() - YARN_DEFAULTS, self.inference_rope_scaling
        if kind != "yarn" or unknown or (values and not enabled):
            raise ValueError(
                f"rope_scaling is {given} with inference_rope_scaling={enabled}; it "
                f"may hold {list(YARN_DEFAULTS)} of type 'yarn', and only with "
                "inference_rope_scaling=True. Correct rope_scaling or leave it out."
            )
        kept = {"rope_type": "yarn", "rope_theta": self.rope_theta}
        return {**kept, **YARN_DEFAULTS, **values} if enabled else None

    def _check(self, uneven: bool) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        top_k, experts = self.num_experts_per_tok, self.n_routed_experts
        problems = {
            f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
            f"{heads}: change one of them or set head_dim.": uneven,
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{kv_heads}: use a divisor of {heads}.": heads % kv_heads,
            f"head_dim {self.head_dim} is odd, RoPE turns pairs: use an even one.": (
                self.head_dim % 2
            ),
            f"scoring_func is {self.scoring_func!r}, known is only 'softmax': "
            "use that.": self.scoring_func != "softmax",
            f"num_experts_per_tok is {top_k} with n_routed_experts {experts}: "
            f"use 1 to {experts}.": self.use_moe and not 1 <= top_k <= experts,
        }
        if found := [problem for problem, wrong in problems.items() if wrong]:
            raise ValueError(" ".join(found))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Build from a `config.json`, ours or of either MiniMind generation.

        The third is known by `num_experts`, `moe_intermediate_size` or
        `router_aux_loss_coef`; what such a file leaves out gets its defaults.
        """
        marks = {"num_experts", "moe_intermediate_size", "router_aux_loss_coef"}
        if "qk_norm" in config_dict or not marks & config_dict.keys():
            return super().from_dict(config_dict, **kwargs)
        fields = THIRD_GENERATION | config_dict
        width = math.ceil(fields["hidden_size"] * math.pi / 64) * 64
        width = fields.get("intermediate_size") or width
        expert_width = fields.pop("moe_intermediate_size", None) or width
        fields["intermediate_size"] = expert_width if fields.get("use_moe") else width
        fields["n_routed_experts"] = fields.pop("num_experts", 4)
        fields["aux_loss_alpha"] = fields.pop("router_aux_loss_coef", 5e-4)
        fields |= {"n_shared_experts": 0, "seq_aux": False, "qk_norm": True}
        return super().from_dict(fields, **kwargs)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis, with statistics in float32.

    On a GPU `F.rms_norm` is one kernel each way; on a CPU it takes 1.28 of the time of
    the operations written out.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return self.fused(x)
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.type_as(x)

    def fused(self, x: Tensor) -> Tensor:
        """Return the same by torch's own function."""
        weight = self.weight
        return F.rms_norm(x.type_as(weight), weight.shape, weight, self.eps)


def lower(x: Tensor) -> Tensor:
    """Return `x` in autocast's precision, so that several products share the cast."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if enabled else x


def rotary_frequencies(config: Any, device: torch.device | None = None) -> Tensor:
    """Return the radians a position adds to each pair of a head: float32 [F].

    YaRN keeps the pairs that turn more than `beta_fast` times within the original
    length, divides by `factor` those that turn less than `beta_slow` times, and blends
    between. As a buffer it would be garbage after `from_pretrained`, and rounded by
    `.half()`.
    """
    width, theta = config.head_dim, config.rope_theta
    exponent_F = torch.arange(0, width, 2, device=device).float() / width
    frequency_F = 1.0 / theta**exponent_F
    yarn = config.rope_parameters
    original = yarn["original_max_position_embeddings"] if yarn else math.inf
    if yarn is None or config.max_position_embeddings <= original:
        return frequency_F

    def pair_that_turns(times: float) -> float:
        return width / 2 * math.log(original / (times * 2 * math.pi), theta)

    low = max(math.floor(pair_that_turns(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_that_turns(yarn["beta_slow"])), width // 2 - 1)
    pair_F = torch.arange(width // 2, device=device).float()
    ramp_F = ((pair_F - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency_F * (1 - ramp_F + ramp_F / yarn["factor"])


def rotary_tables(config: Any, position_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine for `rotate`: float32 [B, 1, T, F]."""
    frequency_F = rotary_frequencies(config, position_BT.device)
    angle_B1TF = position_BT[:, None, :, None].float() * frequency_F
    yarn = config.rope_parameters
    scale = yarn["attention_factor"] if yarn else 1.0
    return angle_B1TF.cos() * scale, angle_B1TF.sin() * scale


def rotate(x_BHTC: Tensor, cos_B1TF: Tensor, sin_B1TF: Tensor) -> Tensor:
    """Turn the pairs (i, i + C/2) of every head by their position's angle."""
    a, b = x_BHTC.chunk(2, dim=-1)
    return torch.cat((a * cos_B1TF - b * sin_B1TF, b * cos_B1TF + a * sin_B1TF), -1)


@torch.compiler.assume_constant_result
def lacks_fast_gqa(device: torch.device) -> bool:
    """Return whether grouped keys must be expanded to all heads before SDPA."""
    cuda = device.type == "cuda"
    return cuda and torch.cuda.get_device_properties(device).major < FAST_GQA_CAPABILITY


class Attention(nn.Module):
    """Causal attention with grouped keys and RoPE; QK norm in the third generation."""

    def __init__(self, config: MiniMindConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = heads // kv_heads
        self.scaling = config.head_dim**-0.5
        width = config.hidden_size
        query_width, key_width = heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=False)
        self.k_proj = nn.Linear(width, key_width, bias=False)
        self.v_proj = nn.Linear(width, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, width, bias=False)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        x_BTD = lower(x_BTD)
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        query_BTHC = self.q_norm(self.q_proj(x_BTD).view(heads))
        key_BTGC = self.k_norm(self.k_proj(x_BTD).view(heads))
        value = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        query = rotate(query_BTHC.transpose(1, 2), *rotary).type_as(value)
        key = rotate(key_BTGC.transpose(1, 2), *rotary).type_as(value)
        if past_key_values is not None:
            position = {"cache_position": cache_position}
            key, value = past_key_values.update(key, value, self.layer_idx, position)

        implementation = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get(implementation, eager_attention_forward)
        layer: Any = self
        paged = "cache" in kwargs  # continuous batching, which expects the few heads
        if implementation == "sdpa" and not paged and lacks_fast_gqa(x_BTD.device):
            layer = None  # so transformers neither repeats them nor sets `enable_gqa`
            key = key.repeat_interleave(self.num_key_value_groups, dim=1)
            value = value.repeat_interleave(self.num_key_value_groups, dim=1)
        kwargs["dropout"] = self.config.dropout if self.training else 0.0
        kwargs["scaling"] = self.scaling
        x_BTHC, _ = attend(layer, query, key, value, attention_mask, **kwargs)
        return self.resid_dropout(self.o_proj(x_BTHC.reshape(*x_BTD.shape[:2], -1)))


class FeedForward(nn.Module):
    """SwiGLU: down(act(gate(x)) · up(x)), any leading shape; also one expert."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = lower(x)
        gated = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.dropout(self.down_proj(gated))


def balance_loss(
    scores_BE: Tensor, count_BE: Tensor, tokens_B: Tensor, seq_aux: bool
) -> Tensor:
    """Return Σ_i f_i·p_i, smallest when the experts share the tokens evenly.

    The scores and choices are summed over the tokens of each row, `tokens_B` of them.
    `p_i` is an expert's mean probability, `f_i` its tokens over those of an even split:
    within each sequence and averaged with `seq_aux` (second generation, 1 when even),
    else over the batch, where a token's K choices add up (third, K when even).
    """
    E = scores_BE.shape[1]
    if seq_aux:
        load_BE = count_BE * E / count_BE.sum(1, keepdim=True).clamp(min=1)
        mean_BE = scores_BE / tokens_B.clamp(min=1)[:, None]
        return (load_BE * mean_BE).sum() / (tokens_B > 0).sum().clamp(min=1)
    tokens = tokens_B.sum().clamp(min=1)
    return (count_BE.sum(0) * E / tokens * scores_BE.sum(0) / tokens).sum()


class MoEGate(nn.Module):
    """The router: each token's K experts by softmax, in float32 also under autocast."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        experts, self.top_k = config.n_routed_experts, config.num_experts_per_tok
        self.alpha, self.seq_aux = config.aux_loss_alpha, config.seq_aux
        # A lone expert keeps its probability in the second generation; in the third its
        # normalised weight is 1.
        self.normalise = config.norm_topk_prob and (self.top_k > 1 or config.qk_norm)
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))

    def forward(
        self, x_BTD: Tensor, real_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return experts [B, T, K], their weights, choices of each expert, and loss.

        The choices [2, E] are those of all tokens, and of the `real_BT` (default: all).
        """
        with torch.autocast(x_BTD.device.type, enabled=False):
            scores_BTE = F.linear(x_BTD.float(), self.weight.float()).softmax(-1)
            weight_BTK, expert_BTK = scores_BTE.topk(self.top_k, dim=-1, sorted=False)
            if self.normalise:
                weight_BTK = weight_BTK / (weight_BTK.sum(-1, keepdim=True) + 1e-20)
            every_E = torch.arange(len(self.weight), device=x_BTD.device)
            choices_BTE = (expert_BTK.unsqueeze(-1) == every_E).float().sum(2)
            real_BT1 = torch.ones_like(scores_BTE[..., :1])
            if real_BT is not None:
                real_BT1 = real_BT.unsqueeze(-1).type_as(scores_BTE)
            count_BE = (choices_BTE * real_BT1).sum(1)
            aux_loss = scores_BTE.new_zeros(())
            if self.training and self.alpha > 0:
                scores_BE = (scores_BTE * real_BT1).sum(1)
                tokens_B = real_BT1.sum((1, 2))
                loss = balance_loss(scores_BE, count_BE, tokens_B, self.seq_aux)
                aux_loss = loss * self.alpha
        choices_2E = torch.stack([choices_BTE.sum((0, 1)), count_BE.sum(0)])
        return expert_BTK, weight_BTK, choices_2E, aux_loss


class MoEFeedForward(nn.Module):
    """Routed experts, each on its own contiguous rows, plus shared ones on all."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        routed, shared = config.n_routed_experts, config.n_shared_experts
        self.gate = MoEGate(config)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(routed))
        self.shared_experts = nn.ModuleList(FeedForward(config) for _ in range(shared))
        self.expert_load = [0] * routed

    def forward(
        self,
        x_BTD: Tensor,
        real_BT: Tensor | None = None,
        experts: Sequence[Callable[[Tensor], Tensor]] | None = None,
        shared: Sequence[Callable[[Tensor], Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return [B, T, D] and the layer's auxiliary loss.

        `experts` and `shared` may be other functions that compute the same.
        """
        expert_BTK, weight_BTK, choices_2E, aux_loss = self.gate(x_BTD, real_BT)
        sizes, self.expert_load = choices_2E.long().tolist()  # the host waits here
        order = expert_BTK.flatten().argsort(stable=True)
        place = torch.arange(len(order), device=order.device)
        back = torch.empty_like(order).scatter_(0, order, place)
        low_BTD = lower(x_BTD)
        rows = low_BTD.flatten(0, 1).index_select(0, order // expert_BTK.shape[-1])
        # An expert without tokens gets zero gradients, not none, from its empty slice.
        parts = zip(experts or self.experts, rows.split(sizes), strict=True)
        rows = torch.cat([expert(part) for expert, part in parts])
        out_BTKD = rows.index_select(0, back).view(*expert_BTK.shape, -1)
        y_BTD = (out_BTKD * weight_BTK.unsqueeze(-1)).sum(2)
        for expert in shared or self.shared_experts:
            y_BTD = y_BTD + expert(low_BTD)
        return y_BTD.type_as(x_BTD), aux_loss


class MiniMindBlock(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward (or mixture), each added to the stream."""

    def __init__(self, config: MiniMindConfig, layer_idx: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer_idx)
        self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        real_BT: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | float]:
        """Return the stream [B, T, D] and this layer's auxiliary loss (0 if dense)."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotary, **kwargs)
        normed_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoEFeedForward):
            y_BTD, aux_loss = self.mlp(normed_BTD, real_BT)
            return x_BTD + y_BTD, aux_loss
        return x_BTD + self.mlp(normed_BTD), 0.0


class MiniMindPreTrainedModel(PreTrainedModel):
    """The family's flags for transformers; weights start as N(0, 0.02)."""

    config_class = MiniMindConfig
    base_model_prefix = "model"
    _no_split_modules = ["MiniMindBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoEGate):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


@dataclass
class MiniMindModelOutput(MoeModelOutputWithPast):
    """Also holds the auxiliary loss, summed over the layers."""

    aux_loss: Any = None


class MiniMindModel(MiniMindPreTrainedModel):
    """Embeddings, blocks and final norm, without the output head."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            MiniMindBlock(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        real_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> MiniMindModelOutput:
        """Return hidden states [B, T, D]; arguments as for `MiniMindForCausalLM`.

        `real_tokens` [B, T] are false for padding, which the experts' balance leaves
        out; by default they are an `attention_mask` of that shape.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        x_BTD = self.dropout(inputs_embeds)
        if attention_mask is not None and attention_mask.shape == x_BTD.shape[:2]:
            real_tokens = attention_mask if real_tokens is None else real_tokens
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if cache_position is None:
            cache_position = torch.arange(x_BTD.shape[1], device=x_BTD.device)
            if past_key_values is not None:
                cache_position = cache_position + past_key_values.get_seq_length()
        # Only the caller's position_ids: transformers looks in them for packed
        # documents, and the host waits for the device meanwhile.
        arguments = {
            "config": self.config,
            "input_embeds": x_BTD,
            "inputs_embeds": x_BTD,
            "attention_mask": attention_mask,
            "cache_position": cache_position,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        known = {name: arguments[name] for name in arguments if name in MASK_ARGUMENTS}
        mask = create_causal_mask(**known)
        eager = self.config._attn_implementation == "eager"
        if eager and mask is not None and mask.dtype == torch.bool:
            # It is added to the scores; True may look.
            mask = torch.where(mask, 0.0, torch.finfo(x_BTD.dtype).min)
        always = self.config.output_hidden_states
        keep_states = kwargs.pop("output_hidden_states", always)
        kwargs |= {"attention_mask": mask, "past_key_values": past_key_values}
        kwargs["cache_position"] = cache_position
        position_BT = cache_position[None] if position_ids is None else position_ids
        rotary = rotary_tables(self.config, position_BT)
        aux_loss, states = x_BTD.new_zeros((), dtype=torch.float32), ()
        for layer in self.layers:
            states += (x_BTD,) if keep_states else ()
            x_BTD, layer_aux_loss = layer(x_BTD, rotary, real_tokens, **kwargs)
            aux_loss = aux_loss + layer_aux_loss
        x_BTD = self.norm(x_BTD)
        states = (*states, x_BTD) if keep_states else None
        return MiniMindModelOutput(x_BTD, past_key_values, states, aux_loss=aux_loss)


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """The language model; `lm_head` shares the embedding's weight when tied."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    stage: str | None = None  # of the training that it comes from, if that is known

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [B, T, V] of `input_ids` [B, T] or `inputs_embeds`, and with `labels`
        the loss.

        `attention_mask` is None (causal, no mask tensor), [B, S] with 0 for padding,
        or a boolean [B, 1, T, S] used as it is. `labels` are the input ids, shifted
        in here, -100 where there is no target; `loss` is their mean cross-entropy in
        float32 (their sum over `num_items_in_batch` where that is given) plus
        `aux_loss`, also returned apart: summed over the layers, 0 for dense models
        and outside training. `logits_to_keep` counts positions from the end (0: all)
        or lists them. A cache is made for `use_cache=True` only.
        """
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        keep = logits_to_keep
        kept = slice(-keep, None) if isinstance(keep, int) else keep
        logits_BTV = self.lm_head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits_BTV, labels, vocab_size=size, **kwargs)
            loss = loss + found.aux_loss
        cache, states = found.past_key_values, found.hidden_states
        return MoeCausalLMOutputWithPast(
            loss, found.aux_loss, logits_BTV, cache, states
        )

    def expert_load(self) -> list[list[int]]:
        """Return the real tokens of each layer's routed experts in the last forward; []
        if dense."""
        mixtures = (layer.mlp for layer in self.model.layers)
        return [m.expert_load for m in mixtures if isinstance(m, MoEFeedForward)]
