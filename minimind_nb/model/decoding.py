"""The loop over new tokens: one forward pass a token for all rows of a batch.

A loop of our own, unlike `model.generate`, can stop between two tokens without a thread.
"""

import functools
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architecture import (
    MiniMindForCausalLM,
    MoEFeedForward,
    RMSNorm,
    rotary_tables,
    rotate,
)

_LIKELIEST = 256  # tokens that are sorted first when drawing from the likeliest


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings of `generate`. Raises `ValueError` if one is out of range."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    thinking: bool | None = None
    tools: Sequence[Callable[..., Any] | dict[str, Any]] = ()

    def __post_init__(self) -> None:
        for name, is_valid, expected in (
            ("max_new_tokens", lambda n: n >= 1, "1 or more"),
            ("temperature", lambda x: x >= 0, "0 (greedy) or more"),
            ("top_p", lambda x: 0 < x <= 1, "more than 0, up to 1 (all tokens)"),
            ("top_k", lambda n: n >= 0, "0 (all tokens) or more"),
            ("repetition_penalty", lambda x: x > 0, "more than 0"),
            ("seed", lambda n: 0 <= (n or 0) < 1 << 64, "None, or 0 up to 2**64 - 1"),
        ):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"{name} is {value!r}, a string: use a number")
            if not is_valid(value):
                raise ValueError(f"{name} is {value}: use {expected}")


