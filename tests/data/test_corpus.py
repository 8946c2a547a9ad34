"""What a run trains on and what it holds out."""

import dataclasses
import json

import numpy as np
import pytest

from minimind_nb.config import TrainConfig, resolve
from minimind_nb.data.batches import IGNORED
from minimind_nb.data.corpus import Corpus, detect_format
from minimind_nb.data.jsonl import DataError
from minimind_nb.data.token_cache import TokenCache

TEXTS = [f"document {n}" for n in range(200)]


@pytest.fixture
def prepare(tmp_path, byte_spec, write_rows):
    """A function that writes texts, and opens them as a configuration says."""

    def prepare(texts, val_texts=None, **wanted):
        file = write_rows(tmp_path / "rows.jsonl", texts)
        if val_texts is not None:
            own = write_rows(tmp_path / "held_out.jsonl", val_texts)
            wanted["val_path"] = str(own)
        cfg = resolve(TrainConfig(data_path=str(file), **wanted))
        return Corpus.prepare(cfg, byte_spec, tmp_path / "cache", 1), cfg

    return prepare


def hashes_of(corpus: Corpus) -> tuple[set[int], set[int]]:
    trained = corpus.cache.hashes[corpus.documents].tolist()
    return set(trained), set(corpus.val_cache.hashes[corpus.val_documents].tolist())


def test_a_part_of_the_documents_is_held_out(prepare):
    corpus, _ = prepare(TEXTS, val_fraction=0.1)
    assert corpus.val_cache is corpus.cache
    assert 8 < len(corpus.val_documents) < 40
    numbers = sorted([*corpus.documents, *corpus.val_documents])
    assert numbers == list(range(200))


def test_no_text_is_on_both_sides(prepare):
    trained, held_out = hashes_of(prepare(TEXTS * 3, val_fraction=0.1)[0])
    assert len(trained) + len(held_out) == 200
    assert not trained & held_out


def test_a_validation_file_replaces_the_held_out_part(prepare):
    corpus, cfg = prepare(TEXTS, val_texts=["x", "", "yy"])
    assert corpus.documents.tolist() == list(range(200))
    assert corpus.val_documents.tolist() == [0, 1]
    assert corpus.val_cache.sizes.tolist() == [1, 2]
    rows = corpus.validation_rows(cfg, pad_id=0)
    assert rows is not None and rows.text_bytes == 3


def test_other_processes_open_the_same_documents(prepare):
    for wanted in ({"val_fraction": 0.2}, {"val_texts": ["x", "y"]}):
        corpus, cfg = prepare(TEXTS, **wanted)
        again = Corpus([TokenCache(c.folder, c.facts) for c in corpus.caches], cfg)
        assert np.array_equal(again.documents, corpus.documents)
        assert np.array_equal(again.val_documents, corpus.val_documents)
        assert hashes_of(again) == hashes_of(corpus)


def test_changed_text_goes_to_another_cache_and_a_length_does_not(prepare):
    folder = prepare(TEXTS, max_seq_len=64)[0].cache.folder
    assert prepare(TEXTS, max_seq_len=128)[0].cache.folder == folder
    assert prepare(TEXTS[1:], max_seq_len=64)[0].cache.folder != folder


@pytest.mark.parametrize("texts", [[""], ["", ""]])
def test_a_file_without_text_to_train_on_is_refused(prepare, texts):
    with pytest.raises(
        ValueError, match=r"rows\.jsonl has no text to use: every text in it"
    ):
        prepare(texts)


def test_a_validation_file_without_text_is_refused(prepare):
    with pytest.raises(ValueError, match=r"held_out\.jsonl has no text to use"):
        prepare(TEXTS, val_texts=["", ""])


def test_bad_rows_are_refused_or_left_out_as_the_configuration_says(
    prepare, tmp_path, byte_spec
):
    _, cfg = prepare(["a"])
    file = tmp_path / "some.jsonl"
    file.write_text('{"text": "a"}\n{"txt": "b"}\n')
    cfg = dataclasses.replace(cfg, data_path=str(file))
    with pytest.raises(DataError, match=r"some\.jsonl:2:1: the keys of the row are"):
        Corpus.prepare(cfg, byte_spec, tmp_path, 1)
    cfg = dataclasses.replace(cfg, on_bad_line="skip", max_bad_fraction=0.5)
    corpus = Corpus.prepare(cfg, byte_spec, tmp_path, 1)
    assert corpus.documents.tolist() == [0]


def test_nothing_is_held_out_of_one_text_or_at_fraction_zero(prepare):
    for texts, fraction in ((["a"], 0.5), (TEXTS, 0.0)):
        corpus, cfg = prepare(texts, val_fraction=fraction)
        assert len(corpus.documents) == len(texts)
        assert corpus.validation_rows(cfg, pad_id=0) is None


def test_a_stream_is_as_the_configuration_says(prepare):
    corpus, cfg = prepare(
        TEXTS,
        max_seq_len=24,
        epochs=3,
        batch_size=4,
        accumulation_steps=2,
        num_processes=2,
        seed=7,
        document_mask=True,
    )
    stream = corpus.training_stream(cfg, pad_id=0, rank=1, samples=16)
    assert (stream.rank, stream.cfg, stream.samples) == (1, cfg, 16)
    assert stream.total_samples == 3 * stream.rows
    assert stream.tokens == corpus.cache.targets[corpus.documents].sum()
    first = stream.next_step().micro_batches[0]
    assert first.inputs.shape == (4, 24)
    assert first.documents is not None


