"""Rows hold every target exactly once, and their order never changes."""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind_nb.data.packing import (
    PackedRows,
    arrange_epoch,
    make_rows,
    pack,
    shuffled,
    split_by_hash,
)

lengths = st.lists(st.integers(0, 40), max_size=30)
widths = st.integers(1, 12)


def whole(targets: Sequence[int] | np.ndarray) -> np.ndarray:
    """Documents of some lengths, whole."""
    counts = np.array(targets, np.int64)
    return np.stack([np.arange(len(counts)), 0 * counts, counts], 1)


def pack_lengths(targets: list[int], width: int) -> PackedRows:
    return pack(whole(targets), width)


def pieces(rows: PackedRows) -> list[list[tuple[int, int, int]]]:
    """Each row's (document, start, count)."""
    return [rows.row(number) for number in range(len(rows))]


def targets_of(rows: PackedRows) -> list[int]:
    return [sum(count for _, _, count in row) for row in pieces(rows)]


def split_documents(rows: PackedRows) -> int:
    """Documents that lie in more than one piece."""
    found = Counter(document for document, _, _ in itertools.chain(*pieces(rows)))
    return sum(n > 1 for n in found.values())


def covered(rows: PackedRows) -> list[tuple[int, int]]:
    """Every (document, target) of the rows, sorted, as often as it is there."""
    return sorted(
        (document, target)
        for document, start, count in itertools.chain(*pieces(rows))
        for target in range(start, start + count)
    )


def all_targets(targets: list[int]) -> list[tuple[int, int]]:
    return [(d, t) for d, n in enumerate(targets) for t in range(n)]


def split_by_concatenation(targets: np.ndarray, width: int) -> int:
    """Documents cut when all are written end to end and cut every `width`."""
    end = np.cumsum(targets)
    first, last = (end - targets) // width, (end - 1) // width
    return int((first < last)[targets > 0].sum())


def test_long_documents_fill_rows_and_the_rest_is_packed_best_fit():
    rows = pack_lengths([5, 3, 2, 8, 0], width=4)
    assert pieces(rows) == [
        [(0, 0, 4)],
        [(3, 0, 4)],
        [(3, 4, 4)],
        [(1, 0, 3), (0, 4, 1)],
        [(2, 0, 2)],
    ]
    assert targets_of(rows) == [4, 4, 4, 4, 2]
    assert split_documents(rows) == 2
    # If none fits, the longest document left is split.
    assert pieces(pack_lengths([3, 3, 3], width=4)) == [
        [(0, 0, 3), (1, 0, 1)],
        [(2, 0, 3), (1, 1, 1)],
        [(1, 2, 1)],
    ]
    # Documents of equal length keep their order.
    assert pieces(pack_lengths([2, 2, 2, 2], width=4)) == [
        [(0, 0, 2), (1, 0, 2)],
        [(2, 0, 2), (3, 0, 2)],
    ]


@pytest.mark.parametrize("targets", [[], [0], [0, 0, 0]])
def test_nothing_to_learn_makes_no_rows(targets):
    rows = pack_lengths(targets, width=8)
    assert len(rows) == 0
    assert len(rows.pieces) == 0
    assert len(arrange_epoch(whole(targets), "pretrain", 8, seed=1, epoch=1)) == 0