@torch.no_grad()
def decode(
    model: MiniMindForCausalLM,
    rows: Sequence[Sequence[int]],
    *,
    ends: Collection[int],
    sampling: Sampling,
) -> Generator[list[int]]:
    """Yield one new token a row and step, until each row has had one of the ids `ends`.

    A row's tokens after its end mean nothing. The host waits for the device once a step
    (a mixture: once a layer, too). On a CPU, in float32, `model.generate` takes twice
    the time for one row of 26 M parameters, and 2.4 times for eight.
    """
    device, was_training = model.device, model.training
    generator = None
    if sampling.seed is not None:
        generator = torch.Generator(device).manual_seed(sampling.seed)
    B, T = len(rows), max(map(len, rows))
    ids_BT = torch.zeros(B, T, dtype=torch.long)
    real_BT = torch.ones(B, T, dtype=torch.bool)
    seen_BV = torch.zeros(B, model.config.vocab_size, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids_BT[b, T - len(row) :] = ids = torch.tensor(row, dtype=torch.long)
        real_BT[b, : T - len(row)] = False
        seen_BV[b, ids] = True
    ids_BT, real_BT, seen_BV = (x.to(device) for x in (ids_BT, real_BT, seen_BV))
    ended: set[int] = set()
    model.eval()
    try:
        forward = _Decoder(model, ids_BT, real_BT, sampling.max_new_tokens)
        logits_BV = forward.first_logits
        for number in range(sampling.max_new_tokens):
            if number:
                logits_BV = forward(ids_BT[:, 0])
            ids_BT = choose(logits_BV.float(), seen_BV, sampling, generator)
            seen_BV.scatter_(1, ids_BT, True)
            yield (tokens := ids_BT[:, 0].tolist())
            ended |= {b for b, token in enumerate(tokens) if token in ends}
            if len(ended) == B:
                return
    finally:
        model.train(was_training)


class _Decoder:
    """The forward pass of one token a row, with the keys and values of those before.

    It computes what the model does with 358 kernels a token instead of 708: buffers are
    written in place, mask and rotary tables are made once, and q, k, v and gate, up are
    one product each, of weights in the precision that is computed in.
    """

    def __init__(
        self, model: MiniMindForCausalLM, ids_BT: Tensor, real_BT: Tensor, new: int
    ) -> None:
        B, self.length = ids_BT.shape
        padded = not real_BT.all()
        real_BS = F.pad(real_BT, (0, new), value=True)
        position_BS = (real_BS.cumsum(1) - 1).clamp(min=0)
        found = model(
            ids_BT,
            attention_mask=real_BT if padded else None,
            position_ids=position_BS[:, : self.length] if padded else None,
            use_cache=True,
            logits_to_keep=1,
        )
        self.first_logits = found.logits[:, -1]
        self.mask = real_BS[:, None, None] if padded else None  # [B, 1, 1, S]
        self.rotary = rotary_tables(model.config, position_BS)
        self.model = model.model
        device, dtype = model.device, model.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)

        def product(*parts: nn.Module) -> Callable[[Tensor], Tensor]:
            plain: Any = parts
            if any(type(p) is not nn.Linear or p._forward_hooks for p in plain):
                # An adapter, say, or a quantised layer.
                return lambda x: torch.cat([part(x) for part in parts], -1)
            weights: list[Any] = [part.weight for part in parts]
            return _product(torch.cat(weights).to(dtype), B)

        def feed_forward(part: Any) -> Callable[[Tensor], Tensor]:
            widen = product(part.gate_proj, part.up_proj)
            narrow = product(part.down_proj)

            def run(x: Tensor) -> Tensor:
                gate, up = widen(x).chunk(2, -1)
                return narrow(part.act_fn(gate) * up)

            return run

        self.head = product(model.lm_head)
        self.blocks: list[tuple[Any, ...]] = []
        layers: Any = model.model.layers
        caches = found.past_key_values.layers
        for layer, cache in zip(layers, caches, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            project = product(attention.q_proj, attention.k_proj, attention.v_proj)
            out = product(attention.o_proj)
            if isinstance(mlp, MoEFeedForward):
                routed = [*map(feed_forward, mlp.experts)]
                shared = [*map(feed_forward, mlp.shared_experts)]
                feed = functools.partial(_mix, mlp, routed, shared)
            else:
                feed = feed_forward(mlp)
            buffers = (F.pad(x, (0, 0, 0, new)) for x in (cache.keys, cache.values))
            self.blocks.append((layer, *buffers, project, out, feed))

    def __call__(self, ids_B: Tensor) -> Tensor:
        """Return the logits [B, V] behind one more token of each row."""
        at = self.length
        self.length += 1
        cos_B1F, sin_B1F = (table[:, :, at] for table in self.rotary)
        mask = None if self.mask is None else self.mask[..., : at + 1]
        x_BD = self.model.embed_tokens(ids_B)
        for layer, keys_BGSC, values_BGSC, project, out, feed_forward in self.blocks:
            attention = layer.self_attn
            G, C = keys_BGSC.shape[1], keys_BGSC.shape[3]
            heads = project(layer.input_layernorm.fused(x_BD)).unflatten(1, (-1, C))
            turned, value = heads[:, :-G], heads[:, -G:]
            if isinstance(attention.q_norm, RMSNorm):
                query, key = turned[:, :-G], turned[:, -G:]
                query, key = attention.q_norm.fused(query), attention.k_norm.fused(key)
                turned = torch.cat([query, key], 1)
            turned = rotate(turned, cos_B1F, sin_B1F).type_as(keys_BGSC)
            keys_BGSC[:, :, at] = turned[:, -G:]
            values_BGSC[:, :, at] = value
            # The query heads of a key head are so many positions that all see it.
            mixed = F.scaled_dot_product_attention(
                turned[:, :-G].unflatten(1, (G, -1)),
                keys_BGSC[:, :, : at + 1],
                values_BGSC[:, :, : at + 1],
                mask,
                scale=attention.scaling,
            )
            x_BD = x_BD + out(mixed.flatten(1))
            normed_BD = layer.post_attention_layernorm.fused(x_BD)
            x_BD = x_BD + feed_forward(normed_BD)
        return self.head(self.model.norm.fused(x_BD))


def _mix(mlp: MoEFeedForward, routed: Any, shared: Any, x_BD: Tensor) -> Tensor:
    y_B1D, _ = mlp(x_BD[:, None], experts=routed, shared=shared)
    return y_B1D[:, 0]


def _product(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """Return x ↦ x · weightᵀ for x of so many rows.

    On a CPU the weight is reordered for oneDNN once, as Inductor does it: the products
    of 26 M parameters then take 0.7 of the time for one row, and 0.45 for eight.
    """
    dtype, own = weight.dtype, torch.ops.mkldnn
    if (
        weight.is_cpu
        and torch.backends.mkldnn.is_available()
        and dtype in (torch.float32, torch.bfloat16)
        and (dtype is torch.float32 or own._is_mkldnn_bf16_supported())
    ):
        packed = own._reorder_linear_weight(weight, rows)
        rest = packed, None, "none", [], ""  # no bias, nothing applied behind
        return lambda x: own._linear_pointwise(x.to(dtype), *rest)
    return lambda x: F.linear(x.to(dtype), weight)


def choose(
    logits_BV: Tensor,
    seen_BV: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the next token of each row [B, 1], from float32 logits.

    Tokens in `seen_BV` are penalised. Top-k comes before top-p, which keeps the
    likeliest tokens up to and with the one that reaches `top_p`.
    """
    if (penalty := sampling.repetition_penalty) != 1:
        lowered_BV = torch.where(
            logits_BV > 0, logits_BV / penalty, logits_BV * penalty
        )
        logits_BV = torch.where(seen_BV, lowered_BV, logits_BV)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    scores_BV, most = logits_BV / sampling.temperature, logits_BV.shape[1]
    if not sampling.top_k and sampling.top_p == 1:
        return torch.multinomial(scores_BV.softmax(-1), 1, generator=generator)
    if sampling.top_k:
        most = min(sampling.top_k, most)
        best_BK, ids_BK = scores_BV.topk(most)
        chance_BK = best_BK.softmax(-1)
    else:  # all tokens are sorted only if the first ones are not enough
        chance_BV = scores_BV.softmax(-1)
        chance_BK, ids_BK = chance_BV.topk(min(_LIKELIEST, most))
        if (chance_BK.sum(-1) < sampling.top_p).any():
            chance_BK, ids_BK = chance_BV.sort(descending=True)
    before_BK = chance_BK.cumsum(-1) - chance_BK
    chance_BK = chance_BK.where(before_BK < sampling.top_p, 0)
    return ids_BK.gather(1, torch.multinomial(chance_BK, 1, generator=generator))
