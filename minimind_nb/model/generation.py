"""Continue prompts and answer conversations, at once or token by token."""

import itertools
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.chat_template import ChatEncoder
from ..data.conversations import Message, read_chat
from ..data.tokenizer import read_tokenizer
from ..progress_bar import open_bar
from .architecture import MiniMindForCausalLM
from .decoding import Sampling, decode

_MANY = 8  # rows, from which on progress is shown
Prompt = str | Sequence[Message]


def generate(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompt | Sequence[Prompt],
    **settings: Any,
) -> str | list[str]:
    """Continue one prompt, or a list of them in one left-padded batch.

    A string begins a pretraining document: with the bos token in front, without an eos
    behind. A conversation, a list of {"role", "content"} messages, is rendered with the
    generation prompt and answered; special strings in a message are ordinary text. A
    continuation ends before the eos token, before the token that closes an answer in the
    chat template, or after `max_new_tokens`.

    `settings`, with defaults that suit a small model:

    - `max_new_tokens=128`;
    - `temperature=0.8`: 0 always takes the likeliest token, and a small model then
      repeats itself; at 1 it rambles;
    - `top_p=0.9`: draw from the likeliest tokens up to this probability (1: all);
    - `top_k=0`: draw from this many of the likeliest tokens (0: all);
    - `repetition_penalty=1.0`: more than 1 makes tokens already seen less likely;
    - `seed=None`: with a seed the same batch gives the same text on the same device,
      and torch's global generators are not touched;
    - `thinking=None`, for conversations: True or False sets the chat template's switch.
      In the shipped template True opens a thought, and False gives an empty one;
    - `tools=()`, for conversations: functions, described by signature and docstring, or
      schemas. The text may then have calls; `chat` runs them.

    Raises `ValueError` for settings out of range, an invalid conversation, a tokenizer
    that does not fit the model or has no chat template, a template without tools or that
    switch, and a prompt that leaves no room for `max_new_tokens`.
    """
    one = isinstance(prompts, str | Mapping)
    one = one or isinstance(next(iter(prompts), None), Mapping)
    batch: list[Any] = [prompts] if one else list(prompts)
    if not batch:
        return []
    rows, ends = _encode(model, tokenizer, batch, Sampling(**settings))
    new = continue_ids(model, rows, ends=ends, **settings)
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in new]
    return texts[0] if one else texts


def stream(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    **settings: Any,
) -> Iterator[str]:
    """Yield the continuation of one prompt in pieces, as its tokens come.

    Prompt, `settings`, errors and the text as a whole are those of `generate`. No piece
    ends within a character.
    """
    (row,), ends = _encode(model, tokenizer, [prompt], Sampling(**settings))
    return stream_ids(model, tokenizer, row, ends=ends, **settings)


def stream_ids(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    row: Sequence[int],
    *,
    ends: Collection[int],
    **settings: Any,
) -> Iterator[str]:
    """Yield what `stream` does for a prompt that is already encoded."""
    ids: list[int] = []
    shown = text = ""
    for (token,) in decode(model, [row], ends=ends, sampling=Sampling(**settings)):
        if token in ends:
            break
        ids.append(token)
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        # A character with some of its bytes missing decodes to U+FFFD.
        if text != shown and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    if text != shown:
        yield text[len(shown) :]


def begin_document(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text behind the bos token, which is not doubled."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin: Any = [tokenizer.bos_token_id]
    return ids if ids[:1] == begin else begin + ids


def check_tokenizer(
    model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise `ValueError` for a tokenizer with ids that the model does not have."""
    if len(tokenizer) > (size := model.config.vocab_size):
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {size}: load both "
            "from one run, model, tokenizer = mm.load(…)"
        )


def _encode(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Prompt],
    sampling: Sampling,
) -> tuple[list[list[int]], set[int]]:
    """Return the ids of each prompt, and the ids that end a continuation."""
    check_tokenizer(model, tokenizer)
    eos_id: Any = tokenizer.eos_token_id
    ends = {eos_id}
    encoder = None
    rows: list[list[int]] = []
    for prompt in batch:
        if isinstance(prompt, str):
            if sampling.tools or sampling.thinking is not None:
                raise ValueError(
                    "thinking and tools are for conversations, and this prompt is a text: "
                    'make it [{"role": "user", "content": "…"}]'
                )
            rows.append(begin_document(tokenizer, prompt))
            if model.stage in ("sft", "dpo") and str(tokenizer.bos_token) not in prompt:
                warnings.warn(
                    "a string is continued as a text, and this model answers conversations: "
                    'mm.generate(model, tokenizer, [{"role": "user", "content": "…"}])',
                    stacklevel=3,
                )
            continue
        try:
            chat, _ = read_chat(prompt, [*sampling.tools])
        except ValueError as fault:
            raise ValueError(f"invalid conversation: {fault}") from None
        if chat.messages[-1]["role"] == "assistant":
            raise ValueError(
                "the conversation ends with the assistant's turn: end it with the user's "
                "or a tool's, which can be answered"
            )
        encoder = encoder or ChatEncoder(read_tokenizer(tokenizer))
        ids = encoder.prompt(chat.messages, chat.tools, sampling.thinking)
        rows.append(ids.tolist())
        ends.add(encoder.end_id)
    longest, room = max(map(len, rows)), model.config.max_position_embeddings
    if longest + sampling.max_new_tokens > room:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new_tokens is "
            f"{sampling.max_new_tokens}; the model has {room} positions: shorten the prompt or "
            f"use max_new_tokens={max(1, room - longest)}"
        )
    return rows, ends


def continue_ids(
    model: MiniMindForCausalLM,
    rows: Sequence[Sequence[int]],
    *,
    ends: Collection[int],
    **settings: Any,
) -> list[list[int]]:
    """Return the new ids of each row of a batch, up to the first of the ids `ends`."""
    sampling = Sampling(**settings)
    steps = decode(model, rows, ends=ends, sampling=sampling)
    if len(rows) >= _MANY:
        title, total = f"Answering {len(rows)} prompts", sampling.max_new_tokens
        steps = open_bar(title, total, iterable=steps, unit="token")
    return [
        list(itertools.takewhile(lambda token: token not in ends, row))
        for row in zip(*steps, strict=True)
    ]
