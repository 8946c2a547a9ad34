"""What of a document is used, at literal points."""

import numpy as np
import pytest
from support.chats import talk

from minimind_nb.data.conversations import IN_LOSS, USER
from minimind_nb.data.packing import truncate_documents

# With single bytes a user's turn of n bytes has n + 8 tokens, an assistant's n + 13 of
# which n + 2 are in the loss, a system turn n + 10, a tool's n + 8.
USERS, ANSWER = 8, 13


def listed(truncated):
    arrays = (*truncated.pieces.T, truncated.loss_tokens, truncated.text_bytes)
    assert {each.dtype for each in arrays} == {np.dtype(np.int64)}
    return [tuple(row) for row in np.stack(arrays, 1).tolist()]


def take(cache, width, documents=None):
    documents = np.arange(len(cache)) if documents is None else np.array(documents)
    return truncate_documents(cache, documents, width)


def test_plain_text_stays_whole_and_counts_throughout(make_cache):
    truncated = take(make_cache(["abc", "d" * 100, "é"]), 10, [2, 1])
    assert listed(truncated) == [(2, 0, 3, 3, 2), (1, 0, 101, 101, 100)]
    assert (truncated.cut, truncated.dropped) == (0, 0)


def test_a_conversation_that_just_fits_is_whole(open_chats):
    cache = open_chats([talk("u: a", "a: bc"), talk("u: a", "a: b", "u: c", "a: é")])
    first, second = (9 + 15, 9 + 14 + 9 + 15)
    assert np.diff(cache.offsets).tolist() == [first, second]
    assert listed(take(cache, second - 1)) == [
        (0, 0, first - 1, 4, 2),
        (1, 0, second - 1, 7, 3),
    ]


@pytest.mark.fault("F44")
def test_a_longer_one_ends_after_the_last_answer_that_fits(open_chats):
    cache = open_chats(
        [
            talk("u: a", "a: b", "u: c", "a: dd", "u: e", "a: fff"),
            talk("u: a", "a: b"),
            talk("u: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "a: b"),
        ]
    )
    ends = [9 + 14, 9 + 14 + 9 + 15, 9 + 14 + 9 + 15 + 9 + 16]
    for width, targets, loss_tokens, size in (
        (ends[2] - 1, ends[2] - 1, 3 + 4 + 5, 6),
        (ends[2] - 2, ends[1] - 1, 3 + 4, 3),
        (ends[1] - 1, ends[1] - 1, 3 + 4, 3),
        (ends[1] - 2, ends[0] - 1, 3, 1),
        (ends[0] - 1, ends[0] - 1, 3, 1),
    ):
        truncated = take(cache, width, [0])
        assert listed(truncated) == [(0, 0, targets, loss_tokens, size)]
        assert truncated.cut == (width < ends[2] - 1)
    truncated = take(cache, ends[0] - 1, [2, 1, 0])
    assert listed(truncated) == [(1, 0, ends[0] - 1, 3, 1), (0, 0, ends[0] - 1, 3, 1)]
    assert (truncated.cut, truncated.dropped) == (1, 1)
    truncated = take(cache, ends[0] - 2)
    assert listed(truncated) == []
    assert (truncated.cut, truncated.dropped) == (0, 3)


def test_no_documents_stay_none(open_chats):
    cache = open_chats([talk("u: a", "a: b")])
    assert listed(take(cache, 4, np.zeros(0, np.int64))) == []


def test_of_rlaif_rows_only_the_last_answer_counts(open_chats):
    cache = open_chats([talk("u: a", "a: b", "u: c", "a: dd")], "rlaif")
    whole = 9 + 14 + 9 + 15
    assert listed(take(cache, whole)) == [(0, 0, whole - 1, 4, 2)]
    assert take(cache, whole - 2).dropped == 1


def pair(*prompt, chosen, rejected):
    ways = {"chosen": chosen, "rejected": rejected}
    return {key: talk(*prompt, f"a: {said}") for key, said in ways.items()}


PROMPT = ("s: a", "u: b", "a: c", "t: d", "a: e", "u: f")
LENGTHS = (11, 9, 14, 9, 14, 9)


@pytest.mark.parametrize(
    ("spare", "lost"), [(0, 0), (-1, 1), (-11, 1), (-12, 5), (-20, 5), (-57, 5)]
)
def test_a_pair_loses_its_oldest_turns_and_begins_with_a_question(
    open_chats, spare, lost
):
    cache = open_chats([pair(*PROMPT, chosen="gg", rejected="hhhh")], "dpo")
    whole = sum(LENGTHS) + ANSWER + 4
    assert np.diff(cache.offsets).tolist() == [whole - 2, whole]
    truncated = take(cache, whole - 1 + spare)
    start = sum(LENGTHS[:lost])
    assert listed(truncated) == [
        (0, start, whole - 3 - start, 4, 2),
        (1, start, whole - 1 - start, 6, 4),
    ]
    assert (truncated.cut, truncated.dropped) == (int(lost > 0), 0)
    if lost:
        assert cache.marks_of(1)[start] & USER


def test_a_pair_begins_elsewhere_where_no_question_fits(open_chats):
    prompt = ("u: a", "a: b", "u: " + "c" * 50, "a: d", "t: e")
    cache = open_chats([pair(*prompt, chosen="f", rejected="gg")], "dpo")
    whole = 9 + 14 + 58 + 14 + 9 + ANSWER + 2
    truncated = take(cache, whole - 1 - 9 - 14 - 1)
    assert truncated.pieces[:, 1].tolist() == [9 + 14 + 58] * 2
    assert cache.marks_of(0)[9 + 14 + 58] & USER == 0


def test_a_pair_of_which_no_turn_of_the_prompt_fits_is_dropped(open_chats):
    cache = open_chats(
        [
            pair("u: a", chosen="b", rejected="c" * 60),
            pair("u: a", chosen="b", rejected="cc"),
            pair(*PROMPT, chosen="b" * 40, rejected="c"),
        ],
        "dpo",
    )
    truncated = take(cache, 40, [4, 5, 2, 3, 0, 1])
    assert listed(truncated) == [(2, 0, 22, 3, 1), (3, 0, 23, 4, 2)]
    assert (truncated.cut, truncated.dropped) == (0, 2)


def test_tokens_in_the_loss_are_those_of_the_marks(open_chats):
    rows = [pair(*PROMPT, chosen="x" * n, rejected="y" * (3 * n)) for n in range(1, 9)]
    cache = open_chats(rows, "dpo")
    for width in range(20, 100, 7):
        truncated = take(cache, width)
        for document, start, targets, loss_tokens, _ in listed(truncated):
            assert targets <= width
            marks = cache.marks_of(document)[start + 1 : start + 1 + targets]
            assert (marks & IN_LOSS).sum() == loss_tokens
