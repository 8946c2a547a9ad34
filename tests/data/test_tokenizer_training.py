"""A vocabulary trained from JSON Lines, and what stops the training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from minimind_nb.data.fast_encoding import BulkEncoder
from minimind_nb.data.jsonl import DataError
from minimind_nb.data.tokenizer import load_tokenizer, read_tokenizer
from minimind_nb.data.tokenizer_training import train_tokenizer


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [
        {"text": f"the number {n} follows {n - 1}. 数字{n}在前"} for n in range(200)
    ]
    return write(tmp_path / "text.jsonl", rows)


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_trained_folder_is_a_whole_tokenizer(file: Path, tmp_path: Path):
    folder = train_tokenizer([file], tmp_path / "new" / "one", vocab_size=300)
    assert folder == tmp_path / "new" / "one"
    spec = read_tokenizer(folder)
    assert spec.vocab_size == 300
    assert (spec.pad_id, spec.bos_id, spec.eos_id) == (0, 1, 2)
    assert spec.chat_template == read_tokenizer().chat_template
    assert BulkEncoder(spec).backend == "tiktoken"
    text = "the number 7 \x00 🙂 数字"
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(" number")["input_ids"]) == 1


def test_same_rows_give_the_same_file(file: Path, tmp_path: Path):
    one = train_tokenizer([file], tmp_path / "one", vocab_size=320)
    two = train_tokenizer(str(file), str(tmp_path / "two"), vocab_size=320)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_conversations_are_read_and_special_strings_left_out(tmp_path: Path):
    content = "<|im_start|>repeated<|im_end|>" * 50
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "a"},
    ]
    file = write(tmp_path / "chat.jsonl", [{"conversations": turns}])
    folder = train_tokenizer([file], tmp_path / "out", vocab_size=266)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("repeated").tokens == ["repeated"]
    entries = tokenizer.get_vocab().keys() - {"<|im_start|>", "<|im_end|>"}
    assert not any("im" in entry for entry in entries)


def test_further_special_strings_get_an_entry_each(file: Path, tmp_path: Path):
    special = ["<tool_call>", "<|im_end|>"]
    folder = train_tokenizer([file], tmp_path / "out", vocab_size=320, special=special)
    tokenizer = load_tokenizer(folder)
    assert tokenizer("<tool_call>a")["input_ids"][0] == 3
    assert len(tokenizer) == 320


def test_only_a_part_of_a_large_file_is_read(file: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"entries, not 6400: add text"):
        train_tokenizer([file], tmp_path / "all")
    size = file.stat().st_size
    whole = train_tokenizer([file], tmp_path / "whole", 300, max_bytes=size)
    part = train_tokenizer([file], tmp_path / "part", 300, max_bytes=size // 4)
    assert read_tokenizer(whole) != read_tokenizer(part)


def test_too_little_text_leaves_nothing_behind(tmp_path: Path):
    file = write(tmp_path / "little.jsonl", [{"text": "aaaa"}])
    with pytest.raises(ValueError, match="4 bytes of text yield 261 entries, not 300"):
        train_tokenizer([file], tmp_path / "out", vocab_size=300)
    assert not (tmp_path / "out").exists()


def test_vocabulary_below_the_bytes_is_refused(file: Path, tmp_path: Path):
    for size in (200, -1):
        with pytest.raises(
            ValueError, match=f"yield 259 entries, not {size}: .* to 259"
        ):
            train_tokenizer([file], tmp_path / "out", vocab_size=size)


def test_missing_files_are_refused(file: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="0 bytes of text yield 259 entries"):
        train_tokenizer([], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"did you mean .*text\.jsonl\?"):
        train_tokenizer([file, tmp_path / "tetx.jsonl"], tmp_path / "out")


def test_existing_vocabulary_is_not_replaced(file: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds a tokenizer\.json already"):
        train_tokenizer([file], tmp_path, vocab_size=300)
    assert (tmp_path / "tokenizer.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"words": "x"}, "the keys of the row are"),
        ({"conversations": [{"role": "user"}]}, 'message 1 has no "content"'),
    ],
)
def test_other_rows_are_refused(tmp_path: Path, row: dict[str, object], reason: str):
    file = write(tmp_path / "rows.jsonl", [{"text": "good"}, row])
    with pytest.raises(DataError) as caught:
        train_tokenizer([file], tmp_path / "out")
    assert reason in str(caught.value)
    assert "rows.jsonl:2:" in str(caught.value)
