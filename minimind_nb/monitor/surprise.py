"""The loss of each token of a text: as colour in a cell, as numbers in the result."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.chat_template import ChatEncoder
from ..data.conversations import Message, read_chat
from ..data.tokenizer import read_tokenizer
from ..model.architecture import MoEGate
from ..model.generation import begin_document, check_tokenizer
from .metrics import perplexity
from .tables import Table
from .vocabulary import mark_tokens, readable, spell

_STRONGEST = 8  # nats, of the tint; a blind guess among 6,400 tokens has 8.8


class Surprise(Table):
    """The loss of each token of a text, and a table of the most surprising ones.

    Of each token: `tokens`, its text; `losses` in nats; `top`, the five likeliest in its
    place and their probabilities; `routes`, the experts of each layer of a mixture. Loss
    and probabilities of the first, which nothing predicts, are NaN. Of all: `loss`, the
    mean; `perplexity`; `bits_per_byte`, of all bytes but those of special tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, ids: list[int], width: int) -> None:
        entries = spell(tokenizer)
        entries += [b"unused"] * (model.config.vocab_size - len(entries))
        pieces = [entries[token] for token in ids]
        self.tokens = [*map(readable, pieces)]
        measured = zip(*_measure(model, ids, width), strict=True)
        self.losses, likeliest, chances, self.routes = measured
        self.top = [
            [(readable(entries[token]), p) for token, p in zip(*five, strict=True)]
            for five in zip(likeliest, chances, strict=True)
        ]
        total = sum(self.losses[1:])
        self.loss = total / max(1, len(ids) - 1)
        self.perplexity = perplexity(self.loss)
        special = tokenizer.added_tokens_decoder
        size = sum(len(entries[token]) for token in ids if token not in special)
        self.bits_per_byte = total / math.log(2) / max(1, size)
        worst = sorted(range(1, len(ids)), key=self.losses.__getitem__, reverse=True)
        super().__init__(
            f"{len(ids):,} tokens, loss {self.loss:.3f} (perplexity "
            f"{self.perplexity:,.4g}), {self.bits_per_byte:.3f} bits per byte",
            ["the most surprising", "expected were"],
            [self._note(n).replace("\n", " · ").split(" · ", 1) for n in worst[:8]],
        )
        scale = [(f" {n} ", f"{n} nats", n / _STRONGEST) for n in range(9)]
        self.above = mark_tokens(self._marks(pieces)) + mark_tokens(scale)

    def _note(self, n: int) -> str:
        loss, lines = self.losses[n], [f"“{self.tokens[n]}” is the first"]
        if n:
            lines = [f"“{self.tokens[n]}” {loss:.2f} nats, {math.exp(-loss):.3%}"]
            lines += [f"“{token}” {p:.1%}" for token, p in self.top[n]]
        if self.routes[n]:
            layers = ("+".join(map(str, layer)) for layer in self.routes[n])
            lines.append(f"experts {' '.join(layers)}")
        return "\n".join(lines)

    def _marks(self, pieces: list[bytes]) -> Iterator[tuple[str, str, float]]:
        """Yield marks; tokens that only together make characters have one."""
        first = 0
        for end in range(1, len(pieces) + 1):
            data = b"".join(pieces[first:end])
            if data.decode(errors="ignore").encode() == data or end == len(pieces):
                notes = "\n".join(map(self._note, range(first, end)))
                loss = sum(self.losses[max(1, first) : end])
                yield readable(data), notes, loss / _STRONGEST
                first = end


@torch.no_grad()
def _measure(model: Any, ids: list[int], width: int) -> Iterator[tuple[Any, ...]]:
    """Yield the loss, the five likeliest, their probabilities, and the experts by layer
    of each token, after half as many tokens as `width` at least."""
    chosen: list[Tensor] = []
    ids_T, half = torch.tensor(ids, device=model.device), max(1, width // 2)
    last_1V = torch.full((1, model.config.vocab_size), math.nan, device=model.device)
    with contextlib.ExitStack() as undo:
        undo.callback(model.train, model.training)
        model.eval()
        for gate in model.modules():
            if isinstance(gate, MoEGate):
                hook = gate.register_forward_hook(lambda *x: chosen.append(x[2][0][0]))
                undo.callback(hook.remove)
        for start in range(0, len(ids), half):
            seen, end = max(0, start - half), start + half
            chosen.clear()
            next_TV = model(ids_T[None, seen:end]).logits[0, start - seen :].float()
            log_TV = torch.cat([last_1V, next_TV.log_softmax(-1)])
            log_TV, last_1V = log_TV[:-1], log_TV[-1:]
            loss_T = -log_TV.gather(1, ids_T[start:end, None])[:, 0]
            chance_T5, id_T5 = log_TV.exp().topk(5)
            routes = torch.stack(chosen, 1)[start - seen :].tolist() if chosen else []
            columns = [loss_T.tolist(), id_T5.tolist(), chance_T5.tolist()]
            yield from zip(*columns, routes or [[]] * len(loss_T), strict=True)


def surprise(
    model: Any, tokenizer: Any, text: str | Sequence[Message], max_seq_len: int = 512
) -> Surprise:
    """Show the loss of each token of a text as colour, and what was likelier on hover.

    A text begins with the bos token, as in pretraining; a conversation, a list of
    {"role", "content"}, is rendered by the chat template. Tokens that only together make
    a character are shown as one. A longer text than `max_seq_len` tokens is read in
    windows of that many, which overlap by half; pass what the model was trained with.
    Dropout is off. From a run: `mm.surprise(*mm.load(run), "…")`. Raises `ValueError`
    for a tokenizer that does not fit the model, and a conversation that is invalid or
    that the tokenizer has no template for.
    """
    check_tokenizer(model, tokenizer)
    if isinstance(text, str):
        ids = begin_document(tokenizer, text)
    else:
        chat, _ = read_chat(text)
        encoder = ChatEncoder(read_tokenizer(tokenizer))
        ids = encoder.prompt(chat.messages, chat.tools).tolist()
    width = min(max_seq_len, model.config.max_position_embeddings)
    return Surprise(model, tokenizer, ids, width)
