"""Continuing prompts with a trained model."""

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from minimind_nb.model.architecture import MiniMindForCausalLM


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

    A prompt is read as the beginning of a pretraining document: the bos token in front,
    no eos behind. Each continuation (without its prompt) ends before the eos token or
    after ``max_new_tokens``. The defaults suit a small pretrained model, which loops at
    ``temperature=0`` (always the likeliest token) and rambles at 1. ``top_p`` keeps the
    likeliest tokens up to that probability, ``top_k`` that many (0: all);
    ``repetition_penalty`` above 1 lowers tokens already seen.

    With a ``seed`` the same batch gives the same text on the same device, and torch's
    global generators stay as they were; without one they are drawn from.

    Raises ``ValueError`` for settings out of range, a tokenizer that does not fit the
    model, or a prompt that leaves no room for ``max_new_tokens``.
    """
    batch = [prompts] if isinstance(prompts, str) else list(prompts)
    settings = _sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty)
    if not batch:
        return []
    rows = _encode(model, tokenizer, batch, max_new_tokens)
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask_BT = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    )
    special: dict[str, Any] = {
        "pad_token_id": pad,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    out_BT = _run(model, ids_BT, mask_BT, GenerationConfig(**settings, **special), seed)
    # A row that ended early is filled up with padding, which is special too.
    texts = [
        str(tokenizer.decode(row, skip_special_tokens=True))
        for row in out_BT[:, longest:].tolist()
    ]
    return texts[0] if isinstance(prompts, str) else texts


def _sampling(
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
) -> dict[str, Any]:
    problems = {
        f"max_new_tokens is {max_new_tokens}: use 1 or more.": max_new_tokens < 1,
        f"temperature is {temperature}: use 0 (greedy) or more.": temperature < 0,
        f"top_p is {top_p}: use more than 0, up to 1 (all tokens).": not 0 < top_p <= 1,
        f"top_k is {top_k}: use 0 (all tokens) or more.": top_k < 0,
        f"repetition_penalty is {repetition_penalty}: use more than 0, 1 for none.": (
            repetition_penalty <= 0
        ),
    }
    if found := [problem for problem, wrong in problems.items() if wrong]:
        raise ValueError(" ".join(found))
    shared = {
        "max_new_tokens": max_new_tokens,
        "repetition_penalty": repetition_penalty,
    }
    if temperature == 0:
        return {**shared, "do_sample": False}
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    return {**shared, "do_sample": True, **sampling}


def _encode(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[str],
    max_new_tokens: int,
) -> list[list[int]]:
    size, room = model.config.vocab_size, model.config.max_position_embeddings
    if len(tokenizer) > size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {size}, so they do "
            "not belong together. Load both from one run: model, tokenizer = mm.load(…)."
        )
    rows = tokenizer(batch, add_special_tokens=False)["input_ids"]
    rows = [[tokenizer.bos_token_id, *row] for row in rows]
    longest = max(map(len, rows))
    if longest + max_new_tokens > room:
        raise ValueError(
            f"The longest prompt has {longest} tokens and max_new_tokens is "
            f"{max_new_tokens}; the model has {room} positions. Shorten the prompt or "
            f"use max_new_tokens={max(1, room - longest)}."
        )
    return rows


def _run(
    model: MiniMindForCausalLM,
    ids_BT: Tensor,
    mask_BT: Tensor,
    settings: GenerationConfig,
    seed: int | None,
) -> Tensor:
    device, was_training = model.device, model.training
    devices = [device] if device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices) if seed is not None else nullcontext():
            if seed is not None:
                _seed(seed, device)
            return cast(Any, model).generate(
                ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                generation_config=settings,
            )
    finally:
        model.train(was_training)


def _seed(seed: int, device: torch.device) -> None:
    # torch.manual_seed would also reseed the devices that fork_rng does not restore.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
