"""Loss and metrics on held-out samples, by all ranks, and answers to fixed prompts."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batches import IGNORED, MicroBatch, TrainingStream, ValidationRows
from ..data.chat_template import ChatEncoder
from ..data.conversations import IN_LOSS, TURN
from ..data.fast_encoding import BulkEncoder
from ..data.tokenizer import TokenizerSpec, load_tokenizer
from ..launch.outcome import RankRecord
from ..launch.process_group import Group
from ..model.architecture import MiniMindForCausalLM
from ..model.generation import continue_ids
from .initial_weights import initial_model, new_model
from .run_plan import RunPlan
from .stages import OBJECTIVES, Losses, with_reference

_PROMPTS = 2
_BEGINNING_TOKENS = 16  # of a held-out text
_MAX_PROMPT_TOKENS = 512  # of a prompt that is chosen here
_load_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)


class Evaluator:
    """The model of a plan on this rank's device, and what its losses need.

    A preference run has a frozen `reference` model.
    """

    reference: MiniMindForCausalLM | None = None

    def __init__(
        self, plan: RunPlan, group: Group, device: torch.device, record: RankRecord
    ) -> None:
        self.plan = plan
        self.cfg = plan.cfg
        self.stage = OBJECTIVES[plan.cfg.stage]
        self.group = group
        self.device = device
        self.record = record
        dtype, reduced = getattr(torch, plan.cfg.dtype), plan.cfg.dtype != "float32"
        self.autocast = torch.autocast(device.type, dtype, enabled=reduced)
        self.model = new_model(plan) if plan.checkpoint else initial_model(plan)
        nn.Module.to(self.model, device)
        if plan.cfg.stage == "dpo":
            self.reference = initial_model(plan).eval().requires_grad_(False)
            nn.Module.to(self.reference, device)

    def to_device(self, batch: MicroBatch, known: Tensor | None = None) -> MicroBatch:
        """Return a batch on the device, with the reference model's sums if it needs them.

        `known` are these sums if they were computed before.
        """
        batch = replace(batch.to(self.device), reference=known)
        if self.reference is None or known is not None:
            return batch
        with self.autocast:
            return with_reference(batch, self.reference)

    def losses(self, batch: MicroBatch) -> Losses:
        """Return the stage's objective for a complete micro-batch."""
        with self.autocast:
            return self.stage.objective(self.model, batch, self.cfg)

    @torch.no_grad()
    def evaluate(self, rows: ValidationRows) -> dict[str, float]:
        """Return the mean loss per target; uses no randomness.

        Beside a loss per token are perplexity and bits per byte: the cost of predicting
        each document, or answer, with its end, per UTF-8 byte of its text, which is
        comparable across tokenizers. Beside a loss per pair, the stage's metrics.
        """
        metrics = self.stage.metrics
        sums = torch.zeros(3 + len(metrics), dtype=torch.float64, device=self.device)
        self.model.eval()
        ranks = (self.group.rank, self.group.size)
        for n, batch in enumerate(rows.micro_batches(self.cfg.batch_size, *ranks)):
            complete = self.to_device(batch, rows.references.get(n))
            rows.references[n] = complete.reference
            losses = self.losses(complete)
            sums[0] += losses.loss
            sums[1] += (batch.targets != IGNORED).sum()
            sums[2] += batch.samples
            sums[3:] += losses.metrics
            self.record.beat()
        self.model.train()
        self.group.sum(sums)
        total, targets, samples, *totals = sums.tolist()
        if metrics:
            means = [value / samples for value in totals]
            return {"loss": total / samples, **dict(zip(metrics, means, strict=True))}
        loss = total / targets
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < math.log(1e300) else math.inf,
            "bits_per_byte": total / math.log(2) / max(1, rows.text_bytes),
        }


class Prompt(NamedTuple):
    """A prompt that the model answers at every validation, as text and as ids."""

    text: str
    ids: list[int]


def choose_prompts(
    plan: RunPlan, stream: TrainingStream, validation: ValidationRows | None
) -> list[Prompt]:
    """Return `sample_prompts`, or the beginnings of the first held-out documents.

    The beginning of a conversation is everything before its first answer.
    """
    cfg, tokenizer = plan.cfg, plan.tokenizer
    if not cfg.sample_tokens:
        return []
    if cfg.sample_prompts is not None:
        return [_encode(text, cfg.stage, tokenizer) for text in cfg.sample_prompts]
    cache, documents = stream.cache, stream.truncated.documents
    if validation is not None:
        cache, documents = validation.cache, validation.documents
    chosen: dict[str, Prompt] = {}
    for number in documents.tolist():
        ids, end = cache.document(number), _BEGINNING_TOKENS
        shown = ids[:end]
        if cache.marks is not None:  # show the message before the first answer
            marks = cache.marks_of(number)
            end = int(np.argmax(marks & IN_LOSS > 0))
            turns = [0, end, *np.flatnonzero(marks[: end + 1] & TURN)]
            shown = ids[turns[-2] : turns[-1]]
        if end < min(len(ids), _MAX_PROMPT_TOKENS):
            text = _decode(tokenizer, shown)
            text = text.removeprefix("user\n").strip()  # ChatML's name of the role
            chosen[text] = Prompt(text, ids[:end].tolist())
        if len(chosen) == _PROMPTS:
            break
    return list(chosen.values())


def _encode(text: str, stage: str, tokenizer: TokenizerSpec) -> Prompt:
    if stage == "pretrain":
        ids = [tokenizer.bos_id, *BulkEncoder(tokenizer).encode([text])[0].tolist()]
        return Prompt(text, ids)
    message = {"role": "user", "content": text}
    return Prompt(text, ChatEncoder(tokenizer).prompt([message]).tolist())


def _decode(tokenizer: TokenizerSpec, ids: list[int] | np.ndarray) -> str:
    return str(_load_tokenizer(tokenizer).decode(ids, skip_special_tokens=True))


def answer_prompt(evaluator: Evaluator, prompt: Prompt, *keys: int) -> str:
    """Return the model's answer to a prompt, drawn with a seed from (seed, *keys)."""
    tokenizer = evaluator.plan.tokenizer
    with evaluator.autocast:
        (ids,) = continue_ids(
            evaluator.model,
            [prompt.ids],
            eos_id=tokenizer.eos_id,
            max_new_tokens=evaluator.cfg.sample_tokens,
            seed=seed_of(evaluator.cfg.seed, *keys),
        )
    return _decode(tokenizer, ids)


def seed_of(*keys: int) -> int:
    """Return a 64-bit seed for torch from whole numbers."""
    text = " ".join(map(str, keys)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
