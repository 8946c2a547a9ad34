"""`PretrainDataset`: rows as MiniMind's scripts read them."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from minimind_nb.data import demo
from minimind_nb.data.datasets import PretrainDataset
from minimind_nb.data.faults import DataError
from minimind_nb.data.tokenizer import read_tokenizer

TEXTS = ["abc", "", "d", "efghijk"]


@pytest.fixture
def open_rows(tmp_path, byte_spec, write_rows):
    def open_rows(texts=TEXTS, tokenizer=byte_spec, **wanted):
        file = write_rows(tmp_path / "rows.jsonl", texts)
        wanted = {"max_seq_len": 6, "cache_dir": tmp_path / "cache", **wanted}
        return PretrainDataset(file, tokenizer, **wanted)

    return open_rows


def test_examples_at_literal_points(open_rows):
    rows = open_rows()
    assert len(rows) == 3
    listed = [[part.tolist() for part in rows[n]] for n in range(3)]
    assert listed == [
        [[1, 67, 68, 69, 2], [67, 68, 69, 2, 0], [1, 1, 1, 1, 0]],
        [[1, 70, 2, 0, 0], [70, 2, 0, 0, 0], [1, 1, 0, 0, 0]],
        [[1, 71, 72, 73, 74], [71, 72, 73, 74, 75], [1, 1, 1, 1, 1]],
    ]
    assert {part.dtype for part in rows[0]} == {torch.int64}


def test_a_document_of_just_the_length_is_whole(open_rows):
    inputs, targets, mask = open_rows(["abcd"])[0]
    assert inputs.tolist() == [1, 67, 68, 69, 70]
    assert targets.tolist() == [67, 68, 69, 70, 2]
    assert mask.tolist() == [1] * 5


def test_shortest_length_is_an_input_and_its_target(open_rows):
    assert [part.tolist() for part in open_rows(max_seq_len=2)[0]] == [[1], [67], [1]]
    with pytest.raises(ValueError, match="max_seq_len=1 is too small, 2 is needed"):
        open_rows(max_seq_len=1)


def test_it_is_indexed_and_ends_as_a_list(open_rows):
    rows = open_rows()
    assert all(map(torch.equal, rows[-1], rows[2]))
    assert all(map(torch.equal, rows[-3], rows[0]))
    for index in (3, -4):
        with pytest.raises(IndexError):
            rows[index]
    assert len(list(rows)) == 3


def test_length_changes_no_cache(open_rows):
    assert open_rows(max_seq_len=4).cache.folder == open_rows().cache.folder


def test_tokenizer_may_be_an_object_a_path_or_the_shipped_one(open_rows, tmp_path):
    shipped = read_tokenizer()
    (tmp_path / "tokenizer.json").write_text(shipped.json, encoding="utf-8")
    given = [shipped, tmp_path, str(tmp_path / "tokenizer.json")]
    given.append(Tokenizer.from_str(shipped.json))
    expected = [part.tolist() for part in open_rows(tokenizer=None)[0]]
    for tokenizer in given:
        found = [part.tolist() for part in open_rows(tokenizer=tokenizer)[0]]
        assert found == expected


def test_cache_lies_where_the_session_keeps_such_things(
    open_rows, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    open_rows(cache_dir=None)
    assert list((tmp_path / "out" / "cache").glob("tokens-*"))


def test_a_loader_takes_it_in_any_order(open_rows):
    rows = open_rows([f"text {n}" for n in range(10)], max_seq_len=16)
    in_order = torch.cat([inputs for inputs, _, _ in DataLoader(rows, batch_size=3)])
    assert in_order.shape == (10, 15)
    shuffled = torch.cat([x for x, _, _ in DataLoader(rows, 4, shuffle=True)])
    assert sorted(shuffled.tolist()) == sorted(in_order.tolist())
    elsewhere = DataLoader(rows, batch_size=5, num_workers=1)
    assert torch.equal(torch.cat([x for x, _, _ in elsewhere]), in_order)


def test_bad_files_are_refused_with_the_line(tmp_path, byte_spec):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "a"}) + "\n\n[1]\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:3:1: the line is a list"):
        PretrainDataset(file, byte_spec, cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        PretrainDataset(tmp_path / "none.jsonl", byte_spec, cache_dir=tmp_path)


def test_demo_names_the_embedded_corpus(tmp_path, monkeypatch, byte_spec):
    monkeypatch.setattr(demo, "documents", lambda: iter(["a text", "一段文字"]))
    rows = PretrainDataset("demo", byte_spec, cache_dir=tmp_path)
    assert len(rows) == 2
    assert (tmp_path / "demo.jsonl").is_file()
