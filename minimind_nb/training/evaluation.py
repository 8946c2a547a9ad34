"""Loss and metrics on held-out samples, by all ranks, and answers to fixed prompts."""

import functools
import hashlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ..data.batches import IGNORED, MicroBatch, ValidationRows
from ..data.conversations import IN_LOSS, TURN
from ..data.tokenizer import load_tokenizer
from ..launch.outcome import RankRecord
from ..launch.process_group import Group
from ..model.architecture import MiniMindForCausalLM
from ..model.generation import generate
from ..monitor.metrics import perplexity
from .initial_weights import initial_model, new_model
from .run_plan import RunPlan
from .stages import OBJECTIVES, Losses, with_reference

_PROMPTS = 2
_BEGINNING_TOKENS = 16  # of a held-out text
_MAX_PROMPT_TOKENS = 512  # of a prompt that is chosen here


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

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the plan, for prompts and answers."""
        return load_tokenizer(self.plan.tokenizer)

    def to_device(self, batch: MicroBatch, known: Tensor | None = None) -> MicroBatch:
        """Return a batch on the device, with the reference model's sums if it needs them.

        `known` are these sums if they were computed before.
        """
        batch = replace(batch.to(self.device), reference=known)
        if self.reference is None or known is not None:
            return batch
        with self.autocast:
            return with_reference(batch, self.reference)

    def losses(self, batch: MicroBatch, compiled: Any = None) -> Losses:
        """Return the stage's objective for a complete micro-batch."""
        with self.autocast:
            return (compiled or self.stage.objective)(self.model, batch, self.cfg)

    @torch.no_grad()
    def evaluate(self, rows: ValidationRows) -> dict[str, Any]:
        """Return the mean loss per target; uses no randomness.

        Beside a loss per token are perplexity and bits per UTF-8 byte of the documents
        or answers; beside a loss per pair, the stage's metrics. Of several files there
        is the loss of each, too.
        """
        metrics = self.stage.metrics
        size = (len(rows.sources), 3 + len(metrics))
        sums = torch.zeros(size, dtype=torch.float64, device=self.device)
        self.model.eval()
        place = self.group.rank, self.group.size
        share = rows.micro_batches(self.cfg.batch_size, *place)
        for n, (file, batch) in enumerate(share):
            complete = self.to_device(batch, rows.references.get(n))
            rows.references[n] = complete.reference
            losses = self.losses(complete)
            sums[file, 0] += losses.loss
            sums[file, 1] += (batch.targets != IGNORED).sum()
            sums[file, 2] += batch.samples
            sums[file, 3:] += losses.metrics
            self.record.beat()
        self.model.train()
        self.group.sum(sums)
        total, targets, samples, *totals = sums.sum(0).tolist()
        counted = 2 if metrics else 1  # the column of what the loss is a mean over
        result = {"loss": total / (samples if metrics else targets)}
        if len(rows.sources) > 1:
            result["loss_by_file"] = (sums[:, 0] / sums[:, counted]).tolist()
        if metrics:
            means = [value / samples for value in totals]
            return result | dict(zip(metrics, means, strict=True))
        loss = result["loss"]
        return result | {
            "perplexity": perplexity(loss),
            "bits_per_byte": total / math.log(2) / max(1, rows.text_bytes),
        }


def choose_prompts(
    evaluator: Evaluator, validation: ValidationRows | None
) -> list[str]:
    """Return `sample_prompts`, or the beginnings of the first held-out documents.

    The beginning of a conversation is the message before its first answer.
    """
    cfg = evaluator.cfg
    if not cfg.sample_tokens:
        return []
    if cfg.sample_prompts is not None or validation is None:
        return list(cfg.sample_prompts or ())
    cache, chosen = validation.cache, set()
    for number in validation.documents.tolist():
        ids, end = cache.document(number), _BEGINNING_TOKENS
        shown = ids[:end]
        if cache.marks is not None:
            marks = cache.marks_of(number)
            end = int(np.argmax(marks & IN_LOSS > 0))
            turns = [0, end, *np.flatnonzero(marks[: end + 1] & TURN)]
            shown = ids[turns[-2] : turns[-1]]
        if end < min(len(ids), _MAX_PROMPT_TOKENS):
            text = str(evaluator.tokenizer.decode(shown, skip_special_tokens=True))
            text = text.removeprefix("user\n")  # ChatML's name of the role
            chosen.add(text.strip(" \n\ufffd"))  # a cut character decodes to U+FFFD
        if len(chosen) == _PROMPTS:
            break
    return sorted(chosen)


def answer_prompts(evaluator: Evaluator, prompts: list[str], seed: int) -> list[str]:
    """Return the model's answer to each prompt, a turn unless it is rendered already."""
    if not prompts:
        return []
    model, tokenizer = evaluator.model, evaluator.tokenizer
    asked: list[Any] = [*prompts]
    for n, text in enumerate(prompts):
        rendered = text.startswith(str(tokenizer.bos_token))
        if evaluator.cfg.stage != "pretrain" and not rendered:
            asked[n] = [{"role": "user", "content": text}]
    most = evaluator.cfg.sample_tokens
    with evaluator.autocast:
        return [*generate(model, tokenizer, asked, max_new_tokens=most, seed=seed)]


def seed_of(*keys: int) -> int:
    """Return a 64-bit seed for torch from whole numbers."""
    text = " ".join(map(str, keys)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
