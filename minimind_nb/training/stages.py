"""The objective of each stage; the loop is the same for all."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ResolvedConfig
from ..data.batches import IGNORED, MicroBatch, StepBatch
from ..model.architecture import MiniMindForCausalLM, lower


class Losses(NamedTuple):
    """The losses of a micro-batch.

    `loss` is summed over its targets (or pairs), `metrics` over its samples. `aux_loss`,
    a mixture's load balancing, is a mean already: of rows, or of the micro-batch.
    """

    loss: Tensor
    aux_loss: Tensor
    metrics: Tensor

    def share_of(self, step: StepBatch, samples: int) -> "Losses":
        """Return what the losses of so many samples add to the means over a step."""
        return Losses(
            self.loss / step.num_targets,
            self.aux_loss * (samples / step.samples),
            self.metrics / step.samples,
        )


class Stage(NamedTuple):
    """An objective, and the names of the metrics that are logged beside its loss."""

    objective: Callable[[MiniMindForCausalLM, MicroBatch, ResolvedConfig], Losses]
    metrics: tuple[str, ...] = ()


def next_token_loss(
    model: MiniMindForCausalLM, batch: MicroBatch, cfg: ResolvedConfig
) -> "Losses":
    """Return the cross-entropy in float32, summed over the targets."""
    losses, aux_loss = target_losses(model, batch)
    return Losses(losses.sum(), aux_loss, losses.new_zeros(0))


def preference_loss(
    model: MiniMindForCausalLM, batch: MicroBatch, cfg: ResolvedConfig
) -> "Losses":
    """Direct preference optimisation (Rafailov et al. 2023): -log σ(margin) of pairs.

    The margin is β times how much more the model, relative to the reference, prefers
    the chosen answer to the rejected one. The metrics are the margin, whether it is
    above 0 (a half at 0, as at first), and the reference's log-probability per target
    minus the model's: an estimate of KL(reference ‖ model), which may be negative.
    """
    assert cfg.dpo_beta is not None and batch.reference is not None
    sums, counts, aux_loss = answer_log_probabilities(model, batch)
    drift = sums - batch.reference
    margins = cfg.dpo_beta * (drift[0::2] - drift[1::2])
    kl = -(drift[0::2] + drift[1::2]) / (counts[0::2] + counts[1::2])
    right = (margins.sign() + 1) / 2
    metrics = torch.stack([margins.sum(), right.sum(), kl.sum()])
    return Losses(-F.logsigmoid(margins).sum(), aux_loss, metrics.detach())


@torch.no_grad()
def with_reference(batch: MicroBatch, reference: MiniMindForCausalLM) -> MicroBatch:
    """Add the reference model's log-probability of each answer to a batch of pairs."""
    sums, _, _ = answer_log_probabilities(reference, batch)
    return replace(batch, reference=sums)


def answer_log_probabilities(
    model: MiniMindForCausalLM, batch: MicroBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each answer of each pair, [2 · samples], the sum of its targets'
    log-probabilities and their number; and the auxiliary loss."""
    losses_N, aux_loss = target_losses(model, batch)
    assert batch.documents is not None and batch.loss_positions is not None
    answer_N = batch.documents.flatten()[batch.loss_positions].long()
    none = losses_N.new_zeros(2 * batch.samples)
    sums = none.index_add(0, answer_N, -losses_N)
    return sums, none.index_add(0, answer_N, torch.ones_like(losses_N)), aux_loss


def target_losses(
    model: MiniMindForCausalLM, batch: MicroBatch
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy at the targets [N], or at all [B · T]; auxiliary loss.

    Logits are computed only at `loss_positions`: if answers are a third of the text, a
    step of the demo's model takes 0.68 of the time, if they are 86 % 0.98.
    """
    documents, mask, more = batch.documents, None, {}
    if documents is not None:
        mask = document_mask(documents, lower(model.lm_head.weight).dtype)
    if model.config.use_moe:  # whose balance is one of tokens, padding left out
        texts = batch.targets != IGNORED  # each of them is a target
        more["real_tokens"] = texts if documents is None else documents >= 0
    found = model.model(input_ids=batch.inputs, attention_mask=mask, **more)
    x_ND, targets_N = found.last_hidden_state.flatten(0, 1), batch.targets.flatten()
    if batch.loss_positions is not None:
        x_ND, targets_N = x_ND[batch.loss_positions], targets_N[batch.loss_positions]
    logits_NV = model.lm_head(x_ND).float()
    losses_N = F.cross_entropy(
        logits_NV, targets_N, ignore_index=IGNORED, reduction="none"
    )
    return losses_N, found.aux_loss


def document_mask(documents_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what attention adds to its scores, [B, 1, T, T]: 0 for the tokens up to
    each that are of the same document, else -inf.

    Padding (-1) sees padding only, so that no row of the softmax is empty. As booleans
    every layer would turn it into these numbers again.
    """
    length = documents_BT.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents_BT.device)
    same = documents_BT[:, :, None] == documents_BT[:, None, :]
    mask = torch.zeros(same.shape, dtype=dtype, device=same.device)
    return mask.masked_fill_(~(same & causal.tril()), -torch.inf)[:, None]


OBJECTIVES: dict[str, Stage] = {
    "pretrain": Stage(next_token_loss),
    "sft": Stage(next_token_loss),
    "dpo": Stage(preference_loss, ("reward_margin", "accuracy", "kl")),
}
"""Objectives by stage; `config.presets` has its defaults."""


def compile_objective(model: MiniMindForCausalLM, cfg: ResolvedConfig) -> Callable:
    """Return the objective as one graph; of chats, whose targets vary, the hidden states."""
    torch._dynamo.config.capture_scalar_outputs = True  # how a mixture splits its rows
    objective = OBJECTIVES[cfg.stage].objective
    if cfg.stage == "pretrain":
        return torch.compile(objective, fullgraph=True, dynamic=False)
    hidden = torch.compile(model.model.forward, fullgraph=True, dynamic=False)
    net: Any = SimpleNamespace(config=model.config, model=hidden, lm_head=model.lm_head)
    return lambda _, batch, cfg: objective(net, batch, cfg)
