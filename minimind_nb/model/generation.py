"""Text from a trained model: prompts continued, conversations answered, streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.conversations import ChatEncoder, Message, check_messages
from ..data.tokenizer import read_tokenizer
from .architecture import MiniMindForCausalLM
from .decoding import Sampling, continue_ids, continue_paged, decode

Prompt = str | Sequence[Message]


def generate(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompt | Sequence[Prompt],
    *,
    paged: bool = False,
    **settings: Any,
) -> str | list[str]:
    """Continue one prompt, or a list of them in one left-padded batch.

    A string is read as the beginning of a pretraining document: the bos token in front
    (not doubled), no eos behind. A conversation, a list of {"role", "content"} messages,
    is rendered with the generation prompt and answered; special strings in a message
    are ordinary text. Each continuation (without its prompt) ends before the eos token
    or after `max_new_tokens`.

    `settings`, with defaults that suit a small model:

    - `max_new_tokens=128`;
    - `temperature=0.8`: 0 always takes the likeliest token, and a small model then
      repeats itself; at 1 it rambles;
    - `top_p=0.9`: draw from the likeliest tokens up to this probability (1: all);
    - `top_k=0`: draw from this many of the likeliest tokens (0: all);
    - `repetition_penalty=1.0`: more than 1 makes tokens already seen less likely;
    - `seed=None`: with a seed the same batch gives the same text on the same device,
      and torch's global generators are not touched; without one they are drawn from.

    `paged=True` decodes greedily with a paged cache (transformers' continuous
    batching), without padding, and gives equal answers. It is made for GPUs: on a CPU
    50 prompts of 5 to 60 tokens took twice as long (1.5 times with a mixture).

    Raises `ValueError` for settings out of range, an invalid conversation, a tokenizer
    that does not fit the model or has no chat template, a prompt that leaves no room for
    `max_new_tokens`, and `paged` with a `temperature` other than 0; `RuntimeError` for
    `paged` with transformers older than 5.9.
    """
    sampling = Sampling(**settings)
    one = isinstance(prompts, str | Mapping)
    batch: list[Any] = [prompts] if one else list(prompts)
    if not one and batch and isinstance(batch[0], Mapping):
        one, batch = True, [batch]
    if not batch:
        return []
    rows = _encode(model, tokenizer, batch, sampling.max_new_tokens)
    eos_id: Any = tokenizer.eos_token_id
    if paged:
        new = continue_paged(model, rows, eos_id=eos_id, sampling=sampling)
    else:
        new = continue_ids(model, rows, pad_id=eos_id, eos_id=eos_id, **settings)
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in new]
    return texts[0] if one else texts


def stream(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    **settings: Any,
) -> Iterator[str]:
    """Yield the continuation of one prompt in pieces, as its tokens come.

    Prompt, `settings`, errors (raised by the call itself) and the text that the pieces
    make are those of `generate`. No piece ends within a character.
    """
    most = Sampling(**settings).max_new_tokens
    (row,) = _encode(model, tokenizer, [prompt], most)
    return stream_ids(model, tokenizer, row, **settings)


def stream_ids(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    row: Sequence[int],
    **settings: Any,
) -> Iterator[str]:
    """Yield what `stream` does for a prompt that is encoded and known to leave room."""
    ids: list[int] = []
    shown = text = ""
    eos_id: Any = tokenizer.eos_token_id
    sampling = Sampling(**settings)
    for (token,) in decode(
        model, [row], pad_id=eos_id, eos_id=eos_id, sampling=sampling
    ):
        if token == eos_id:
            break
        ids.append(token)
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        # A character with some of its bytes missing decodes to U+FFFD.
        if text != shown and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    if text != shown:
        yield text[len(shown) :]


def check_tokenizer(
    model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise `ValueError` for a tokenizer with ids that the model does not have."""
    if len(tokenizer) > (size := model.config.vocab_size):
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {size}, so they do "
            "not belong together. Load both from one run: model, tokenizer = mm.load(…)."
        )


def _encode(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Prompt],
    max_new_tokens: int,
) -> list[list[int]]:
    check_tokenizer(model, tokenizer)
    encoder = None
    rows: list[list[int]] = []
    for prompt in batch:
        if isinstance(prompt, str):
            row: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            begin: Any = [tokenizer.bos_token_id]
            rows.append(row if row[:1] == begin else begin + row)
            continue
        if reason := check_messages(prompt):
            raise ValueError(f"Invalid conversation: {reason}.")
        if prompt[-1]["role"] == "assistant":
            raise ValueError(
                "The conversation ends with the assistant's turn: end it with the user's "
                "or a tool's, which can be answered."
            )
        encoder = encoder or ChatEncoder(read_tokenizer(tokenizer))
        rows.append(encoder.prompt(prompt).tolist())
    longest, room = max(map(len, rows)), model.config.max_position_embeddings
    if longest + max_new_tokens > room:
        raise ValueError(
            f"The longest prompt has {longest} tokens and max_new_tokens is "
            f"{max_new_tokens}; the model has {room} positions. Shorten the prompt or "
            f"use max_new_tokens={max(1, room - longest)}."
        )
    return rows