def test_validation_is_as_the_configuration_says(prepare):
    wanted = {"max_seq_len": 24, "val_fraction": 0.5, "document_mask": True}
    corpus, cfg = prepare(TEXTS, eval_tokens=100, **wanted)
    rows = corpus.validation_rows(cfg, pad_id=0)
    assert rows is not None
    ((_, batch),) = rows.micro_batches(100, rank=0, size=1)
    assert batch.inputs.shape[1] == 24
    assert batch.documents is not None
    assert 80 < int((batch.targets != IGNORED).sum()) <= 100


def user(said):
    return {"role": "user", "content": said}


def answer(said):
    return {"role": "assistant", "content": said}


@pytest.fixture
def prepare_rows(tmp_path, byte_spec):
    """A function that writes rows of any kind, and opens them for a stage."""

    def prepare_rows(rows, stage, **wanted):
        file = tmp_path / f"{stage}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cfg = resolve(TrainConfig(stage=stage, data_path=str(file), **wanted))
        root = tmp_path / "cache"
        return Corpus.prepare(cfg, byte_spec, root, 1), cfg

    return prepare_rows


def pair(number, size=3):
    asked, said = user(f"question {number}"), "a" * size
    return {"chosen": [asked, answer(said)], "rejected": [asked, answer("b")]}


@pytest.mark.parametrize(
    ("row", "record_format"),
    [
        ('{"text": "a"}', "pretrain"),
        ('{"conversations": []}', "sft"),
        ('{"text": "a", "conversations": []}', "sft"),
        ('\n{"id": 3, "text": 4}', "pretrain"),
    ],
)
def test_the_format_of_a_file_is_told_by_its_first_rows_keys(
    row, record_format, tmp_path
):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{row}\n")
    assert detect_format(file) == record_format


def test_the_demo_is_text_for_pretraining_and_chats_for_the_rest():
    formats = [detect_format("demo", stage) for stage in ("pretrain", "sft", "dpo")]
    assert formats == ["pretrain", "sft", "sft"]


def test_a_file_of_neither_format_says_what_was_found(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": 1, "answer": 2}\n')
    with pytest.raises(DataError) as caught:
        detect_format(file)
    assert str(caught.value) == (
        f"{file} has neither texts nor conversations, its first row the keys ['prompt', "
        '\'answer\']: expected is one {"text": "…"} or {"conversations": […]} a line'
    )
    with pytest.raises(FileNotFoundError, match="does not exist"):
        detect_format(tmp_path / "nowhere.jsonl")
    file.write_text("")
    with pytest.raises(DataError, match="is empty"):
        detect_format(file)
    (blank := tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"blank\.txt has no rows: every line"):
        detect_format(blank)


def test_both_answers_of_a_pair_are_on_the_same_side(prepare_rows):
    corpus, cfg = prepare_rows([pair(n) for n in range(60)], "dpo", val_fraction=0.3)
    assert len(corpus.cache) == 120
    for documents in (corpus.documents, corpus.val_documents):
        assert len(documents) > 10
        assert (documents[::2] % 2 == 0).all()
        assert (documents[1::2] == documents[::2] + 1).all()
    rows = corpus.validation_rows(cfg, pad_id=0)
    assert rows is not None
    assert len(rows.sources[0]) == len(corpus.val_documents) // 2


def test_what_is_left_of_chats_follows_the_length_of_a_row(prepare_rows):
    rows = [[user("a"), answer("b" * n)] for n in (1, 2, 90)]
    chats = [{"conversations": row} for row in rows]
    corpus, cfg = prepare_rows(chats, "sft", max_seq_len=50, val_fraction=0.0)
    assert corpus.truncated.documents.tolist() == [0, 1]
    assert (corpus.truncated.cut, corpus.truncated.dropped) == (0, 1)
    assert corpus.training_stream(cfg, pad_id=0).tokens == 22 + 23
    longer = dataclasses.replace(cfg, max_seq_len=200)
    assert Corpus(corpus.caches, longer).truncated.dropped == 0


def test_pairs_that_do_not_fit_are_left_out_and_counted_as_pairs(prepare_rows):
    rows = [pair(n, size=3 if n % 2 else 90) for n in range(10)]
    corpus, cfg = prepare_rows(rows, "dpo", max_seq_len=60, val_fraction=0.0)
    assert corpus.truncated.dropped == 5
    assert corpus.training_stream(cfg, pad_id=0).rows == 5
    with pytest.raises(ValueError, match=r"dpo\.jsonl: none of 5 pairs has a whole"):
        prepare_rows(rows[::2], "dpo", max_seq_len=60, val_fraction=0.0)


def test_answers_that_are_all_cut_away_are_refused(prepare_rows):
    chats = [{"conversations": [user("a"), answer("b" * 99)]}] * 3
    with pytest.raises(ValueError, match="none of 3 conversations has a whole answer"):
        prepare_rows(chats, "sft", max_seq_len=50)
