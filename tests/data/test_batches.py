"""Every rank takes its rows of the same samples, wherever the stream is resumed."""

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from minimind_nb.config import TrainConfig, resolve
from minimind_nb.data.batches import (
    IGNORED,
    MicroBatch,
    StepBatch,
    TrainingStream,
    ValidationRows,
    read_samples,
)
from minimind_nb.data.packing import TruncatedDocuments, pack, truncate_documents
from minimind_nb.data.token_cache import TokenCache
from minimind_nb.data.tokenizer import read_tokenizer

PAD = 0
WIDTH = 16
# batch_size and accumulation_steps by number of ranks: 24 rows a step each.
LAYOUTS = {1: (24, 1), 2: (3, 4), 3: (2, 4), 8: (3, 1)}
WORDS = "The cat 猫 sat on 坐在 the mat 垫子 and sang".split()


@pytest.fixture(scope="module")
def cache(make_cache):
    """87 documents of 1 to 60 bytes, empty texts and so gaps in the lines between."""
    draw = np.random.default_rng(5)
    sizes = draw.integers(1, 60, 87).tolist()
    texts = ["".join(map(chr, draw.integers(33, 127, n))) for n in sizes]
    return make_cache(list(itertools.chain(*((text, "") for text in texts))))


def truncated_of(cache: TokenCache, width: int = WIDTH) -> TruncatedDocuments:
    return truncate_documents(cache, np.arange(len(cache.lines)), width)


def unique_tokens(targets: list[int]) -> TokenCache:
    """Documents whose tokens are all different: 0, 1, 2, … through the cache."""
    counts = np.array(targets, np.int64) + 1
    offsets = np.concatenate([[0], np.cumsum(counts)])
    tokens = np.arange(counts.sum(), dtype=np.uint32)
    return cast(
        TokenCache,
        SimpleNamespace(
            tokens=tokens,
            offsets=offsets,
            piece=lambda d, at, n: tokens[offsets[d] + at :][: n + 1],
            loss_mask=lambda d, at, n: np.ones(n, bool),
            lines=np.arange(len(counts)) + 1,
            targets=counts - 1,
            sizes=counts,
            marks=None,
            loss_tokens=None,
        ),
    )


def make_stream(
    cache: TokenCache, size: int = 1, *, rank: int = 0, samples: int = 0, **other: Any
) -> TrainingStream:
    batch_size, accumulation_steps = LAYOUTS[size]
    given = {
        "max_seq_len": WIDTH,
        "epochs": 2,
        "batch_size": batch_size,
        "accumulation_steps": accumulation_steps,
        "num_processes": size,
    }
    cfg = resolve(TrainConfig(**{**given, **other}))
    truncated = truncated_of(cache, cfg.max_seq_len)
    return TrainingStream(cache, truncated, cfg, PAD, rank=rank, samples=samples)


def read_all(cache: TokenCache, width: int, mask: bool) -> MicroBatch:
    """All documents packed in their order, as one micro-batch."""
    rows = pack(truncated_of(cache).pieces, width)
    cfg = resolve(TrainConfig(max_seq_len=width, document_mask=mask))
    return read_samples(cache, cfg, PAD, [rows.row(n) for n in range(len(rows))])


def steps(stream: TrainingStream) -> list[StepBatch]:
    """All that is left of a stream."""
    taken = []
    while stream.samples < stream.total_samples:
        taken.append(stream.next_step())
    return taken


def rows_of(step: StepBatch) -> list[tuple[list[int], list[int]]]:
    """A step's rows as (inputs, targets), over its micro-batches."""
    return [
        (inputs.tolist(), targets.tolist())
        for batch in step.micro_batches
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True)
    ]


def pairs_of(batches: list[MicroBatch]) -> Counter[tuple[int, int]]:
    """How often each (input, target) is there."""
    found: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        there = batch.targets != IGNORED
        inputs, targets = batch.inputs[there].tolist(), batch.targets[there].tolist()
        found.update(zip(inputs, targets, strict=True))
    return found


