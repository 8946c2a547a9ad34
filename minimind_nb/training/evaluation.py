"""Loss and metrics on held-out samples, by all ranks, and answers to fixed prompts."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from ..config import ResolvedConfig
from ..data.batches import IGNORED, MicroBatch, TrainingStream, ValidationRows
from ..data.conversations import TRAINED, TURN, USER, ChatEncoder
from ..data.fast_encoding import BulkEncoder
from ..data.tokenizer import TokenizerSpec, load_tokenizer
from ..launch.outcome import RankRecord
from ..launch.process_group import Group
from ..model.architecture import MiniMindForCausalLM
from ..model.generation import continue_ids
from .stages import Losses, Stage, with_reference

_PROMPTS = 2
_BEGINNING_TOKENS = 16  # of a held-out text
_MAX_PROMPT_TOKENS = 512  # of a prompt that is chosen here
_SAMPLING = {"temperature": 0.8, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.0}


@dataclass
class Evaluator:
    """A model, and what all ranks need to compute its losses.

    `reference` is the frozen reference model of a preference run.
    """

    cfg: ResolvedConfig
    stage: Stage
    group: Group
    device: torch.device
    model: MiniMindForCausalLM
    record: RankRecord
    reference: MiniMindForCausalLM | None = None
    _validation_reference: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def autocast(self) -> torch.autocast:
        """The precision of the run's matrix products."""
        dtype = getattr(torch, self.cfg.dtype)
        enabled = self.cfg.dtype != "float32"
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled)

    def losses(self, batch: MicroBatch) -> Losses:
        """Return the stage's objective for a micro-batch."""
        batch = batch.to(self.device)
        with self.autocast:
            if self.reference is not None and batch.reference is None:
                batch = with_reference(batch, self.reference)
            return self.stage.objective(self.model, batch, self.cfg)

    @torch.no_grad()
    def evaluate(self, rows: ValidationRows) -> dict[str, float]:
        """Return the mean loss per target and related metrics; uses no randomness.

        For a loss per token, perplexity and bits per byte are included: the cost of
        predicting each document, or answer, with its end, per UTF-8 byte of its text,
        which is comparable across tokenizers. For a loss per pair, the stage's metrics.
        """
        metrics = self.stage.metrics
        sums = torch.zeros(3 + len(metrics), dtype=torch.float64).to(self.device)
        training = self.model.training
        self.model.eval()
        ranks = (self.group.rank, self.group.size)
        for n, batch in enumerate(rows.micro_batches(self.cfg.batch_size, *ranks)):
            losses = self.losses(self._with_kept_reference(n, batch))
            sums[0] += losses.loss
            sums[1] += (batch.targets != IGNORED).sum()
            sums[2] += batch.samples
            sums[3:] += losses.metrics
            self.record.beat()
        self.model.train(training)
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

    def _with_kept_reference(self, number: int, batch: MicroBatch) -> MicroBatch:
        """Add what the reference says of a validation batch, computed the first time."""
        if self.reference is None:
            return batch
        if number not in self._validation_reference:
            with self.autocast:
                found = with_reference(batch.to(self.device), self.reference)
            assert found.reference is not None
            self._validation_reference[number] = found.reference
        return replace(batch, reference=self._validation_reference[number])


class Prompt(NamedTuple):
    """A prompt that the model answers at every validation, as text and as ids."""

    text: str
    ids: list[int]


def choose_prompts(
    cfg: ResolvedConfig,
    tokenizer: TokenizerSpec,
    stream: TrainingStream,
    validation: ValidationRows | None,
) -> list[Prompt]:
    """Return `sample_prompts`, or the beginnings of the first held-out documents.

    The beginning of a conversation is everything before its first answer.
    """
    if not cfg.sample_tokens:
        return []
    if cfg.sample_prompts is not None:
        return [_encode(text, cfg, tokenizer) for text in cfg.sample_prompts]
    cache, documents = stream.cache, stream.truncated.documents
    if validation is not None:
        cache, documents = validation.cache, validation.documents
    decode = _decoder(tokenizer)
    chosen: dict[str, Prompt] = {}
    for number in documents.tolist():
        ids = cache.document(number)
        end, shown = _BEGINNING_TOKENS, slice(0, _BEGINNING_TOKENS)
        if cache.marks is not None:
            end, shown = _find_question(cache.marks_of(number))
        if end < min(len(ids), _MAX_PROMPT_TOKENS):
            text = str(decode(ids[shown], skip_special_tokens=True))
            text = text.removeprefix("user\n").strip()  # ChatML's name of the role
            chosen[text] = Prompt(text, ids[:end].tolist())
        if len(chosen) == _PROMPTS:
            break
    return list(chosen.values())


def _find_question(marks: np.ndarray) -> tuple[int, slice]:
    """Return the start of the first answer, and the user's last turn before it."""
    end = int(np.argmax(marks & TRAINED > 0))
    turns = np.append(np.flatnonzero(marks[:end] & TURN), end)
    asked = np.flatnonzero(marks[turns[:-1]] & USER)
    last = int(asked[-1]) if len(asked) else 0
    return end, slice(int(turns[last]), int(turns[last + 1]))


@functools.lru_cache(maxsize=1)
def _decoder(tokenizer: TokenizerSpec) -> Callable[..., Any]:
    return load_tokenizer(tokenizer).decode


def _encode(text: str, cfg: ResolvedConfig, tokenizer: TokenizerSpec) -> Prompt:
    if cfg.stage == "pretrain":
        ids = [tokenizer.bos_id, *BulkEncoder(tokenizer).encode([text])[0].tolist()]
        return Prompt(text, ids)
    message = {"role": "user", "content": text}
    return Prompt(text, ChatEncoder(tokenizer).prompt([message]).tolist())


def answer_prompt(
    evaluator: Evaluator, tokenizer: TokenizerSpec, prompt: Prompt, *keys: int
) -> str:
    """Return the model's answer to a prompt, drawn with a seed from (seed, *keys)."""
    config = evaluator.model.config
    with evaluator.autocast:
        (ids,) = continue_ids(
            evaluator.model,
            [prompt.ids],
            eos_id=config.eos_token_id,
            max_new_tokens=evaluator.cfg.sample_tokens,
            seed=seed_of(evaluator.cfg.seed, *keys),
            **_SAMPLING,
        )
    return str(_decoder(tokenizer)(ids, skip_special_tokens=True))


def seed_of(*keys: int) -> int:
    """Return a 64-bit seed for torch from whole numbers."""
    text = " ".join(map(str, keys)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
