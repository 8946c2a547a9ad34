"""What the model answers to the same prompts at every validation."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ..config import TrainConfig
from ..data.batches import TrainingStream, ValidationRows
from ..data.conversations import TRAINED, TURN, USER, ChatEncoder
from ..data.fast_encoding import BulkEncoder
from ..data.tokenizer import TokenizerSpec, load_tokenizer
from ..model.generation import continue_ids
from .trainer import Prompt, Trainer

_PROMPTS = 2
_BEGINNING = 16  # tokens of a held-out text
_LONGEST = 512  # tokens of a prompt that is chosen here
_SAMPLING = {"temperature": 0.8, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.0}


def choose_prompts(
    cfg: TrainConfig,
    tokenizer: TokenizerSpec,
    stream: TrainingStream,
    validation: ValidationRows | None,
) -> list[Prompt]:
    """The prompts of `sample_prompts`, or the first held-out documents' beginnings.

    Of a conversation, that is everything before its first answer.
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
        end, shown = _BEGINNING, slice(0, _BEGINNING)
        if cache.marks is not None:
            end, shown = _find_question(cache.marks_of(number))
        if end < min(len(ids), _LONGEST):
            text = str(decode(ids[shown], skip_special_tokens=True))
            text = text.removeprefix("user\n").strip()  # ChatML's name of the role
            chosen[text] = Prompt(text, ids[:end].tolist())
        if len(chosen) == _PROMPTS:
            break
    return list(chosen.values())


def _find_question(marks: np.ndarray) -> tuple[int, slice]:
    """Where the first answer begins, and the last turn of the user's before it."""
    end = int(np.argmax(marks & TRAINED > 0))
    turns = np.append(np.flatnonzero(marks[:end] & TURN), end)
    asked = np.flatnonzero(marks[turns[:-1]] & USER)
    last = int(asked[-1]) if len(asked) else 0
    return end, slice(int(turns[last]), int(turns[last + 1]))


@functools.lru_cache(maxsize=1)
def _decoder(tokenizer: TokenizerSpec) -> Callable[..., Any]:
    return load_tokenizer(tokenizer).decode


def _encode(text: str, cfg: TrainConfig, tokenizer: TokenizerSpec) -> Prompt:
    if cfg.stage == "pretrain":
        ids = [tokenizer.bos_id, *BulkEncoder(tokenizer).encode([text])[0].tolist()]
        return Prompt(text, ids)
    message = {"role": "user", "content": text}
    return Prompt(text, ChatEncoder(tokenizer).prompt([message]).tolist())


def write_samples(t: Trainer) -> None:
    """On rank 0, append what the model says to each prompt; no randomness is consumed.

    The draws are seeded from (seed, step, prompt).
    """
    if not t.prompts:  # none asked for, or not rank 0
        return
    config = t.model.config
    decode = _decoder(t.tokenizer)
    for number, prompt in enumerate(t.prompts):
        with t.autocast:
            (ids,) = continue_ids(
                t.model,
                [prompt.ids],
                pad_id=config.pad_token_id,
                eos_id=config.eos_token_id,
                max_new_tokens=t.cfg.sample_tokens or 0,
                seed=seed_of(t.cfg.seed, t.progress.step, number),
                **_SAMPLING,
            )
        t.record.beat()
        answer = str(decode(ids, skip_special_tokens=True))
        where = t.progress.position()
        t.metrics.append(
            "sample", **where, number=number, prompt=prompt.text, answer=answer
        )


def seed_of(*keys: int) -> int:
    """A seed for torch from whole numbers: 64 bits, sign included."""
    text = " ".join(map(str, keys)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