def equal(a: StepBatch, b: StepBatch) -> bool:
    """Whether two steps are the same bit for bit."""
    if (a.samples, a.tokens, a.num_targets) != (b.samples, b.tokens, b.num_targets):
        return False
    return len(a.micro_batches) == len(b.micro_batches) and all(
        torch.equal(x, y)
        for one, other in zip(a.micro_batches, b.micro_batches, strict=True)
        for x, y in (
            (one.inputs, other.inputs),
            (one.targets, other.targets),
            (numbered(one), numbered(other)),
        )
    )


def numbered(batch: MicroBatch) -> torch.Tensor:
    return torch.zeros(0) if batch.documents is None else batch.documents


def test_a_row_at_literal_points(make_cache):
    cache = make_cache(["abc", "d", "eeee"])
    batch = read_all(cache, width=6, mask=True)
    assert batch.inputs.tolist() == [[1, 71, 71, 71, 71, 1], [67, 68, 69, 1, 70, 0]]
    assert batch.targets.tolist() == [
        [71, 71, 71, 71, 2, 67],
        [68, 69, 2, 70, 2, IGNORED],
    ]
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, -1]]
    assert [batch.inputs.dtype, batch.targets.dtype] == [torch.int64] * 2
    assert batch.documents.dtype == torch.int32


def test_a_later_piece_repeats_the_last_token_of_the_one_before(make_cache):
    cache = make_cache(["abcdefg"])
    batch = read_all(cache, width=3, mask=False)
    assert batch.inputs.tolist() == [[1, 67, 68], [69, 70, 71], [72, 73, 0]]
    assert batch.targets.tolist() == [[67, 68, 69], [70, 71, 72], [73, 2, IGNORED]]


def test_documents_are_numbered_only_where_they_are_hidden_from_each_other(cache):
    step = make_stream(cache).next_step()
    masked = make_stream(cache, document_mask=True).next_step()
    assert all(batch.documents is None for batch in step.micro_batches)
    assert rows_of(step) == rows_of(masked)
    for batch in masked.micro_batches:
        assert batch.documents is not None
        assert torch.equal(batch.documents == -1, batch.targets == IGNORED)


def test_rows_stay_where_they_are_on_a_cpu(cache):
    (batch,) = make_stream(cache).next_step().micro_batches
    assert batch.to(torch.device("cpu")) is batch


