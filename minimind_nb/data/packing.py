"""Documents become rows of one width: held-out split, truncation, packing and order.

A document of n tokens is n - 1 *targets*: each token but its first is predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .conversations import IN_LOSS, TURN, USER
from .token_cache import TokenCache

Piece = tuple[int, int, int]
"""(document, start, count): `count` targets, the first after the token at `start`."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class PackedRows:
    """`spans` [rows, 2] gives begin and end in `pieces` [n, 3] of each row; int64."""

    pieces: np.ndarray
    spans: np.ndarray

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def tokens(self) -> int:
        """The targets of all rows."""
        before = np.append(0, np.cumsum(self.pieces[:, 2]))
        begins, ends = self.spans.T
        return int((before[ends] - before[begins]).sum())

    def row(self, number: int) -> list[Piece]:
        """Return the pieces of one row."""
        begin, end = self.spans[number]
        return [(d, start, n) for d, start, n in self.pieces[begin:end].tolist()]


def pack(pieces: np.ndarray, width: int, split: bool = True) -> PackedRows:
    """Fill rows of `width` targets with pieces [n, 3]; only the last row may have room.

    A piece longer than a row fills whole rows first. What remains is packed best fit,
    longest first (Johnson 1974): the longest piece that fits goes in, and if none fits,
    the longest left is split. Costs about 1 µs a piece. Rows follow the lengths.

    Without `split` pieces stay whole, none may be longer than a row, and any row may have
    room. The number of rows follows from the lengths alone, whatever their order.
    """
    documents, starts, targets = pieces.T
    assert split or targets.max(initial=0) <= width
    rows, left = np.divmod(targets, width)
    whole = np.repeat(pieces, rows, axis=0)
    number = np.arange(len(whole)) - np.repeat(np.cumsum(rows) - rows, rows)
    whole[:, 1] += number * width
    whole[:, 2] = width
    rest = np.stack([documents, starts + targets - left, left], 1)
    rest, ends = _best_fit(rest, width, split)
    bounds = np.concatenate([np.arange(len(whole) + 1), len(whole) + ends])
    spans = np.stack([bounds[:-1], bounds[1:]], 1)
    return PackedRows(np.concatenate([whole, rest]), spans)