@given(lengths, widths)
def test_rows_hold_every_target_once_and_one_at_most_has_room(targets, width):
    rows = pack_lengths(targets, width)
    assert covered(rows) == all_targets(targets)
    assert all(n == width for n in targets_of(rows)[:-1])
    assert len(rows) == -(-sum(targets) // width)
    assert all(0 < n <= width for n in targets_of(rows))
    assert (rows.pieces[:, 2] > 0).all()


@given(lengths, widths)
def test_a_row_splits_one_document_at_most(targets, width):
    rows = pack_lengths(targets, width)
    n = np.array(targets, np.int64)
    needed = -(-n // width)  # pieces of a document that is split no more than it must
    found = Counter(rows.pieces[:, 0].tolist())
    spare = sum(found[d] - k for d, k in enumerate(needed.tolist()))
    assert 0 <= spare <= len(rows) - int((n // width).sum())


short_lengths = st.lists(st.integers(0, 9), max_size=30)


def pack_whole(targets: list[int], width: int) -> PackedRows:
    return pack(whole(targets), width, split=False)


def test_without_splitting_the_longest_that_fits_goes_in_and_room_is_left():
    rows = pack_whole([5, 3, 2, 4, 8, 3], width=8)
    assert pieces(rows) == [
        [(4, 0, 8)],
        [(0, 0, 5), (1, 0, 3)],
        [(3, 0, 4), (5, 0, 3)],
        [(2, 0, 2)],
    ]
    assert targets_of(rows) == [8, 8, 7, 2]


def test_without_splitting_nothing_may_be_longer_than_a_row():
    with pytest.raises(AssertionError):
        pack_whole([3, 9], width=8)


@given(short_lengths, st.integers(9, 20))
def test_without_splitting_every_document_lies_whole_in_one_row(targets, width):
    rows = pack_whole(targets, width)
    found = sorted(itertools.chain(*pieces(rows)))
    assert found == [(d, 0, n) for d, n in enumerate(targets) if n]
    assert all(0 < n <= width for n in targets_of(rows))
    half_empty = sum(n <= width // 2 for n in targets_of(rows))
    assert half_empty <= 1, "two such rows would fit in one"


@given(short_lengths, st.integers(9, 20), st.randoms())
def test_without_splitting_rows_are_as_many_in_any_order(targets, width, random):
    count = len(pack_whole(targets, width))
    for epoch in range(2):
        rows = arrange_epoch(whole(targets), "sft", width, 1, epoch)
        assert len(rows) == count
    random.shuffle(targets)
    assert len(pack_whole(targets, width)) == count


def test_two_neighbours_make_a_pair():
    four = np.array([[4, 0, 7], [5, 0, 3], [0, 2, 6], [1, 2, 8]], np.int64)
    rows = make_rows(four, "dpo", 9)
    assert pieces(rows) == [[(4, 0, 7), (5, 0, 3)], [(0, 2, 6), (1, 2, 8)]]
    assert targets_of(rows) == [10, 14]
    assert len(make_rows(four[:0], "dpo", 9)) == 0


@given(st.integers(0, 40), st.integers(0, 3), st.integers(0, 3))
def test_shuffled_pairs_stay_together(count, seed, epoch):
    numbers = np.arange(2 * count, dtype=np.int64)
    paired = np.stack([numbers, numbers % 3, numbers + 1], 1)
    rows = arrange_epoch(paired, "dpo", 99, seed, epoch)
    found = [[document for document, _, _ in row] for row in pieces(rows)]
    order = shuffled(count, seed, epoch, 1)
    assert found == [[2 * n, 2 * n + 1] for n in order]
    assert targets_of(rows) == [4 * n + 3 for n in order]


def test_hardly_a_document_is_split_that_fits_in_a_row():
    # Lengths as in real text: median 162, mean 306; 117 of 20,000 when written, and
    # 8,540 by plain concatenation.
    draw = np.random.default_rng(0).lognormal(np.log(162), 1.13, 20_000)
    targets = np.minimum(draw, 512).astype(np.int64)
    rows = arrange_epoch(whole(targets), "pretrain", 512, seed=42, epoch=0)
    assert sum(targets_of(rows)) == targets.sum() > 0.999 * 512 * len(rows)
    assert split_documents(rows) < 200
    assert split_by_concatenation(targets, 512) > 8000


@given(lengths, widths, st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_holds_every_target_exactly_once(targets, width, seed, epoch):
    rows = arrange_epoch(whole(targets), "pretrain", width, seed, epoch)
    assert covered(rows) == all_targets(targets)
    assert sum(n < width for n in targets_of(rows)) <= 1


def test_epochs_and_seeds_order_differently_and_repeat_exactly():
    documents = whole(np.arange(200) % 17)

    def order(seed: int, epoch: int) -> list[list[tuple[int, int, int]]]:
        return pieces(arrange_epoch(documents, "pretrain", 16, seed, epoch))

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(1, 2) != order(2, 1)


def test_rows_of_an_epoch_do_not_follow_the_lengths():
    rows = arrange_epoch(whole(np.arange(2000) % 64), "pretrain", 64, seed=3, epoch=0)
    pieces_in_row = np.diff(rows.spans).ravel()
    half = len(rows) // 2
    first, second = pieces_in_row[:half].mean(), pieces_in_row[half:].mean()
    assert abs(first - second) < 0.5


def test_an_epoch_is_the_packed_rows_in_another_order():
    documents = whole([5, 3, 2, 8, 0, 7])
    documents[:, 0] = [7, 3, 9, 4, 0, 8]
    packed = pack(documents[shuffled(6, 9, 2, 0)], 4)
    order = shuffled(len(packed), 9, 2, 1)
    rows = arrange_epoch(documents, "pretrain", 4, seed=9, epoch=2)
    assert sorted(order) != list(order)
    assert pieces(rows) == [pieces(packed)[i] for i in order]


def test_shuffling_never_changes_between_versions():
    assert shuffled(8, 42, 0, 0).tolist() == [7, 1, 4, 6, 0, 3, 5, 2]
    assert shuffled(10, 7).tolist() == [8, 4, 3, 1, 2, 0, 7, 6, 9, 5]
    million = shuffled(10**6, 42, 3, 1)
    assert million[:4].tolist() == [561309, 698271, 861591, 129260]
    assert million[-1] == 944007


@given(st.integers(0, 300), st.lists(st.integers(0, 2**63), max_size=3))
def test_shuffling_gives_a_permutation(n, keys):
    assert sorted(shuffled(n, *keys).tolist()) == list(range(n))


def test_each_key_and_its_place_count():
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2, 1), (1, 2), (0, 0, 0)]
    orders = {tuple(shuffled(50, *key).tolist()) for key in keys}
    assert len(orders) == len(keys)


def test_all_orders_are_about_equally_frequent():
    orders = Counter(tuple(shuffled(3, seed).tolist()) for seed in range(1200))
    assert len(orders) == 6
    assert all(150 < n < 250 for n in orders.values())


def hashes_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, n, np.uint64)


def test_held_out_share_is_about_the_fraction():
    for fraction in (0.01, 0.1, 0.5):
        kept, held_out = split_by_hash(hashes_of(100_000), fraction)
        assert abs(len(held_out) / 100_000 - fraction) < 0.005
        assert sorted([*kept, *held_out]) == list(range(100_000))
        assert (np.diff(held_out) > 0).all() and (np.diff(kept) > 0).all()


def test_equal_texts_stay_together_whatever_their_order_and_the_others():
    hashes = np.repeat(hashes_of(500), 3)
    kept, held_out = split_by_hash(hashes, 0.1)
    assert not set(hashes[kept]) & set(hashes[held_out]) and len(held_out)
    chosen = set(hashes[split_by_hash(hashes, 0.1)[1]])
    assert set(hashes[::-1][split_by_hash(hashes[::-1], 0.1)[1]]) == chosen
    some = hashes[:300]
    assert set(some[split_by_hash(some, 0.1)[1]]) == chosen & set(some)


@pytest.mark.parametrize("fraction", [1e-12, 0.01, 0.5, 0.999999, 1.0])
@pytest.mark.parametrize("values", [[5, 6], [0, 2**64 - 1], [7, 7, 8], [2**63, 1, 1]])
def test_each_side_gets_one_where_two_texts_differ(values, fraction):
    kept, held_out = split_by_hash(np.array(values, np.uint64), fraction)
    assert len(kept) and len(held_out)
    assert len(kept) + len(held_out) == len(values)


@pytest.mark.parametrize("values", [[0], [0, 0], [2**64 - 1]])
def test_a_single_text_is_trained_on(values):
    kept, held_out = split_by_hash(np.array(values, np.uint64), 0.5)
    assert len(kept) == len(values)
    assert len(held_out) == 0


def test_fraction_zero_and_no_documents_hold_out_none():
    kept, held_out = split_by_hash(np.array([0, 1, 2], np.uint64), 0.0)
    assert (kept.tolist(), held_out.tolist()) == ([0, 1, 2], [])
    kept, held_out = split_by_hash(np.zeros(0, np.uint64), 0.01)
    assert len(kept) == len(held_out) == 0