def test_sizes_of_a_stream(cache):
    stream = make_stream(cache, size=2)
    targets = int(cache.targets.sum())
    assert stream.rows == -(-targets // WIDTH)
    assert stream.rows % 24 != 0 != 2 * stream.rows % 24  # a step crosses the epochs
    assert stream.total_samples == 2 * stream.rows
    assert len(steps(stream)) == -(-2 * stream.rows // 24)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_any_number_of_ranks_takes_the_same_samples(cache, size):
    batch_size, accumulation_steps = LAYOUTS[size]
    ranks = [steps(make_stream(cache, size, rank=rank)) for rank in range(size)]
    for alone, *together in zip(steps(make_stream(cache)), *ranks, strict=True):
        rows = [iter(rows_of(step)) for step in together]
        taken = []
        for _, rank in itertools.product(range(accumulation_steps), range(size)):
            taken += itertools.islice(rows[rank], batch_size)
        assert taken == rows_of(alone)
        assert [next(left, None) for left in rows] == [None] * size
        assert {step.samples for step in together} == {alone.samples}
        assert {step.tokens for step in together} == {alone.tokens}
        assert {step.num_targets for step in together} == {alone.tokens}


def test_a_rank_without_rows_gets_none(cache):
    ranks = [make_stream(cache, 8, rank=rank, epochs=1) for rank in range(8)]
    begin = ranks[0].total_samples - 7
    for stream in ranks:
        stream.samples = begin
    batches = [stream.next_step() for stream in ranks]
    assert [len(rows_of(step)) for step in batches] == [3, 3, 1, 0, 0, 0, 0, 0]
    assert batches[7].micro_batches == []
    assert {step.samples for step in batches} == {7}


def test_a_step_may_take_several_epochs_and_the_last_takes_what_is_left(make_cache):
    stream = make_stream(make_cache(["abc"]), epochs=30)
    first, last = steps(stream)
    assert (first.samples, last.samples) == (24, 6)
    assert (first.tokens, last.num_targets) == (96, 24)
    assert (len(rows_of(first)), len(rows_of(last))) == (24, 6)


def test_a_stream_at_its_end_gives_nothing(cache):
    stream = make_stream(cache)
    steps(stream)
    with pytest.raises(AssertionError, match="the stream is at its end"):
        stream.next_step()


def test_lines_are_those_the_samples_come_from(make_cache):
    cache = make_cache(["", "aaaaaa", "", "bb", "c", ""])
    stream = make_stream(cache, max_seq_len=4)
    assert stream.rows == 3
    assert (
        stream.lines(range(0, 3))
        == stream.lines(range(3, 6))
        == stream.lines(range(1, 5))
        == [2, 4, 5]
    )
    assert stream.lines(range(2, 2)) == []
    read = [
        np.concatenate([ids for ids, _ in stream.pieces(sample)]).tolist()
        for sample in range(3)
    ]
    letters = {2: 67, 4: 68, 5: 69}
    for row in range(3):
        there = [n for n, letter in letters.items() if letter in read[row]]
        assert stream.lines(range(row, row + 1)) == there


def test_every_token_of_real_documents_is_a_target_once_an_epoch(make_cache):
    spec = read_tokenizer()
    decode = Tokenizer.from_str(spec.json).decode
    draw = np.random.default_rng(3)
    picked = [draw.choice(WORDS, n).tolist() for n in draw.integers(1, 90, 60)]
    texts = [f"{n}: {' '.join(words)}" for n, words in enumerate(picked)]
    cache = make_cache(texts, spec)
    stream = make_stream(cache, document_mask=True, epochs=3, batch_size=1)
    expected = Counter(
        pair
        for n in range(len(cache))
        for pair in itertools.pairwise(cache.document(n).tolist())
    )
    orders = []
    for _ in range(3):
        batches = [stream.next_step().micro_batches[0] for _ in range(stream.rows)]
        assert pairs_of(batches) == expected
        orders.append([batch.inputs.tolist() for batch in batches])
        pieces = [ids for batch in batches for ids in pieces_of(batch)]
        whole = {
            decode(ids) for ids in pieces if ids[:: len(ids) - 1] == [1, spec.eos_id]
        }
        short = {text for n, text in enumerate(texts) if cache.targets[n] <= WIDTH}
        assert whole <= set(texts)
        assert len(whole & short) > 0.5 * len(short) > 0
    assert orders[0] != orders[1] != orders[2]


def pieces_of(batch: MicroBatch) -> list[list[int]]:
    """The tokens of each piece in a micro-batch of one row."""
    assert batch.documents is not None
    (inputs,), (targets,), (documents,) = batch.inputs, batch.targets, batch.documents
    places = [documents == piece for piece in range(int(documents.max()) + 1)]
    return [[*inputs[at].tolist(), int(targets[at][-1])] for at in places]


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any),
    st.integers(2, 9),
    st.sampled_from([1, 2, 3]),
)
def test_every_token_but_the_first_is_a_target_once_an_epoch(targets, width, size):
    cache = unique_tokens(targets)
    firsts = set(cache.offsets[:-1].tolist())
    pairs = {(t - 1, t) for t in range(len(cache.tokens)) if t not in firsts}
    ranks = [
        steps(make_stream(cache, size, rank=rank, epochs=2, max_seq_len=width))
        for rank in range(size)
    ]
    batches = [b for taken in ranks for step in taken for b in step.micro_batches]
    assert pairs_of(batches) == Counter(dict.fromkeys(pairs, 2))


def validation_rows(cache: TokenCache, width: int, most: int) -> ValidationRows:
    cfg = resolve(TrainConfig(max_seq_len=width, eval_tokens=most))
    return ValidationRows(cache, truncated_of(cache, width), cfg, PAD)


