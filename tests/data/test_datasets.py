"""Rows as MiniMind's scripts read them, one of the file each."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from minimind_nb.data.datasets import (
    DPODataset,
    PretrainDataset,
    RLAIFDataset,
    SFTDataset,
)
from minimind_nb.data.jsonl import DataError
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


def talk(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": c} for n, c in enumerate(contents)]


@pytest.fixture
def open_chats(tmp_path, byte_spec):
    def open_chats(kind, rows, tokenizer=byte_spec, **wanted):
        file = tmp_path / "chats.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        file.write_text("\n\n".join(lines), encoding="utf-8")
        return kind(file, tokenizer, cache_dir=tmp_path / "cache", **wanted)

    return open_chats


CHATS = [
    {"conversations": talk("a", "b", "cc", "dd")},
    {"conversations": talk("a", "文")},
    {"conversations": talk("a" * 30, "b", "c", "d")},
]
PAIRS = [
    {"chosen": talk("a", "b", "c", "dd"), "rejected": talk("a", "b", "c", "e")},
    {"chosen": talk("a", "b"), "rejected": talk("a", "c" * 30)},
]


def test_answers_alone_are_masked_in(open_chats):
    rows = open_chats(SFTDataset, CHATS, max_seq_len=50)
    assert len(rows) == 3
    inputs, targets, mask = rows[0]
    assert inputs[:10].tolist() == [1, 87, 85, 71, 84, 201, 67, 2, 201, 1]
    assert torch.equal(inputs[1:], targets[:-1])
    assert targets[mask == 1].tolist() == [68, 2, 201, 70, 70, 2, 201]
    assert mask.nonzero().flatten().tolist() == [19, 20, 21, 43, 44, 45, 46]
    assert targets[47:].tolist() == [0, 0]
    assert {part.dtype for part in rows[0]} == {torch.int64}
    assert {part.shape for part in rows[0]} == {(49,)}


def test_a_longer_conversation_is_cut_at_a_turn(open_chats):
    rows = open_chats(SFTDataset, CHATS, max_seq_len=46)
    inputs, targets, mask = rows[0]
    assert targets[19:].tolist() == [68, 2, 201, *[0] * 23]
    assert mask.tolist() == [*[0] * 19, 1, 1, 1, *[0] * 23]
    assert inputs[22:].tolist() == [201, *[0] * 22]
    assert rows[1][2].sum() == 5
    inputs, targets, mask = rows[2]
    assert (inputs != 0).all() and mask.sum() == 0


def test_pairs_are_six_tensors(open_chats):
    rows = open_chats(DPODataset, PAIRS, max_seq_len=48)
    assert len(rows) == 2
    names = [
        f"{part}_{way}" for way in ("chosen", "rejected") for part in "x y mask".split()
    ]
    assert list(rows[0]) == names
    in_loss = [
        rows[0][f"y_{way}"][rows[0][f"mask_{way}"] == 1].tolist()
        for way in ("chosen", "rejected")
    ]
    assert in_loss == [[70, 70, 2, 201], [71, 2, 201]]
    assert rows[0]["x_chosen"][:2].tolist() == [1, 87]


def test_of_long_pairs_both_lose_the_same_turns_or_are_masked_out(open_chats):
    rows = open_chats(DPODataset, PAIRS, max_seq_len=30)
    shorter = rows[0]
    assert shorter["x_chosen"][:9].tolist() == [1, 87, 85, 71, 84, 201, 69, 2, 201]
    assert torch.equal(shorter["x_chosen"][:20], shorter["x_rejected"][:20])
    assert (shorter["mask_chosen"].sum(), shorter["mask_rejected"].sum()) == (4, 3)
    dropped = rows[1]
    assert dropped["mask_chosen"].sum() == dropped["mask_rejected"].sum() == 0
    assert (dropped["x_rejected"] != 0).all()


def test_prompts_are_text_with_the_last_answer_held_back(open_chats):
    rows = open_chats(RLAIFDataset, CHATS, tokenizer=None)
    head = "<|im_start|>assistant\n"
    assert rows[1] == {
        "prompt": f"<|im_start|>user\na<|im_end|>\n{head}",
        "answer": "文",
    }
    assert rows[0]["prompt"].endswith(
        f"{head}b<|im_end|>\n<|im_start|>user\ncc<|im_end|>\n{head}"
    )
    assert rows[0]["answer"] == "dd"
    blanks = [{"conversations": talk("a b ,", "c .\n")}]
    (row,) = open_chats(RLAIFDataset, blanks, tokenizer=None)
    assert row["answer"] == "c .\n" and "a b ,<|im_end|>" in row["prompt"]
    empty = [{"conversations": [*CHATS[1]["conversations"][:1], *talk("a", "")[1:]]}]
    assert open_chats(RLAIFDataset, empty, tokenizer=None)[0] == rows[1] | {
        "answer": ""
    }


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (PretrainDataset, [{"text": text} for text in ("a", "bc", "d")]),
        (SFTDataset, CHATS),
        (DPODataset, PAIRS),
        (RLAIFDataset, CHATS),
    ],
)
def test_rows_are_taken_in_any_order_as_of_a_list(open_chats, kind, rows):
    opened = open_chats(kind, rows)
    count = len(rows)
    assert len(opened) == count == len(list(opened))
    forward = [str(opened[n]) for n in range(count)]
    assert [str(opened[n]) for n in reversed(range(count))] == forward[::-1]
    assert [str(opened[n - count]) for n in range(count)] == forward
    for index in (count, -count - 1):
        with pytest.raises(IndexError):
            opened[index]
    batch = next(iter(DataLoader(opened, batch_size=count, shuffle=True)))
    assert len(batch["prompt"] if kind is RLAIFDataset else list(batch)[0]) > 0


@pytest.mark.parametrize("kind", [SFTDataset, DPODataset, RLAIFDataset])
def test_bad_chat_rows_are_refused_with_the_line(open_chats, kind):
    with pytest.raises(DataError, match=r"chats\.jsonl:3:1: the keys of"):
        open_chats(kind, [PAIRS[0] if kind is DPODataset else CHATS[0], {"text": "a"}])


@pytest.mark.parametrize(
    "kind", [PretrainDataset, SFTDataset, DPODataset, RLAIFDataset]
)
def test_demo_names_the_shipped_rows_of_each_kind(
    tmp_path, monkeypatch, kind, byte_spec
):
    file = tmp_path / "rows.jsonl"
    row = PAIRS[0] | CHATS[0] | {"text": "a text"}
    file.write_text(json.dumps(row) + "\n")
    wanted = []

    def locate(path, _folder, record_format):
        wanted.append((path, record_format))
        return file

    monkeypatch.setattr("minimind_nb.data.datasets.locate", locate)
    assert len(kind("demo", byte_spec, cache_dir=tmp_path)) == 1
    formats = {SFTDataset: "sft", DPODataset: "dpo", RLAIFDataset: "rlaif"}
    assert wanted == [("demo", formats.get(kind, "pretrain"))]
