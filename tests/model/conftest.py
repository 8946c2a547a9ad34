"""A plain second implementation of MiniMind, and small random models to hold to it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minimind_nb.model.architecture import MiniMindConfig, MiniMindForCausalLM


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _rotate(x_BTHC: Tensor, theta: float) -> Tensor:
    half = x_BTHC.shape[-1] // 2
    rate = theta ** (-torch.arange(half).float() / half)
    angle = (torch.arange(x_BTHC.shape[1]).float()[:, None] * rate)[:, None]
    a, b = x_BTHC[..., :half], x_BTHC[..., half:]
    return torch.cat(
        (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1
    )


def _attend(state: dict, at: str, x: Tensor, config: MiniMindConfig) -> Tensor:
    B, T, _ = x.shape
    q, k, v = (
        (x @ state[f"{at}.{n}_proj.weight"].T).view(B, T, -1, config.head_dim)
        for n in "qkv"
    )
    if f"{at}.q_norm.weight" in state:
        q = _rms(q, state[f"{at}.q_norm.weight"], config.rms_norm_eps)
        k = _rms(k, state[f"{at}.k_norm.weight"], config.rms_norm_eps)
    q, k = _rotate(q, config.rope_theta), _rotate(k, config.rope_theta)
    share = q.shape[2] // k.shape[2]
    out = torch.zeros_like(q)
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // share].transpose(1, 2)
        scores = scores / math.sqrt(config.head_dim)
        hidden = torch.ones(T, T).triu(1).bool()
        chance = scores.masked_fill(hidden, -math.inf).softmax(-1)
        out[:, :, head] = chance @ v[:, :, head // share]
    return out.reshape(B, T, -1) @ state[f"{at}.o_proj.weight"].T


def _swiglu(state: dict, at: str, x: Tensor) -> Tensor:
    gate = x @ state[f"{at}.gate_proj.weight"].T
    up = x @ state[f"{at}.up_proj.weight"].T
    return (gate * gate.sigmoid() * up) @ state[f"{at}.down_proj.weight"].T


def _mixture(state: dict, at: str, x: Tensor, config: MiniMindConfig) -> Tensor:
    third = f"{at.replace('mlp', 'self_attn')}.q_norm.weight" in state
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            chance = (state[f"{at}.gate.weight"] @ x[b, t]).softmax(0)
            best = chance.argsort(descending=True)[: config.num_experts_per_tok]
            total = chance[best].sum() if third or len(best) > 1 else 1.0
            for e in best.tolist():
                expert = _swiglu(state, f"{at}.experts.{e}", x[b, t])
                out[b, t] += chance[e] / total * expert
    for e in range(config.n_shared_experts):
        out = out + _swiglu(state, f"{at}.shared_experts.{e}", x)
    return out


def plain_logits(state: dict, config: MiniMindConfig, ids: Tensor) -> Tensor:
    """Logits [B, T, V] from a state dict, with loops where loops are clearest."""
    x = state["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        at, eps = f"model.layers.{layer}", config.rms_norm_eps
        normed = _rms(x, state[f"{at}.input_layernorm.weight"], eps)
        x = x + _attend(state, f"{at}.self_attn", normed, config)
        normed = _rms(x, state[f"{at}.post_attention_layernorm.weight"], eps)
        mix = _mixture(state, f"{at}.mlp", normed, config) if config.use_moe else None
        x = x + (_swiglu(state, f"{at}.mlp", normed) if mix is None else mix)
    x = _rms(x, state["model.norm.weight"], config.rms_norm_eps)
    return x @ state["lm_head.weight"].T


@pytest.fixture
def reference_logits() -> Callable[[dict, MiniMindConfig, Tensor], Tensor]:
    return plain_logits


@pytest.fixture
def tiny() -> Callable[..., MiniMindForCausalLM]:
    """Makes a small model; weights drawn wide, so that logits and ids vary."""

    def make(**fields: Any) -> MiniMindForCausalLM:
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        small = {"vocab_size": 97, "intermediate_size": 48, "initializer_range": 0.2}
        model = MiniMindForCausalLM(MiniMindConfig(**{**shape, **small, **fields}))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name:
                    weight.uniform_(0.5, 1.5)
        return model.eval()

    return make


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