def test_validation_takes_each_document_once(make_cache):
    rows = validation_rows(make_cache(["ab", "cd", "ef"]), width=3, most=1000)
    ((_, batch),) = rows.micro_batches(batch_size=8, rank=0, size=1)
    assert batch.inputs.tolist() == [[1, 67, 68], [1, 69, 70], [1, 71, 72]]
    assert rows.text_bytes == 6


def test_validation_takes_as_many_whole_documents_as_the_cap_allows(make_cache):
    cache = make_cache(["ab", "cd", "ef"])  # 3 targets each
    lengths = [
        len(validation_rows(cache, 3, most).sources[0]) for most in (3, 5, 6, 8, 9)
    ]
    assert lengths == [1, 1, 2, 2, 3]
    assert validation_rows(cache, 3, 6).text_bytes == 4
    cache = make_cache(["a" * 99, "ab", "b" * 30, "c"])  # 100, 3, 31 and 2 targets
    assert validation_rows(cache, 4, most=30).text_bytes == 2 + 1
    assert validation_rows(cache, 4, most=36).text_bytes == 2 + 30 + 1
    assert validation_rows(cache, 4, most=105).text_bytes == 99 + 2 + 1
    # If all are above the cap, the shortest is taken.
    rows = validation_rows(make_cache(["abcdef", "abc", "abcd"]), width=2, most=1)
    assert (len(rows.sources[0]), rows.text_bytes) == (2, 3)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_share_the_validation_rows(cache, batch_size, size):
    rows = validation_rows(cache, WIDTH, most=1500)
    batches = [
        batch
        for r in range(size)
        for _, batch in rows.micro_batches(batch_size, r, size)
    ]
    taken = [tuple(row) for batch in batches for row in batch.inputs.tolist()]
    ((_, alone),) = rows.micro_batches(1000, 0, 1)
    assert sorted(taken) == sorted(map(tuple, alone.inputs.tolist()))
    assert pairs_of(batches) == pairs_of([alone])
    assert 1500 - 61 < sum(pairs_of(batches).values()) <= 1500
    assert max(len(batch.inputs) for batch in batches) <= batch_size


def user(said: str) -> dict[str, str]:
    return {"role": "user", "content": said}


def answer(said: str) -> dict[str, str]:
    return {"role": "assistant", "content": said}


# With single bytes a user's turn of n bytes has n + 8 tokens, an assistant's n + 13 of
# which the last n + 2 are in the loss.
NEWLINE = 201
ASKS = [1, 87, 85, 71, 84, NEWLINE, 67, 2, NEWLINE]
ANSWERS = [1, 67, 85, 85, 75, 85, 86, 67, 80, 86, NEWLINE]


@pytest.fixture(scope="module")
def chats(open_chats) -> dict[str, TokenCache]:
    """40 conversations and 40 pairs of 1 to 3 turns, some longer than a row of 96."""
    draw = np.random.default_rng(8)

    def talk(turns: int) -> list[dict[str, str]]:
        sizes = draw.integers(1, 40, 2 * turns).tolist()
        return [
            (user, answer)[n % 2]("".join(map(chr, draw.integers(97, 123, size))))
            for n, size in enumerate(sizes)
        ]

    talks = [talk(n % 3 + 1) for n in range(40)]
    pairs = [
        {"chosen": t, "rejected": [*t[:-1], answer("no" * n)]}
        for n, t in enumerate(talks, 1)
    ]
    return {"sft": open_chats(talks, "sft"), "dpo": open_chats(pairs, "dpo")}


