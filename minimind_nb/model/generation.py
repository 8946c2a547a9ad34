"""Continuing prompts with a trained model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .architecture import MiniMindForCausalLM


def generate(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | list[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.9,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> str | list[str]:
    """Continue one prompt, or a list of them in one left-padded batch.

    A prompt is read as the beginning of a pretraining document: the bos token in front
    (not doubled), no eos behind. Each continuation (without its prompt) ends before the
    eos token or after ``max_new_tokens``. The defaults suit a small pretrained model, which loops at
    ``temperature=0`` (always the likeliest token) and rambles at 1. ``top_p`` keeps the
    likeliest tokens up to that probability, ``top_k`` that many (0: all);
    ``repetition_penalty`` above 1 lowers tokens already seen.

    With a ``seed`` the same batch gives the same text on the same device, and torch's
    global generators stay as they were; without one they are drawn from.

    Raises ``ValueError`` for settings out of range, a tokenizer that does not fit the
    model, or a prompt that leaves no room for ``max_new_tokens``.
    """
    batch = [prompts] if isinstance(prompts, str) else list(prompts)
    settings = _sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
    )
    if not batch:
        return []
    rows = _encode(model, tokenizer, batch, max_new_tokens)
    pad: Any = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    settings |= {"pad_token_id": pad, "eos_token_id": tokenizer.eos_token_id}
    ids_BT = _left_padded(rows, pad)
    mask_BT = _left_padded([torch.ones_like(row) for row in rows], 0)
    was_training = model.training
    model.eval()
    try:
        with _seeded(seed, model.device):
            out_BT = cast(Any, model).generate(
                ids_BT.to(model.device),
                attention_mask=mask_BT.to(model.device),
                generation_config=GenerationConfig(**settings),
            )
    finally:
        model.train(was_training)
    # A row that ended early is filled up with padding, which is special too.
    texts = [
        str(tokenizer.decode(row, skip_special_tokens=True))
        for row in out_BT[:, ids_BT.shape[1] :].tolist()
    ]
    return texts[0] if isinstance(prompts, str) else texts


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            # torch.manual_seed would reseed devices that are not restored, too.
            torch.default_generator.manual_seed(seed)
            for each in devices:
                with torch.cuda.device(each):
                    torch.cuda.manual_seed(seed)
        yield


def _left_padded(rows: list[Tensor], value: int) -> Tensor:
    return pad_sequence(rows, True, value, padding_side="left")


def _sampling(**given: Any) -> dict[str, Any]:
    penalty = given["repetition_penalty"]
    ranges = {
        "max_new_tokens": ("1 or more", given["max_new_tokens"] >= 1),
        "temperature": ("0 (greedy) or more", given["temperature"] >= 0),
        "top_p": ("more than 0, up to 1 (all tokens)", 0 < given["top_p"] <= 1),
        "top_k": ("0 (all tokens) or more", given["top_k"] >= 0),
        "repetition_penalty": ("more than 0, 1 for none", penalty > 0),
    }
    problems = [
        f"{name} is {given[name]}: use {expected}."
        for name, (expected, holds) in ranges.items()
        if not holds
    ]
    if problems:
        raise ValueError(" ".join(problems))
    if given["temperature"] > 0:
        return given | {"do_sample": True}
    greedy = {"max_new_tokens": given["max_new_tokens"], "do_sample": False}
    return greedy | {"repetition_penalty": penalty}


def _encode(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[str],
    max_new_tokens: int,
) -> list[Tensor]:
    size, room = model.config.vocab_size, model.config.max_position_embeddings
    if len(tokenizer) > size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {size}, so they do "
            "not belong together. Load both from one run: model, tokenizer = mm.load(…)."
        )
    rows = tokenizer(batch, add_special_tokens=False)["input_ids"]
    begin = [tokenizer.bos_token_id]
    rows = [row if row[:1] == begin else begin + row for row in rows]
    longest = max(map(len, rows))
    if longest + max_new_tokens > room:
        raise ValueError(
            f"The longest prompt has {longest} tokens and max_new_tokens is "
            f"{max_new_tokens}; the model has {room} positions. Shorten the prompt or "
            f"use max_new_tokens={max(1, room - longest)}."
        )
    return [torch.tensor(row) for row in rows]
