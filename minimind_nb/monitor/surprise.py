"""The loss of each token of a text: as colour in a cell, as numbers in the result."""

import contextlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.architecture import MoEGate
from ..model.generation import begin_document, check_tokenizer
from .tables import Table
from .vocabulary import Mark, MarkedText, mark_tokens, readable, spell, tint

_STRONGEST = 8.0  # nats, of the tint; a blind guess among 6,400 tokens has 8.8


class Surprise(MarkedText):
    """The loss of each token of a text, and a table of the most surprising ones.

    Of each token: `tokens`, its text; `losses` in nats, NaN for the first, which nothing
    predicts; `ranks`, 1 for the likeliest; `top`, the five likeliest and their
    probabilities; and of a mixture `routes` [tokens, layers, experts]. `total_loss` is
    the sum, `loss` the mean; `bits_per_byte` leaves out the bytes of special tokens.
    `experts` is a table of the share of the tokens that each got.
    """

    def __init__(self, model: Any, tokenizer: Any, ids: list[int], width: int) -> None:
        losses, ranks, chances, likeliest, self.routes = _measure(model, ids, width)
        entries = dict(enumerate(spell(tokenizer)))
        pieces = [entries[token] for token in ids]
        self.tokens = [readable(piece) for piece in pieces]
        # What the last token predicts is not in the text.
        self.losses, self.ranks = np.array([np.nan, *losses[:-1]]), [0, *ranks[:-1]]
        self.top = [list[tuple[str, float]]()]
        for five, shares in zip(
            likeliest[:-1].tolist(), chances.tolist(), strict=False
        ):
            names = (readable(entries.get(token, b"unused")) for token in five)
            self.top.append([*zip(names, shares, strict=True)])
        self.total_loss = float(self.losses[1:].sum())
        self.loss = self.total_loss / max(1, len(ids) - 1)
        self.perplexity = math.exp(min(self.loss, 700))
        self._special = np.isin(ids, [*tokenizer.added_tokens_decoder])
        size = sum(len(pieces[n]) for n in np.flatnonzero(~self._special))
        self.bits_per_byte = self.total_loss / math.log(2) / max(1, size)
        super().__init__(
            f"{len(ids):,} tokens, loss {self.loss:.3f} (perplexity "
            f"{self.perplexity:,.4g}), {self.bits_per_byte:.3f} bits per byte",
            ["token", "loss", "probability", "rank", "the likeliest"],
            [self._describe(n) for n in 1 + np.argsort(-self.losses[1:])[:8]],
        )
        experts = range(model.config.n_routed_experts if self.routes.size else 0)
        self.experts = Table("Share of each expert", ["layer", *map(str, experts)], [])
        for layer in range(self.routes.shape[1]):
            shares = (f"{np.mean(self.routes[:, layer] == n):.0%}" for n in experts)
            self.experts.rows.append([str(layer), *shares])
        steps = (f"<span{tint(n / _STRONGEST)}> {n} </span>" for n in range(9))
        legend = f'<p class="faint">{"".join(steps)} nats</p>'
        self.body = mark_tokens(self._marks(pieces)) + legend
        if experts:
            self.body += self.experts._repr_html_()

    def _describe(self, n: int) -> list[str]:
        loss, chance = self.losses[n], math.exp(-self.losses[n])
        likeliest = " · ".join(f"“{token}” {100 * p:.3g}%" for token, p in self.top[n])
        row = [f"“{self.tokens[n]}”", f"{loss:.2f}", f"{100 * chance:.3g}%"]
        return [*row, f"{self.ranks[n]:,}", likeliest]

    def _note(self, n: int) -> str:
        token, loss, chance, rank, likeliest = self._describe(n)
        note = f"{token} {loss} nats, {chance}, rank {rank} · {likeliest}"
        note = note.replace(" · ", "\n") if n else f"{token} is the first"
        experts = " ".join("+".join(map(str, layer)) for layer in self.routes[n])
        return f"{note}\nexperts {experts}" if experts else note

    def _marks(self, pieces: list[bytes]) -> list[Mark]:
        """Return what `mark_tokens` takes; tokens that only together make characters
        are one, with the sum of their losses."""
        marks, first = list[Mark](), 0
        for end in range(1, len(pieces) + 1):
            data = b"".join(pieces[first:end])
            if data.decode(errors="ignore").encode() == data or end == len(pieces):
                notes = "\n".join(map(self._note, range(first, end)))
                share = min(1.0, np.nansum(self.losses[first:end]) / _STRONGEST)
                faint = bool(self._special[first])
                marks.append((readable(data), notes, share, faint))
                first = end
        return marks


@torch.no_grad()
def _measure(model: Any, ids: list[int], width: int) -> list[np.ndarray]:
    """Return loss and rank of the token after each [T], the five likeliest's
    probabilities and ids [T, 5], and the experts of each [T, layers, K]."""
    chosen: list[Tensor] = []
    ids_T = torch.tensor(ids, device=model.device)
    parts, done = list[list[Tensor]](), 0
    with contextlib.ExitStack() as undo:
        undo.callback(model.train, model.training)
        model.eval()
        for gate in model.modules():
            if isinstance(gate, MoEGate):
                hook = gate.register_forward_hook(lambda *x: chosen.append(x[2][0][0]))
                undo.callback(hook.remove)
        while done < len(ids):
            start = max(0, done - width // 2)
            chosen.clear()
            logits_TV = model(ids_T[None, start : start + width]).logits[0]
            log_TV = logits_TV[done - start :].float().log_softmax(-1)
            next_T1 = ids_T.roll(-1)[done : done + len(log_TV), None]
            log_T1 = log_TV.gather(1, next_T1)
            rank_T = (log_TV > log_T1).sum(1) + 1
            experts_LTK = torch.stack(chosen or [next_T1])[:, -len(log_TV) :]
            routes_TLK = experts_LTK.transpose(0, 1)[:, : len(chosen)]
            parts.append([-log_T1[:, 0], rank_T, *log_TV.exp().topk(5), routes_TLK])
            done += len(log_TV)
    return [torch.cat(each).cpu().numpy() for each in zip(*parts, strict=True)]


def surprise(model: Any, tokenizer: Any, text: str, max_seq_len: int = 512) -> Surprise:
    """Show the loss of each token of a text as colour, and what was likelier on hover.

    The text begins with the bos token, as in pretraining; for a conversation pass what
    `tokenizer.apply_chat_template(messages, tokenize=False)` returns. Tokens that only
    together make a character are shown as one. More than `max_seq_len` tokens are read in
    windows of that many, which overlap by half, so that half of one at least stands
    before every token behind the first window; pass what the model was trained with.
    Dropout is off. From a run: `mm.surprise(*mm.load(run), "…")`. Raises `ValueError`
    for a tokenizer that does not fit the model.
    """
    check_tokenizer(model, tokenizer)
    width = max(2, min(max_seq_len, model.config.max_position_embeddings))
    return Surprise(model, tokenizer, begin_document(tokenizer, text), width)