def test_answers_alone_are_targets_at_literal_points(open_chats):
    talks = [[user("a"), answer("b")], [user("a"), answer("bc")]]
    cache = open_chats(talks, "sft")
    stream = make_stream(cache, stage="sft", max_seq_len=46, epochs=1)
    step = stream.next_step()
    (batch,) = step.micro_batches
    long, short = [*ASKS, *ANSWERS, 68, 69, 2], [*ASKS, *ANSWERS, 68, 2]
    assert batch.inputs.tolist() == [[*long, *short, PAD]]
    assert batch.targets.tolist() == [
        [IGNORED] * 19
        + [68, 69, 2, NEWLINE]
        + [IGNORED] * 19
        + [68, 2, NEWLINE, IGNORED]
    ]
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0] * 23 + [1] * 22 + [-1]]
    assert (step.samples, step.tokens, step.num_targets) == (1, 45, 7)
    assert batch.reference is None
    whole = [
        (len(ids), np.flatnonzero(in_loss).tolist())
        for ids, in_loss in stream.pieces(0)
    ]
    assert whole == [(24, [20, 21, 22, 23]), (23, [20, 21, 22])]


def test_a_conversation_that_is_cut_is_read_to_its_last_whole_answer(open_chats):
    talk = [user("a"), answer("b"), user("a"), answer("bcd")]
    cache = open_chats([talk], "sft")
    step = make_stream(cache, stage="sft", max_seq_len=46, epochs=1).next_step()
    (batch,) = step.micro_batches
    assert batch.inputs[0, :22].tolist() == [*ASKS, *ANSWERS, 68, 2]
    assert (batch.inputs[0, 22:] == PAD).all()
    assert (step.tokens, step.num_targets) == (22, 3)


def test_pairs_at_literal_points(open_chats):
    rejected = {"rejected": [user("a"), answer("d")]}
    pair = {"chosen": [user("a"), answer("bc")], **rejected}
    stream = make_stream(
        open_chats([pair], "dpo"), stage="dpo", max_seq_len=64, epochs=1
    )
    step = stream.next_step()
    (batch,) = step.micro_batches
    chosen, rejected = [*ASKS, *ANSWERS, 68, 69, 2], [*ASKS, *ANSWERS, 70, 2]
    assert batch.inputs.tolist() == [[*chosen, *rejected]], "as wide as it must be"
    assert batch.targets.tolist() == [
        [IGNORED] * 19 + [68, 69, 2, NEWLINE] + [IGNORED] * 19 + [70, 2, NEWLINE]
    ]
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0] * 23 + [1] * 22]
    assert (step.samples, step.tokens, step.num_targets, batch.samples) == (1, 45, 1, 1)


def test_answers_of_a_pair_may_lie_in_any_row_under_their_numbers(open_chats):
    pairs = [
        {"chosen": [user("a"), answer("b" * n)], "rejected": [user("a"), answer("c")]}
        for n in (2, 20, 3)
    ]
    cache = open_chats(pairs, "dpo")
    stream = make_stream(cache, stage="dpo", max_seq_len=45, epochs=1)
    (batch,) = stream.next_step().micro_batches
    assert batch.documents is not None
    order = [stream.pieces(sample) for sample in range(3)]
    for number, (ids, in_loss) in enumerate(itertools.chain(*order)):
        at = batch.documents == number
        assert batch.inputs[at].tolist() == ids[:-1].tolist()
        targets = batch.targets[at]
        assert targets[targets != IGNORED].tolist() == ids[in_loss].tolist()
    assert len(batch.inputs) == 4, "six answers in as few rows as hold them"


def test_only_what_follows_the_common_prompt_of_a_pair_is_a_target(open_chats):
    prompt = [user("a"), answer("bbb"), user("a")]
    pair = {"chosen": [*prompt, answer("c")], "rejected": [*prompt, answer("d")]}
    stream = make_stream(open_chats([pair], "dpo"), stage="dpo", max_seq_len=99)
    in_loss = [ids[there].tolist() for ids, there in stream.pieces(0)]
    assert in_loss == [[69, 2, NEWLINE], [70, 2, NEWLINE]]


