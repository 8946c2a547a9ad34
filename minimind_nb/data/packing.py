"""Documents become rows of one width: order, packing, and the held-out split.

Pure functions of lengths, hashes and seeds; no token is read here. A document of n
tokens is n - 1 *targets*: each token but its first is predicted from those before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class PackedRows:
    """Which pieces of which documents make up each row; all int64.

    A piece is (document, start, count): `count` targets of a document, of which the
    first is predicted from the token at `start`, so a piece that goes on repeats the
    last token of the one before. `spans` [rows, 2] says from where to where in `pieces`
    each row lies, `targets` [rows] how many targets it has.
    """

    pieces: np.ndarray
    spans: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def row(self, number: int) -> list[tuple[int, int, int]]:
        """The pieces of one row, as (document, start, count)."""
        begin, end = self.spans[number]
        return [(d, start, n) for d, start, n in self.pieces[begin:end].tolist()]


def pack(
    documents: np.ndarray, targets: np.ndarray, width: int, split: bool = True
) -> PackedRows:
    """Fill rows of `width` targets with documents; only the last row may have room.

    `documents` are numbers in the order wished for, `targets` their numbers of targets
    (int64 both). A document longer than a row fills whole rows first. What remains is
    packed best fit, longest first (the offline bin-packing heuristic, Johnson 1974):
    the longest document that fits goes in, and where none fits, the longest there is
    is split. Costs about 1 µs a piece; rows = ceil(sum of targets / width), so fill
    is 1 but for the last row. Not covered: the order of the rows follows the lengths;
    shuffle them.

    Without `split` every document, none longer than a row, stays whole: a row may have
    room left. How many rows there are follows from the lengths alone, whatever their
    order.
    """
    assert split or targets.max(initial=0) <= width
    rows = targets // width
    number = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
    document = np.repeat(documents, rows)
    whole = [document, number * width, np.full_like(document, width)]
    left = targets % width
    rest = np.stack([documents, targets - left, left], 1)
    rest, ends = _best_fit(rest, width, split)
    pieces = np.concatenate([np.stack(whole, 1), rest])
    bounds = np.concatenate([np.arange(len(number) + 1), len(number) + ends])
    cumulative = np.concatenate([[0], np.cumsum(pieces[:, 2])])
    spans = np.stack([bounds[:-1], bounds[1:]], 1)
    return PackedRows(pieces, spans, np.diff(cumulative[bounds]))


def _best_fit(
    rest: np.ndarray, width: int, split: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Pack pieces shorter than a row; returns them, and where each row of them ends."""
    buckets: list[list[tuple[int, int]]] = [[] for _ in range(width)]
    for document, start, count in rest[::-1].tolist():
        buckets[count].append((document, start))
    # Bit n says that a piece of n targets is there: the longest that fits is then one
    # shift of a 512-bit integer away.
    there = sum(1 << count for count in range(1, width) if buckets[count])
    pieces: list[tuple[int, int, int]] = []
    ends: list[int] = []
    while there:
        room = width
        while room and there:
            fitting = there & ((2 << room) - 1)
            if not (fitting or split):
                break
            count = (fitting or there).bit_length() - 1
            document, start = buckets[count].pop()
            if not buckets[count]:
                there ^= 1 << count
            taken = min(count, room)
            pieces.append((document, start, taken))
            room -= taken
            if taken < count:
                buckets[count - taken].append((document, start + taken))
                there |= 1 << (count - taken)
        ends.append(len(pieces))
    return np.array(pieces, np.int64).reshape(-1, 3), np.array(ends, np.int64)


def pack_epoch(
    documents: np.ndarray,
    targets: np.ndarray,
    width: int,
    seed: int,
    epoch: int,
    *,
    split: bool = True,
) -> PackedRows:
    """The rows of one epoch: shuffled documents, packed, and the rows shuffled."""
    order = shuffled(len(documents), seed, epoch, 0)
    return shuffle_rows(
        pack(documents[order], targets[order], width, split), seed, epoch
    )


def pair_up(pieces: np.ndarray) -> PackedRows:
    """One row for every two pieces [2n, 3], in their order."""
    ends = np.arange(0, len(pieces) + 1, 2)
    targets = pieces[:, 2].reshape(-1, 2).sum(1)
    return PackedRows(pieces, np.stack([ends[:-1], ends[1:]], 1), targets)


def shuffle_rows(rows: PackedRows, seed: int, epoch: int) -> PackedRows:
    """The same rows in the order of an epoch."""
    order = shuffled(len(rows), seed, epoch, 1)
    return replace(rows, spans=rows.spans[order], targets=rows.targets[order])


def shuffled(n: int, *keys: int) -> np.ndarray:
    """A permutation of range(n), a function of n and the keys alone.

    Sorts by splitmix64 (Steele, Lea and Flood 2014) of the position and the keys:
    random generators may change their streams between versions, and a resumed run
    must find the very same order.
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
    """Document numbers to train on and to hold out, each in the file's order.

    A document is held out when its 64-bit content hash falls below `fraction` of the
    range, so equal texts stay on one side and the choice does not depend on order or
    on other documents. Where there are two different texts, each side gets one at
    least; a single one is trained on.
    """
    held_out = hashes < np.uint64(min(fraction, 1.0) * float(2**64 - 2**11))
    if fraction > 0 and len(hashes):
        if not held_out.any():
            held_out = hashes == hashes.min()
        held_out &= hashes != hashes.max()
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
