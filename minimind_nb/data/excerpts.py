"""What of each document is used: all of it, or as many whole turns as a row can hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .conversations import TRAINED, TURN, USER
from .token_cache import TokenCache


@dataclass(frozen=True)
class Excerpts:
    """The parts of documents that are used; arrays are int64, one entry a document.

    A part is (document, start, targets): `targets` predicted tokens, the first from the
    token at `start`. Of them `trained` are learned from, and spell `text_bytes` bytes of
    UTF-8. Documents (where they are pairs: pairs) that lost turns are `cut`; `dropped`
    are those of which no whole answer was left, and which are not among `documents`;
    `longest` is the number of targets of the longest before.
    """

    documents: np.ndarray
    starts: np.ndarray
    targets: np.ndarray
    trained: np.ndarray
    text_bytes: np.ndarray
    cut: int
    dropped: int
    longest: int


def take_excerpts(cache: TokenCache, documents: np.ndarray, width: int) -> Excerpts:
    """The parts of `documents` (numbers in the cache) that fit in rows of `width`.

    Plain text stays whole, of any length. A conversation of more targets ends after the
    last whole answer that fits. Pairs, chosen and rejected being neighbours in
    `documents`, lose the oldest turns of their prompt, the same in both, so that both
    fit and, if that can be, begin with the user's turn; one turn of it stays at least.
    """
    targets = cache.targets[documents]
    starts = np.zeros_like(targets)
    sizes = np.array(cache.sizes[documents])
    longest = int(targets.max(initial=0))
    if cache.marks is None or cache.loss_tokens is None:
        return Excerpts(documents, starts, targets, targets, sizes, 0, 0, longest)
    trained = np.array(cache.loss_tokens[documents])
    together = 2 if cache.facts["record_format"] == "dpo" else 1
    long = np.flatnonzero(targets.reshape(-1, together).max(1) > width)
    kept = np.ones(len(documents) // together, bool)
    if together == 1:
        ends, trained[long], sizes[long] = _find_ends(cache, documents[long], width)
        kept[long] = ends > 0
        targets[long] = ends - 1
    else:
        begins = _find_begins(cache, documents.reshape(-1, 2)[long], width)
        kept[long] = begins[:, 0] > 0
        starts.reshape(-1, 2)[long] = begins
        targets -= starts
    whole = np.repeat(kept, together)
    dropped = len(kept) - int(kept.sum())
    return Excerpts(
        documents[whole],
        starts[whole],
        targets[whole],
        trained[whole],
        sizes[whole],
        cut=len(long) - dropped,
        dropped=dropped,
        longest=longest,
    )


def _find_ends(cache: TokenCache, documents: np.ndarray, width: int) -> np.ndarray:
    """Where the last whole answer that fits ends, trained tokens, bytes of answers."""
    assert cache.answers is not None and cache.answer_sizes is not None
    first = np.cumsum(cache.answers) - cache.answers
    found = np.zeros((3, len(documents)), np.int64)
    for number, document in enumerate(documents.tolist()):
        marks = cache.marks_of(document)
        goes_on = np.append((marks[1:] & (TRAINED | TURN)) == TRAINED, False)
        ends = np.flatnonzero((marks & TRAINED > 0) & ~goes_on) + 1
        ends = ends[ends <= width + 1]
        if len(ends):
            sizes = cache.answer_sizes[first[document] :][: len(ends)]
            trained = np.count_nonzero(marks[: ends[-1]] & TRAINED)
            found[:, number] = ends[-1], trained, sizes.sum()
    return found


def _find_begins(cache: TokenCache, pairs: np.ndarray, width: int) -> np.ndarray:
    """Where chosen and rejected [pairs, 2] begin, at the same turn; 0 where none fits."""
    found = np.zeros_like(pairs)
    for number, pair in enumerate(pairs.tolist()):
        marks = [cache.marks_of(document) for document in pair]
        turns = [_find_prompt_turns(each) for each in marks]
        fitting = [
            (begins, bool(marks[0][begins[0]] & USER))
            for begins in zip(*turns, strict=False)
            if all(len(m) - 1 - a <= width for m, a in zip(marks, begins, strict=True))
        ]
        if fitting:
            found[number] = max(fitting, key=lambda each: each[1])[0]
    return found


def _find_prompt_turns(marks: np.ndarray) -> list[int]:
    """Where the turns before the first trained answer begin, but for the first turn."""
    answer = int(np.argmax(marks & TRAINED > 0))
    return np.flatnonzero(marks[: answer + 1] & TURN)[1:-1].tolist()