def test_an_over_long_pair_loses_the_same_oldest_turns_in_both(open_chats):
    prompt = [user("x" * 40), answer("y"), user("a")]
    pair = {"chosen": [*prompt, answer("c")], "rejected": [*prompt, answer("ddd")]}
    stream = make_stream(open_chats([pair], "dpo"), stage="dpo", max_seq_len=50)
    chosen, rejected = (ids.tolist() for ids, _ in stream.pieces(0))
    assert chosen == [*ASKS, *ANSWERS, 69, 2, NEWLINE]
    assert rejected == [*ASKS, *ANSWERS, 70, 70, 70, 2, NEWLINE]
    assert (stream.truncated.cut, stream.truncated.dropped) == (1, 0)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_counts_of_a_step_are_those_of_all_ranks(chats, cache, stage, size):
    given = {"stage": stage, "document_mask": True, "max_seq_len": 96, "epochs": 3}
    made = [
        make_stream(chats.get(stage, cache), size, rank=rank, **given)
        for rank in range(size)
    ]
    for together in zip(*map(steps, made), strict=True):
        batches = [batch for step in together for batch in step.micro_batches]
        tokens = sum(int((numbered(batch) >= 0).sum()) for batch in batches)
        targets = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
        samples = sum(batch.samples for batch in batches)
        assert {(step.samples, step.tokens) for step in together} == {(samples, tokens)}
        counted = samples if stage == "dpo" else targets
        assert {step.num_targets for step in together} == {counted}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_resumed_stream_equals_the_uninterrupted_one(chats, cache, stage, size):
    data, given = chats.get(stage, cache), {"stage": stage, "epochs": 3}
    given["max_seq_len"] = WIDTH if stage == "pretrain" else 96
    for rank in range(size):
        first = make_stream(data, size, rank=rank, **given)
        assert first.rows % 24 != 0, "a step crosses the end of an epoch"
        whole = steps(first)
        for done in range(len(whole)):
            resumed = make_stream(data, size, rank=rank, samples=24 * done, **given)
            left = steps(resumed)
            assert len(left) == len(whole) - done
            assert all(map(equal, left, whole[done:]))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_each_excerpt_is_read_once_an_epoch_in_another_order(chats, stage):
    stream = make_stream(chats[stage], stage=stage, max_seq_len=96)
    truncated = stream.truncated
    assert truncated.cut > 0
    orders = []
    for epoch in range(2):
        rows = stream.arrange(epoch)
        found = list(itertools.chain(*(rows.row(n) for n in range(len(rows)))))
        expected = sorted(map(tuple, truncated.pieces.tolist()))
        if stage == "sft":
            expected = [(d, 0, n) for d, _, n in expected]
        assert sorted(found) == expected
        orders.append(found)
    assert orders[0] != orders[1]


def test_validation_takes_pairs_whole_and_counts_bytes_of_answers(open_chats):
    pairs = [
        {"chosen": [user("a"), answer("é" * n)], "rejected": [user("a"), answer("c")]}
        for n in (1, 2, 3)
    ]
    cache = open_chats(pairs, "dpo")  # 23 + 22, 25 + 22 and 27 + 22 targets
    cfg = resolve(TrainConfig(stage="dpo", max_seq_len=64, eval_tokens=95))
    rows = ValidationRows(cache, truncated_of(cache, 64), cfg, PAD)
    assert len(rows.sources[0]) == 2
    assert rows.documents.tolist() == [0, 1, 2, 3]
    assert rows.text_bytes == 2 + 1 + 4 + 1
    batches = [b for r in range(2) for _, b in rows.micro_batches(4, rank=r, size=2)]
    assert [batch.samples for batch in batches] == [1, 1]


def test_validation_packs_conversations_whole(open_chats):
    talks = [[user("a"), answer("b" * n)] for n in (1, 2, 30)]
    cache = open_chats(talks, "sft")
    cfg = resolve(TrainConfig(stage="sft", max_seq_len=52, eval_tokens=1000))
    rows = ValidationRows(cache, truncated_of(cache, 52), cfg, PAD)
    ((_, batch),) = rows.micro_batches(8, rank=0, size=1)
    assert rows.text_bytes == 33
    assert int((batch.targets != IGNORED).sum()) == 3 + 4 + 32
    assert [int((row >= 0).sum()) for row in numbered(batch)] == [51, 45]
