"""Documents become rows of one width: order, packing, and the held-out split.

Pure functions of lengths, hashes and seeds; no token is read here. A document of n
tokens is n - 1 *targets*: each token but its first is predicted from those before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class PackedRows:
    """Which pieces of which documents make up each row.

    Row r holds the pieces `bounds[r]:bounds[r + 1]`; piece p is the targets
    `start[p]` to `start[p] + count[p]` of document `document[p]`, so its inputs begin
    with the token at `start[p]`: a piece that goes on repeats the last token of the one
    before. All int64; `targets[r]` is the number of targets in row r.
    """

    width: int
    document: np.ndarray
    start: np.ndarray
    count: np.ndarray
    bounds: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def fill(self) -> float:
        """Share of the positions that hold a target."""
        return float(self.targets.sum()) / max(1, len(self) * self.width)

    @property
    def split_documents(self) -> int:
        """Documents that lie in more than one piece."""
        _, pieces = np.unique(self.document, return_counts=True)
        return int((pieces > 1).sum())


def pack(documents: np.ndarray, targets: np.ndarray, width: int) -> PackedRows:
    """Fill rows of `width` targets with documents; only the last row may have room.

    `documents` are numbers in the order wished for, `targets` their numbers of targets
    (int64 both). A document longer than a row fills whole rows first. What remains is
    packed best fit, longest first (the offline bin-packing heuristic, Johnson 1974):
    the longest document that fits goes in, and where none fits, the longest there is
    is split. Costs about 1 µs a piece; rows = ceil(sum of targets / width), so fill
    is 1 but for the last row. Not covered: the order of the rows follows the lengths;
    shuffle them.
    """
    whole = _whole_rows(documents, targets, width)
    pieces, row_sizes = _best_fit(documents, targets, width)
    rest = np.array(pieces, dtype=np.int64).reshape(-1, 3)
    table = np.concatenate([whole, rest])
    sizes = np.concatenate([np.ones(len(whole), np.int64), np.array(row_sizes, int)])
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    cumulative = np.concatenate([[0], np.cumsum(table[:, 2])])
    return PackedRows(
        width=width,
        document=table[:, 0],
        start=table[:, 1],
        count=table[:, 2],
        bounds=bounds,
        targets=np.diff(cumulative[bounds]),
    )


def _whole_rows(documents: np.ndarray, targets: np.ndarray, width: int) -> np.ndarray:
    """The rows that long documents fill alone: (document, start, width) each."""
    rows = targets // width
    first = np.concatenate([[0], np.cumsum(rows)[:-1]]) if len(rows) else rows
    number = np.arange(rows.sum()) - np.repeat(first, rows)
    document = np.repeat(documents, rows)
    return np.stack([document, number * width, np.full_like(document, width)], axis=1)


def _best_fit(
    documents: np.ndarray, targets: np.ndarray, width: int
) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Pack what is left of each document; returns pieces and pieces a row."""
    left = targets % width
    starts = targets - left
    buckets: list[list[tuple[int, int]]] = [[] for _ in range(width)]
    for document, start, count in zip(
        documents[::-1].tolist(),
        starts[::-1].tolist(),
        left[::-1].tolist(),
        strict=True,
    ):
        buckets[count].append((document, start))
    # Bit n says that a document with n targets left is there: the longest that fits
    # is then one shift of a 512-bit integer away.
    there = sum(1 << count for count in range(1, width) if buckets[count])
    pieces: list[tuple[int, int, int]] = []
    row_sizes: list[int] = []
    while there:
        room, pieces_before = width, len(pieces)
        while room and there:
            count = (there & ((2 << room) - 1)).bit_length() - 1
            fits = count > 0
            if not fits:
                count = there.bit_length() - 1
            document, start = buckets[count].pop()
            if not buckets[count]:
                there ^= 1 << count
            taken = count if fits else room
            pieces.append((document, start, taken))
            room -= taken
            if not fits:
                buckets[count - taken].append((document, start + taken))
                there |= 1 << (count - taken)
        row_sizes.append(len(pieces) - pieces_before)
    return pieces, row_sizes


def shuffle_rows(rows: PackedRows, order: np.ndarray) -> PackedRows:
    """The same rows in another order (`order[i]` is the old number of row i)."""
    sizes = np.diff(rows.bounds)[order]
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    within = np.arange(bounds[-1]) - np.repeat(bounds[:-1], sizes)
    piece = np.repeat(rows.bounds[:-1][order], sizes) + within
    return PackedRows(
        width=rows.width,
        document=rows.document[piece],
        start=rows.start[piece],
        count=rows.count[piece],
        bounds=bounds,
        targets=rows.targets[order],
    )


def pack_epoch(
    documents: np.ndarray, targets: np.ndarray, width: int, seed: int, epoch: int
) -> PackedRows:
    """The rows of one epoch: shuffled documents, packed, and the rows shuffled."""
    order = shuffled(len(documents), seed, epoch, 0)
    rows = pack(documents[order], targets[order], width)
    return shuffle_rows(rows, shuffled(len(rows), seed, epoch, 1))


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