def _best_fit(
    rest: np.ndarray, width: int, split: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return pieces shorter than a row, packed, and the end of each row in them."""
    buckets: list[list[tuple[int, int]]] = [[] for _ in range(width)]
    for document, start, count in rest[::-1].tolist():
        buckets[count].append((document, start))
    # Bit n is set if a piece of n targets is left: the longest that fits is then one
    # shift of a 512-bit integer away.
    left = sum(1 << count for count in range(1, width) if buckets[count])
    pieces: list[Piece] = []
    ends: list[int] = []
    while left:
        room = width
        while room and left:
            fitting = left & ((2 << room) - 1)
            if not (fitting or split):
                break
            count = (fitting or left).bit_length() - 1
            document, start = buckets[count].pop()
            if not buckets[count]:
                left ^= 1 << count
            taken = min(count, room)
            pieces.append((document, start, taken))
            room -= taken
            if taken < count:
                buckets[count - taken].append((document, start + taken))
                left |= 1 << (count - taken)
        ends.append(len(pieces))
    return np.array(pieces, np.int64).reshape(-1, 3), np.array(ends, np.int64)


def make_rows(pieces: np.ndarray, stage: str, width: int) -> PackedRows:
    """Return the samples of a stage: two neighbours each, or rows; only texts are split."""
    if stage == "dpo":
        ends = np.arange(0, len(pieces) + 1, 2)
        return PackedRows(pieces, np.stack([ends[:-1], ends[1:]], 1))
    return pack(pieces, width, split=stage == "pretrain")


def arrange_epoch(
    pieces: np.ndarray, stage: str, width: int, seed: int, epoch: int, *source: int
) -> PackedRows:
    """Return the samples of one epoch: shuffled pieces, packed, and the rows shuffled."""
    if stage != "dpo":
        pieces = pieces[shuffled(len(pieces), seed, epoch, *source, 0)]
    rows = make_rows(pieces, stage, width)
    order = shuffled(len(rows), seed, epoch, *source, 1)
    return PackedRows(rows.pieces, rows.spans[order])


def mix_epoch(
    sources: Sequence[np.ndarray],
    stage: str,
    width: int,
    seed: int,
    epoch: int,
    *,
    weights: Sequence[float],
) -> PackedRows:
    """Return the samples of one epoch of several sources, mixed by their weights.

    Each source is arranged by itself. The source of row k is the one that is furthest
    behind its share of k + 1 rows; the epoch ends where one has no row left.
    """
    arranged = [
        arrange_epoch(pieces, stage, width, seed, epoch, number)
        for number, pieces in enumerate(sources)
    ]
    shares = [weight / sum(weights) for weight in weights]
    taken = [0] * len(sources)
    order: list[int] = []
    while True:
        rows = len(order) + 1
        behind = [share * rows - n for share, n in zip(shares, taken, strict=True)]
        source = behind.index(max(behind))
        if taken[source] == len(arranged[source]):
            break
        taken[source] += 1
        order.append(source)
    spans = np.empty((len(order), 2), np.int64)
    begin = 0
    for number, rows in enumerate(arranged):
        spans[np.array(order) == number] = rows.spans[: taken[number]] + begin
        begin += len(rows.pieces)
    return PackedRows(np.concatenate([rows.pieces for rows in arranged]), spans)


def shuffled(n: int, *keys: int) -> np.ndarray:
    """Return a permutation of range(n), a function of n and the keys alone.

    Sorts by splitmix64 (Steele, Lea and Flood 2014) of position and keys, since numpy's
    generators may change their streams between versions.
    """
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = _mix(state ^ np.uint64(key))
    positions = np.arange(1, n + 1, dtype=np.uint64)
    return np.argsort(_mix(positions * _GOLDEN + state), kind="stable")


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def split_by_hash(hashes: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return document numbers to train on and to hold out, each in the file's order.

    A document is held out when its content hash falls below `fraction` of the range, so
    equal texts stay on one side. Of different texts each side gets one at least; a
    single one is trained on.
    """
    held_out = hashes < np.uint64(min(fraction, 1.0) * float(2**64 - 2**11))
    if fraction > 0 and len(hashes):
        if not held_out.any():
            held_out = hashes == hashes.min()
        held_out &= hashes != hashes.max()
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


@dataclass(frozen=True)
class TruncatedDocuments:
    """The `pieces` [n, 3] of documents that are used; arrays are int64.

    Of their targets `loss_tokens` [n] are in the loss, and spell `text_bytes` [n] of
    UTF-8. `cut` documents or pairs lost turns, `dropped` have no whole answer left and no
    piece. The longest had `longest` targets.
    """

    pieces: np.ndarray
    loss_tokens: np.ndarray
    text_bytes: np.ndarray
    cut: int
    dropped: int
    longest: int

    @property
    def documents(self) -> np.ndarray:
        """The numbers of the documents in the cache."""
        return self.pieces[:, 0]


def truncate_documents(
    cache: TokenCache, documents: np.ndarray, width: int
) -> TruncatedDocuments:
    """Return the parts of `documents` (numbers in the cache) that fit in rows of `width`.

    Plain text stays whole, of any length. A conversation of more targets ends after the
    last whole answer that fits. Pairs, chosen and rejected being neighbours in
    `documents`, lose the oldest turns of their prompt, the same in both, so that both
    fit and, if possible, begin with the user's turn; one turn of it stays at least.
    """
    targets, sizes = cache.targets[documents], cache.sizes[documents]
    starts, longest = np.zeros_like(targets), int(targets.max(initial=0))
    if cache.loss_tokens is None or cache.answers is None or cache.answer_sizes is None:
        pieces = np.stack([documents, starts, targets], 1)
        return TruncatedDocuments(
            pieces, targets, sizes, cut=0, dropped=0, longest=longest
        )
    loss_tokens = cache.loss_tokens[documents]
    together = 2 if cache.facts["record_format"] == "dpo" else 1
    long = np.flatnonzero(targets.reshape(-1, together).max(1) > width)
    kept = np.ones(len(documents) // together, bool)
    first_answer = np.cumsum(cache.answers) - cache.answers
    for number in long.tolist():
        these = slice(together * number, together * (number + 1))
        marks = [cache.marks_of(document) for document in documents[these].tolist()]
        if together == 1:
            answer_sizes = cache.answer_sizes[first_answer[documents[number]] :]
            found = _find_end(marks[0], answer_sizes, width)
            targets[number], loss_tokens[number], sizes[number] = found
            kept[number] = loss_tokens[number] > 0
        else:
            starts[these] = _find_starts(marks, width)
            kept[number] = starts[these].all()
    whole, dropped = np.repeat(kept, together), int((~kept).sum())
    pieces = np.stack([documents, starts, targets - starts], 1)
    return TruncatedDocuments(
        pieces[whole],
        loss_tokens[whole],
        sizes[whole],
        cut=len(long) - dropped,
        dropped=dropped,
        longest=longest,
    )


def _find_end(
    marks: np.ndarray, answer_sizes: np.ndarray, width: int
) -> tuple[int, int, int]:
    """Return targets, tokens in the loss and bytes of answers that fit whole."""
    continued = np.append((marks[1:] & (IN_LOSS | TURN)) == IN_LOSS, False)
    ends = np.flatnonzero((marks & IN_LOSS > 0) & ~continued) + 1
    ends = ends[ends <= width + 1]
    if not len(ends):
        return 0, 0, 0
    loss_tokens = int(np.count_nonzero(marks[: ends[-1]] & IN_LOSS))
    return int(ends[-1]) - 1, loss_tokens, int(answer_sizes[: len(ends)].sum())


def _find_starts(pair: Sequence[np.ndarray], width: int) -> tuple[int, int]:
    """Return where chosen and rejected start, at one turn; zeros if none fits."""
    chosen, rejected = pair
    turns = []
    for marks in pair:  # of the prompt, but the first
        answer = int(np.argmax(marks & IN_LOSS > 0))
        turns.append(np.flatnonzero(marks[: answer + 1] & TURN)[1:-1].tolist())
    fitting = [
        (a, b)
        for a, b in zip(*turns, strict=False)
        if max(len(chosen) - a, len(rejected) - b) <= width + 1
    ]
    asking = [each for each in fitting if chosen[each[0]] & USER]
    return (asking or fitting or [(0, 0)])[0]
